"""Policy process: a child that runs what nobody vouches for. Owns its life, its pipes and its end; never what is said.

No thread and no wait without an end: whoever asks polls the pipes until a deadline. The child leads a process group of
its own, which is killed as a whole.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tiermem.errors import ConfigError, PolicyError
from tiermem.runner.frames import ANSWER, MAGIC, MAX_ANSWER_BYTES, pack_question, unpack_answer

SEND_S = 10.0
"""A question of a million pages takes 0.1 s; a child that does not read is stopped after this."""
KEPT_BYTES = 64 << 10
"""The end of what it printed is kept."""
_PIPE_BYTES = 1 << 20
_KILLED_S = 10.0
_WHERE_S = 0.05
_SAID = 200
_ROOT = Path(__file__).parents[2]
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Overran(Exception):
    """No answer until the deadline."""


class Died(Exception):
    """The process ended, or closed its pipes; the text says how."""


class PolicyProcess:
    """One child, alive from the constructor to `kill`, which must be called. Not thread-safe: its owner holds a lock.

    Raises ConfigError where no child can be started.
    """

    def __init__(self) -> None:
        if not sys.executable:
            raise ConfigError("a policy file runs in a process of its own, and this Python does not know its program")
        # The child has the kernel kill its group when our end of this pipe goes, however we end.
        life, self._life = os.pipe()
        paths = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "tiermem.runner.child", str(life)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                pass_fds=(life,), start_new_session=True, env=os.environ | _ONE_THREAD | {"PYTHONPATH": paths},
            )  # fmt: skip
        except OSError as error:
            os.close(self._life)
            raise ConfigError(f"a policy file runs in a process of its own, which does not start: {error}") from None
        finally:
            os.close(life)
        self._in, self._out, self._err = (pipe.fileno() for pipe in self._pipes())
        self._pidfd = os.pidfd_open(self._child.pid)
        self._printed = bytearray()
        self._number = 0
        self._cpu_s = 0.0
        for descriptor in (self._in, self._out, self._err):
            os.set_blocking(descriptor, False)
            with suppress(OSError):  # an ordinary user has a limit
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def cpu_s(self) -> float:
        """CPU time of the child so far; of one that ended, as it was last asked."""
        if self._life >= 0:
            with suppress(OSError):  # the host's process reaps all its children
                # clock_getcpuclockid(3): the clock of a process, made of its number.
                self._cpu_s = time.clock_gettime(~self._child.pid << 3 | 2)
        return self._cpu_s

    @property
    def last_words(self) -> str:
        """`; it said: ...`: the last line that it printed; empty if there is none."""
        self._drain()
        lines = self._printed.decode("utf-8", "replace").strip().splitlines()
        return f"; it said: {lines[-1][:_SAID]}" if lines else ""

    def ask(self, question: tuple[Any, ...]) -> None:
        """Send a question. Raises Overran or Died."""
        self._number += 1
        deadline = time.monotonic() + SEND_S
        parts = pack_question(self._number, question)
        while parts:
            self._wait(select.POLLOUT, self._in, deadline)
            try:
                done = os.writev(self._in, parts[:64])
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Died(self._end()) from None
            while parts and done >= parts[0].nbytes:
                done -= parts.pop(0).nbytes
            if done:
                parts[0] = parts[0][done:]

    def answer(self, within_s: float) -> list[Any]:
        """The next answer to the last question. Raises Overran, Died, or PolicyError for nonsense."""
        deadline = time.monotonic() + within_s
        magic, number, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if magic != MAGIC or number != self._number or length > MAX_ANSWER_BYTES:
            raise PolicyError("its process answered nonsense")
        return unpack_answer(self._read(length, deadline))

    def line(self, path: str) -> int | None:
        """The line of that file where the child is now, if it can be had: faulthandler tells, even inside of C."""
        self._drain()
        earlier, self._printed = self._printed, bytearray()
        line = None
        pattern = re.compile(rb'File "%b", line (\d+)' % re.escape(os.fsencode(path)))
        deadline = time.monotonic() + _WHERE_S
        self._child.send_signal(signal.SIGUSR1)
        while line is None and time.monotonic() < deadline:
            _poll(((self._err, select.POLLIN), (self._pidfd, select.POLLIN)), deadline - time.monotonic())
            self._drain()
            if found := pattern.search(self._printed):
                line = int(found[1])  # now: a match of a bytearray reads from it when it is asked
        self._printed[:0] = earlier
        return line

    def kill(self) -> None:
        """End the child and all that it started. Safe to call again."""
        if self._life < 0:
            return
        _ = self.cpu_s  # while it can be asked
        # Before the child is waited for: until then its number is not another's. Forks in between are killed, too.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        _poll(((self._pidfd, select.POLLIN),), _KILLED_S)
        self._child.poll()
        self._drain()
        os.close(self._life)
        os.close(self._pidfd)
        self._life = self._err = -1
        for pipe in self._pipes():
            pipe.close()

    def _pipes(self) -> list[IO[bytes]]:
        return [pipe for pipe in (self._child.stdin, self._child.stdout, self._child.stderr) if pipe]

    def _read(self, count: int, deadline: float) -> bytes | bytearray:
        data = bytearray()
        while len(data) < count:
            self._wait(select.POLLIN, self._out, deadline)
            with suppress(BlockingIOError):
                part = os.read(self._out, min(count - len(data), _PIPE_BYTES))
                if not part:
                    raise Died(self._end())
                data += part
        return data

    def _wait(self, event: int, descriptor: int, deadline: float) -> None:
        """Until the pipe is ready. What the child prints is taken meanwhile: a full pipe would stop it."""
        while True:
            left_s = deadline - time.monotonic()
            watched = ((descriptor, event), (self._err, select.POLLIN), (self._pidfd, select.POLLIN))
            ready = _poll(watched, left_s)
            self._drain()
            if descriptor in ready:
                return
            if self._pidfd in ready:
                raise Died(self._end())
            if left_s <= 0:
                raise Overran

    def _drain(self) -> None:
        if self._err < 0:
            return
        with suppress(BlockingIOError):
            # As much as a pipe holds, lest one that prints for ever hold us here.
            part = os.read(self._err, _PIPE_BYTES)
            self._printed += part
            if not part:
                self._err = -1  # closed there: it would be ready for ever
        del self._printed[:-KEPT_BYTES]

    def _end(self) -> str:
        _poll(((self._pidfd, select.POLLIN),), _WHERE_S)
        status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return "closed its pipes"
        if status.si_code == os.CLD_EXITED:
            return f"ended its process with exit code {status.si_status}"
        return f"ended its process by {signal.Signals(status.si_status).name}"


def _poll(watched: tuple[tuple[int, int], ...], timeout_s: float) -> set[int]:
    poll = select.poll()
    for descriptor, event in watched:
        if descriptor >= 0:
            poll.register(descriptor, event)
    return {descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)}
