"""In whatever order images are created, sealed, given up, opened, pinned and evicted, the pool agrees with a model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.conftest import dram
from tests.unit.paint import fill, painted, prints
from tiermem.config import load_config
from tiermem.draft import Draft
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CapacityError, DeadlineExceeded, ImageNotFound, Refused
from tiermem.model import Model
from tiermem.types import PAGE_BYTES, ImageTensor

CAPACITY = 6
"""Pages."""
SEEDS = range(5)
SEED = st.sampled_from(SEEDS)


def pages_of(seed: int) -> int:
    return seed % 3 + 1


def tensors_of(seed: int) -> list[ImageTensor]:
    return [ImageTensor(f"model.layers.{i}.w", "U8", (1000 + i,)) for i in range(pages_of(seed))]


class Images(RuleBasedStateMachine):
    """The pool beside what it must hold: drafts, sealed images, their leases and pins."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        options = {"state": self.home, "digests": self.home, "tier": dram(CAPACITY * PAGE_BYTES), "staging": "4MiB"}
        self.pool = EmbeddedPool(load_config(options, environ={"HOME": str(self.home)}, files=()))
        self.drafts: dict[int, Draft] = {}
        self.leased: dict[int, list[Model]] = {}
        self.pins: dict[int, int] = {}

    @rule(seed=SEED)
    def create(self, seed: int) -> None:
        def ask() -> Draft | Model:
            return self.pool.create_image(prints(seed), tensors_of(seed), name=f"image {seed}", timeout_s=0)

        if seed in self.drafts:
            with pytest.raises(DeadlineExceeded):
                ask()
        elif seed in self.leased:
            self._take(seed, ask)
        elif self._held_pages() + pages_of(seed) > CAPACITY:
            with pytest.raises(CapacityError):
                ask()
        else:
            fits = self._all_pages() + pages_of(seed) <= CAPACITY
            draft = ask()
            assert isinstance(draft, Draft)
            there = {model["name"] for model in self.pool.status()["models"]}
            gone = {other for other in self.leased if f"image {other}" not in there}
            assert not any(self._held(other) for other in gone)
            assert not (fits and gone), "nothing leaves where there is room"
            for other in gone:
                del self.leased[other], self.pins[other]
            self.drafts[seed] = draft

    @rule(seed=SEED, by_name=st.booleans())
    def open(self, seed: int, by_name: bool) -> None:
        if seed in self.drafts:
            return
        if seed in self.leased:
            self._take(seed, lambda: self.pool.open_image(prints(seed), name=f"image {seed}" if by_name else None))
        else:
            with pytest.raises(ImageNotFound):
                self.pool.open_image(prints(seed))

    @precondition(lambda self: self.drafts)
    @rule(data=st.data(), whole=st.booleans())
    def end_draft(self, data: st.DataObject, whole: bool) -> None:
        seed = data.draw(st.sampled_from(sorted(self.drafts)))
        draft = self.drafts.pop(seed)
        if whole:
            fill(draft)
            self.leased[seed], self.pins[seed] = [draft.seal()], 0
        else:
            draft.close()

    @precondition(lambda self: any(self.leased.values()))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        seed = data.draw(st.sampled_from(sorted(seed for seed, models in self.leased.items() if models)))
        model = self.leased[seed].pop()
        assert painted(model)
        model.close()

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), by=st.sampled_from([1, -1]))
    def pin(self, data: st.DataObject, by: int) -> None:
        seed = data.draw(st.sampled_from(sorted(self.leased)))
        if by > 0:
            self.pins[seed] = self.pool.pin(f"image {seed}")
        elif self.pins[seed]:
            self.pins[seed] = self.pool.unpin(f"image {seed}")

    @rule(seed=SEED, evict=st.booleans())
    def take_out(self, seed: int, evict: bool) -> None:
        take = self.pool.evict if evict else self.pool.remove
        if seed in self.drafts or (seed in self.leased and self._held(seed)):
            with pytest.raises(Refused):
                take(f"image {seed}")
        elif seed in self.leased:
            assert take(f"image {seed}") == pages_of(seed) * PAGE_BYTES
            del self.leased[seed], self.pins[seed]

    @invariant()
    def agrees(self) -> None:
        self.pool._agent.settle()
        self.pool._pool.check()
        states = {model["name"]: model["state"] for model in self.pool.status()["models"]}
        expected = {f"image {seed}": "draft" for seed in self.drafts} | {f"image {i}": "resident" for i in self.leased}
        assert states == expected
        status = self.pool.status()
        assert status["tiers"][0]["used_bytes"] == self._all_pages() * PAGE_BYTES
        assert status["pool"]["leases"] == len(self.drafts) + sum(map(len, self.leased.values()))

    def teardown(self) -> None:
        self.pool.close()
        shutil.rmtree(self.home)

    def _take(self, seed: int, ask: Callable[[], Draft | Model]) -> None:
        model = ask()
        assert isinstance(model, Model)
        assert painted(model)
        self.leased[seed].append(model)

    def _held(self, seed: int) -> bool:
        return bool(self.leased[seed] or self.pins[seed])

    def _all_pages(self) -> int:
        return sum(map(pages_of, (*self.drafts, *self.leased)))

    def _held_pages(self) -> int:
        return sum(map(pages_of, (*self.drafts, *filter(self._held, self.leased))))


TestImages = Images.TestCase
TestImages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
