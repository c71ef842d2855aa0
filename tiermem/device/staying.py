"""Staying: which stages of a module stay on a device while the others pass through. Asks a policy; never copies.

The policy sees the device as its fastest memory tier, which has room for what the stages in use at once leave over, and
host memory below it; each use of a stage is a touch of its pages. Stages are whole: those stay of which it wants most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.device.overlap import Overlap
from tiermem.device.stage import Stage, bytes_of
from tiermem.heat import Heat, snapshot
from tiermem.observations import Counts, Rung
from tiermem.page_facts import page_facts_of
from tiermem.policy import PAGE_DTYPES, Models, Pages, TierView, View
from tiermem.steering import Steering
from tiermem.types import PAGE_BYTES, Manifest

_DEVICE, _HOST, _DISK = range(3)

_HALF_LIFE_S = 30.0
"""A pass may take seconds; its last stages are not to count for more than its first."""


class Staying:
    """Of the stages of one module, in their order; `ahead` of them are copied while one computes.

    `stays`: the numbers of those that stay, as of when the policy was asked last. A policy that fails changes nothing.
    """

    def __init__(
        self, name: str, manifest: Manifest, stages: Sequence[Stage], ahead: int, steering: Steering,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.stays = frozenset[int]()
        self._name, self._stages, self._ahead, self._steering, self._clock = name, stages, ahead, steering, clock
        overlap, numbers = Overlap(manifest), manifest.by_name
        # By stage, rows of the view, which are the pages that any stage is on.
        pages = [overlap.pages_of(numbers[slot.info.name] for slot in stage.slots) for stage in stages]
        every = np.unique(np.concatenate(pages)) if pages else np.empty(0, np.int32)
        self._rows = [np.searchsorted(every, of).astype(np.int32) for of in pages]
        self._heat = Heat(len(every), _HALF_LIFE_S)
        self._began_s = self._until_s = self._asked_s = clock()
        self._asked_s -= steering.period_s
        stages_of = Counter(weight.key for stage in stages for weight in stage.weights)
        # By stage: bytes of weights of its own, and those that other stages have too.
        self._own = [bytes_of([w for w in stage.weights if stages_of[w.key] == 1]) for stage in stages]
        self._tied = [{w.key: bytes_of([w]) for w in stage.weights if stages_of[w.key] > 1} for stage in stages]
        self._columns = self._fixed(manifest, every)

    def use(self, number: int) -> None:
        """A stage is used now."""
        rows, now_s = self._rows[number], self._clock()
        # Every use is seen, as only hardware sees others: what was not used is known to be idle.
        self._heat.add_counts(Counts(Rung.PERF, self._until_s, now_s, rows, np.ones(len(rows), np.uint32), 1.0))
        self._until_s = now_s

    def choose(self, room_bytes: int) -> frozenset[Hashable]:
        """Keys of the weights that stay, where stages may take `room_bytes`. Asks the policy once a period at most."""
        now_s = self._clock()
        if now_s - self._asked_s >= self._steering.period_s:
            self._steering.refresh()
            # A late view is for as long as the next one may take to come.
            view = self._view(now_s, max(self._steering.period_s, now_s - self._asked_s), room_bytes)
            # What is to stay, by its place in the plan; what stays already and does not go comes first.
            wanted = np.where(view.pages.tier == _DEVICE, 0.0, np.inf)
            for place, move in enumerate(self._steering.plan(view), 1):
                wanted[move.first : move.first + move.pages] = place if move.target == _DEVICE else np.inf
            self.stays = self._fitting(wanted, room_bytes)
            self._asked_s = now_s
        return frozenset(weight.key for number in self.stays for weight in self._stages[number].weights)

    def _fitting(self, wanted: npt.NDArray[np.float64], room_bytes: int) -> frozenset[int]:
        """Of the stages with wanted pages those that fit beside the window, first those of which most is wanted."""
        ranked = list[tuple[float, float, int]]()
        for number, rows in enumerate(self._rows):
            places = wanted[rows]
            if (found := np.isfinite(places)).any():
                ranked.append((-float(found.mean()), float(places.min()), number))
        chosen = set[int]()
        for *_, number in sorted(ranked):
            if self._needed({*chosen, number}) <= room_bytes:
                chosen.add(number)
        return frozenset(chosen)

    def _needed(self, staying: set[int]) -> int:
        """Bytes of these stages, and of those others that are in use at once, where they are the largest."""
        moving = [number for number in range(len(self._stages)) if number not in staying]
        around = moving + moving[: self._ahead]
        tied = {key for number in staying for key in self._tied[number]}
        windows = (around[start : start + 1 + self._ahead] for start in range(len(moving)))
        return self._bytes(staying) + max((self._bytes(set(window), tied) for window in windows), default=0)

    def _bytes(self, numbers: Iterable[int], without: Container[Hashable] = ()) -> int:
        """Of these stages, less those weights; what several have counts once."""
        tied = {key: nbytes for number in numbers for key, nbytes in self._tied[number].items() if key not in without}
        return sum(self._own[number] for number in numbers) + sum(tied.values())

    def _view(self, now_s: float, period_s: float, room_bytes: int) -> View:
        """All is leased: the policy is to place what is read, and to evict nothing."""
        held = np.zeros(self._heat.pages, np.bool_)
        for number in self.stays:
            held[self._rows[number]] = True
        heat = snapshot((self._heat,), now_s)
        columns: dict[str, Any] = self._columns | {"tier": np.where(held, np.int8(_DEVICE), np.int8(_HOST))}
        columns["tier"].flags.writeable = False
        columns |= {name: getattr(heat, name) for name in PAGE_DTYPES.keys() - columns.keys()}
        rate = np.array([np.nan_to_num(heat.rate).sum(dtype=np.float64)])
        models = Models((self._name,), np.array([self._total]), np.ones(1, np.int64), np.array([self._began_s]), rate)
        # Which stages need the window depends on which stay: this is the room beside the smallest ones. A page of small
        # tensors is not full: room is counted in pages as full as these are in the mean.
        part = 1.0 if room_bytes >= self._total else max(0, room_bytes - self._least_window) / self._total
        room = int(part * self._heat.pages)
        used, size = int(held.sum()) * PAGE_BYTES, self._heat.pages * PAGE_BYTES
        tiers = (
            TierView(_DEVICE, "hbm", "dram", max(used, min(size, room * PAGE_BYTES)), used),
            TierView(_HOST, "dram", "dram", size, size - used),
            TierView(_DISK, "disk", "disk", None, 0),
        )
        return View(now_s, tiers, models, Pages(**columns), period_s=period_s)

    def _fixed(self, manifest: Manifest, every: npt.NDArray[np.int32]) -> dict[str, Any]:
        """The columns that never change."""
        self._total = self._bytes(range(len(self._stages)))
        self._least_window = sum(sorted(bytes_of(stage.weights) for stage in self._stages)[: 1 + self._ahead])
        facts = page_facts_of(manifest)
        columns: dict[str, Any] = {
            "id": every.astype(np.int64), "model": np.zeros(len(every), np.int32),
            "replicas": np.zeros(len(every), np.uint8), "pinned": np.zeros(len(every), np.bool_),
            "leased": np.ones(len(every), np.bool_), "last_used_s": np.full(len(every), self._began_s),
        }  # fmt: skip
        columns |= {name: getattr(facts, name)[every] for name in ("segment", "layer", "order", "tensor_class")}
        for column in columns.values():
            column.flags.writeable = False
        return columns
