"""The lease table: counts agree with leases, and nobody ends or uses another's."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tiermem.errors import Refused
from tiermem.lease import Lease, LeaseTable, Session

MODELS = ("a", "b", "c")


class Leases(RuleBasedStateMachine):
    """The table beside a plain list of what is held."""

    granted = Bundle("granted")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.sessions = [Session(pid, 0) for pid in (7, 7, 8)]
        self.held: list[Lease] = []

    @rule(target=granted, model=st.sampled_from(MODELS), number=st.integers(0, 2))
    def grant(self, model: str, number: int) -> Lease:
        lease = self.table.grant(model, self.sessions[number])
        self.held.append(lease)
        return lease

    @rule(lease=granted)
    def release(self, lease: Lease) -> None:
        self.table.release(lease)
        self.held = [other for other in self.held if other is not lease]

    @rule(lease=consumes(granted), number=st.integers(0, 2))
    def get(self, lease: Lease, number: int) -> None:
        session = self.sessions[number]
        if lease in self.held and lease.session is session:
            assert self.table.get(lease.id, session) is lease
        else:
            with pytest.raises(Refused, match="open the model again"):
                self.table.get(lease.id, session)

    @rule(number=st.integers(0, 2))
    def end_session(self, number: int) -> None:
        for lease in self.table.of_session(self.sessions[number]):
            self.table.release(lease)
        self.held = [lease for lease in self.held if lease.session is not self.sessions[number]]

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert len(self.table) == len(self.held)
        for model in MODELS:
            of_model = [lease for lease in self.held if lease.model_id == model]
            assert self.table.holders(model) == len(of_model)
            assert self.table.pids(model) == sorted({lease.session.pid for lease in of_model})


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_lease_that_is_brought_along_keeps_its_id_and_is_taken_once() -> None:
    table, first, second = LeaseTable(), Session(1, 0), Session(2, 0)
    assert table.grant("a", first, "brought").id == "brought"
    with pytest.raises(Refused, match="already held by process 1"):
        table.grant("a", second, "brought")
    assert table.holders("a") == 1
    table.check()


def test_check_finds_a_count_that_is_off() -> None:
    table = LeaseTable()
    table.grant("a", Session(1, 0))
    table._per_model["a"] += 1
    with pytest.raises(AssertionError, match="lease counts"):
        table.check()
