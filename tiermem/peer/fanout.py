"""Fan-out: of the pools that fetch one model at the same time, which gets its bytes from which. Pure state: it opens no
connection, and its caller guards it.

They form a chain in the order in which they came, each sending on what it has received and verified: all links are
used in full, and the owner sends the model once. A chain is as long as DEPTH; those who come later begin others, at the
owner and at the pools that have one successor. Nobody is sent to a pool whose own bytes may come, by whatever way, from
the one that asks: there are no cycles, and none can arise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tiermem.peer.address import Address

DEPTH = 16
"""Pools of the longest chain. Each makes those behind it wait for as long as its first tensors take to come."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A pool that fetches. `listener`: where others find it, None where they cannot. `parent` None is the owner;
    `sources`: the parent, the parent's parent and so on, without the owner."""

    listener: Address | None
    parent: _Place | None
    sources: tuple[Address, ...]


class FanOut:
    """Of one owner, for all of its models."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, _Place]] = {}

    def join(self, model_id: str, lease_id: str, listener: Address | None) -> tuple[Address, ...]:
        """Where the holder of a lease is to ask for the model before it asks the owner, nearest first.

        Who asks again is told the same.
        """
        places = self._places.setdefault(model_id, {})
        place = places.get(lease_id)
        if place is None:
            parent = _parent(places.values(), listener)
            sources = () if parent is None or parent.listener is None else (parent.listener, *parent.sources)
            place = places[lease_id] = _Place(listener, parent, sources)
        return place.sources

    def leave(self, model_id: str, lease_id: str) -> None:
        """The lease has ended; nobody else is sent to its holder. Idempotent."""
        places = self._places.get(model_id, {})
        places.pop(lease_id, None)
        if not places:
            self._places.pop(model_id, None)

    def check(self) -> None:
        """No pool gets bytes that come from itself, and no model is kept that nobody fetches."""
        for model_id, places in self._places.items():
            assert places, f"nobody fetches {model_id}"
            for place in places.values():
                fed = _fed(places.values(), place.listener)
                assert fed.isdisjoint(place.sources), f"{place.listener} gets {model_id} from itself"


def _parent(places: Iterable[_Place], listener: Address | None) -> _Place | None:
    """Whoever sends to the fewest, the owner (None) before those who came first."""
    places = list(places)
    busy = Counter(place.parent for place in places)
    fed = _fed(places, listener)
    listening = (place for place in places if place.listener is not None and place.listener not in fed)
    return min((None, *(place for place in listening if len(place.sources) + 1 < DEPTH)), key=lambda place: busy[place])


def _fed(places: Iterable[_Place], listener: Address | None) -> set[Address]:
    """The pool that listens there, and all whose bytes may come from it."""
    fed = set() if listener is None else {listener}
    left = [place for place in places if place.listener is not None]
    while more := {place.listener for place in left if place.listener and not fed.isdisjoint(place.sources)} - fed:
        fed |= more
    return fed
