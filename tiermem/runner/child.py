"""Child: what runs a policy's file in a process of its own. Owns the far end of the pipes; never imports the pool.

Started as `python -m tiermem.runner.child LIFE` by tiermem.runner.process. It answers one question at a time:

    ("load", path)          -> ["loaded", period_s, guard_s, sources, whether it has place]
    ("plan", view)          -> ["begun"], then ["plan", *columns]
    ("place", request)      -> ["begun"], then ["placed", bytes]
    ("check", pages)        -> ["check", name, result, line, detail] for each check, ["begun", name] before it; ["done"]

and instead of any of them ["failed", what the policy did].
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tiermem.errors import ConfigError, PolicyError
from tiermem.policy import Move, Request, View, check_plan, load_policy
from tiermem.policy.placing import check_place
from tiermem.policy.plan import MAX_MOVES, Plan
from tiermem.policy.probe import steps
from tiermem.policy.source import describe, seconds_of, sources_of
from tiermem.runner.frames import QUESTION, pack_answer, pack_plan, unpack_question

MAX_DATA_BYTES = 4 << 30
"""Memory that a policy may have, and its interpreter: a view of a million pages (2 TB) has 63 MB."""
_MAX_FAILURE = 4000


class Pipes:
    """Descriptors that the policy does not know: what it prints goes to stderr, what it starts does not get them."""

    def __init__(self) -> None:
        self._in, self._out = (fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 100) for number in (0, 1))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        self._owner = os.getpid()
        self._number = 0

    def question(self) -> tuple[Any, ...]:
        """The next question; ends the process when there will be none."""
        pickled, arrays = QUESTION.unpack(self._read(QUESTION.size))
        parts = bytes(self._read(pickled)), self._read(arrays)
        self._number, question = unpack_question(*parts)
        return question

    def answer(self, *answer: Any) -> None:
        data = memoryview(pack_answer(self._number, list(answer)))
        self._end_if_forked()
        while data:
            data = data[os.write(self._out, data) :]

    def _read(self, count: int) -> memoryview:
        # numpy's memory is not zeroed first, and large enough to be of whole pages.
        self._end_if_forked()
        data = np.empty(count, np.uint8).data
        done = 0
        while done < count:
            part = os.readv(self._in, [data[done:]])
            if not part:
                os._exit(0)  # nobody asks any more; nothing of the policy's runs at exit
            done += part
        return data

    def _end_if_forked(self) -> None:
        """A policy that forked comes back twice; the second one has nothing to say here."""
        if os.getpid() != self._owner:
            os._exit(0)


class Child:
    """The policy of one file, and how it is asked."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self._policy: Any = None
        self._path = ""

    def serve(self) -> NoReturn:
        while True:
            step = ""
            try:
                match self._pipes.question():
                    case "load", str(path):
                        step, self._path = f"policy {path}", path
                        self._load()
                    case "plan", View() as view:
                        step = "plan(view)"
                        self._pipes.answer("begun")
                        self._pipes.answer("plan", *pack_plan(_portable(view, self._policy.plan(view))))
                    case "place", Request() as request:
                        step = "place(request)"
                        self._pipes.answer("begun")
                        placed = self._policy.place(request)
                        self._pipes.answer("placed", check_place(request, placed).tobytes())
                    case "check", int(pages):
                        self._check(pages)
            except (PolicyError, ConfigError) as error:
                self._pipes.answer("failed", str(error)[:_MAX_FAILURE])
            except BaseException as error:  # SystemExit, too: nothing that a policy raises ends the conversation
                self._pipes.answer("failed", f"{step} {describe(error, self._path)}"[:_MAX_FAILURE])

    def _load(self) -> None:
        self._policy = policy = load_policy(self._path)
        times = (seconds_of(policy, name, self._path) for name in ("period_s", "guard_s"))
        self._pipes.answer("loaded", *times, sources_of(policy, self._path), hasattr(policy, "place"))

    def _check(self, pages: int) -> None:
        for name, check in steps(self._policy, self._path, pages):
            self._pipes.answer("begun", name)
            made = check()
            self._pipes.answer("check", made.name, made.result, made.line, made.detail[:_MAX_FAILURE])
        self._pipes.answer("done")


def confine(life: int) -> None:
    """The first to be killed when memory is short, bounded, without a core file; ends as soon as its parent does."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    # The kernel itself kills the group when the other end closes: a policy may hold the interpreter for ever, and
    # PR_SET_PDEATHSIG would strike when the thread that started us ends.
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.set_inheritable(life, False)
    poll = select.poll()
    poll.register(life, select.POLLIN)
    if poll.poll(0):
        os._exit(0)  # it closed before that
    # On this signal, tells on stderr where the policy is.
    faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=False)


def _portable(view: View, plan: object) -> Plan:
    """A plan whose every value crosses the pipe. Raises PolicyError for what is no plan; whether it is possible is for
    the one who asked to say."""
    if type(plan) is list and len(plan) <= MAX_MOVES and all(_plain(move) for move in plan):
        return plan
    return [
        type(move)(int(move.first), int(move.pages), int(move.source), int(move.target), str(move.reason), move.kind)
        for move in check_plan(view, plan)
    ]


def _plain(move: object) -> bool:
    match move:
        case Move(int(first), int(pages), int(source), int(target), str(), "move" | "copy" | "drop"):
            numbers = (first, pages, source, target)
            return all(type(number) is int and abs(number) < 1 << 62 for number in numbers)
    return False


if __name__ == "__main__":
    confine(int(sys.argv[1]))
    Child(Pipes()).serve()
