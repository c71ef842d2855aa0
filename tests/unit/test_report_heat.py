"""Heat of recordings: touched, cold and unknown are told apart, whatever rows are asked for; and its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.recordings import end, events, manifest, mapped, model, perf_data, record, sampled, window
from tiermem.errors import ConfigError
from tiermem.perfdata import Image
from tiermem.recording import frame, read
from tiermem.report import plot
from tiermem.report.heat import HeatRow, file_heat, heat
from tiermem.types import PAGE_BYTES


def states(rows: Sequence[HeatRow]) -> dict[str, tuple[int, int, int]]:
    return {row.part: (row.touched, row.cold, row.unknown) for row in rows}


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """Pages 0 to 3 were sampled: 0 and 2 touched in one of two windows, 1 and 3 never; nobody looked at the others."""
    return record(
        tmp_path / "r", mapped(), window(0.0, 1.0, [0, 1, 2, 3], [0, 2]), window(1.0, 2.0, [0, 1, 2, 3], []), end(2.0)
    )


def test_layers_have_touched_cold_and_unknown_pages(windows: Path) -> None:
    rows = heat(read(windows), "layer")
    assert states(rows) == {
        "embeddings": (1, 1, 0), "model.layers.0": (1, 1, 0), "model.layers.1": (0, 0, 2), "head": (0, 0, 2)
    }  # fmt: skip
    assert rows[0].touches_per_s == pytest.approx(np.log(2) / 2)  # of two pages, one touched in half of its windows
    assert (rows[2].touches_per_s, rows[2].age_s, rows[2].rungs) == (None, None, ())
    assert (rows[0].age_s, rows[0].rungs, rows[0].observed) == (1.0, ("present",), 1)


def test_the_other_rows_agree_with_the_layers(windows: Path) -> None:
    recording = read(windows)
    (whole,) = heat(recording, "model")
    assert (whole.part, whole.pages, whole.touched, whole.cold, whole.unknown) == ("", 8, 2, 2, 4)
    assert states(heat(recording, "tensor"))["model.layers.0.weight"] == (1, 1, 0)
    pages = heat(recording, "page")
    assert [(row.page, row.part) for row in pages[:3]] == [(0, "embeddings"), (1, "embeddings"), (2, "model.layers.0")]
    assert [(row.touched, row.cold, row.unknown) for row in pages] == [(1, 0, 0), (0, 1, 0)] * 2 + [(0, 0, 1)] * 4
    assert [row.touches_per_s for row in pages[1:5:3]] == [0.0, None]
    assert heat(recording, "expert") == []
    with pytest.raises(ValueError, match="colour"):
        heat(recording, "colour")


def test_experts_have_rows_of_their_own(tmp_path: Path) -> None:
    layers = [f"model.layers.0.mlp.experts.{i}" for i in range(2)]
    described = manifest(layers)
    path = tmp_path / "r"
    record(path, model(described, id="e", name="moe"), window_of("e", 0.0, 1.0, [0, 1, 2, 3], [2]), end(1.0))
    assert states(heat(read(path), "expert")) == {
        "model.layers.0 expert 0": (0, 2, 0), "model.layers.0 expert 1": (1, 1, 0)
    }  # fmt: skip


def window_of(model_id: str, begin_s: float, end_s: float, pages: list[int], touched: list[int]) -> bytes:
    bits = np.packbits([page in touched for page in pages], bitorder="little").tobytes()
    return frame("bits", end_s, pid=1, lease="m", model=model_id, rung="present", begin_s=begin_s, end_s=end_s,
                 pages=np.array(pages, "<i4").tobytes(), touched=bits)  # fmt: skip


def test_hardware_samples_watch_every_page(tmp_path: Path) -> None:
    path = record(tmp_path / "r", mapped(), events("mem-loads"), sampled([(1.0, 0), (1.0, 0), (9.0, 3)]), end(10.0))
    rows = heat(read(path), "page")
    assert [(row.touched, row.cold, row.unknown) for row in rows] == [(1, 0, 0), *[(0, 1, 0)] * 2, (1, 0, 0)] + [
        (0, 1, 0)
    ] * 4
    assert rows[0].touches_per_s == pytest.approx(2 * 1000 / 10)  # each sample stands for its period
    assert rows[1].touches_per_s == 0
    assert rows[0].age_s == pytest.approx(8.9, abs=0.2)
    assert rows[3].age_s == pytest.approx(0.9, abs=0.2)
    assert rows[0].rungs == ("perf",)


def test_faults_show_pages_that_were_touched_and_none_that_are_cold(tmp_path: Path) -> None:
    path = record(tmp_path / "r", mapped(), events("faults", rung="present"), sampled([(1.0, 0)]), end(10.0))
    (first, *others) = heat(read(path), "page")
    assert (first.touched, first.cold, first.unknown, first.observed) == (1, 0, 0, 1)
    assert first.touches_per_s is None
    assert {(row.touched, row.cold, row.unknown) for row in others} == {(0, 0, 1)}


def test_nothing_observed_is_all_unknown(tmp_path: Path) -> None:
    (row,) = heat(read(record(tmp_path / "r")), "model")
    assert (row.touched, row.cold, row.unknown) == (0, 0, 8)


def test_the_picture_has_gaps_where_nobody_looked(windows: Path) -> None:
    (band,) = plot.bands(read(windows))
    half = plot.COLUMNS // 2
    assert band.values.shape == (8, plot.COLUMNS)
    assert np.isnan(band.values[4:]).all()
    assert (band.values[0, : half - 1] == 1).all()
    assert (band.values[0, half + 1 :] == 0).all()
    assert (band.values[1] == 0).all()
    assert [text for _, text in band.labels] == ["embeddings", "model.layers.0", "model.layers.1", "head"]
    assert [row for row, _ in band.labels] == [0, 2, 4, 6]


def test_samples_are_counted_where_and_when_they_were(tmp_path: Path) -> None:
    rows = [(0.01, 0), (9.99, 7), (9.99, 7)]
    path = record(tmp_path / "r", mapped(), events("loads"), sampled(rows), end(10.0))
    (band,) = plot.bands(read(path))
    assert (band.values[0, 0], band.values[7, -1], band.values.sum()) == (1, 2, 3)
    path = record(tmp_path / "r", mapped(), events("faults", rung="present"), sampled(rows), end(10.0))
    (band,) = plot.bands(read(path))
    assert np.isfinite(band.values).sum() == 2  # of what faults did not show nothing is known


def test_a_picture_is_written(windows: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="lacks matplotlib: pip install 'tiermem[report]'")
    record(tmp_path / "names", model(manifest(["$\\frac{$", "b" * 300]), id="e", name="$\\nothing$"),
           window_of("e", 0.0, 1.0, [0, 1], [1]))  # fmt: skip
    for path in (windows, tmp_path / "names"):
        assert plot.draw(read(path), tmp_path / "out.png") == 1
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nothing was observed"):
        plot.draw(read(record(tmp_path / "r2")), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_files_of_perf_data_are_told_apart() -> None:
    assert [(row.file, row.page, row.pages, row.samples) for row in file_heat(perf_data())] == [
        ("/lib/a.so", None, 2, 4), ("[anon]", None, 1, 2), ("/lib/b.so", None, 1, 1)
    ]  # fmt: skip
    rows = file_heat(perf_data(), by_page=True)
    assert [(row.file, row.page, row.samples) for row in rows] == [
        ("/lib/a.so", 1, 3), ("[anon]", 1016, 2), ("/lib/a.so", 2, 1), ("/lib/b.so", 0, 1)
    ]  # fmt: skip
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_files_of_perf_data_are_drawn() -> None:
    drawn = plot.bands(perf_data())
    assert [band.title for band in drawn] == ["/lib/a.so", "[anon]", "/lib/b.so"]
    assert [float(np.nansum(band.values)) for band in drawn] == [4, 2, 1]
    assert drawn[0].values.shape == (2, plot.COLUMNS)


def test_pages_of_what_is_no_file_are_addresses() -> None:
    start = 0x40000000
    heap = Image(1, 10, start, 8 * PAGE_BYTES, PAGE_BYTES, "[heap]", False)
    rows = file_heat(dataclasses.replace(perf_data(), images=(heap,), forks=()), by_page=True)
    assert {row.page for row in rows if row.file == "[heap]"} == {start // PAGE_BYTES, start // PAGE_BYTES + 1}
