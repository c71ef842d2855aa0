"""Well-formed checkpoints: what safetensors wrote is what the manifest says, and every tensor has its place."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import TensorSpec, deserialize, serialize

from tests.hostile.checkpoints import entry, header_text, write_file, write_good, write_index
from tiermem.checkpoint import check_unchanged, file_facts, open_checkpoint
from tiermem.errors import CheckpointChanged, CheckpointError, CheckpointNotFound, TensorNotFound
from tiermem.types import DTYPE_BITS, TENSOR_ALIGN, Manifest

WRITABLE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F4": "float4_e2m1fn_x2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
"""Name in the format -> name that the library's writer takes; it has none for F6."""

Raw = tuple[str, tuple[int, ...], bytes]

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
LAYERED = st.builds("{}.layers.{}.{}".format, st.sampled_from(["model", "tower"]), st.integers(0, 3), NAMES)


@st.composite
def raw_tensors(draw: st.DrawFn) -> Raw:
    dtype = draw(st.sampled_from(sorted(WRITABLE)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    if dtype == "F4":
        shape = (*shape, 2)
    return dtype, shape, draw(st.randoms()).randbytes(math.prod(shape) * DTYPE_BITS[dtype] // 8)


SHARDS = st.dictionaries(NAMES | LAYERED, st.tuples(st.integers(0, 2), raw_tensors()), max_size=12)
# Never an empty map: without tensors the library writes that as JSON which it cannot read itself.
METADATA = st.none() | st.dictionaries(NAMES, st.just("v\u00e9"), min_size=1, max_size=2)


def serialized(tensors: Mapping[str, Raw], metadata: dict[str, str] | None) -> bytes:
    arrays = {name: np.frombuffer(data or b"\0", np.uint8) for name, (_, _, data) in tensors.items()}
    specs = {}
    for name, (dtype, shape, data) in tensors.items():
        # The writer takes the shape in storage, where one element holds two F4.
        stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
        specs[name] = TensorSpec(
            dtype=WRITABLE[dtype], shape=list(stored), data_ptr=arrays[name].ctypes.data, data_len=len(data)
        )
    return bytes(serialize(specs, metadata))


def assert_laid_out(manifest: Manifest) -> None:
    """Extents are aligned, disjoint, inside their segment; segments appear in order and are as long as they must be."""
    assert [s.layer for s in manifest.segments] == list(dict.fromkeys(s.layer for s in manifest.segments))
    firsts = list(dict.fromkeys(t.extent.segment for t in manifest.tensors))
    assert firsts == list(range(len(manifest.segments)))
    for number, segment in enumerate(manifest.segments):
        extents = [t.extent for t in manifest.tensors if t.extent.segment == number]
        assert all(e.offset % TENSOR_ALIGN == 0 for e in extents)
        full = [e for e in extents if e.length]
        assert all(a.offset + a.length <= b.offset < a.offset + a.length + TENSOR_ALIGN for a, b in pairwise(full))
        assert segment.length == max([1, *(e.offset + e.length for e in full)])


@given(SHARDS, METADATA, st.booleans())
def test_manifest_says_what_safetensors_says(
    tensors: dict[str, tuple[int, Raw]], metadata: dict[str, str] | None, indexed: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        written: dict[str, dict[str, object]] = {}
        shards = sorted({shard for shard, _ in tensors.values()})
        for shard in shards:
            raw = serialized({n: t for n, (s, t) in tensors.items() if s == shard}, metadata)
            (directory / f"{shard}.safetensors").write_bytes(raw)
            written |= dict(deserialize(raw))
        if not shards:
            (directory / "empty.safetensors").write_bytes(serialized({}, metadata))
        elif indexed:
            write_index(directory, {n: f"{s}.safetensors" for n, (s, _) in tensors.items()})
        manifest = open_checkpoint(directory)
        assert all(file.metadata == metadata for file in manifest.files)
        assert manifest.by_name.keys() == written.keys() == tensors.keys()
        for tensor in manifest.tensors:
            expected = written[tensor.name]
            assert (tensor.dtype, list(tensor.shape)) == (expected["dtype"], expected["shape"])
            raw = Path(manifest.files[tensor.file].path).read_bytes()
            assert raw[tensor.file_offset :][: tensor.nbytes] == expected["data"] == tensors[tensor.name][1][2]
        order = [(t.file, t.file_offset) for t in manifest.tensors]
        assert order == sorted(order)
        assert_laid_out(manifest)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_format(dtype: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", header_text({"a": entry(dtype, [4], 0, DTYPE_BITS[dtype] // 2)}),
                      bytes(DTYPE_BITS[dtype] // 2))  # fmt: skip
    assert deserialize(path.read_bytes())[0][1]["dtype"] == dtype
    assert open_checkpoint(path).tensors[0].nbytes == DTYPE_BITS[dtype] // 2


def test_layout_packs_each_layer_by_itself(tmp_path: Path) -> None:
    header = header_text(
        {
            "model.layers.1.b": entry("U8", [5], 0, 5),
            "lm_head": entry("U8", [3], 5, 8),
            "model.layers.1.empty": entry("F32", [0, 9], 8, 8),
            "model.layers.1.c": entry("U8", [5000], 8, 5008),
            "embed.empty": entry("F32", [0], 5008, 5008),
            "model.layers.1.d": entry("U8", [1], 5008, 5009),
        }
    )
    manifest = open_checkpoint(write_file(tmp_path / "a.safetensors", header + b"   ", bytes(5009)))
    assert [(s.layer, s.length, s.pages) for s in manifest.segments] == [
        ("model.layers.1", 4096 + 8192 + 1, 1), ("head", 3, 1), ("embeddings", 1, 1),
    ]  # fmt: skip
    places = {t.name: (t.extent.segment, t.extent.offset, t.extent.length) for t in manifest.tensors}
    assert places == {
        "model.layers.1.b": (0, 0, 5), "lm_head": (1, 0, 3), "model.layers.1.empty": (0, 0, 0),
        "model.layers.1.c": (0, 4096, 5000), "embed.empty": (2, 0, 0), "model.layers.1.d": (0, 12288, 1),
    }  # fmt: skip
    assert manifest.tensors[0].file_offset == 8 + len(header) + 3


def test_tensors_come_by_offset_and_empty_ones_first(tmp_path: Path) -> None:
    header = {"z": entry("U8", [4], 4, 8), "y": entry("U8", [4], 0, 4), "e2": entry("U8", [0], 4, 4),
              "e1": entry("U8", [3, 0], 4, 4)}  # fmt: skip
    manifest = open_checkpoint(write_file(tmp_path / "a.safetensors", header_text(header), bytes(8)))
    assert [t.name for t in manifest.tensors] == ["y", "e2", "e1", "z"]


def test_checkpoint_without_tensors_has_no_segments(tmp_path: Path) -> None:
    manifest = open_checkpoint(write_file(tmp_path / "a.safetensors", b'{"__metadata__":null}'))
    assert (manifest.segments, manifest.tensors, manifest.files[0].metadata) == ((), (), None)


def test_layers_override_some_keys(tmp_path: Path) -> None:
    path = write_good(tmp_path / "a.safetensors", "layers.0.a", "layers.0.b", "layers.1.c")
    plain, cut = open_checkpoint(path), open_checkpoint(path, {"layers.0.b": "mine", "layers.1.c": "layers.0"})
    assert [s.layer for s in plain.segments] == ["layers.0", "layers.1"]
    assert [(s.layer, s.length) for s in cut.segments] == [("layers.0", 4104), ("mine", 8)]
    assert [t.extent.segment for t in cut.tensors] == [0, 1, 0]
    assert cut.identity == plain.identity
    with pytest.raises(TensorNotFound, match=r"lacks: \['gone'\]"):
        open_checkpoint(path, {"gone": "x", "layers.0.a": "y"})


def test_identity_ignores_spelling_and_notices_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_good(tmp_path / "a.safetensors", "a")
    first = open_checkpoint(path)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for spelling in ("a.safetensors", "./link/a.safetensors", "link", tmp_path, str(path)):
        again = open_checkpoint(spelling)
        assert again.identity == first.identity
        assert os.path.isabs(again.path)
        assert os.path.isabs(again.files[0].path)
    os.utime(path, ns=(0, first.files[0].mtime_ns + 1))
    assert open_checkpoint(path).identity != first.identity


def test_identity_covers_every_file_and_its_header(tmp_path: Path) -> None:
    one = write_good(tmp_path / "1.safetensors", "a")
    alone = open_checkpoint(tmp_path)
    write_good(tmp_path / "2.safetensors", "b")
    both = open_checkpoint(tmp_path)
    assert both.identity != alone.identity
    one = one.rename(tmp_path / "3.safetensors")
    assert open_checkpoint(tmp_path).identity == both.identity
    facts = one.stat()
    with one.open("r+b") as file:
        file.write(one.read_bytes().replace(b'"a"', b'"c"'))
    os.utime(one, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    renamed = open_checkpoint(tmp_path)
    assert (facts.st_ino, facts.st_size, facts.st_mtime_ns) == file_facts(str(one))[1:]
    assert renamed.identity != both.identity


def test_check_unchanged_compares_path_or_descriptor(tmp_path: Path) -> None:
    path = write_good(tmp_path / "a.safetensors", "a")
    file = open_checkpoint(path).files[0]
    with path.open("rb") as opened:
        check_unchanged(file)
        check_unchanged(file, opened.fileno())
        write_good(tmp_path / "new", "a").rename(path)
        check_unchanged(file, opened.fileno())
        with pytest.raises(CheckpointChanged, match=r"a\.safetensors: changed .*inode \d+ -> \d+"):
            check_unchanged(file)
    path.unlink()
    with pytest.raises(CheckpointNotFound):
        check_unchanged(file)


def test_hub_cache_snapshot(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for blob, shard, name in (("d1", "model-00001-of-00002.safetensors", "a"), ("d2", "sub/two.safetensors", "b")):
        write_good(blobs / blob, name)
        (snapshot / shard).parent.mkdir(exist_ok=True)
        (snapshot / shard).symlink_to(blobs / blob)
    write_index(blobs, {"a": "model-00001-of-00002.safetensors", "b": "sub/two.safetensors"})
    (snapshot / "model.safetensors.index.json").symlink_to(blobs / "model.safetensors.index.json")
    manifest = open_checkpoint(snapshot)
    assert list(manifest.by_name) == ["a", "b"]
    assert manifest.files[0].inode == (blobs / "d1").stat().st_ino
    assert list(open_checkpoint(blobs / "d1").by_name) == ["a"]


def test_index_chooses_the_files_and_all_their_tensors_count(tmp_path: Path) -> None:
    write_good(tmp_path / "b.safetensors", "in the map", "not in the map")
    write_good(tmp_path / "a.safetensors", "first")
    write_good(tmp_path / "other.safetensors", "first")
    write_index(tmp_path, {"in the map": "b.safetensors", "first": "a.safetensors"})
    manifest = open_checkpoint(tmp_path)
    assert list(manifest.by_name) == ["first", "in the map", "not in the map"]
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").identity == manifest.identity


def test_only_index_counts_whatever_its_stem(tmp_path: Path) -> None:
    write_good(tmp_path / "a.safetensors", "a")
    write_good(tmp_path / "b.safetensors", "b")
    body = json.dumps({"weight_map": {"a": "a.safetensors"}})
    (tmp_path / "diffusion.safetensors.index.json").write_text(body)
    assert list(open_checkpoint(tmp_path).by_name) == ["a"]
    (tmp_path / "second.safetensors.index.json").write_text(body)
    with pytest.raises(CheckpointError, match="2 indexes"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"b": "b.safetensors"})
    assert list(open_checkpoint(tmp_path).by_name) == ["b"]
