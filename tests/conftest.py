"""Fixtures of all tests: small checkpoints, a configuration that touches nothing outside of the test's directory, and
the `root` marker, which skips by name what needs CAP_SYS_ADMIN."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from tiermem.config import Config, load_config

NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
FREE_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

CAP_SYS_ADMIN, CAP_SYS_NICE = 21, 23
"""capability.h; bits of `CapEff`."""


def has_capability(number: int, status: str = "/proc/self/status") -> bool:
    """Whether the process may do what the capability allows."""
    for line in Path(status).read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def pytest_configure() -> None:
    # How long an example takes says more of what else runs on the machine than of us.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and not has_capability(CAP_SYS_ADMIN):
        pytest.skip("lacks CAP_SYS_ADMIN, which mounting and reserving pages need; run the tests as root")


def dram(nbytes: int) -> str:
    """Option `tier`: one tier of memory, of so many bytes."""
    return f"dram={nbytes}B"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and what its tensors hold."""

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    def same(self, model: Any) -> bool:
        """Whether a model has exactly these tensors."""
        return set(model) == set(self.tensors) and all(
            np.array_equal(model[name], array) for name, array in self.tensors.items()
        )


class CheckpointWriter(Protocol):
    def __call__(self, name: str = ..., *, layers: int = ..., kib: int = ..., files: int = ..., seed: int = ...,
                 extra: dict[str, npt.NDArray[Any]] | None = ...) -> Checkpoint: ...  # fmt: skip


class ConfigMaker(Protocol):
    def __call__(self, **options: object) -> Config: ...


@pytest.fixture
def checkpoint(tmp_path: Path) -> CheckpointWriter:
    """Writes directory `name` with `files` safetensors files: for each layer a matrix of `kib` KiB and a small bias."""

    def write(
        name: str = "model",
        *,
        layers: int = 2,
        kib: int = 64,
        files: int = 1,
        seed: int = 0,
        extra: dict[str, npt.NDArray[Any]] | None = None,
    ) -> Checkpoint:
        random = np.random.default_rng(seed)
        shards: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(files)]
        for layer in range(layers):
            shard = shards[layer * files // layers]
            shard[f"model.layers.{layer}.weight"] = random.integers(0, 256, (kib, 1024), np.uint8)
            shard[f"model.layers.{layer}.bias"] = random.random(8, np.float32)
        shards[-1] |= extra or {}
        directory = tmp_path / name
        directory.mkdir(parents=True, exist_ok=True)
        names = ["model.safetensors"] if files == 1 else [f"model-{i}-of-{files}.safetensors" for i in range(files)]
        paths = tuple(directory / file for file in names)
        for path, shard in zip(paths, shards, strict=True):
            save_file(shard, path)
        return Checkpoint(directory, paths, {name: array for shard in shards for name, array in shard.items()})

    return write


@pytest.fixture
def config(tmp_path: Path) -> ConfigMaker:
    """A configuration with its directories in the test's; options as load_config takes them."""

    def make(**options: object) -> Config:
        defaults: dict[str, object] = {
            "state": tmp_path / "state", "digests": tmp_path / "digests", "tier": "dram=256MiB", "read_threads": 2,
            "staging": "4MiB",
        }  # fmt: skip
        return load_config(defaults | options, environ={"HOME": str(tmp_path)}, files=())

    return make


@pytest.fixture
def damage() -> Callable[[Path, int], None]:
    """Flips the byte at an offset from the end of a file, and gives the file its modification time back."""

    def flip(path: Path, from_end: int) -> None:
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(-from_end, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0xFF]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return flip


@pytest.fixture
def reserved() -> Iterator[int]:
    """Eight more reserved 2 MiB pages; gives how many are free, and the host its number back."""
    before = NR_HUGEPAGES.read_text()
    try:
        NR_HUGEPAGES.write_text(str(int(before) + 8))
        free = int(FREE_HUGEPAGES.read_text())
        if free < 8:
            pytest.skip("the host has no eight whole 2 MiB pages to reserve")
        yield free
    finally:
        NR_HUGEPAGES.write_text(before)


def open_files() -> list[str]:
    """What this process's descriptors name: files, directories, memory files. Sockets, pipes and event files are left
    out, because gRPC closes those of earlier tests when it likes."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # listing needs a descriptor too
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(name for name in found if name.startswith("/") and not name.startswith("/proc/"))


def until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition is true; fail after 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 10 s"
        time.sleep(0.002)
