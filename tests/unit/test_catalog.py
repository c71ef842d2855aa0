"""The catalog: whatever is added, loaded, dropped and removed, it agrees with itself and finds what it holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiermem import durable
from tiermem.catalog import Catalog, ModelRecord
from tiermem.catalog_files import CatalogFiles
from tiermem.checkpoint.layout import identity_of
from tiermem.errors import ModelNotFound, Refused
from tiermem.types import LOADING, PAGE_BYTES, CheckpointFile, Extent, Manifest, SegmentInfo, TensorInfo

DRAM, CXL, DISK = 0, 1, 2
"""Tiers of the pools of these tests."""


def manifest_of(files: Sequence[int], pages: Sequence[int] = (1,)) -> Manifest:
    """A manifest of files by number and of segments by pages: one full page a tensor, the last tensor a byte short."""
    facts = tuple(CheckpointFile(f"/weights/{i}", 1, i, 1 << 40, i, f"digest {i}") for i in files)
    tensors = [
        TensorInfo(f"layers.{s}.{p}", "U8", (nbytes,), 0, 0, Extent(s, p * PAGE_BYTES, nbytes))
        for s, count in enumerate(pages)
        for p in range(count)
        for nbytes in (PAGE_BYTES - (p == count - 1),)
    ]
    segments = tuple(SegmentInfo(f"layers.{i}", count * PAGE_BYTES - 1) for i, count in enumerate(pages))
    path = "/weights" if len(files) > 1 else facts[0].path
    return Manifest(path, identity_of(facts), facts, segments, tuple(tensors))


def record_of(name: str, files: Sequence[int] = (0,), pages: Sequence[int] = (1,)) -> ModelRecord:
    manifest = manifest_of(files, pages)
    return ModelRecord(name, manifest, [None] * len(manifest.tensors), DISK)


def begin(record: ModelRecord, segment: int, key: str | None = None, tiers: Sequence[int] = (DRAM,)) -> None:
    """A file for a segment, with pages of these tiers in turn."""
    placed = np.resize(np.array(tiers, np.int8), record.manifest.segments[segment].pages)
    record.begin(segment, record.new_key(segment) if key is None else key, placed)


def fill(record: ModelRecord, segment: int) -> None:
    """Every tensor of a segment that is being filled is there."""
    record.ready[record.tensors_of[segment]] = True
    record.complete(segment)


FILES = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)


class Catalogs(RuleBasedStateMachine):
    """A catalog beside a plain list of its models, their segments' states beside the residency columns."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.models: list[ModelRecord] = []
        self.states: dict[tuple[str, int], int] = {}
        self.placed: dict[tuple[str, int], list[int]] = {}
        self.ids: list[range] = []
        self.keys_seen: set[tuple[ModelRecord, str]] = set()

    @rule(files=FILES, name=st.sampled_from("abc"), pages=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def add(self, files: list[int], name: str, pages: list[int]) -> None:
        record = record_of(name, files, pages)
        if self.catalog.by_id(record.id) is not None:
            return
        if name in {model.name for model in self.models}:
            with pytest.raises(Refused, match=f"the name '{name}' is taken by /weights"):
                self.catalog.add(record)
            record.name = self.catalog.free_name(name, record.id)
            assert record.name == f"{name}@{record.id[:8]}"
        else:
            assert self.catalog.free_name(name, record.id) == name
        self.catalog.add(record)
        self.models.append(record)
        self.ids.append(range(record.first_id, record.first_id + sum(pages)))
        self.states |= {(record.id, i): DISK for i in range(len(pages))}

    def pick(self, number: int, states: set[int]) -> tuple[ModelRecord, int] | None:
        places = [(m, i) for m in self.models for i in range(len(m.keys)) if self.states[m.id, i] in states]
        return places[number % len(places)] if places else None

    @rule(number=st.integers(0, 99), tiers=st.lists(st.sampled_from([DRAM, CXL]), min_size=3, max_size=3))
    def begin(self, number: int, tiers: list[int]) -> None:
        if place := self.pick(number, {DISK}):
            record, segment = place
            key = record.new_key(segment)
            assert (record, key) not in self.keys_seen, "a file name is used once"
            self.keys_seen.add((record, key))
            begin(record, segment, key, tiers)
            self.placed[record.id, segment] = tiers[: record.manifest.segments[segment].pages]
            self.states[record.id, segment] = LOADING

    @rule(number=st.integers(0, 99), page=st.integers(0, 2), tier=st.sampled_from([DRAM, CXL]))
    def move(self, number: int, page: int, tier: int) -> None:
        if place := self.pick(number, {LOADING, DRAM}):
            record, segment = place
            placed = self.placed[record.id, segment]
            page %= len(placed)
            placed[page] = tier
            record.place(np.array([record.first_page[segment] + page]), tier)

    @rule(number=st.integers(0, 99))
    def complete(self, number: int) -> None:
        if place := self.pick(number, {LOADING}):
            fill(*place)
            self.states[place[0].id, place[1]] = DRAM

    @rule(number=st.integers(0, 99))
    def drop(self, number: int) -> None:
        if place := self.pick(number, {LOADING, DRAM}):
            record, segment = place
            key = record.keys[segment]
            assert record.drop(segment) == key
            assert not record.ready[record.tensors_of[segment]].any()
            self.states[record.id, segment] = DISK

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: self.models)
    def remove(self, number: int) -> None:
        record = self.models.pop(number % len(self.models))
        for i, key in enumerate(record.keys):
            if key is not None:
                record.drop(i)
        self.catalog.remove(record)
        assert self.catalog.by_id(record.id) is None
        with pytest.raises(ModelNotFound):
            self.catalog.named(record.name)

    @rule(files=FILES)
    def find(self, files: list[int]) -> None:
        manifest = manifest_of(files)
        found = self.catalog.find(manifest)
        holders = [m for m in self.models if {f.path for f in manifest.files} <= {f.path for f in m.manifest.files}]
        if not holders:
            assert found is None
            return
        assert found is not None
        record, numbers = found
        assert record in holders
        if numbers is None:
            assert record.id == manifest.identity
        else:
            assert manifest.identity not in {m.id for m in self.models}
            assert [record.manifest.files[i] for i in numbers] == list(manifest.files)

    @invariant()
    def agrees(self) -> None:
        self.catalog.check()
        numbers = [number for pages in self.ids for number in pages]
        assert len(numbers) == len(set(numbers)), "an id is given once"
        assert list(self.catalog) == self.models
        assert len(self.catalog) == len(self.models)
        for record in self.models:
            assert self.catalog.named(record.name) is record
            assert self.catalog.by_id(record.id) is record
            states = [self.states[record.id, i] for i in range(len(record.keys))]
            for i, state in enumerate(states):
                pages = record.manifest.segments[i].pages
                placed = [DISK] * pages if state == DISK else self.placed[record.id, i]
                assert record.placed[record.pages(i)].tolist() == placed
                assert record.residency[record.pages(i)].tolist() == ([LOADING] * pages if state == LOADING else placed)
            assert record.missing() == [i for i, state in enumerate(states) if state == DISK]
            assert [record.resident(i) for i in range(len(states))] == [state == DRAM for state in states]
            held = [s.page_bytes for s, state in zip(record.manifest.segments, states, strict=True) if state != DISK]
            assert record.resident_bytes() == sum(held)


TestCatalogs = Catalogs.TestCase
TestCatalogs.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_a_shard_is_found_inside_of_its_directory() -> None:
    catalog, whole = Catalog(), record_of("whole", [5, 6, 7])
    catalog.add(whole)
    assert catalog.find(manifest_of([6])) == (whole, (1,))
    assert catalog.find(manifest_of([7, 5])) == (whole, (2, 0))
    assert catalog.find(manifest_of([7, 6, 5])) == (whole, None)
    assert catalog.find(manifest_of([6, 8])) is None


def test_a_shard_is_found_after_a_model_of_its_own_has_gone() -> None:
    """A file that was a model first, then part of one: its memory is not taken twice when the first goes."""
    catalog, shard, whole = Catalog(), record_of("shard", [5]), record_of("whole", [5, 6])
    catalog.add(shard)
    catalog.add(whole)
    assert catalog.find(manifest_of([5])) == (shard, None)
    catalog.remove(shard)
    assert catalog.find(manifest_of([5])) == (whole, (0,))


def test_shards_of_one_model_are_found_although_another_holds_some_of_them() -> None:
    catalog, pair, whole = Catalog(), record_of("pair", [5, 6]), record_of("whole", [5, 6, 7, 8])
    catalog.add(pair)
    catalog.add(whole)
    assert catalog.find(manifest_of([6, 7])) == (whole, (1, 2))


def test_an_unknown_name_lists_what_there_is() -> None:
    catalog = Catalog()
    with pytest.raises(ModelNotFound, match=r"no model 'x' in the pool \(it holds: none\)"):
        catalog.named("x")
    catalog.add(record_of("b", [1]))
    catalog.add(record_of("a", [2]))
    with pytest.raises(ModelNotFound, match=r"it holds: a, b\); load it first: tiermem load PATH"):
        catalog.named("x")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda record: record.residency.__setitem__(0, DISK), "residency"),
        (lambda record: record.residency.fill(7), "residency"),
        (lambda record: record.placed.__setitem__(0, CXL), "counted in"),
        (lambda record: record.place(np.array([0]), DISK), "in memory and on disk at once"),
        (lambda record: record.ready.__setitem__(0, False), "not ready"),
        (lambda record: record.keys.__setitem__(0, None), "with key None"),
    ],
)
def test_check_finds_damage(damage: object, words: str) -> None:
    catalog, record = Catalog(), record_of("a", pages=[2])
    catalog.add(record)
    begin(record, 0)
    fill(record, 0)
    catalog.check()
    damage(record)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=words):
        catalog.check()


def test_check_finds_a_file_that_two_segments_share() -> None:
    catalog, record = Catalog(), record_of("a", pages=[1, 1])
    catalog.add(record)
    for segment in (0, 1):
        begin(record, segment, "key")
    with pytest.raises(AssertionError, match="share a file"):
        catalog.check()


# --- catalog files --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> CatalogFiles:
    return CatalogFiles(tmp_path / "catalog", DISK)


@pytest.fixture
def record() -> ModelRecord:
    """A model of three segments: the first resident, the second on its way, the third on disk."""
    record = record_of("model", [1, 2], pages=[1, 2, 1])
    record.digests = [bytes([i]) * 32 for i in range(4)]
    begin(record, 0)
    fill(record, 0)
    begin(record, 1)
    record.pins, record.opens, record.last_open_s = 2, 7, 12.5
    return record


def test_a_model_comes_back_with_what_was_resident(files: CatalogFiles, record: ModelRecord) -> None:
    files.sync(record.id, lambda: record)
    ((again, keys),) = CatalogFiles(files.directory, DISK)
    assert again.manifest == record.manifest
    assert again.digests == record.digests
    assert keys == [record.keys[0], None, None], "a segment that is still being filled cannot be adopted"
    assert (again.name, again.pins, again.opens, again.last_open_s) == ("model", 2, 7, 12.5)
    assert again.loaded
    assert again.new_key(0) != record.keys[0]
    assert (again.residency == DISK).all()
    assert not np.any(again.ready)


def test_a_model_that_is_known_no_more_is_forgotten(files: CatalogFiles, record: ModelRecord) -> None:
    files.sync(record.id, lambda: record)
    files.sync(record.id, lambda: None)
    assert list(files) == []
    files.remove(record.id)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[:-1], id="torn"),
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: b"not ours at all", id="foreign"),
        pytest.param(lambda whole: whole[:40] + b"\xff" + whole[41:], id="flipped"),
    ],
)
def test_a_damaged_file_is_dropped_with_a_warning(
    files: CatalogFiles, record: ModelRecord, content: object, caplog: pytest.LogCaptureFixture
) -> None:
    files.sync(record.id, lambda: record)
    path = files.directory / record.id
    path.write_bytes(content(path.read_bytes()))  # type: ignore[operator]
    assert list(files) == []
    assert "must be loaded again" in caplog.text
    assert not path.exists()


def body_of(files: CatalogFiles, record: ModelRecord) -> dict[str, object]:
    files.sync(record.id, lambda: record)
    body: dict[str, object] = msgpack.unpackb(durable.read(files.directory / record.id))
    return body


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"keys": [None]}, {"digests": b"short"}, {"manifest": b"garbage"}, {"manifest": None}, {"keys": 5}],
)
def test_a_whole_file_that_makes_no_sense_is_dropped(
    files: CatalogFiles, record: ModelRecord, change: dict[str, object]
) -> None:
    durable.write(files.directory / record.id, msgpack.packb(body_of(files, record) | change))
    assert list(files) == []


@pytest.mark.parametrize("body", [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb("text"), msgpack.packb(None)])
def test_a_whole_file_of_something_else_is_dropped(files: CatalogFiles, body: bytes) -> None:
    durable.write(files.directory / "id", body)
    assert list(files) == []
    assert not (files.directory / "id").exists()


def test_what_a_crash_left_is_removed_and_a_directory_is_left_alone(files: CatalogFiles, record: ModelRecord) -> None:
    files.sync(record.id, lambda: record)
    (files.directory / f".{record.id}.4711").write_bytes(b"half")
    (files.directory / "foreign").mkdir()
    (files.directory / ".foreign").mkdir()
    assert [again.name for again, _ in files] == ["model"]
    assert sorted(os.listdir(files.directory)) == sorted([".foreign", "foreign", record.id])


def test_a_directory_that_cannot_be_written_is_an_error_to_show_until_it_can(
    files: CatalogFiles, record: ModelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        files.sync(record.id, lambda: record)
    assert "No space left on device; a restart would not find model" in files.error
    files.sync(record.id, lambda: record)
    assert files.error == ""
    assert len(list(files)) == 1


def test_a_path_that_no_text_can_hold_costs_the_restart_not_the_load(files: CatalogFiles) -> None:
    record = record_of("model\udcff")
    files.sync(record.id, lambda: record)
    assert "a restart would not find" in files.error
