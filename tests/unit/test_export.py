"""Export: exported files are valid, aligned and whole pages; a directory is touched only where an export made it."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.conftest import CheckpointWriter, ConfigMaker
from tiermem.checkpoint import open_checkpoint
from tiermem.embedded import EmbeddedPool
from tiermem.errors import AccessDenied, Refused
from tiermem.export import directory as export_directory
from tiermem.export import export
from tiermem.export.directory import Note, claim, clear, digest_of, fill, leave, note_of
from tiermem.export.layout import INDEX_NAME, index_of, lay_out_files, safetensors_file
from tiermem.types import DTYPE_BITS, PAGE_BYTES, CheckpointFile, Extent, TensorInfo

SOURCE = CheckpointFile("/models/m/model.safetensors", 0, 0, 0, 0, "")
WHOLE_BYTES = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")


def tensor(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, offset, Extent(0, 0, prod(shape) * DTYPE_BITS[dtype] // 8))


@st.composite
def files(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors of one file, in its order, whose sizes sum up to anything."""
    shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    found: list[TensorInfo] = []
    offset = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=12)):
        found.append(tensor(name, draw(st.sampled_from(WHOLE_BYTES)), draw(shapes), offset))
        offset += found[-1].nbytes
    return found


@given(files(), st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_any_tensors_become_whole_pages_that_safetensors_reads(
    tensors: list[TensorInfo], metadata: dict[str, str] | None
) -> None:
    file = safetensors_file("model.safetensors", tensors, SOURCE, metadata)
    data = bytearray(file.page_bytes)
    data[: len(file.header)] = file.header
    random = np.random.default_rng(0)
    contents = {info.name: random.bytes(info.nbytes) for info in tensors}
    for info, offset in file.tensors:
        data[offset : offset + info.nbytes] = contents[info.name]
        assert offset % (DTYPE_BITS[info.dtype] // 8) == 0 or not info.nbytes, "a tensor is aligned to its elements"
    assert len(data) == file.page_bytes
    assert file.page_bytes % PAGE_BYTES == 0
    read = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in parsed(bytes(data))}
    assert read == {info.name: (info.dtype, info.shape, contents[info.name]) for info in tensors}
    header = json.loads(file.header[8:])
    assert header.pop("__metadata__", None) == (metadata or None)
    assert len(header) == len(tensors)


def parsed(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    # F8_E4M3FNUZ and such come back with their names in the format.
    return safetensors.deserialize(data)


def test_tensors_of_one_dtype_keep_the_order_of_their_file() -> None:
    tensors = [tensor(name, "BF16", (3,), 6 * i) for i, name in enumerate("zay")]
    file = safetensors_file("model.safetensors", tensors, SOURCE, None)
    assert [info.name for info, _ in file.tensors] == ["z", "a", "y"]


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_page_is_added_only_where_one_is_needed(surplus: int) -> None:
    header = len(safetensors_file("f", [tensor("t", "U8", (PAGE_BYTES - 100,), 0)], SOURCE, None).header.rstrip())
    file = safetensors_file("f", [tensor("t", "U8", (PAGE_BYTES - header + surplus,), 0)], SOURCE, None)
    assert file.page_bytes == PAGE_BYTES * (1 + surplus)


def test_a_header_beyond_the_limit_of_the_format_is_refused() -> None:
    tensors = [tensor("n" * 10_000_000 + str(i), "U8", (1,), i) for i in range(10)]
    with pytest.raises(Refused, match="split the checkpoint"):
        safetensors_file("f", tensors, SOURCE, None)


def test_a_tensor_with_the_name_of_the_metadata_is_refused() -> None:
    with pytest.raises(Refused, match="rename it"):
        safetensors_file("f", [tensor("__metadata__", "U8", (1,), 0)], SOURCE, {"format": "pt"})


def test_shards_keep_their_names_and_get_an_index(checkpoint: CheckpointWriter) -> None:
    made = checkpoint(files=2)
    form, laid = lay_out_files(open_checkpoint(made.path))
    assert form == "safetensors"
    assert [file.name for file in laid] == [path.name for path in made.files]
    index = json.loads(index_of(laid))
    assert index["metadata"]["total_size"] == made.nbytes
    assert index["weight_map"].keys() == made.tensors.keys()
    assert set(index["weight_map"].values()) == {path.name for path in made.files}


@pytest.mark.parametrize(
    ("name", "exported"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
    ],
)
def test_pytorch_files_become_safetensors_that_say_so(tmp_path: Path, name: str, exported: str) -> None:
    torch.save(OrderedDict(w=torch.ones(3)), tmp_path / name)
    (file,) = lay_out_files(open_checkpoint(tmp_path))[1]
    assert file.name == exported
    assert json.loads(file.header[8:])["__metadata__"]["format"] == "pt"


def test_a_blob_without_an_ending_keeps_its_whole_name(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "v1.0")
    (file,) = lay_out_files(open_checkpoint(tmp_path / "v1.0"))[1]
    assert file.name == "v1.0.safetensors"


def test_gguf_is_tiled_by_its_tensors_and_what_lies_between_them(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for i in range(3):
        writer.add_tensor(f"blk.{i}.weight", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    form, (file,) = lay_out_files(open_checkpoint(tmp_path))
    assert (form, file.name, file.page_bytes, file.header) == ("verbatim", "m.gguf", PAGE_BYTES, b"")
    parts = sorted([*file.gaps, *((offset, offset + info.nbytes) for info, offset in file.tensors)])
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])], (
        "no byte is read twice, none is left out"
    )
    assert parts[-1][1] == (tmp_path / "m.gguf").stat().st_size
    assert len(file.gaps) == 4


def test_what_cannot_be_shared_by_links_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.ones(0, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(Refused, match="no bytes to share"):
        lay_out_files(open_checkpoint(tmp_path))


def test_files_outside_the_directory_are_refused(checkpoint: CheckpointWriter) -> None:
    manifest = open_checkpoint(checkpoint().path)
    object.__setattr__(manifest, "path", manifest.path + "/deeper/model.safetensors")
    with pytest.raises(Refused, match="outside the checkpoint's directory"):
        lay_out_files(manifest)


def test_an_embedded_pool_cannot_export(config: ConfigMaker, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    with EmbeddedPool(config()) as pool, pytest.raises(Refused, match="tiermem serve"):
        export(pool, checkpoint().path, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# --- directories ---------------------------------------------------------------------------------------------------


def note(
    target: Path, *, made: bool = True, links: tuple[str, ...] = ("model.safetensors",), text: bytes = b""
) -> Note:
    digests = {INDEX_NAME: digest_of(text)} if text else {}
    return Note("/models/m", "identity", "unix:/s", "m.export", "1", dict.fromkeys(links, str(target)), digests, made)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What links lead to."""
    (tmp_path / "segment").write_bytes(b"weights")
    return tmp_path / "segment"


def check(directory: Path) -> Note | None:
    return export_directory.check(directory, "identity", "unix:/s")


def made_in(directory: Path, made: Note, text: bytes = b"") -> None:
    claim(directory, made, None)
    fill(directory, made, {INDEX_NAME: text} if text else {})


def test_what_was_made_is_removed_and_nothing_else(tmp_path: Path, target: Path) -> None:
    directory = tmp_path / "out"
    written = note(target, links=("model.safetensors", "deep/er/x.safetensors", "config.json"), text=b"{}")
    made_in(directory, written, b"{}")
    assert note_of(directory) == written
    assert (directory / "deep/er/x.safetensors").read_bytes() == b"weights"
    (directory / "mine").write_text("kept")
    (directory / "config.json").unlink()
    (directory / "config.json").write_text("edited")
    clear(directory, written)
    assert leave(directory, written) is False
    assert sorted(os.listdir(directory)) == ["config.json", "mine"]
    assert target.read_bytes() == b"weights"


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_goes_only_if_the_export_made_it(tmp_path: Path, target: Path, made: bool) -> None:
    directory = tmp_path / "out"
    if not made:
        directory.mkdir()
    written = note(target, made=made)
    made_in(directory, written)
    clear(directory, written)
    assert leave(directory, written) is True
    assert directory.exists() is not made


def test_links_are_made_anew_and_old_ones_go(tmp_path: Path, target: Path) -> None:
    directory, other = tmp_path / "out", tmp_path / "other"
    other.write_bytes(b"moved")
    old = note(target, links=("model.safetensors", "sub/gone.safetensors"))
    made_in(directory, old)
    new = note(other)
    claim(directory, new, check(directory))
    fill(directory, new, {})
    assert (directory / "model.safetensors").read_bytes() == b"moved"
    assert sorted(os.listdir(directory)) == [export_directory.NOTE_NAME, "model.safetensors"]


def test_an_undo_finds_all_after_a_crash_between_note_and_links(tmp_path: Path, target: Path) -> None:
    directory = tmp_path / "out"
    written = note(target, links=("a", "b"))
    claim(directory, written, None)
    (directory / "a").symlink_to(target)
    clear(directory, written)
    assert leave(directory, written) is True
    assert not directory.exists()


def test_a_crash_while_links_are_made_anew_leaves_what_can_be_done_again(tmp_path: Path, target: Path) -> None:
    directory, other = tmp_path / "out", tmp_path / "other"
    other.write_bytes(b"moved")
    made_in(directory, note(target, text=b"old"), b"old")
    claim(directory, note(other, text=b"new"), check(directory))
    again = check(directory)
    claim(directory, note(other, text=b"new"), again)
    fill(directory, note(other, text=b"new"), {INDEX_NAME: b"new"})
    assert (directory / "model.safetensors").read_bytes() == b"moved"
    assert (directory / INDEX_NAME).read_bytes() == b"new"


def test_what_is_in_the_way_stays(tmp_path: Path, target: Path) -> None:
    directory = tmp_path / "out"
    made_in(directory, note(target, links=("a",)))
    (directory / "b").write_text("mine")
    with pytest.raises(Refused, match=r"out/b: is in the way"):
        claim(directory, note(target, links=("a", "b")), check(directory))
    (directory / "a").unlink()
    (directory / "a").write_text("mine")
    with pytest.raises(Refused, match=r"out/a: is in the way"):
        claim(directory, note(target, links=("a",)), check(directory))
    assert (directory / "a").read_text() == (directory / "b").read_text() == "mine"


def test_a_directory_that_no_export_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "dangling"):
        with pytest.raises(Refused, match="empty or not there yet"):
            check(tmp_path / name)
    with pytest.raises(Refused, match="make it first"):
        check(tmp_path / "none" / "out")
    (tmp_path / "empty").mkdir()
    assert check(tmp_path / "empty") is None


def test_an_export_of_another_checkpoint_or_pool_is_refused(tmp_path: Path, target: Path) -> None:
    made_in(tmp_path / "out", note(target))
    assert check(tmp_path / "out") == note(target)
    for identity, address in (("another", "unix:/s"), ("identity", "unix:/other")):
        with pytest.raises(Refused, match="tiermem export --undo"):
            export_directory.check(tmp_path / "out", identity, address)


def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(AccessDenied, match="may not make files"):
        check(tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: b"[]",
        lambda body: body.replace(b"/1", b"/2"),
        lambda body: body.replace(b'"model.safetensors"', b'"../escaped"'),
        lambda body: body.replace(b'"model.safetensors"', b'"/etc/passwd"'),
        lambda body: body.replace(b'"image"', b'"picture"'),
        lambda body: body.replace(b'"m.export"', b"7"),
    ],
)
def test_a_damaged_note_is_refused(tmp_path: Path, target: Path, damage: Any) -> None:
    made_in(tmp_path / "out", note(target))
    path = tmp_path / "out" / export_directory.NOTE_NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Refused, match="remove the directory by hand"):
        note_of(tmp_path / "out")
