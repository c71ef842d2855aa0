"""Accesses, passes, threads and functions of recordings and of perf.data."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.recordings import ADDRESS, PID, TID, end, events, manifest, mapped, model, perf_data, record, sampled, window
from tiermem.recording import Recording, frame, read
from tiermem.report import passes
from tiermem.report.accesses import accesses
from tiermem.report.functions import functions
from tiermem.report.passes import Order, orders
from tiermem.report.threads import threads
from tiermem.types import PAGE_BYTES

ORDER = ["embeddings", "model.layers.0", "model.layers.1", "head"]


def test_accesses_are_in_the_order_of_time_and_say_what_was_touched(tmp_path: Path) -> None:
    stray = sampled([(0.5, 9000)], weight=3)
    process = frame("process", 0.0, pid=PID, start_ticks=1, comm="engine")
    path = record(tmp_path / "r", process, mapped(), events("loads"),
                  sampled([(2.0, 7), (1.0, 2)], weight=40, data_src=2 | 2 << 5 | 13 << 33), stray)  # fmt: skip
    recording = read(path)
    foreign, first, second = accesses(recording)
    assert (foreign.model, foreign.page, foreign.latency_cycles) == ("", None, 3)
    assert (first.time_s, first.pid, first.tid, first.comm, first.event) == (1.0, PID, TID, "engine", "loads")
    assert (first.model, first.layer, first.tensor) == ("tiny", "model.layers.0", "model.layers.0.weight")
    assert (first.page, first.address) == (2, ADDRESS + 2 * PAGE_BYTES + PAGE_BYTES // 2)
    assert (first.source, first.latency_cycles) == ("RAM", 40)
    assert second.layer == "head"
    assert accesses(recording, limit=1) == [foreign]
    assert accesses(recording, ours=True, limit=1) == [first]


def one(recording: Recording) -> Order:
    (order,) = orders(recording)
    return order


def test_a_forward_pass_over_and_over_is_in_checkpoint_order(tmp_path: Path) -> None:
    rows = [(1 + 0.1 * i + 0.001 * j, i % 8) for i in range(40) for j in range(3)]
    order = one(read(record(tmp_path / "r", mapped(), events("loads"), sampled(rows))))
    assert (order.verdict, order.layers, order.complete, order.forward) == (passes.IN_ORDER, 4, 5, 1.0)
    assert [part.layers for part in order.passes] == [tuple(ORDER)] * 5
    assert order.passes[1].begin_s == pytest.approx(1.8)


def test_recording_may_begin_and_end_within_a_pass(tmp_path: Path) -> None:
    rows = [(1 + 0.1 * i, i % 8) for i in range(5, 27)]
    order = one(read(record(tmp_path / "r", mapped(), events("loads"), sampled(rows))))
    assert (order.verdict, order.complete, len(order.passes)) == (passes.IN_ORDER, 2, 4)


def test_layers_are_ordered_by_number_where_the_file_is_not(tmp_path: Path) -> None:
    layers = ["head", "model.layers.0", "model.layers.1", "model.layers.10", "model.layers.2", "embeddings"]
    described = manifest(layers, pages=1)
    place = [layers.index(name) for name in ("embeddings", *(f"model.layers.{i}" for i in (0, 1, 2, 10)), "head")]
    rows = [(1 + 0.1 * i, place[i % 6]) for i in range(30)]
    mapping = frame("map", 0.0, pid=PID, lease="l", model="e", address=ADDRESS, pages=6)
    path = record(tmp_path / "r", model(described, id="e", name="sorted"), mapping, events("loads"), sampled(rows))
    assert one(read(path)).verdict == passes.IN_ORDER
    rows = [(1 + 0.1 * i, i % 6) for i in range(30)]
    path = record(tmp_path / "r", model(described, id="e", name="sorted"), mapping, events("loads"), sampled(rows))
    assert one(read(path)).verdict == passes.NO_ORDER


def test_a_random_order_is_none(tmp_path: Path) -> None:
    source = random.Random(3)
    rows = [(1 + 0.1 * i, source.randrange(8)) for i in range(200)]
    order = one(read(record(tmp_path / "r", mapped(), events("loads"), sampled(rows))))
    assert order.verdict == passes.NO_ORDER
    assert 0.4 < order.forward < 0.8


def test_passes_that_skip_layers_have_gaps(tmp_path: Path) -> None:
    rows = [(1 + 0.1 * i, page) for i, page in enumerate([0, 2, 4, 6, 0, 2, 6, 0, 4, 6, 0, 2, 4, 6])]
    order = one(read(record(tmp_path / "r", mapped(), events("loads"), sampled(rows))))
    assert (order.verdict, order.complete, len(order.passes)) == (passes.WITH_GAPS, 2, 4)


@pytest.mark.parametrize("pages", [[], [0, 1], [0, 2, 0, 2, 0, 2], [0, 4]])
def test_too_little_is_no_verdict(tmp_path: Path, pages: list[int]) -> None:
    rows = [(1 + 0.1 * i, page) for i, page in enumerate(pages)]
    found = orders(read(record(tmp_path / "r", mapped(), events("loads"), sampled(rows))))
    assert [order.verdict for order in found] == [passes.TOO_LITTLE] * bool(pages)


def test_windows_tell_the_order_from_one_to_the_next(tmp_path: Path) -> None:
    shown = [window(i / 10, (i + 1) / 10, range(8), [i % 8]) for i in range(40)]
    order = one(read(record(tmp_path / "r", mapped(), *shown)))
    assert (order.verdict, order.complete) == (passes.IN_ORDER, 5)
    shown = [window(i / 10, (i + 1) / 10, range(8), [-i % 8]) for i in range(40)]
    assert one(read(record(tmp_path / "r", mapped(), *shown))).verdict == passes.NO_ORDER


def test_windows_that_hold_whole_passes_tell_no_order(tmp_path: Path) -> None:
    shown = [window(i, i + 1, range(8), range(8)) for i in range(40)]
    assert orders(read(record(tmp_path / "r", mapped(), *shown))) == []


def test_threads_and_their_models(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r", frame("process", 0.0, pid=PID, start_ticks=1, comm="engine"),
        frame("thread", 0.0, pid=PID, tid=7, comm="worker"), mapped(), events("loads"),
        sampled([(1.0, 0), (1.1, 1), (1.2, 9000)], tid=7), sampled([(1.0, 0)], tid=8), end(2.0),
    )  # fmt: skip
    worker, other = threads(read(path))
    assert (worker.tid, worker.comm, worker.samples, worker.share) == (7, "worker", 3, 0.75)
    assert (worker.in_models, worker.models) == (2, ("tiny",))
    assert (other.tid, other.comm, other.samples) == (8, "engine", 1)
    assert threads(read(record(tmp_path / "none"))) == []


def test_functions_are_summed_up(tmp_path: Path) -> None:
    image = frame("image", 0.0, pid=PID, address=0x1000, nbytes=0x1000, offset=0, path="[vdso]")
    path = record(tmp_path / "r", image, mapped(), events("loads"),
                  sampled([(1.0, 0), (1.0, 1), (1.0, 1)], ip=0x1010), sampled([(1.0, 0)], ip=0x5000))  # fmt: skip
    rows, notes = functions(read(path))
    assert [(row.symbol, row.file, row.samples, row.share) for row in rows] == [
        ("[vdso]+0x10", "[vdso]", 3, 0.75), ("unknown", "", 1, 0.25)
    ]  # fmt: skip
    assert notes == []


def test_samples_of_perf_data_are_placed_in_files() -> None:
    found = accesses(perf_data())
    assert [(access.model, access.page) for access in found] == [
        ("a.so", 1), ("a.so", 1), ("a.so", 2), ("[anon]", 1016), ("[anon]", 1016), ("b.so", 0), ("a.so", 1)
    ]  # fmt: skip
    assert [access.comm for access in found] == ["main"] * 5 + ["main", "child"]
    assert [access.event for access in found] == ["faults"] * 7
    first, second = threads(perf_data())
    assert (first.comm, first.samples, first.models) == ("main", 6, ("a.so", "[anon]", "b.so"))
    assert (second.pid, second.comm, second.models) == (2, "child", ("a.so",))


def test_functions_of_perf_data_are_in_executable_images_alone() -> None:
    rows, notes = functions(perf_data())
    assert [(row.symbol, row.samples) for row in rows] == [("unknown", 6), ("b.so+0x10", 1)]
    assert notes == ["/lib/b.so: no symbols: No such file or directory"]
