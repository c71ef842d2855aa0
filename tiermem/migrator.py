"""Migrator: the only thing that acts on a plan. Checks every move again at the moment it acts; never plans.

A move that no longer holds (leased, pinned, elsewhere by now, not a whole segment) is refused and counted, and the
rest of the plan goes on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from tiermem.errors import Refused
from tiermem.policy import Move, Plan, Policy, View
from tiermem.tier import DISK
from tiermem.view import Place

_log = logging.getLogger(__name__)


class Migrator:
    """Executes plans. `evict` takes a segment out of memory for a reason and returns its bytes, or raises Refused."""

    def __init__(self, policy: Policy, evict: Callable[[Place, str], int]) -> None:
        self.policy: Policy | None = policy
        self.failure = ""
        self.evicted_bytes = 0
        self.refused: Counter[str] = Counter()
        self.policy_s = 0.0
        self._evict = evict

    def relieve(self, view: View, places: Mapping[int, Place]) -> int:
        """Ask the policy and do what it says; returns bytes freed. A policy that raises is replaced by holding."""
        if self.policy is None:
            return 0
        begin = time.monotonic()
        try:
            plan = [_move(move) for move in self.policy.plan(view)]
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            _log.exception("policy %s raised; nothing is moved until another is set", type(self.policy).__name__)
            self.policy = None
            return 0
        finally:
            self.policy_s += time.monotonic() - begin
        return self.execute(plan, places)

    def execute(self, plan: Plan, places: Mapping[int, Place]) -> int:
        """Do the moves in order; returns bytes that left memory."""
        freed = 0
        for move in plan:
            try:
                freed += self._evict(_whole_segment(move, places), move.reason)
            except Refused as error:
                self.refused[str(error)] += 1
                _log.info("move refused: %s (%s)", error, move)
        self.evicted_bytes += freed
        return freed


def _move(move: object) -> Move:
    if not isinstance(move, Move):
        raise TypeError(f"plan(view) must give moves, not {move!r}")
    return move


def _whole_segment(move: Move, places: Mapping[int, Place]) -> Place:
    if move.target != DISK:
        raise Refused(f"tier {move.target} takes no moves")
    place = places.get(move.first)
    if place is None or place[0].manifest.segments[place[1]].pages != move.pages:
        raise Refused("only whole segments are evicted")
    return place
