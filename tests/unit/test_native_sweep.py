"""A sweep and the memory that it looks at may end in one garbage collection, in whatever order that takes them."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest

from tiermem import _native
from tiermem._native import sweep as sweep_module
from tiermem._native.door import ffi, lib
from tiermem.sampler.mappings import Mapping
from tiermem.types import PAGE_BYTES


class Spy:
    """The core, and the calls on each sweep in their order."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._lib, name)
        if name not in ("tm_sweep_drop", "tm_sweep_wake", "tm_sweep_close"):
            return call

        def told(sweep: Any, *rest: Any) -> Any:
            self.calls.append((address_of(sweep), name))
            return call(sweep, *rest)

        return told


def address_of(handle: Any) -> int:
    return int(ffi.cast("uintptr_t", handle))


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, *parts: object) -> None:
        self.parts = (self, *parts)


@pytest.mark.parametrize("sweep_first", [True, False])
def test_nothing_is_asked_of_a_sweep_that_has_ended(sweep_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what earlier tests left
    spy = Spy()
    monkeypatch.setattr(sweep_module, "lib", spy)
    fd = os.memfd_create("model", os.MFD_CLOEXEC)
    os.truncate(fd, PAGE_BYTES)
    gc.disable()
    try:
        sweep = _native.Sweep(_native.Pagemap()) if sweep_first else None
        range_ = _native.Range.reserve(PAGE_BYTES)
        range_.map(0, fd, PAGE_BYTES)
        sweep = sweep or _native.Sweep(_native.Pagemap())
        mapping = Mapping("a", range_, 1)
        mapping.join(sweep, np.zeros(1, np.uint32))
        range_.on_release(sweep.wake)
        ours = address_of(sweep.live())
        Cycle(sweep, range_, mapping)
        del sweep, range_, mapping
        gc.collect()
    finally:
        gc.enable()
        os.close(fd)
    calls = [name for sweep_, name in spy.calls if sweep_ == ours]
    assert calls.count("tm_sweep_close") == 1
    assert calls[-1] == "tm_sweep_close", calls
