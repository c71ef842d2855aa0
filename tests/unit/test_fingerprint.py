"""Fingerprints and the manifests of images: equal fields mean the same image, and what is no image is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.paint import PAGES, TENSORS, prints
from tiermem.errors import ProtocolError
from tiermem.fingerprint import differences, fingerprint_of, identity_of, is_image, manifest_of, metadata_of
from tiermem.rpc.codec import decode_manifest, encode_manifest
from tiermem.types import DTYPE_BITS, PAGE_BYTES, TENSOR_ALIGN, CheckpointFile, ImageTensor, Manifest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FIELDS = st.dictionaries(TEXT, TEXT, min_size=1, max_size=8)


@given(FIELDS, st.dictionaries(TEXT, TEXT, max_size=4))
def test_any_text_survives_the_wire_and_the_disk(fields: dict[str, str], metadata: dict[str, str]) -> None:
    manifest = decode_manifest(encode_manifest(manifest_of(fields, TENSORS, metadata)))
    assert fingerprint_of(manifest) == fields
    kept = {key: value for key, value in metadata.items() if key != "tiermem.fingerprint"}
    assert metadata_of(manifest, manifest.files) == kept
    assert is_image(manifest)
    assert manifest.identity == identity_of(fields)


@given(FIELDS, FIELDS, st.randoms(use_true_random=False))
def test_identity_is_of_the_fields_and_of_nothing_else(one: dict[str, str], other: dict[str, str], chance: Any) -> None:
    shuffled = list(one.items())
    chance.shuffle(shuffled)
    assert identity_of(dict(shuffled)) == identity_of(one)
    assert (identity_of(one) == identity_of(other)) == (one == other)
    assert (differences(one, other) == []) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": "b"}, {"a": "b", "": ""}),
        ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}),
        ({"a": '1", "b": "2'}, {"a": "1", "b": "2"}),
        ({"a\0": ""}, {"a": "\0"}),
        ({"\u00e9": ""}, {"e\u0301": ""}),
    ],
)
def test_what_looks_alike_has_another_identity(one: dict[str, str], other: dict[str, str]) -> None:
    assert identity_of(one) != identity_of(other)


def test_differences_name_each_field_with_both_values() -> None:
    wanted, found = prints(1, dtype="bf16"), prints(2, tp="2")
    assert differences(wanted, found) == [
        "checkpoint is '2', not '1'", "dtype is absent, not 'bf16'", "tp is '2', not absent"
    ]  # fmt: skip


def test_tensors_lie_in_the_order_given_at_multiples_of_4096() -> None:
    manifest = manifest_of(prints(), TENSORS)
    assert [segment.layer for segment in manifest.segments] == ["embeddings", "model.layers.0", "model.layers.1"]
    assert manifest.page_bytes == PAGES * PAGE_BYTES
    assert [tensor.name for tensor in manifest.tensors] == [tensor.name for tensor in TENSORS]
    places = [(tensor.extent.segment, tensor.extent.offset) for tensor in manifest.tensors]
    assert places == [(0, 0), (1, 0), (1, 300 * 4096), (2, 0), (2, 0)]
    assert [tensor.nbytes for tensor in manifest.tensors] == [64 * 32 * 2, 300 * 4096, 8, PAGE_BYTES + 5, 0]


def test_a_layer_that_is_given_goes_before_the_one_in_the_name() -> None:
    given_ = [ImageTensor("model.layers.0.w", "U8", (1,), "mine"), ImageTensor("other", "U8", (1,), "mine")]
    manifest = manifest_of(prints(), given_)
    assert [(segment.layer, segment.length) for segment in manifest.segments] == [("mine", TENSOR_ALIGN + 1)]


def test_an_image_of_empty_tensors_has_a_page() -> None:
    assert manifest_of(prints(), [ImageTensor("w", "F32", (0,))]).page_bytes == PAGE_BYTES


def test_a_checkpoint_is_no_image() -> None:
    file = CheckpointFile("/m/a", 1, 2, 3, 4, "ab", {"tiermem.fingerprint": "{}", "format": "pt"})
    manifest = Manifest("/m", "ab", (file,), (), ())
    assert not is_image(manifest)
    assert fingerprint_of(manifest) == {}
    assert metadata_of(manifest, manifest.files) == {"tiermem.fingerprint": "{}", "format": "pt"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "1 to 64 fields, this one 0"),
        ({str(i): "" for i in range(65)}, "this one 65"),
        ({"a": "x" * 4096}, "'a' has more than 4096 characters; digest it"),
        ({"x" * 5000: ""}, "more than 4096 characters"),
        ({"a": 1}, "'a' is 1; names and values are text"),
        ({1: "a"}, "1 is 'a'; names and values are text"),
        ({"a": None}, "names and values are text"),
    ],
)
def test_what_is_no_fingerprint(fields: dict[Any, Any], words: str) -> None:
    for refused in (lambda: identity_of(fields), lambda: manifest_of(fields, TENSORS)):
        with pytest.raises(ProtocolError, match=words):
            refused()


def test_the_largest_fingerprint() -> None:
    assert len(identity_of({str(i).zfill(2): "\U0001f600" * 4094 for i in range(64)})) == 64


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "without tensors"),
        ([ImageTensor("w", "F32", (1,)), ImageTensor("w", "F32", (1,))], "tensor name twice"),
        ([ImageTensor("w", "F33", (1,))], "'w' has the unknown dtype 'F33'"),
        ([ImageTensor("w", "Q4_K", (256,))], "unknown dtype 'Q4_K'"),
        ([ImageTensor("w", "F32", (2, -1))], r"'w' has the shape \[2, -1\]"),
        ([ImageTensor("w", "F32", (0, 1 << 63))], "'w' has the shape"),
        ([ImageTensor("w", "F64", (1 << 62, 1 << 62))], "'w' has the shape"),
        ([ImageTensor("w", "F32", (1,) * 256)], "of 256 dimensions"),
        ([ImageTensor("w", "F32", (1 << 62,) * 1_000_000)], "of 1000000 dimensions"),
        ([ImageTensor("w", "F4", (3,))], r"'w' of F4\[3\] ends within a byte"),
        ([ImageTensor("w", "F6_E2M3", (2,))], "ends within a byte"),
    ],
)
def test_what_is_no_image(tensors: list[ImageTensor], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        manifest_of(prints(), tensors)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_survives_the_wire(dtype: str) -> None:
    manifest = manifest_of(prints(), [ImageTensor("w", dtype, (3, 8))])
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert manifest.nbytes == 3 * DTYPE_BITS[dtype]
