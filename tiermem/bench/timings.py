"""Timings: one load or open of a model after the other, each verified against the checkpoint's files.

Owns what is inside the clock and what is not. Asks the pool for everything a user asks it for, and nothing else.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from blake3 import blake3

from tiermem.bench import page_cache
from tiermem.errors import DigestMismatch, Refused
from tiermem.model import Model
from tiermem.types import Manifest

_TOUCH_BYTES = 4096
_RELEASE_S = 0.5
"""A lease ends a moment after its model was closed: the client's agent tells the pool of it."""

Digests = Mapping[str, bytes]
"""Tensor name -> BLAKE3 of its bytes."""


class AnyPool(Protocol):
    """What a client of a daemon and an embedded pool have in common."""

    def open(self, path_or_name: str) -> Model: ...
    def load(self, path: str) -> str: ...
    def evict(self, name: str) -> int: ...
    def remove(self, name: str) -> int: ...
    def status(self, name: str | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """One load. Thread seconds are sums over the loading threads; `cached` is the page cache's part before it."""

    load_s: float
    cached: float
    prefault_thread_s: float
    read_thread_s: float
    digest_thread_s: float


@dataclass(frozen=True, slots=True)
class OpenTiming:
    """One open of a resident model: until every tensor is there, one byte of each 4 KiB read, and read again."""

    open_s: float
    touch_s: float
    touch_again_s: float


def digests_of(manifest: Manifest) -> dict[str, bytes]:
    """Digests of the tensors as their files have them, read by a way of its own and not by a pool's."""
    digests = {}
    for number, file in enumerate(manifest.files):
        with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            for tensor in manifest.tensors:
                if tensor.file == number:
                    with view[tensor.file_offset : tensor.file_offset + tensor.nbytes] as content:
                        digests[tensor.name] = blake3(content).digest()
            view.release()
    return digests


def verify(model: Model, digests: Digests) -> int:
    """Compare every tensor of the model with its digest; returns how many. Raises DigestMismatch."""
    wrong = [name for name in digests if blake3(model.raw(name)).digest() != digests[name]]
    if wrong:
        raise DigestMismatch(
            f"{model.name}: {len(wrong)} of {len(digests)} tensors differ from {model.manifest.path}, the first is "
            f"{wrong[0]!r}; these timings are void: unload the model and load it again"
        )
    return len(digests)


def time_load(pool: AnyPool, manifest: Manifest, digests: Digests, cold: bool) -> LoadTiming:
    """Load a model that is not in memory, from a page cache that is empty of it (`cold`) or full.

    Raises Refused where another process leases the model or keeps it in the page cache, and DigestMismatch.
    """
    resident = model_status(pool, manifest)
    if resident is not None and resident["resident_bytes"]:
        pool.evict(resident["name"])
    paths = [file.path for file in manifest.files]
    cached = page_cache.drop(paths) if cold else page_cache.fill(paths)
    begin = time.perf_counter()
    name = pool.load(manifest.path)
    elapsed = time.perf_counter() - begin
    status = pool.status(name)["models"][0]
    if status["identity"] != manifest.identity:
        raise Refused(f"{manifest.path} is a part of {name}, which is in the pool already; time {status['path']}")
    figures = status["last_load"]
    with pool.open(manifest.path) as model:
        verify(model, digests)
    return LoadTiming(
        elapsed, cached, figures["prefault_thread_s"], figures["read_thread_s"], figures["digest_thread_s"]
    )


def time_open(pool: AnyPool, path_or_name: str, digests: Digests | None = None) -> OpenTiming:
    """Open a resident model and read one byte of every 4 KiB, twice. Raises DigestMismatch."""
    begin = time.perf_counter()
    with pool.open(path_or_name) as model:
        tensors = [model.raw(name) for name in model]
        opened = time.perf_counter()
        first = _touch(tensors)
        again = _touch(tensors)
        if digests is not None:
            verify(model, digests)
    return OpenTiming(opened - begin, first, again)


@contextmanager
def kept_as_found(pool: AnyPool, manifest: Manifest) -> Iterator[None]:
    """A model that the pool did not know before is removed from it afterwards."""
    known = model_status(pool, manifest) is not None
    try:
        yield
    finally:
        status = model_status(pool, manifest)
        if status is not None and not known and not status["leases"]:
            pool.remove(status["name"])


def model_status(pool: AnyPool, manifest: Manifest) -> dict[str, Any] | None:
    """The pool's status of the model of these files, or None. Leases that were just released are not in it."""
    deadline = time.monotonic() + _RELEASE_S
    while True:
        models: list[dict[str, Any]] = pool.status()["models"]
        status = next((model for model in models if model["identity"] == manifest.identity), None)
        if status is None or not status["leases"] or time.monotonic() > deadline:
            return status
        time.sleep(_RELEASE_S / 50)


def _touch(tensors: list[memoryview]) -> float:
    views = [np.frombuffer(tensor, np.uint8)[::_TOUCH_BYTES] for tensor in tensors if tensor.nbytes]
    begin = time.perf_counter()
    for view in views:
        np.bitwise_or.reduce(view)
    return time.perf_counter() - begin
