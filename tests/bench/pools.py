"""Two daemons and a model that goes from one to the other, as `tiermem load tiermem://...` has it: control, grants, the
loader's threads, digests of every tensor. Into prefaulted memory, since first touch of memory is not what is measured.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
from blake3 import blake3

from tests.hostile.checkpoints import entry, header_text
from tests.integration.child import eventually
from tests.integration.daemon import Daemon

LAYER_BYTES = 64 << 20
TICKS_S = os.sysconf("SC_CLK_TCK")


def write_model(path: Path, nbytes: int) -> list[str]:
    """A checkpoint of one tensor a layer in the new directory `path`; digests of the tensors in order."""
    path.mkdir()
    count = max(1, round(nbytes / LAYER_BYTES))
    spans = [(i * LAYER_BYTES, (i + 1) * LAYER_BYTES) for i in range(count)]
    entries = {f"model.layers.{i}.weight": entry("U8", [LAYER_BYTES], *span) for i, span in enumerate(spans)}
    header = header_text(entries)
    digests = []
    random = np.random.default_rng(7)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count):
            data = random.bytes(LAYER_BYTES)
            digests.append(blake3(data).hexdigest())
            file.write(data)
    return digests


def cpu_s(daemons: Sequence[Daemon]) -> float:
    """CPU time of all of them so far."""
    fields = (Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split() for daemon in daemons)
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS_S


class Pools:
    """The model, and pools for one measurement at a time: they are large. `flags`: of the daemons."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._path = directory / "model"
        self._digests = write_model(self._path, nbytes)
        self.staging_bytes = 0  # the most that a daemon took while the model came
        self._room = f"{(len(self._digests) + 2) * LAYER_BYTES}B"

    def measure(self, flags: Sequence[str]) -> tuple[float, float]:
        """Seconds until the model is there and verified by its pool, and CPU seconds of both daemons."""
        tier = f"dram={self._room}"
        with Daemon("--listen", "127.0.0.1:0", *flags, tier=tier) as owner:
            with owner.client() as client:
                client.load(self._path)
            found = re.search(r"listening for peers at (\S+) ", owner.log)
            assert found, owner.log
            with Daemon("--spare", self._room, *flags, tier=tier) as here, here.client() as client:
                eventually(lambda: _prefaulted(here), "memory is prefaulted", 120)
                with self._staging(owner, here):
                    cpu, begin = cpu_s([owner, here]), time.perf_counter()
                    client.load(f"tiermem://{found[1]}/model")
                    taken = time.perf_counter() - begin
                    cpu = cpu_s([owner, here]) - cpu
                with client.open("model") as model:
                    came = [blake3(model[f"model.layers.{i}.weight"]).hexdigest() for i in range(len(self._digests))]
                if came != self._digests:
                    raise RuntimeError("the model is not what was sent")
                return taken, cpu

    @contextmanager
    def _staging(self, *daemons: Daemon) -> Iterator[None]:
        """Watch what each takes of memory that is no segment."""
        ended = Event()
        before = [anonymous_bytes(daemon) for daemon in daemons]

        def look() -> None:
            while not ended.wait(0.02):
                grown = (anonymous_bytes(daemon) - was for daemon, was in zip(daemons, before, strict=True))
                self.staging_bytes = max(self.staging_bytes, *grown)

        looking = Thread(target=look)
        looking.start()
        yield
        ended.set()
        looking.join()


def anonymous_bytes(daemon: Daemon) -> int:
    """What a daemon has of memory of its own."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def _prefaulted(daemon: Daemon) -> bool:
    spare = daemon.status()["spare"]
    return bool(spare["ready_bytes"] >= spare["target_bytes"] > 0)
