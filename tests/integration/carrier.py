"""Carrier of numpy memory: copies pages of an open model as a device would, and lets a test look at the bytes."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from tiermem.carrier import Link
from tiermem.model import Model
from tiermem.types import PAGE_BYTES


class NumpyCarrier:
    """The model's tensors by name, as far as they are copied. `stop`: copies wait while it is clear."""

    def __init__(self, model: Model, device: str = "npu:0", capacity_bytes: int = 1 << 30) -> None:
        self.device, self.budget_bytes, self.capacity_bytes = device, capacity_bytes // 2, capacity_bytes
        self.registered = False
        self.tensors: dict[str, bytes] = {}
        self.go = threading.Event()
        self.go.set()
        self.copying = threading.Event()
        self._model = model
        self._copied: list[int] = []
        self._pages: list[tuple[int, str]] = []  # of the model, with each tensor that lies on it
        base, self._base = 0, list[int]()
        for segment in model.manifest.segments:
            self._base.append(base)
            base += segment.pages
        self._count = base
        for tensor in model.manifest.tensors:
            extent = tensor.extent
            first = self._base[extent.segment] + extent.offset // PAGE_BYTES
            last = self._base[extent.segment] + (extent.offset + max(extent.length, 1) - 1) // PAGE_BYTES
            self._pages += [(page, tensor.name) for page in range(first, last + 1)]
        self.link: Link = model._holder.carry(self)

    def copy(self, segment: int, pages: range) -> None:
        self.copying.set()
        assert self.go.wait(20)
        wanted = {self._base[segment] + page for page in pages}
        for page, name in self._pages:
            if page in wanted and name not in self.tensors:
                self.tensors[name] = bytes(self._model.raw(name))
                self._copied.append(page)
        self.link.changed()

    def drop(self, segment: int, pages: range) -> None:
        wanted = {self._base[segment] + page for page in pages}
        for page, name in self._pages:
            if page in wanted:
                self.tensors.pop(name, None)
        self.link.changed()

    def replicas(self) -> npt.NDArray[np.bool_]:
        there = np.ones(self._count, np.bool_)
        for page, name in self._pages:
            there[page] &= name in self.tensors
        return there

    def take_copied(self) -> npt.NDArray[np.int32]:
        taken, self._copied = self._copied, []
        return np.array(taken, np.int32)
