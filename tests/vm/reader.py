"""Reader: a client process that reads layers of a model over and over, judges their bytes, and tells what it has.

`python -m tests.vm.reader ADDRESS CHECKPOINT` is the process. It opens the model once, and is told by lines what to do:

    verify 0 1 2    read all bytes of these layers again and again, and compare their digests
    touch 0 1 2     read a word of each OS page of them
    anonymous 8 1   fill 8 MiB of private memory, put it on node 1, and from then on touch it too
    count           answer with the number of layers read so far
    tell            answer with one line of JSON: see Told
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.integration.child import Child, eventually
from tests.vm import os_pages

if TYPE_CHECKING:
    from tests.integration.weights import Weights

DEADLINE_S = 90.0
"""For whatever a process does first: under emulation it imports for ten seconds, and shares its CPU."""


@dataclass(frozen=True, slots=True)
class Told:
    """`reads` of layers so far, of which `wrong` had other bytes than the checkpoint. `nodes`: where the kernel has a
    page of the model, and `anonymous`: an OS page of the process's own memory. `mappings` and `huge_bytes`: how the
    model is mapped."""

    pid: int
    address: int
    reads: int
    wrong: int
    nodes: list[list[int]]
    anonymous: list[int]
    mappings: list[str]
    huge_bytes: int


class Reader:
    """The process. Construction returns at once; `ready` when it has the model open."""

    def __init__(self, address: str, weights: Weights) -> None:
        digests = weights.path.with_suffix(".digests")
        if not digests.exists():
            digests.write_text(json.dumps(digests_of(weights.tensors)))
        self._child = Child(["-m", "tests.vm.reader", address, str(weights.path)])

    def ready(self) -> Reader:
        assert self._child.line(DEADLINE_S) == "ready"
        return self

    def verify(self, *layers: int) -> None:
        self._child.say(f"verify {' '.join(map(str, layers))}")

    def touch(self, *layers: int) -> None:
        self._child.say(f"touch {' '.join(map(str, layers))}")

    def anonymous(self, mib: int, node: int) -> None:
        self._child.say(f"anonymous {mib} {node}")

    def tell(self) -> Told:
        self._child.say("tell")
        return Told(**json.loads(self._child.line(DEADLINE_S)))

    def read_all(self, times: int, timeout_s: float = DEADLINE_S) -> Told:
        """What it tells when it has read so many further layers."""
        wanted = self._count() + times
        eventually(lambda: self._count() >= wanted, f"{times} layers are read", timeout_s)
        return self.tell()

    def _count(self) -> int:
        self._child.say("count")
        return int(self._child.line(DEADLINE_S))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()


def digests_of(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Of each tensor."""
    from blake3 import blake3

    return {name: blake3(data).hexdigest() for name, data in tensors.items()}


class _Process:
    """What the process does: one thread reads, the main one listens."""

    def __init__(self, address: str, path: str) -> None:
        import tiermem

        self.model = tiermem.connect(address).open(path)
        self.model.wait()
        self._digests: dict[str, str] = json.loads(Path(path).with_suffix(".digests").read_text())
        self._tensors = {int(name.split(".")[2]): name for name in self.model}
        self._arrays = {name: self.model[name] for name in self.model}
        self._anonymous = np.empty(0, np.uint8)
        self._whole, self._layers = True, list[int]()
        self._reads = self._wrong = 0
        threading.Thread(target=self._read, name="reading", daemon=True).start()

    def obey(self, order: str) -> None:
        verb, *words = order.split()
        numbers = list(map(int, words))
        if verb == "tell":
            print(json.dumps(asdict(self._told())), flush=True)
        elif verb == "count":
            print(self._reads, flush=True)
        elif verb == "anonymous":
            private = mmap.mmap(-1, numbers[0] << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._anonymous = np.frombuffer(private, np.uint8)
            self._anonymous[:] = 1
            os_pages.move(self._anonymous.ctypes.data, self._anonymous.nbytes, numbers[1])
        else:
            self._whole, self._layers = verb == "verify", numbers

    def _read(self) -> None:
        while True:
            begin = time.monotonic()
            whole, layers = self._whole, self._layers
            for name in [self._tensors[number] for number in layers]:
                array = self._arrays[name]
                if whole:
                    self._wrong += digests_of({name: array.data})[name] != self._digests[name]
                else:
                    array[:: os_pages.OS_PAGE_BYTES].sum()
                self._reads += 1
            self._anonymous[:: os_pages.OS_PAGE_BYTES].sum()
            time.sleep(0.002 + time.monotonic() - begin)  # others need the guest's few CPUs, too

    def _told(self) -> Told:
        manifest = self.model.manifest
        first = manifest.tensors[0]
        address = self._arrays[first.name].ctypes.data - first.extent.offset
        pages = sum(segment.pages for segment in manifest.segments)
        length = pages * os_pages.PAGE_BYTES
        own = self._anonymous
        return Told(
            pid=os.getpid(),
            address=address,
            reads=self._reads,
            wrong=self._wrong,
            nodes=os_pages.nodes_of_pages(address, pages),
            anonymous=os_pages.nodes_of(own.ctypes.data, own.nbytes) if own.nbytes else [],
            mappings=os_pages.mappings(address, length),
            huge_bytes=os_pages.most_huge_bytes(address, length),
        )


def main(address: str, path: str) -> None:
    os.nice(10)  # what it reads without a pause is not to starve the others of a small guest
    process = _Process(address, path)
    print("ready", flush=True)
    for line in sys.stdin:
        process.obey(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
