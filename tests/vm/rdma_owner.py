"""Owner: a process whose segments others read by RDMA, and the test's end of it.

`python -m tests.vm.rdma_owner IDLE_S` is the process. It makes a segment for each of SIZES, and answers each line of
JSON, [command, arguments...], with one: [answer] or [name of the error, text].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.child import REPOSITORY, Child
from tests.vm import os_pages
from tiermem import _native, errors
from tiermem.peer.rdma import Device, End, Region
from tiermem.peer.rdma_exporter import Exporter
from tiermem.types import PAGE_BYTES

SIZES = (10 * PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES)
"""The first is more than a window."""

DEADLINE_S = 120.0


def content(segment: int) -> bytes:
    """Of an owner's segment."""
    return np.random.default_rng(segment).bytes(SIZES[segment])


class Owner:
    """The process. `idle_s`: how long what nobody reads stays pinned; it sweeps when it is told to."""

    def __init__(self, idle_s: float = 1e9) -> None:
        path = f"PYTHONPATH={REPOSITORY}{os.pathsep}{os.environ['PYTHONPATH']}"  # where pyverbs is
        self.child = Child(["-m", "tests.vm.rdma_owner", str(idle_s)], prefix=["env", path])
        try:
            assert self.child.line(DEADLINE_S) == "ready"
        except BaseException:
            self.child.__exit__()
            raise

    def ask(self, command: str, *arguments: object) -> Any:
        """Its answer; raises the error that it raised."""
        self.child.say(json.dumps([command, *arguments]))
        answer = json.loads(self.child.line(DEADLINE_S))
        if len(answer) > 1:
            raise getattr(errors, answer[0])(answer[1])
        return answer[0]

    def export(
        self, lease: str, end: End, segments: Iterable[int] = range(len(SIZES))
    ) -> tuple[End, dict[int, Region]]:
        """As a peer's control call does."""
        told, regions = self.ask("export", lease, list(segments), {**asdict(end), "gid": end.gid.hex()})
        return _end(told), {int(number): Region(**region) for number, region in regions.items()}

    def pinned_bytes(self) -> int:
        """As the kernel counts them."""
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            if line.startswith("VmPin:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no VmPin")


class _Process:
    """What the process does for each command."""

    def __init__(self, idle_s: float) -> None:
        self.segments = [_segment(number) for number in range(len(SIZES))]
        self.pinned: list[tuple[str, bool]] = []
        self.exporter = Exporter(Device(), idle_s, lambda key, pinned: self.pinned.append((key, pinned)))

    def export(self, lease: str, numbers: list[int], end: dict[str, Any]) -> object:
        segments = {number: (f"segment {number}", self.segments[number].buffer()) for number in numbers}
        made, regions = self.exporter.export(lease, segments, _end(end))
        told = {**asdict(made), "gid": made.gid.hex()}
        return told, {number: asdict(region) for number, region in regions.items()}

    def withdraw(self, lease: str) -> None:
        self.exporter.withdraw(lease)

    def sweep(self, idle_s: float | None = None) -> None:
        self.exporter.sweep(idle_s)

    def revoke(self, number: int) -> None:
        self.exporter.revoke(f"segment {number}")

    def figures(self) -> object:
        return asdict(self.exporter.figures())

    def pins(self) -> object:
        """What was told of pages since the last time."""
        told, self.pinned[:] = list(self.pinned), []
        return told

    def move(self, number: int, node: int) -> object:
        """On which nodes a segment's pages are when they were to be moved to this one."""
        segment = self.segments[number]
        return sorted(set(os_pages.move(segment.address, segment.nbytes, node)))

    def same(self, number: int) -> object:
        return bytes(self.segments[number].buffer()) == content(number)


def _segment(number: int) -> _native.Segment:
    segment = _native.Segment.create(-1, f"owner's {number}", SIZES[number])
    segment.prefault(nodes=1)
    segment.buffer()[:] = content(number)
    segment.seal()
    return segment


def _end(fields: dict[str, Any]) -> End:
    return End(**{**fields, "gid": bytes.fromhex(fields["gid"])})


def main() -> None:
    process = _Process(float(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: list[object]
        try:
            answer = [getattr(process, command)(*arguments)]
        except errors.TiermemError as error:
            answer = [type(error).__name__, str(error)]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
