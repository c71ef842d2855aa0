"""Staging: pinned host memory of bounded size that copies to a device go through, as a ring of equal slots.

Owns the memory and when a slot may be filled again. Never copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiermem.device.backend import ALIGN, Device, Event, Stream
from tiermem.errors import Closed, ConfigError
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch

_SLOTS = 8


@dataclass(eq=False, slots=True)
class Slot:
    """`memory`: uint8 [slot_bytes] at host address `address`. `event` passes when the copy that reads it is done."""

    memory: torch.Tensor
    address: int
    event: Event


class Staging:
    """Of one copier: slots are taken in turn by one thread, and never handed out before their copy has read them."""

    def __init__(self, device: Device, nbytes: int = 64 << 20) -> None:
        """Pins `nbytes`, rounded down to whole slots. Raises ConfigError, DeviceFull, DeviceLost."""
        self.slot_bytes = nbytes // _SLOTS // ALIGN * ALIGN
        if self.slot_bytes <= 0:
            raise ConfigError(
                f"staging of {nbytes} bytes is too small; it takes {format_bytes(_SLOTS * ALIGN)} or more"
            )
        self.nbytes = _SLOTS * self.slot_bytes
        self._device = device
        # Not a set: to have the hash of a stream torch_npu waits for what is enqueued.
        self._streams = list[Stream]()
        self._stopped = False
        self._memory = [device.pinned(self.nbytes)]
        self._slots = [
            Slot(part, part.data_ptr(), device.event())
            for part in (self._memory[0][i * self.slot_bytes :][: self.slot_bytes] for i in range(_SLOTS))
        ]
        self._turn = 0

    def take(self) -> Slot:
        """The next slot, once the device has read what was in it. Raises Closed, and RuntimeError as torch does."""
        if not self._slots:
            raise Closed("this staging is closed; make a new one")
        slot = self._slots[self._turn]
        slot.event.synchronize()
        self._turn = (self._turn + 1) % _SLOTS
        return slot

    def mark(self, slot: Slot, stream: Stream) -> None:
        """The copy that reads a slot was enqueued in `stream`; who fills one says so. Raises RuntimeError."""
        if not any(stream is known for known in self._streams):
            self._streams.append(stream)
        slot.event.record(stream)

    def renew(self) -> None:
        """Forget what the slots wait for: all copies from them have ended, but the device does not tell of it."""
        self._stopped = True
        for slot in self._slots:
            slot.event = self._device.event()

    def close(self) -> None:
        """Unpin the memory. The copier that it is of was closed before."""
        self._slots, self.nbytes = [], 0
        self._device.unpin(self._memory, self._streams, self._stopped)
