"""Sampling inside a client, on sparse memory files: what is told, when the next tick is due, and what is refused."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tiermem import _native
from tiermem.errors import ConfigError, NativeError, Refused
from tiermem.observations import Rung
from tiermem.sampler import client as client_module
from tiermem.sampler.client import ClientSampling, Order, Report, member_of
from tiermem.sampler.mappings import Mapping
from tiermem.sampler.present import PresentSampler, turn_order
from tiermem.types import PAGE_BYTES

PRESENT = Order("present", epoch_s=0.01, budget=1.0)


def mapped(pages: int, *, cow: bool = False) -> tuple[_native.Range, npt.NDArray[np.uint8]]:
    """A sparse memory file of zeros, mapped, and its bytes."""
    fd = os.memfd_create("model", os.MFD_CLOEXEC)
    os.truncate(fd, pages * PAGE_BYTES)
    range_ = _native.Range.reserve(pages * PAGE_BYTES, _native.Access.COW if cow else _native.Access.SHARED)
    range_.map(0, fd, pages * PAGE_BYTES)
    os.close(fd)
    return range_, np.frombuffer(range_.buffer(), np.uint8)


def busy(sampling: ClientSampling, work: Callable[[], object] = lambda: None) -> Report | None:
    """A tick after an epoch in which this client did `work` and used its CPU."""
    work()
    until = time.thread_time() + 0.002
    while time.thread_time() < until:
        pass
    return sampling.tick(time.monotonic())


def test_nothing_to_sample_means_sleep_for_good() -> None:
    sampling = ClientSampling()
    assert sampling.pause_s is None
    sampling.configure(PRESENT)
    assert sampling.pause_s is None
    assert sampling.tick(time.monotonic()) is None


def test_a_mapping_is_sampled_until_it_is_unmapped_or_removed() -> None:
    sampling = ClientSampling()
    sampling.configure(PRESENT)
    for ending in ("unmapped", "removed"):
        range_, content = mapped(2)
        sampling.add("a", member_of("a", range_, 2))
        assert sampling.pause_s is not None
        for _ in range(3):
            busy(sampling)
        if ending == "removed":
            sampling.remove("a")
        del range_, content
        gc.collect()
        busy(sampling)
        assert sampling.pause_s is None
        assert sampling.tick(time.monotonic()) is None


def test_nothing_is_due_while_sampling_is_off() -> None:
    sampling = ClientSampling()
    range_, _content = mapped(2)
    sampling.add("a", member_of("a", range_, 2))
    assert sampling.pause_s is None
    assert sampling.tick(time.monotonic()) is None


def test_a_mapping_that_ended_before_it_was_told_is_never_told() -> None:
    sampling = ClientSampling()
    range_, content = mapped(2)
    sampling.add("a", member_of("a", range_, 2))
    del range_, content
    gc.collect()
    assert sampling.tick(time.monotonic()) is None
    assert sampling.pause_s is None


def test_windows_say_which_pages_were_touched_between_two_ticks() -> None:
    sampling = ClientSampling()
    range_, content = mapped(16)
    content[::PAGE_BYTES].sum()
    sampling.add("a", member_of("a", range_, 16))
    sampling.configure(PRESENT)
    for _ in range(12):  # until all pages are sampled in every epoch
        busy(sampling)
    before = time.monotonic()
    busy(sampling)
    report = busy(sampling, lambda: content[[PAGE_BYTES * 3, PAGE_BYTES * 11 + 77]].sum())
    assert report is not None
    (window,) = report.windows
    assert window.key == "a"
    bits = window.bits
    assert bits.rung is Rung.PRESENT
    assert bits.pages.dtype == np.int32
    assert bits.pages.tolist() == list(range(16))
    assert bits.pages[bits.touched].tolist() == [3, 11]
    assert before <= bits.begin_s < bits.end_s <= time.monotonic()
    assert report.fault_s > 0
    assert report.agent_s > 0
    assert report.client_s > 0.001


def test_what_was_mapped_beforehand_is_no_touch() -> None:
    sampling = ClientSampling()
    range_, content = mapped(8)
    content[::PAGE_BYTES].sum()
    sampling.add("a", member_of("a", range_, 8))
    sampling.configure(PRESENT)
    reports = [busy(sampling) for _ in range(12)]
    windows = [window for report in reports if report for window in report.windows]
    assert windows
    assert not any(window.bits.touched.any() for window in windows)


def test_an_idle_client_is_skipped_and_its_window_lasts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = [1.0]
    monkeypatch.setattr(client_module.time, "process_time", lambda: cpu[0])
    monkeypatch.setattr(client_module.time, "thread_time", lambda: 0.0)
    sampling = ClientSampling()
    range_, content = mapped(4)
    sampling.add("a", member_of("a", range_, 4))
    sampling.configure(Order("present", epoch_s=0.1))
    began_s = time.monotonic()
    sampling.tick(100.0)
    content[0].sum()
    skipped_s = time.monotonic()
    for now, pause in ((100.1, 0.2), (100.3, 0.4), (100.7, 0.8), (101.5, 1.0)):
        assert sampling.tick(now) is None
        assert sampling.pause_s == pytest.approx(pause)
    cpu[0] += 0.5
    report = sampling.tick(102.5)
    assert report is not None
    (window,) = report.windows
    assert began_s < window.bits.begin_s < skipped_s < window.bits.end_s
    assert report.windows[0].bits.touched.tolist() == [True, False, False, False]
    assert sampling.pause_s == pytest.approx(0.1)


def test_copy_on_write_is_told_but_never_sampled() -> None:
    sampling = ClientSampling()
    range_, content = mapped(4, cow=True)
    with pytest.raises(Refused, match="copy-on-write"):
        Mapping("a", range_, 4)
    sampling.add("a", member_of("a", range_, 4))
    sampling.configure(PRESENT)
    content[::PAGE_BYTES] = 5
    assert sampling.pause_s == 0, "something is to be told"
    report = busy(sampling)
    assert report is not None
    assert "copy-on-write" in report.refused
    for _ in range(5):
        assert not getattr(busy(sampling), "windows", ())
    assert content[::PAGE_BYTES].tolist() == [5] * 4
    assert sampling.pause_s is None  # nothing but that


def test_more_pages_than_the_range_has_are_refused() -> None:
    range_, _ = mapped(2)
    with pytest.raises(Refused, match="3 pages"):
        ClientSampling().add("a", member_of("a", range_, 3))


def test_pinned_pages_are_untrackable_and_told_once() -> None:
    sampling = ClientSampling()
    range_, content = mapped(4)
    sampling.add("a", member_of("a", range_, 4))
    sampling.configure(PRESENT)
    sampling.mark_pinned("a", [1, 3])
    report = busy(sampling)
    assert report is not None
    assert {key: pages.tolist() for key, pages in report.untrackable.items()} == {"a": [1, 3]}
    for _ in range(4):
        report = busy(sampling, lambda: content[::PAGE_BYTES].sum())
        assert report is not None
        assert not report.untrackable
        assert report.windows[0].bits.pages.tolist() == [0, 2]


def test_memory_that_somebody_pinned_untold_makes_every_page_untrackable(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmPin:\t    4096 kB\nVmHWM:\t 1 kB\n")
    sampling = ClientSampling(status)
    range_, _ = mapped(4)
    sampling.add("a", member_of("a", range_, 4))
    sampling.configure(PRESENT)
    report = busy(sampling)
    assert report is not None
    assert report.untrackable["a"].tolist() == [0, 1, 2, 3]
    assert "VmPin" in report.refused
    assert report.windows == ()
    sampling.mark_pinned("a", [0, 1])  # that is all of the 4 MiB
    reports = [busy(sampling), busy(sampling)]
    assert reports[0] is not None
    assert reports[0].untrackable["a"].tolist() == [0, 1]
    assert reports[0].refused == ""
    assert reports[1] is not None
    assert reports[1].windows[0].bits.pages.tolist() == [2, 3]


def test_no_right_to_the_page_tables_is_told_and_asked_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NativeError("cannot read the page tables: Permission denied", 13)

    monkeypatch.setattr(_native, "Pagemap", refuse)
    sampling = ClientSampling()
    range_, _ = mapped(2)
    sampling.add("a", member_of("a", range_, 2))
    sampling.configure(PRESENT)
    report = sampling.tick(time.monotonic())
    assert report is not None
    assert "Permission denied" in report.refused
    assert sampling.pause_s is None
    monkeypatch.undo()
    sampling.configure(PRESENT)  # asked again
    report = busy(sampling)
    assert report is not None
    assert report.refused == ""


@pytest.mark.parametrize(
    "order", [("perf", 0.1, 0.01), ("present", 0.0, 0.01), ("present", 0.1, 0.0), ("off", 0.1, 2.0)]
)
def test_orders_that_make_no_sense_are_refused(order: tuple[str, float, float]) -> None:
    with pytest.raises(ConfigError):
        Order(*order)


def test_a_forked_child_does_nothing_and_does_not_hang() -> None:
    sampling = ClientSampling()
    range_, content = mapped(4)
    sampling.add("a", member_of("a", range_, 4))
    sampling.configure(PRESENT)
    for _ in range(3):
        busy(sampling)
    with sampling._lock:  # as another thread of the parent might at that moment
        child = os.fork()
        if child == 0:
            quiet = sampling.pause_s is None and sampling.tick(time.monotonic()) is None
            sampling.add("b", member_of("b", range_, 4))
            sampling.configure(Order("off"))
            sampling.mark_pinned("a", [0])
            os._exit(0 if quiet else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    busy(sampling)
    report = busy(sampling, lambda: content[PAGE_BYTES].sum())
    assert report is not None
    assert report.windows[0].bits.touched.tolist() == [False, True, False, False]


def test_each_page_has_its_turn_equally_often_and_no_two_runs_follow_each_other() -> None:
    range_, content = mapped(100)
    mapping, sampler = Mapping("a", range_, 100), PresentSampler()
    counts = np.zeros(100, np.int64)
    for now in range(41):  # of 10 pages each; the first begins only
        for window in sampler.sample([mapping], float(now), 10, 1, 0.1).windows:
            counts[window.bits.pages] += 1
    assert counts.tolist() == [4] * 100
    assert content[0] == 0


@pytest.mark.parametrize("pages", [1, 31, 32, 33, 1024, 71680])
def test_the_order_of_turns_has_each_page_once_and_scatters_runs_of_neighbours(pages: int) -> None:
    order = turn_order(pages).astype(np.int64)
    assert np.array_equal(np.sort(order), np.arange(pages))
    jumps = np.count_nonzero(np.diff(order) != 1)
    assert jumps <= -(-pages // 32)
    if pages >= 1024:
        assert jumps > pages / 32 * 0.8


def test_a_quota_below_one_page_an_epoch_still_reaches_every_page_of_small_mappings() -> None:
    ranges = [mapped(pages) for pages in (1, 3, 60)]
    mappings = [Mapping(str(number), range_, len(content) // PAGE_BYTES)
                for number, (range_, content) in enumerate(ranges)]  # fmt: skip
    sampler = PresentSampler()
    seen: dict[str, list[int]] = {mapping.key: [0] * mapping.pages for mapping in mappings}
    for now in range(1, 66):
        for window in sampler.sample(mappings, float(now), 4, 1, 0.1).windows:
            for page in window.bits.pages.tolist():
                seen[window.key][page] += 1
    assert all(3 <= count <= 5 for counts in seen.values() for count in counts), seen
