"""HBM tiers: nothing is placed there or moved there, whatever policy is in charge, and copies are counted once each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.test_catalog import CXL, DRAM
from tests.unit.test_policies import ALL
from tests.unit.test_replicas import HBM, Client, Copying
from tiermem.migrator import log
from tiermem.policy import as_copies, as_memory, check_plan, fill_fastest
from tiermem.policy.sample import sample_request, sample_view, with_device
from tiermem.types import PAGE_BYTES

views = st.builds(
    with_device,
    st.builds(sample_view, st.sampled_from([1, 40, 700]), st.integers(0, 50), memory_tiers=st.integers(1, 3),
              full=st.sampled_from([0.5, 1.0]), needed_bytes=st.sampled_from([0, 100 * PAGE_BYTES])),
    st.sampled_from([1, 10, 500]),
)  # fmt: skip


@pytest.mark.parametrize("policy", ALL)
@given(view=views)
@settings(max_examples=15)
def test_policies_of_memory_leave_devices_alone(policy: Any, view: Any) -> None:
    for move in check_plan(view, policy().plan(view)):
        assert move.kind == "move"
        assert 0 not in (move.source, move.target)


@pytest.mark.parametrize("policy", ALL)
@given(view=views)
@settings(max_examples=15)
def test_shown_a_device_as_memory_they_plan_what_can_be(policy: Any, view: Any) -> None:
    plan = check_plan(view, as_copies(policy().plan(as_memory(view, 0)), 0))
    assert {move.kind for move in plan} <= {"copy", "drop"}
    copies, drops = (sum(m.pages for m in plan if m.kind == kind) for kind in ("copy", "drop"))
    assert (copies - drops) * PAGE_BYTES <= view.tiers[0].free_bytes
    assert drops == 0 or copies > 0, "giving up moves no bytes, so it can wait"


@pytest.mark.parametrize("policy", [*ALL, None])
def test_new_pages_are_not_placed_on_a_device(policy: Any) -> None:
    request = sample_request(300, with_device(sample_view(3000, 1), 1000).tiers)
    place = fill_fastest if policy is None or not hasattr(policy, "place") else policy().place
    assert set(place(request).tolist()) <= {-1, 1, 2}


def test_the_view_with_a_device_is_that_view() -> None:
    plain = sample_view(3000, 1)
    view = with_device(plain, 100)
    assert [tier.kind for tier in view.tiers] == ["hbm", *(tier.kind for tier in plain.tiers)]
    assert [tier.id for tier in view.tiers] == [0, 1, 2, 3]
    assert (view.movable == plain.movable).all()
    assert int(view.pages.replicas.sum()) * PAGE_BYTES == view.tiers[0].used_bytes == 50 * PAGE_BYTES
    more = replace(view.pages, replicas=np.full(3000, 3, np.uint8))
    assert (as_memory(replace(view, pages=more), 0).pages.replicas == 2).all(), "copies elsewhere stay"


class Sharing(RuleBasedStateMachine):
    """Three processes with a device, one of them with another, of which each may do anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Copying()
        self.clients: dict[str, Client] = {}
        self.names = iter(range(10_000))

    @rule(device=st.sampled_from(["npu:0", "npu:0", "npu:1"]))
    def join(self, device: str) -> None:
        if len(self.clients) < 3:
            name = f"{next(self.names):05d}"
            self.clients[name] = self.bench.client(name, device=device)

    @rule(data=st.data(), pages=st.lists(st.booleans(), min_size=5, max_size=5))
    def tell(self, data: st.DataObject, pages: list[bool]) -> None:
        if self.clients:
            client = data.draw(st.sampled_from(sorted(self.clients)))
            self.clients[client].pages[:] = pages
            self.clients[client].report()

    @rule(first=st.integers(0, 2), count=st.integers(1, 3), fails=st.booleans())
    def copy(self, first: int, count: int, fails: bool) -> None:
        for client in self.clients.values():
            client.error = "no" if fails else ""
        pages = range(first, min(3, first + count))
        before = self.bench.copied()
        self.bench.copy(1, pages, CXL if first == 2 else DRAM)
        outcome = self.bench.log.entries()[0].outcome
        wanted = sorted({*before, *(2 + page for page in pages)})
        assert self.bench.copied() == (wanted if outcome == log.COPIED else before)
        for client in self.clients.values():
            client.error = ""

    @rule(first=st.integers(0, 1), count=st.integers(1, 2))
    def drop(self, first: int, count: int) -> None:
        pages = range(first, min(2, first + count))
        before = set(self.bench.copied())
        self.bench.drop(0, pages)
        gone = set(pages) <= before
        assert set(self.bench.copied()) == (before - set(pages) if gone else before)

    @rule(data=st.data(), gone=st.booleans())
    def leave(self, data: st.DataObject, gone: bool) -> None:
        if self.clients:
            client = self.clients.pop(data.draw(st.sampled_from(sorted(self.clients))))
            if gone:
                client.pages[:] = False
                client.report(gone=True)
            client.leave()

    @rule()
    def forget(self) -> None:
        with self.bench.lock:
            self.bench.replicas.forget(self.bench.record)
        self.clients.clear()

    @invariant()
    def all_is_counted(self) -> None:
        self.bench.check()
        there = [client.pages for client in self.clients.values() if client.device == "npu:0"]
        assert self.bench.held() == sum(int(pages.sum()) for pages in there)
        union = np.logical_or.reduce(there) if there else np.zeros(5, np.bool_)
        assert self.bench.copied() == np.flatnonzero(union).tolist()
        assert not (self.bench.record.replicas & ~np.uint8(1 << HBM)).any()

    def teardown(self) -> None:
        self.bench.close()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=60, stateful_step_count=20)
