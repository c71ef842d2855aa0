"""Module: a torch.nn.Module that computes with weights that come to a device just before their use, and go after it.

Owns the hooks and who is in which stage now. A stage's weights are in place while it computes; before it does the host
has enqueued their copies, and the compute stream waits for these; copies of the next stages are enqueued before it
computes. The host never waits for the device. Never changes what a module computes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tiermem.device.replica import Weight
from tiermem.device.residency import Residency
from tiermem.device.stage import Call, Stage, bytes_of, survey
from tiermem.device.staying import Staying
from tiermem.device.worth import Worth
from tiermem.errors import DeviceFull
from tiermem.steering import Steering
from tiermem.types import Manifest
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch


class Attached:
    """A module whose weights are a model's on a device, until `detach`; a context manager. See `DeviceModel.attach`.

    `stages`: the parts that come and go; `detached`: whether it has ended.
    """

    def __init__(
        self, module: torch.nn.Module, prefix: str, name: str, manifest: Manifest, weights: Mapping[str, Weight],
        residency: Residency, worth: Worth, steering: Steering | None, ahead: int,
    ) -> None:  # fmt: skip
        """`name`: of the model. Without `steering` all weights stay. Raises ModuleMismatch, DeviceFull, CopyFailed,
        DeviceLost, and what stopped the load."""
        self._device = residency.device.empty(0).device
        found = survey(module, prefix, manifest, weights, self._device, staged=steering is not None)
        self.stages, self._loose, self._strange = found.stages, found.loose, found.strange
        self.detached = False
        self._residency, self._worth, self._ahead = residency, worth, ahead
        self._loose_bytes = bytes_of([slot.weight for slot in self._loose])
        self._check_budget(name)
        self._order = _Order(len(self.stages))
        self._staying = Staying(name, manifest, self.stages, ahead, steering) if steering else None
        self._hooks = list[Any]()
        self._buffers: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
        self._lock = threading.Lock()
        loose = Stage(-1, "", module, self._loose)
        self._pinned = residency.hold(loose.weights)
        try:
            self._pinned.result()
            self._move_buffers()
            loose.fill(self._pinned)
            for slot in (slot for stage in self.stages for slot in stage.slots):
                setattr(slot.owner, slot.leaf, slot.absent)
        except BaseException:
            self.detach()
            raise
        worth.begin([[weight.key for weight in stage.weights] for stage in self.stages])
        self._hook(module)

    def detach(self) -> None:
        """Give the module back what it had; buffers that no checkpoint has come back with their values. No call of it
        may be on its way. Again, it does nothing."""
        if self.detached:
            return
        self.detached = True
        for hook in self._hooks:
            hook.remove()
        for slot in (*self._loose, *(slot for stage in self.stages for slot in stage.slots)):
            slot.restore()
        for owner, leaf, before in self._buffers:
            # A device that is lost keeps its values.
            with suppress(RuntimeError):
                before = getattr(owner, leaf).to(before.device)
            setattr(owner, leaf, before)
        self._worth.end()
        with ExitStack() as stack:  # of which every one is released, whatever becomes of the others
            for holding in (self._pinned, *(call.holding for stage in self.stages for call in stage.inside)):
                if holding is not None:
                    stack.callback(holding.release)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- the module's calls --------------------------------------------------------------------------------------

    def _hook(self, module: torch.nn.Module) -> None:
        if self.stages and all(stage.module is not module for stage in self.stages):
            self._hooks.append(module.register_forward_pre_hook(self._begin, prepend=True))
        for stage in self.stages:
            self._hooks += [
                stage.module.register_forward_pre_hook(partial(self._enter, stage), prepend=True),
                stage.module.register_forward_hook(partial(self._leave, stage), always_call=True),
            ]

    def _begin(self, *_: Any) -> None:
        """The whole is called: what this thread is in still was interrupted (torch calls no hook then)."""
        me = threading.get_ident()
        for stage in self.stages:
            while any(call.thread == me for call in stage.inside):
                self._leave(stage)

    def _enter(self, stage: Stage, *_: Any) -> None:
        """Its weights are in place for what is enqueued from now on. Raises DeviceFull, CopyFailed, DeviceLost, Closed,
        and what stopped the load; `_leave` is called then, too."""
        call = Call(threading.get_ident())
        with self._lock:
            stage.inside.append(call)
            again = self._order.step(stage.number)
            if self._staying is not None:
                if again:
                    self._worth.stays = self._staying.choose(self._residency.budget_bytes - self._loose_bytes)
                self._staying.use(stage.number)
            self._worth.use([weight.key for weight in stage.weights])
            coming = self._order.coming(self._ahead)
        call.holding = self._residency.hold(stage.weights)
        self._residency.prefetch([weight for number in coming for weight in self.stages[number].weights])
        call.holding.wait()
        with self._lock:
            stage.fill(call.holding)

    def _leave(self, stage: Stage, *_: Any) -> None:
        """The last call of it by this thread has ended; its weights go when what it enqueued is done."""
        me = threading.get_ident()
        with self._lock:
            # Another's hook may have failed before ours was called.
            mine = next((call for call in reversed(stage.inside) if call.thread == me), None)
            if mine is None:
                return
            stage.inside.remove(mine)
            if not stage.inside:
                stage.clear()
        if mine.holding is not None:
            mine.holding.release()

    # --- what it takes -------------------------------------------------------------------------------------------

    def _check_budget(self, name: str) -> None:
        """Raises DeviceFull where a stage would not fit."""
        largest = max(self.stages, key=lambda stage: bytes_of(stage.weights), default=None)
        part = bytes_of(largest.weights) if largest else 0
        least, budget, device = self._loose_bytes + part, self._residency.budget_bytes, self._residency.device.name
        if least > budget:
            what = f"its part {largest.path or 'as a whole'!r} takes {format_bytes(part)}" if largest else "all stays"
            raise DeviceFull(
                f"{name} cannot be streamed on {device} within {format_bytes(budget)}: {what}, beside "
                f"{format_bytes(self._loose_bytes)} of what is in no part; give it a budget of at least {least} bytes",
                least - budget,
            )

    def _move_buffers(self) -> None:
        """Those that no checkpoint has go to where the module computes."""
        for owner, leaf in self._strange:
            before = getattr(owner, leaf)
            self._buffers.append((owner, leaf, before))
            setattr(owner, leaf, before.to(self._device))


class _Order:
    """In which order stages are called: what followed two calls the last time, at first the module's own order."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._next = dict[tuple[int, int], int]()
        self._last = (-1, -1)

    def step(self, number: int) -> bool:
        """This one is called now; whether another pass begins with it."""
        before, last = self._last
        self._next[before, last] = number
        self._last = last, number
        return number <= last

    def coming(self, count: int) -> list[int]:
        """Those that will be called next, as it looks."""
        before, last = self._last
        found = list[int]()
        for _ in range(count):
            before, last = last, self._next.get((before, last), (last + 1) % self._stages)
            found.append(last)
        return found
