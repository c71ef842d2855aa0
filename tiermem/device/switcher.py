"""Switcher: many models behind one budget of device memory, of which one is ready to compute with.

Owns which model is the current one, and whose weights are held. Never changes a model, and never writes a weight back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiermem.device.backend import open_device
from tiermem.device.holding import Holding
from tiermem.device.replica import Weight, weights_of
from tiermem.device.residency import Residency
from tiermem.dtypes import torch_layout
from tiermem.errors import Closed, ModelNotFound, Refused
from tiermem.types import TensorInfo
from tiermem.units import parse_bytes

if TYPE_CHECKING:
    import torch

    from tiermem.model import Model


@dataclass(frozen=True, slots=True)
class Switched:
    """A model that is ready, and what it cost.

    tensors        name -> torch tensor on the device, of the checkpoint's dtype and shape; good until the next switch,
                   when their memory is used again, whoever still has them
    bytes_copied   of weights that were not on the device; `bytes_shared` of those that were: of this model from an
                   earlier time, or of another one with equal digests
    seconds        until `switch` returned
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    bytes_copied: int
    bytes_shared: int
    seconds: float


class Switcher:
    """Models on `device`, of which one is current. What others had stays as long as there is room, and goes in the
    order in which they were last current; equal weights of several models are there once. Threads may share it, but a
    switch takes the tensors of the model before away from all of them."""

    def __init__(self, device: str = "npu:0", budget: int | str | None = None, **options: Any) -> None:
        """`budget`: bytes, or text as `24GiB`; None: what the device has free, less a reserve. `options` are those of
        `Residency`. Raises DeviceUnavailable, DeviceFull, DeviceLost, ConfigError."""
        budget_bytes = parse_bytes(budget) if isinstance(budget, str) else budget
        self.residency = Residency(open_device(device), budget_bytes, **options)
        self._members = dict[str, _Member]()
        self._current: tuple[str, Holding] | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, in the order in which they were added."""
        return tuple(self._members)

    @property
    def current(self) -> str | None:
        """The model whose weights are held."""
        current = self._current
        return current and current[0]

    def add(self, name: str, model: Model | str | os.PathLike[str]) -> None:
        """Add a model, or one by its path or its name in the pool, which is opened when it is first used and closed in
        the end. Raises Refused where the name is taken, Closed."""
        with self._lock:
            self._check_open()
            if name in self._members:
                raise Refused(f"there is a model {name!r} already; remove it first")
            self._members[name] = _Member(model)

    def remove(self, name: str) -> None:
        """Forget a model, and drop what no other one shares with it. Raises ModelNotFound."""
        with self._lock:
            member = self._member(name)
            if self.current == name:
                self._leave()
            del self._members[name]
            shared = {weight.key for other in self._members.values() for weight in other.weights.values()}
            self.residency.drop({weight.key for weight in member.weights.values()} - shared)
            member.close()

    def switch(self, name: str, block: bool = False) -> Switched:
        """Make a model the current one. When this returns, work that is enqueued in the current stream sees its
        weights; with `block` they are on the device already. Work of the model before that was enqueued by then, in the
        streams that were current in its switch and in this one, still sees that model's.

        Raises ModelNotFound, Closed, Refused for a dtype that torch lacks, and what opening it raises: the model before
        stays current then. Raises DeviceFull, which names the least budget, CopyFailed, DeviceLost, and what stopped
        its load: no model is current then, and another switch may be tried; after DeviceLost all raise it.
        """
        start_s = time.perf_counter()
        with self._lock:
            weights, layouts = self._member(name).opened()
            self._leave()
            holding = self.residency.hold(list(weights.values()))
            try:
                holding.wait()
                if block:
                    holding.result()
                tensors = {
                    info.name: replica.tensor(info.dtype, info.shape)
                    for info, replica in zip(layouts, holding.replicas, strict=True)
                }
            except BaseException:
                holding.release()
                raise
            self._current = name, holding
            elapsed_s = time.perf_counter() - start_s
            return Switched(name, tensors, holding.bytes_copied, holding.bytes_shared, elapsed_s)

    def prefetch(self, name: str) -> None:
        """Have the weights of a model copied ahead of a switch, as many as fit beside those of the current one, and
        after copies that are needed now. Raises ModelNotFound, Refused, DeviceLost, Closed, and what opening raises."""
        with self._lock:
            member = self._member(name)
        weights, _ = member.opened()
        self.residency.prefetch(weights.values())

    def close(self) -> None:
        """Give all memory up, and close the models that were opened here."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._leave()
            self.residency.close()
            for member in self._members.values():
                member.close()

    def __enter__(self) -> Switcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self) -> None:
        """Let the current model's weights go, once what computes with them is done."""
        if self._current is not None:
            self._current[1].release()
            self._current = None

    def _member(self, name: str) -> _Member:
        self._check_open()
        if name not in self._members:
            raise ModelNotFound(f"no model {name!r} was added; there are: {', '.join(self._members) or 'none'}")
        return self._members[name]

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the switcher on {self.residency.device.name} is closed; make a new one")


class _Member:
    """A model as it was added. `weights`: by tensor name, once it was opened."""

    def __init__(self, given: Model | str | os.PathLike[str]) -> None:
        self.weights: Mapping[str, Weight] = {}
        self._given = given
        self._model: Model | None = None
        self._closed = False
        self._lock = threading.Lock()

    def opened(self) -> tuple[Mapping[str, Weight], Iterable[TensorInfo]]:
        """Its weights, and what each of them is. Raises Refused where torch has no such dtype, Closed."""
        with self._lock:
            if self._closed:
                raise Closed("the model was removed, or its switcher closed; make a new one")
            if self._model is None:
                model = _opened(self._given) if isinstance(self._given, str | os.PathLike) else self._given
                try:
                    for info in map(model.info, model):
                        torch_layout(info.dtype, info.shape)
                    self.weights = _weights_of(model)
                except BaseException:
                    self._close(model)
                    raise
                self._model = model
            return self.weights, map(self._model.info, self.weights)

    def close(self) -> None:
        """Once it is not being opened any more."""
        with self._lock:
            self._closed = True
            if self._model is not None:
                self._close(self._model)

    def _close(self, model: Model) -> None:
        if model is not self._given:
            model.close()


def _opened(path_or_name: str | os.PathLike[str]) -> Model:
    from tiermem.opening import open_model  # with grpc, which a switcher of open models does not need

    return open_model(path_or_name)


def _weights_of(model: Model) -> dict[str, Weight]:
    """By tensor name. Digests that nobody knew before are known once the model is loaded, which is waited for."""
    digests = model.digests()
    if None in digests.values():
        model.wait()
        digests = model.digests()
    return weights_of(model, digests, model.raw)
