"""Traces: columns that hold together, files that are equal and refuse damage, and what becomes of a recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.recordings import MODEL, PID, end, events, mapped, model, record, sampled, window
from tests.traces import trace
from tiermem.errors import RecordingError
from tiermem.observations import Bits, Rung
from tiermem.recording import bits_frame, frame
from tiermem.replay.trace import read_trace


def test_visits_are_put_in_the_order_of_time_with_their_pages() -> None:
    made = trace([(3.0, [2, 3]), (1.0, [0]), (2.0, [3, 1, 0])])
    assert made.visit_s.tolist() == [1.0, 2.0, 3.0]
    assert made.page.tolist() == [0, 3, 1, 0, 2, 3]
    assert made.first.tolist() == [0, 1, 4, 6]


def test_a_file_gives_the_trace_back_and_equal_traces_equal_files(tmp_path: Path) -> None:
    made = trace([(1.0, [0, 3]), (2.0, [1])], models=2, shifts_s=(5.0,))
    for name in "ab":
        made.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = read_trace(tmp_path / "a")
    for name, value in vars(made).items():
        assert np.array_equal(getattr(read, name), value), name
        if isinstance(value, np.ndarray):
            assert getattr(read, name).dtype == value.dtype
            assert not getattr(read, name).flags.writeable


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"page": np.array([0, 4], np.int32)}, "touches of pages"),
        ({"page": np.array([0, -1], np.int32)}, "touches of pages"),
        ({"first": np.array([0, 1, 1])}, "share out"),
        ({"first": np.array([0, 2, 2])}, "share out"),
        ({"visit_s": np.array([2.0, 1.0])}, "ascend"),
        ({"visit_s": np.array([1.0, np.nan])}, "ascend"),
        ({"visit_s": np.array([1.0, 11.0])}, "ascend"),
        ({"names": ("a", "b")}, "2 models"),
        ({"model": np.array([0, 0, 2, 2], np.int32)}, "1 models"),
        ({"order": np.array([0], np.int32)}, "one number for each"),
        ({"tensor_class": np.array([0, 0, 0, 99], np.int8)}, "tensor classes"),
        ({"use_s": np.array([1.0])}, "times of 0 uses"),
        (
            {"use_s": np.array([1.0]), "use_model": np.array([1], np.int32), "use_change": np.array([1], np.int8)},
            "uses",
        ),
        ({"end_s": float("inf")}, "ends at"),
        ({"model": np.empty(0, np.int32)}, "0 pages"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(change: dict[str, object], what: str) -> None:
    made = trace([(1.0, [0]), (2.0, [1])])
    with pytest.raises(RecordingError, match=what):
        type(made)(**(vars(made) | change))


def test_a_damaged_file_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    path, random = tmp_path / "t", np.random.default_rng(0)
    trace([(1.0, [0, 3]), (2.0, [1])]).write(path)
    whole = path.read_bytes()
    refused = 0
    for turn in range(600):
        damaged = bytearray(whole)
        if turn % 3:
            for at in random.integers(4, len(whole), 1 + turn % 4).tolist():
                damaged[at] ^= int(random.integers(1, 256))
        else:
            del damaged[int(random.integers(4, len(whole))) :]
        path.write_bytes(damaged)
        try:
            read_trace(path)
        except RecordingError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_what_is_no_trace_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(RecordingError, match="f: "):
        read_trace(tmp_path / "f")


def test_windows_of_a_recording_are_visits_at_their_ends(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r", frame("open", 1.0, pid=PID, model=MODEL, lease="l"), mapped(),
        window(0.0, 1.0, [0, 1, 2], [0, 2]), window(1.0, 2.0, [3, 4], []),
        frame("release", 3.0, pid=PID, lease="l"), end(10.0),
    )  # fmt: skip
    made = read_trace(path)
    assert made.visit_s.tolist() == [1.0]
    assert made.page.tolist() == [0, 2]
    assert (made.use_s.tolist(), made.use_model.tolist(), made.use_change.tolist()) == ([1.0, 3.0], [0, 0], [1, -1])
    assert made.end_s == 10.0
    assert any("not seen" in note for note in made.notes)


def test_pages_of_a_second_model_come_behind_those_of_the_first(tmp_path: Path) -> None:
    bits = Bits(Rung.PRESENT, 0.0, 1.0, np.array([0, 3], np.int32), np.array([False, True]))
    path = record(tmp_path / "r", model(id="ef" * 32, name="two"), bits_frame(1.0, PID, "l", "ef" * 32, bits), end(2.0))
    made = read_trace(path)
    assert made.names == ("tiny", "two")
    assert made.page.tolist() == [8 + 3]
    assert made.model[made.page].tolist() == [1]


def test_samples_of_a_recording_are_visits_of_distinct_pages(tmp_path: Path) -> None:
    path = record(
        tmp_path / "r", mapped(), events("mem-loads"),
        sampled([(1.001, 5), (1.002, 4), (1.003, 5), (1.021, 5), (1.022, 0)]), end(2.0),
    )  # fmt: skip
    made = read_trace(path)
    assert np.allclose(made.visit_s, [1.0, 1.02])
    assert [made.page[a:b].tolist() for a, b in zip(made.first, made.first[1:], strict=False)] == [[4, 5], [0, 5]]


def test_a_recording_in_which_nothing_was_touched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no touch of a model"):
        read_trace(record(tmp_path / "r", mapped(), window(0.0, 1.0, [0], []), end(2.0)))
