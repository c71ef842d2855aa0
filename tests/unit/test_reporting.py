"""Reporting: what the pool must know of this process is told until it arrived, and again to the next pool."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.unit.test_sampler_client import mapped
from tiermem import _native, reporting
from tiermem.errors import ConfigError, DaemonUnreachable
from tiermem.reporting import Reporting
from tiermem.rpc import messages as m
from tiermem.sampler.client import Member, member_of
from tiermem.types import PAGE_BYTES

PAGES = 4
PRESENT = m.SamplingOrder("present", 0.01, 1.0)
OFF = m.SamplingOrder("off", 0.1, 0.01)


def member(lease: str, range_: _native.Range) -> Member:
    return member_of(lease, range_, range_.nbytes // PAGE_BYTES)


class Pool:
    """Keeps reports, or is away."""

    def __init__(self) -> None:
        self.requests: list[m.ReportRequest] = []
        self.away = False

    def send(self, request: m.ReportRequest) -> None:
        if self.away:
            raise DaemonUnreachable("away")
        self.requests.append(request)

    def taken(self) -> m.ReportRequest:
        """The only one since the last time."""
        (request,) = self.requests
        self.requests.clear()
        return request


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def own(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Reporting:
    monkeypatch.setattr(reporting, "_PAUSE_S", 0.0)
    monkeypatch.setattr(reporting, "_GATHER_S", 0.0)
    return Reporting(pool.send)


def test_nothing_is_told_where_nothing_is_mapped(own: Reporting, pool: Pool) -> None:
    assert own.pause_s is None
    own.run()
    assert pool.requests == []


def test_an_address_is_told_once_also_where_nothing_is_sampled(own: Reporting, pool: Pool) -> None:
    range_, _content = mapped(PAGES)
    own.obey(OFF)
    own.add("l", member("l", range_), 5.0)
    assert own.pause_s == 0
    own.run()
    assert pool.taken().mapped == (m.MappedReport("l", range_.address, 5.0),)
    assert own.pause_s is None, "the agent sleeps"
    own.run()
    assert pool.requests == []


def test_windows_are_told_as_the_protocol_has_them(own: Reporting, pool: Pool) -> None:
    range_, content = mapped(PAGES)
    own.obey(PRESENT)
    own.add("l", member("l", range_), 5.0)
    own.run()
    assert pool.taken().rung == "present"
    begin_s = time.monotonic()
    touched = [False, True, False, True]
    while not pool.requests or not pool.requests[-1].windows:
        content[np.flatnonzero(touched) * PAGE_BYTES].sum()
        assert time.monotonic() < begin_s + 10
        own.run()
    (window,) = pool.requests[-1].windows
    assert (window.lease_id, np.frombuffer(window.pages, "<i4").tolist()) == ("l", [0, 1, 2, 3])
    assert window.touched == bytes([0b1010])
    assert 0 < window.begin_s < window.end_s <= time.monotonic()
    assert sum(request.agent_s for request in pool.requests) > 0


def test_what_was_not_delivered_is_told_again_but_not_of_what_ended(own: Reporting, pool: Pool) -> None:
    ranges = [mapped(PAGES) for _ in range(2)]
    own.obey(OFF)
    pool.away = True
    for lease, (range_, _) in zip("ab", ranges, strict=True):
        own.add(lease, member(lease, range_), 5.0)
    with pytest.raises(DaemonUnreachable):
        own.run()
    own.remove("a")
    pool.away = False
    assert own.pause_s == 0
    own.run()
    assert [mapping.lease_id for mapping in pool.taken().mapped] == ["b"]


def test_the_next_pool_is_told_all_of_what_is_still_so(own: Reporting, pool: Pool) -> None:
    shared, private = mapped(PAGES), mapped(PAGES, cow=True)
    own.obey(PRESENT)
    own.add("shared", member("shared", shared[0]), 5.0)
    own.add("private", member("private", private[0]), 6.0)
    own.run()
    first = pool.taken()
    assert "copy-on-write" in first.refused
    assert first.untrackable == (m.UntrackableReport("private", PAGES),)
    pool.requests.clear()
    own.announce()
    assert own.pause_s == 0
    own.run()
    again = pool.taken()
    assert sorted(mapping.lease_id for mapping in again.mapped) == ["private", "shared"]
    assert (again.refused, again.untrackable) == (first.refused, first.untrackable)
    own.remove("private")
    own.announce()
    own.run()
    later = pool.taken()
    assert [mapping.lease_id for mapping in later.mapped] == ["shared"]
    assert later.untrackable == ()


def test_a_refusal_that_was_not_delivered_is_not_forgotten(own: Reporting, pool: Pool) -> None:
    private = mapped(PAGES, cow=True)
    own.obey(PRESENT)
    own.add("private", member("private", private[0]), 6.0)
    pool.away = True
    with pytest.raises(DaemonUnreachable):
        own.run()
    pool.away = False
    own.run()
    request = pool.taken()
    assert "copy-on-write" in request.refused
    assert request.untrackable == (m.UntrackableReport("private", PAGES),)
    shared = mapped(PAGES)
    own.add("shared", member("shared", shared[0]), 7.0)
    own.run()
    request = pool.taken()
    assert "copy-on-write" in request.refused, "it stands"
    assert request.untrackable == (), "that was told"


def test_copy_on_write_gives_no_windows_and_lets_the_agent_sleep(own: Reporting, pool: Pool) -> None:
    private, content = mapped(PAGES, cow=True)
    own.obey(PRESENT)
    own.add("private", member("private", private), 6.0)
    for _ in range(5):
        content[::PAGE_BYTES] = 9
        own.run()
    assert not any(request.windows for request in pool.requests)
    assert (content[::PAGE_BYTES] == 9).all()
    assert own.pause_s is None


def test_a_new_mapping_waits_a_moment_and_later_ones_do_not_put_it_off(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Reporting(pool.send)
    now = 1000.0
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now)
    ranges = [mapped(1) for _ in range(3)]
    for number, (range_, _) in enumerate(ranges):
        own.add(str(number), member(str(number), range_), now)
        now += 0.03
    assert own.pause_s == pytest.approx(reporting._PAUSE_S - 0.09)


def test_an_order_of_a_later_version_changes_nothing(own: Reporting) -> None:
    own.obey(PRESENT)
    with pytest.raises(ConfigError, match="telepathy"):
        own.obey(m.SamplingOrder("telepathy", 0.1, 0.01))
    with pytest.raises(ConfigError):
        own.obey(m.SamplingOrder("present", -1.0, 0.01))
    assert own._rung == "present"
