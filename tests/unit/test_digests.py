"""Digest records: what was put comes back whole or not at all, and never costs a load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tiermem import durable
from tiermem.digests import DigestRecords
from tiermem.types import Extent, Manifest, TensorInfo

DIGESTS = (b"a" * 32, b"b" * 32, b"c" * 32)


def manifest_of(names: str, identity: str = "id") -> Manifest:
    """A manifest of one tensor a letter."""
    tensors = tuple(TensorInfo(name, "U8", (1,), 0, i, Extent(0, 4096 * i, 1)) for i, name in enumerate(names))
    return Manifest("/weights", identity, (), (), tensors)


THREE = manifest_of("xyz")


@pytest.fixture
def records(tmp_path: Path) -> DigestRecords:
    return DigestRecords(tmp_path / "not" / "there" / "yet")


def test_digests_come_back_in_order(records: DigestRecords) -> None:
    assert records.get(THREE) is None
    records.put(THREE, DIGESTS)
    assert records.get(THREE) == list(DIGESTS)
    assert records.get(manifest_of("xyz", "another")) is None
    assert DigestRecords(records.directory).get(THREE) == list(DIGESTS)
    assert os.stat(records.directory).st_mode & 0o777 == 0o700


def test_a_record_of_another_number_of_tensors_is_not_used(records: DigestRecords) -> None:
    records.put(THREE, DIGESTS)
    assert records.get(manifest_of("ab")) is None
    assert records.get(manifest_of("abcd")) is None


def test_digests_go_with_the_names_whatever_the_order(records: DigestRecords) -> None:
    records.put(manifest_of("zxy"), DIGESTS)
    assert records.get(manifest_of("xyz")) == [DIGESTS[1], DIGESTS[2], DIGESTS[0]]


def test_a_checkpoint_without_tensors_has_a_record(records: DigestRecords) -> None:
    records.put(manifest_of(""), ())
    assert records.get(manifest_of("")) == []


def test_a_record_of_another_format_is_not_used(records: DigestRecords) -> None:
    records.directory.mkdir(parents=True)
    for body in (b"".join(DIGESTS), b"\2" + b"".join(DIGESTS), b"\1" * 96, b""):
        durable.write(records.directory / "id", body)
        assert records.get(THREE) is None


@pytest.mark.parametrize("content", [b"", b"torn", b"\0" * 128])
def test_a_damaged_record_is_not_used_and_can_be_put_again(
    records: DigestRecords, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    records.put(THREE, DIGESTS)
    (records.directory / "id").write_bytes(content)
    assert records.get(THREE) is None
    assert "digest record not used" in caplog.text
    records.put(THREE, DIGESTS)
    assert records.get(THREE) == list(DIGESTS)


def test_what_a_crash_left_beside_a_record_is_ignored(records: DigestRecords) -> None:
    records.put(THREE, DIGESTS)
    (records.directory / ".id.4711").write_bytes(b"half of it")
    assert records.get(THREE) == list(DIGESTS)


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "plain").write_bytes(b"")
    for directory in (tmp_path / "plain", tmp_path / "plain" / "below"):
        records = DigestRecords(directory)
        caplog.clear()
        records.put(THREE, DIGESTS)
        assert "not kept" in caplog.text
        assert records.get(THREE) is None


def test_a_directory_in_place_of_a_record_costs_a_warning(
    records: DigestRecords, caplog: pytest.LogCaptureFixture
) -> None:
    (records.directory / "id").mkdir(parents=True)
    assert records.get(THREE) is None
    records.put(THREE, DIGESTS)
    assert "not kept" in caplog.text
    assert [name for name in os.listdir(records.directory) if name.startswith(".")] == []
