"""Content: equal where weights are, whatever else differs; another one as soon as anything of the weights does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.test_catalog import manifest_of, record_of
from tiermem.content import content_of
from tiermem.types import Extent, Manifest, TensorInfo

MANIFEST = manifest_of((0, 1), (1, 2))
DIGESTS = [bytes([i]) * 32 for i in range(len(MANIFEST.tensors))]


def with_first(**changes: object) -> Manifest:
    first: TensorInfo = replace(MANIFEST.tensors[0], **changes)  # type: ignore[arg-type]
    return replace(MANIFEST, tensors=(first, *MANIFEST.tensors[1:]))


def test_where_it_lies_does_not_matter() -> None:
    elsewhere = replace(MANIFEST, path="/elsewhere", identity="other", files=MANIFEST.files[:1])
    assert content_of(MANIFEST, DIGESTS) == content_of(elsewhere, DIGESTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"dtype": "I8" if MANIFEST.tensors[0].dtype != "I8" else "U8"},
        {"shape": (1, *MANIFEST.tensors[0].shape)},
        {"extent": Extent(0, MANIFEST.tensors[0].extent.offset + 64, MANIFEST.tensors[0].extent.length)},
    ],
)
def test_what_it_is_and_where_in_a_segment_does(changes: dict[str, object]) -> None:
    assert content_of(MANIFEST, DIGESTS) != content_of(with_first(**changes), DIGESTS)


def test_bytes_do() -> None:
    assert content_of(MANIFEST, DIGESTS) != content_of(MANIFEST, [b"\xff" * 32, *DIGESTS[1:]])


def test_unknown_digests_are_nobodys_content() -> None:
    record = record_of("m", (0, 1), (1, 2))
    assert record.content() is None
    record.digests[:] = DIGESTS
    assert record.content() == content_of(MANIFEST, DIGESTS)
    assert content_of(MANIFEST, [*DIGESTS[:-1], None]) is None
