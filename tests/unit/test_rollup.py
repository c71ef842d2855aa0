"""Rollups against brute force: for each row, a loop over its tensors' bytes and over the pages that these lie on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.addresses import AddressBook
from tiermem.heat import Heat, HeatColumns
from tiermem.observations import Bits, Counts, Rung
from tiermem.rollup import By, Expert, TensorIndex, experts_of, rollup
from tiermem.samples import SAMPLE
from tiermem.types import PAGE_BYTES, Extent, Manifest, SegmentInfo, TensorInfo

HALF = PAGE_BYTES // 2
Tensor = tuple[str, int, tuple[int, ...]]


def manifest_of(layers: dict[str, Sequence[Tensor]], gap: int = 0) -> Manifest:
    """One segment a layer; of each tensor the name, the bytes and the shape; `gap` bytes between tensors."""
    segments, tensors = [], []
    for number, (layer, members) in enumerate(layers.items()):
        offset = 0
        for name, nbytes, shape in members:
            tensors.append(TensorInfo(name, "U8", shape, 0, 0, Extent(number, offset, nbytes)))
            offset += nbytes + gap
        segments.append(SegmentInfo(layer, max(offset - gap, 1)))
    return Manifest("/weights", "id", (), tuple(segments), tuple(tensors))


def pages_of(manifest: Manifest, tensor: TensorInfo) -> set[int]:
    first = sum(segment.pages for segment in manifest.segments[: tensor.extent.segment])
    begin, end = tensor.extent.offset, tensor.extent.offset + tensor.nbytes
    return {first + page for page in range(1000) if begin < end and begin < (page + 1) * PAGE_BYTES
            and page * PAGE_BYTES < end}  # fmt: skip


def heat_of(pages: int, seed: int, counted: bool) -> HeatColumns:
    random, heat = np.random.default_rng(seed), Heat(pages)
    for n in range(3):
        chosen = np.flatnonzero(random.random(pages) < 0.5).astype(np.int32)
        rung = (Rung.ACCESSED, Rung.PRESENT)[n % 2]
        heat.add_bits(Bits(rung, n, n + 1.0, chosen, random.random(len(chosen)) < 0.5))
    heat.add_declared(np.flatnonzero(random.random(pages) < 0.2), 3.5)
    if counted:
        amounts = random.integers(0, 3, pages, np.uint32)
        heat.add_counts(Counts(Rung.PERF, 3.0, 4.0, np.arange(pages, dtype=np.int32), amounts, 7.0))
    return heat.columns(5.0)


def brute(columns: HeatColumns, pages: set[int]) -> tuple[object, ...]:
    known = [p for p in pages if columns.known[p]]
    rates = [float(columns.rate[p]) for p in known]
    ages = [float(columns.age_s[p]) for p in pages if not np.isnan(columns.age_s[p])]
    return (
        len(pages), len(known), sum(columns.observed[p] > 0 for p in pages),
        pytest.approx(sum(rates) / len(rates) if rates else math.nan, nan_ok=True),
        pytest.approx(max(rates, default=math.nan), nan_ok=True), sum(int(columns.observed[p]) for p in pages),
        pytest.approx(min(ages, default=math.nan), nan_ok=True),
        tuple(rung for rung in Rung if rung and rung in {columns.rung[p] for p in pages}),
    )  # fmt: skip


def shown(manifest: Manifest, columns: HeatColumns, by: By) -> dict[str, tuple[object, ...]]:
    table = rollup(manifest, columns, by, "mine")
    figures = (table.pages, table.known, table.touched, table.mean_rate, table.max_rate, table.observed, table.age_s)
    return {
        name: (*(column[row].item() for column in figures), table.rungs_of(row)) for row, name in enumerate(table.names)
    }


sizes = st.lists(st.sampled_from([0, 1, 4096, HALF, HALF + 1, PAGE_BYTES, PAGE_BYTES * 2 + 5]), max_size=6)


@given(st.lists(sizes, max_size=4), st.sampled_from([0, 4096]), st.integers(0, 1000), st.booleans())
def test_every_row_is_what_its_pages_say(layers: list[list[int]], gap: int, seed: int, counted: bool) -> None:
    manifest = manifest_of(
        {
            f"l.{i}": [(f"l.{i}.experts.{j // 2}.w{j}", nbytes, (nbytes,)) for j, nbytes in enumerate(members)]
            for i, members in enumerate(layers)
        },
        gap,
    )
    columns = heat_of(sum(segment.pages for segment in manifest.segments), seed, counted)
    rows: dict[By, dict[str, set[int]]] = {"tensor": {}, "expert": {}, "layer": {}, "model": {}}
    for tensor in manifest.tensors:
        layer, number = manifest.segments[tensor.extent.segment].layer, tensor.name.split(".")[3]
        keys: dict[By, str] = {"tensor": tensor.name, "expert": f"{layer} expert {number}", "layer": layer,
                               "model": "mine"}  # fmt: skip
        for by, key in keys.items():
            rows[by].setdefault(key, set()).update(pages_of(manifest, tensor))
    for by, expected in rows.items():
        seen = shown(manifest, columns, by)
        assert list(seen) == list(expected)
        assert seen == {key: brute(columns, pages) for key, pages in expected.items()}, by


def test_rows_that_nothing_is_known_of() -> None:
    manifest = manifest_of({"l.0": [("l.0.w", HALF, (HALF,)), ("l.0.empty", 0, (0,))]})
    table = rollup(manifest, Heat(1).columns(0.0), "tensor")
    assert (table.pages.tolist(), table.nbytes.tolist()) == ([1, 0], [HALF, 0])
    assert np.isnan([table.mean_rate, table.max_rate, table.age_s]).all()
    assert table.known.tolist() == table.observed.tolist() == table.rungs.tolist() == [0, 0]
    assert len(rollup(manifest_of({}), Heat(0).columns(0.0), "tensor")) == 0


def test_heat_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of heat for /weights, which has 1 pages"):
        rollup(manifest_of({"l.0": [("l.0.w", 5, (5,))]}), Heat(2).columns(0.0), "model")


def test_a_page_of_two_experts_counts_for_both_and_once_for_each() -> None:
    names = ("e.0.down", "e.0.up", "e.1.down")
    manifest = manifest_of({"l.0": [(f"l.0.mlp.experts.{n[2:]}_proj.weight", HALF // 2, (1,)) for n in names]})
    heat = Heat(1)
    heat.add_counts(Counts(Rung.PERF, 0.0, 1.0, np.array([0], np.int32), np.array([5], np.uint32), 2.0))
    table = rollup(manifest, heat.columns(1.0), "expert")
    assert table.keys == (Expert("l.0", 0), Expert("l.0", 1))
    assert table.pages.tolist() == [1, 1]
    assert table.observed.tolist() == [5, 5]
    assert table.mean_rate.tolist() == [10, 10]
    assert table.nbytes.tolist() == [HALF, HALF // 2]


@pytest.mark.parametrize(
    ("names", "experts"),
    [
        (["model.layers.3.mlp.experts.17.down_proj.weight"], [("model.layers.3", 17)]),
        (["model.layers.3.block_sparse_moe.experts.5.w1.weight"], [("model.layers.3", 5)]),
        (["model.layers.3.mlp.shared_experts.gate_proj.weight", "model.layers.3.mlp.gate.weight"], []),
        (["model.layers.3.mlp.shared_experts.0.gate_proj.weight", "model.layers.3.myexperts.2.weight"], []),
    ],
)
def test_experts_by_name(names: list[str], experts: list[tuple[str, int]]) -> None:
    assert list(experts_of(manifest_of({"l": [(name, 8, (2, 4)) for name in names]}))) == experts


def test_fused_experts_are_cut_along_the_first_dimension() -> None:
    manifest = manifest_of({
        "l.0": [("l.0.mlp.gate.weight", 4096, (4, 1024)),
                ("l.0.mlp.experts.gate_up_proj", 4 * PAGE_BYTES, (4, 2, HALF)),
                ("l.0.mlp.experts.gate_up_proj_bias", 400, (4, 100)),
                ("l.0.mlp.experts.down_proj_odd", 401, (401,))],
    })  # fmt: skip
    found = experts_of(manifest)
    assert list(found) == [("l.0", number) for number in range(4)]
    assert found[Expert("l.0", 2)] == [
        (4096 + 2 * PAGE_BYTES, PAGE_BYTES),
        (4096 + 4 * PAGE_BYTES + 200, 100),
    ]
    heat = Heat(5)
    heat.add_bits(Bits(Rung.PRESENT, 0.0, 1.0, np.array([1], np.int32), np.array([True])))
    table = rollup(manifest, heat.columns(1.0), "expert")
    assert table.touched.tolist() == [1, 1, 0, 0], "page 1 has the end of expert 0 and the beginning of expert 1"
    assert table.pages.tolist() == [3, 3, 3, 2], "two of the weights and one of the bias, which the last one shares"


@pytest.mark.parametrize(
    "tensors",
    [
        [("l.0.experts.w1", 80, (8, 10))],  # two dimensions: these rows may be of any number of experts
        [("l.0.experts.w1", 80, (4, 2, 10)), ("l.0.experts.w2", 80, (8, 2, 5))],
        [("l.0.experts.w1", 0, (0, 2, 10))],
        [("l.0.experts.w1", 6, (4, 1, 3))],  # half a byte an element: a slice would begin within a byte
        [("l.0.experts.scale", 4, ())],
    ],
)
def test_fused_tensors_that_cannot_be_cut_are_of_no_expert(tensors: list[Tensor]) -> None:
    assert experts_of(manifest_of({"l.0": tensors})) == {}


@given(st.lists(sizes, max_size=4), st.sampled_from([0, 4096]))
def test_the_tensor_at_an_offset(layers: list[list[int]], gap: int) -> None:
    manifest = manifest_of(
        {f"l.{i}": [(f"l.{i}.{j}", n, (n,)) for j, n in enumerate(members)] for i, members in enumerate(layers)}, gap
    )
    first, spans = 0, []
    for number, segment in enumerate(manifest.segments):
        for i, tensor in enumerate(manifest.tensors):
            if tensor.extent.segment == number:
                begin = first * PAGE_BYTES + tensor.extent.offset
                spans.append((i, begin, begin + tensor.nbytes))
        first += segment.pages
    asked = sorted({max(at + d, 0) for _, begin, end in spans for at in (begin, end) for d in (-1, 0, 1)} | {0, 2**63})
    expected = [next((i for i, begin, end in spans if begin <= at < end), -1) for at in asked]
    assert TensorIndex(manifest).find(np.array(asked, np.uint64)).tolist() == expected


def test_from_a_sample_to_its_tensor() -> None:
    manifest = manifest_of({"l.0": [("l.0.a", HALF, (1,))], "l.1": [("l.1.a", HALF, (1,)), ("l.1.b", HALF, (1,))]})
    book = AddressBook()
    book.map(9, 0, 0x10000000, 2 * PAGE_BYTES, 5)
    samples = np.zeros(3, SAMPLE)
    samples["pid"], samples["time"] = 9, 6
    samples["addr"] = [0x10000000, 0x10000000 + PAGE_BYTES + HALF, 0x10000000 + HALF]
    found = TensorIndex(manifest).find(book.resolve(samples).offset)
    assert [manifest.tensors[i].name if i >= 0 else None for i in found.tolist()] == ["l.0.a", "l.1.b", None]


def test_an_empty_tensor_hides_none_at_the_same_offset() -> None:
    whole = manifest_of({"l.0": [("l.0.empty", 0, (0,)), ("l.0.w", 8, (8,))]})
    swapped = Manifest(whole.path, whole.identity, (), whole.segments, whole.tensors[::-1])
    for manifest, number in ((whole, 1), (swapped, 0)):
        assert TensorIndex(manifest).find(np.array([0, 7, 8], np.uint64)).tolist() == [number, number, -1]
