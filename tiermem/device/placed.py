"""Placed: a model whose weights are copied to a device: all of them, or as they are used within a budget.

Owns which of its tensors are held by name, and what makes the others come and go. Never changes the model, and never
writes a weight back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tiermem.config import value_of
from tiermem.device.arena import whole
from tiermem.device.backend import ALIGN, Registration, open_device
from tiermem.device.carrier import TensorCarrier
from tiermem.device.holding import Holding
from tiermem.device.module import Attached
from tiermem.device.replica import Replica, Weight, weights_of
from tiermem.device.residency import Residency
from tiermem.device.stage import bytes_of
from tiermem.device.worth import Worth
from tiermem.dtypes import torch_layout
from tiermem.errors import Closed, ConfigError, CopyFailed, Refused, TensorNotFound, TiermemError
from tiermem.steering import Steering
from tiermem.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

    from tiermem.model import Model
    from tiermem.types import TensorInfo

_CHUNK_BYTES, _STAGING_BYTES = 256 << 20, 64 << 20
_LEAST_STAGING_BYTES = 64 << 10


def place(model: Model, device: str, register: bool) -> DeviceModel:
    """As `Model.to`."""
    model.wait()
    placed = DeviceModel(model, device, register=register)
    try:
        placed.pin(placed, wait=True)
    except BaseException:
        placed.close()
        raise
    return placed


def stream(model: Model, device: str, budget: int | str | None, policy: str, ahead: int, register: bool) -> DeviceModel:
    """As `Model.stream`."""
    budget_bytes = parse_bytes(budget) if isinstance(budget, str) else budget
    if budget_bytes is not None and budget_bytes <= 0:
        raise ConfigError(f"a budget of {budget_bytes} bytes holds nothing; give it one of a layer or more")
    if ahead < 0:
        raise ConfigError(f"ahead={ahead}: layers are copied 0 or more ahead of the one that computes")
    steering = Steering(policy, float(value_of("policy_budget")))
    try:
        return DeviceModel(model, device, steering, budget_bytes, ahead, register)
    except BaseException:
        steering.close()
        raise


class DeviceModel(Mapping[str, "torch.Tensor"]):
    """A model on a device: tensor name -> torch tensor there, of the checkpoint's dtype and shape.

    A tensor that was asked for stays, as does what `pin` names, until it is released; then its memory is used again,
    whoever still has the tensor. Others come and go within the budget. Work that is enqueued in the stream in which a
    tensor was asked for sees its bytes, and has ended before they are overwritten. Threads may share a model.
    """

    def __init__(
        self, model: Model, device: str, steering: Steering | None = None, budget_bytes: int | None = None,
        ahead: int = 0, register: bool = False,
    ) -> None:  # fmt: skip
        """Without `steering` there is room for all weights, and they are not to go. Raises DeviceUnavailable,
        DeviceFull, DeviceLost."""
        self.name = model.name
        self._model, self._steering, self._ahead = model, steering, ahead
        self._copied = np.zeros(len(model.manifest.tensors), np.bool_)
        self._weights = weights_of(model, model.digests(), partial(_give, model, self._copied))
        self._held = dict[str, Holding]()
        self._lock = threading.RLock()
        self._worth = Worth()
        self._attached: Attached | None = None
        self._closed = False
        total = bytes_of(self._weights.values())
        self.residency = Residency(
            open_device(device),
            total if steering is None else budget_bytes,
            chunk_bytes=total if steering is None else max(_CHUNK_BYTES, self._window_bytes()),
            staging_bytes=min(_STAGING_BYTES, max(_LEAST_STAGING_BYTES, total)),
            worth=self._worth,
        )
        self._registration: Registration | None = None
        try:
            if register:
                self._register()
            numbers = model.manifest.by_name
            weights = {numbers[name]: weight for name, weight in self._weights.items()}
            registered = self._registration is not None
            carrier = TensorCarrier(model.manifest, self.residency, weights, self._worth, self._copied, registered)
            self._link = model._holder.carry(carrier)
            self.residency.on_change = self._link.changed
        except BaseException:
            self._give_up()
            raise

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor on the device; what the current stream does with it waits for its copy, the host does not.

        Raises TensorNotFound, Refused for a dtype that torch lacks, before anything is copied (see `raw`), DeviceFull,
        CopyFailed, DeviceLost, Closed, and what stopped the load.
        """
        info = self._info(name)
        _check_dtype(info)
        return self._arriving(name).tensor(info.dtype, info.shape)

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes on the device, uint8 [nbytes], of any dtype. Raises as `model[name]` else does."""
        self._info(name)
        return self._arriving(name).view

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def prefetch(self, names: Iterable[str]) -> None:
        """Have these tensors copied ahead of their use, in this order, as far as there is room that nobody holds. They
        may be dropped again before it. Raises TensorNotFound, DeviceLost, Closed."""
        self.residency.prefetch([self._weight(name) for name in names])

    def pin(self, names: Iterable[str], wait: bool = False) -> None:
        """Have these tensors copied, and hold them until they are released; with `wait`, return when they are there.

        Raises TensorNotFound, DeviceFull, DeviceLost, Closed, and then holds none that was not held; with `wait` also
        CopyFailed and what stopped the load.
        """
        with self._lock:
            named = [self._weight(name) for name in dict.fromkeys(names)]
            wanted = [weight for weight in named if weight.name not in self._held]
            together = self.residency.hold(wanted)
            try:
                if wait:
                    together.result()
                for weight in wanted:
                    self._held[weight.name] = self.residency.hold([weight])
            except BaseException:
                self.release(weight.name for weight in wanted)
                raise
            finally:
                together.release()

    def release(self, names: Iterable[str]) -> None:
        """These tensors may be dropped from now on, once what was enqueued with them is done; those that are not held
        are left alone. Raises TensorNotFound."""
        with self._lock:
            for name in names:
                self._info(name)
                if (holding := self._held.pop(name, None)) is not None:
                    holding.release()

    def attach(self, module: torch.nn.Module, prefix: str = "") -> Attached:
        """Have a module compute with these weights on the device, until `detach`, or as a `with` block.

        Tensor `prefix + name` is the parameter, or buffer, `name` of the module. The weights of a layer are in place
        while it is called; at other times its parameters have no values, and their use raises Refused. What the module
        had comes back in the end. For inference: a backward pass through it raises RuntimeError. One module at a time.

        Raises ModuleMismatch, which lists the parameters that are no tensor's, or of another shape or dtype;
        DeviceFull, which names the least budget; Refused, Closed.
        """
        with self._lock:
            if self._closed:
                raise Closed(f"{self.name} on {self.residency.device.name} is closed; place it again")
            if self._attached is not None and not self._attached.detached:
                raise Refused(f"{self.name} is attached to a module already; detach it from that first")
            self._attached = Attached(
                module, prefix, self.name, self._model.manifest, self._weights, self.residency, self._worth,
                self._steering, self._ahead,
            )  # fmt: skip
            return self._attached

    @property
    def peak_bytes(self) -> int:
        """The most that weights ever took on the device."""
        return self.residency.peak_bytes

    @property
    def budget_bytes(self) -> int:
        """What weights may take on the device now."""
        return self.residency.budget_bytes

    def close(self) -> None:
        """Detach, and give all memory up; it returns with the last tensor that somebody has. Again, it does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._attached is not None:
                # A stream that waited for a copy that failed may take no marks any more; it does nothing more either.
                with suppress(CopyFailed):
                    self._attached.detach()
            self._held.clear()
            self.residency.on_change = None
            self._link.close()
            self._give_up()
            if self._steering is not None:
                self._steering.close()

    def __enter__(self) -> DeviceModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        used, budget = format_bytes(self.residency.used_bytes), format_bytes(self.budget_bytes)
        return f"<DeviceModel {self.name!r} on {self.residency.device.name}: {used} of {budget}>"

    def _register(self) -> None:
        """Have the device read the model's memory by itself, where it can."""
        model = self._model
        memory = next((model.place(info)[1] for info in map(model.info, model)), memoryview(b""))
        self._registration = self.residency.device.register(memory)
        if self._registration is not None:
            model.mark_pinned()

    def _give_up(self) -> None:
        self.residency.close()
        if self._registration is not None:
            self._registration.close()

    def _arriving(self, name: str) -> Replica:
        """Held by its name; what the current stream does from now on waits for its copy."""
        with self._lock:
            self.pin([name])
            holding = self._held[name]
        try:
            holding.wait()
        except TiermemError:
            self.release([name])
            raise
        return holding.replicas[0]

    def _weight(self, name: str) -> Weight:
        self._info(name)
        return self._weights[name]

    def _info(self, name: str) -> TensorInfo:
        if name not in self._weights:
            raise TensorNotFound(f"{self.name} has no tensor {name!r}; it has {len(self._weights)} others")
        manifest = self._model.manifest
        return manifest.tensors[manifest.by_name[name]]

    def _window_bytes(self) -> int:
        """Of the largest layers that may be used and copied ahead at once."""
        sizes = np.zeros(len(self._model.manifest.segments), np.int64)
        for name, weight in self._weights.items():
            sizes[self._info(name).extent.segment] += whole(weight.nbytes)
        return int(np.sort(sizes)[::-1][: 1 + self._ahead].sum()) or ALIGN


def _give(model: Model, copied: npt.NDArray[np.bool_], name: str) -> memoryview:
    """A tensor's bytes, to be copied."""
    given = model.raw(name)
    copied[model.manifest.by_name[name]] = True
    return given


def _check_dtype(info: TensorInfo) -> None:
    try:
        torch_layout(info.dtype, info.shape)
    except Refused as error:
        raise Refused(f"{info.name} is {info.dtype}: {error}: raw({info.name!r})") from None
