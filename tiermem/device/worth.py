"""Worth: of the replicas of one model that nobody holds, which should go last. Never drops one itself.

Layers are used in a cycle, and in a cycle what was used just now is needed last: it goes first (L. A. Belady, "A study
of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966). Before that goes what was
left out of the last two cycles, and what no layer uses.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

from tiermem.device.replica import Replica

_UNUSED = -1.0


class Worth:
    """What a residency asks; safe under its lock. Without layers what nobody held for longest goes first.

    `stays`: keys that a policy keeps; `ordered`: keys that the pool had copied here. They go when nothing else is left.
    """

    def __init__(self) -> None:
        self.stays: frozenset[Hashable] = frozenset()
        self.ordered: frozenset[Hashable] = frozenset()
        self._used = dict[Hashable, int]()
        self._uses = self._patience = 0

    def begin(self, layers: Sequence[Iterable[Hashable]]) -> None:
        """The keys of layers that will be used, in about this order."""
        self._patience = 2 * len(layers)
        self._uses = len(layers)
        self._used = {key: number for number, keys in reversed([*enumerate(layers)]) for key in keys}

    def use(self, keys: Iterable[Hashable]) -> None:
        """A layer is used."""
        self._uses += 1
        self._used |= dict.fromkeys(keys, self._uses)

    def end(self) -> None:
        """There are no layers any more."""
        self._used = {}
        self.stays = frozenset()

    def __call__(self, replica: Replica) -> float:
        key = replica.weight.key
        if key in self.stays:
            return math.inf
        if key in self.ordered:
            return float(1 << 62)
        if not self._used:
            return float(replica.used)
        idle = self._uses - self._used.get(key, -math.inf)
        return idle if idle <= self._patience else _UNUSED
