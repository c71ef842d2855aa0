"""Mooncake's transfer engine over TCP, as another way to move the same bytes: two processes of a Python that has it.

Measures nothing of ours. What was received is compared with what was sent, by CRC.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SCRIPT = """
import ctypes, json, mmap, random, resource, sys, time, zlib
from mooncake.engine import TransferEngine
role, nbytes = sys.argv[1], int(sys.argv[2])
memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
view = memoryview(memory)
noise = random.Random(6).randbytes(1 << 20)
for at in range(0, nbytes, 1 << 20):
    view[at : at + (1 << 20)] = noise if role == "send" else bytes(1 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
assert engine.register_memory(address, nbytes) == 0
def say(**facts):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print("@" + json.dumps(facts | {"cpu_s": usage.ru_utime + usage.ru_stime}), flush=True)
say(address=address, session=f"127.0.0.1:{engine.get_rpc_port()}")
for line in sys.stdin:
    if role == "send":
        say(**({"crc": zlib.crc32(view)} if line.strip() == "crc" else {}))
        continue
    session, remote = line.split()
    ctypes.memset(address, 0, nbytes)
    say()
    begin = time.perf_counter()
    assert engine.transfer_sync_read(session, address, int(remote), nbytes) == 0
    elapsed = time.perf_counter() - begin
    say(elapsed=elapsed)
    say(crc=zlib.crc32(view))
"""


class _End:
    def __init__(self, python: str, role: str, nbytes: int) -> None:
        self._process = subprocess.Popen([python, "-c", SCRIPT, role, str(nbytes)], text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        self.ready = self.receive()

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise RuntimeError(f"mooncake's process ended with {self._process.wait()}")

    def ask(self, line: str) -> dict[str, Any]:
        self.send(line)
        return self.receive()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # its threads do not end with the interpreter
        self._process.communicate()


@contextmanager
def engine(python: str, nbytes: int) -> Iterator[Callable[[], tuple[float, float]]]:
    """One transfer of `nbytes` from process to process, to be called; seconds, and CPU seconds of both ends."""
    sender, receiver = _End(python, "send", nbytes), _End(python, "receive", nbytes)

    crc = sender.ask("crc")["crc"]

    def measure() -> tuple[float, float]:
        before = sender.ask("cpu")["cpu_s"]
        before += receiver.ask(f"{sender.ready['session']} {sender.ready['address']}")["cpu_s"]
        read = receiver.receive()
        after = sender.ask("cpu")["cpu_s"] + read["cpu_s"]
        if receiver.receive()["crc"] != crc:
            raise RuntimeError("mooncake: what arrived is not what was sent")
        return read["elapsed"], after - before

    try:
        yield measure
    finally:
        receiver.end()
        sender.end()
