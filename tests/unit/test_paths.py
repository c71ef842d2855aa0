"""Known paths: a checkpoint is parsed again exactly when it may have changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import CheckpointWriter
from tiermem import paths
from tiermem.checkpoint import open_checkpoint
from tiermem.errors import CheckpointError, CheckpointNotFound
from tiermem.paths import KnownPaths, default_name


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were parsed, in order."""
    seen: list[str] = []

    def counted(path: str, *args: object) -> object:
        seen.append(path)
        return open_checkpoint(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(paths, "open_checkpoint", counted)
    return seen


def test_a_checkpoint_at_rest_is_parsed_once(checkpoint: CheckpointWriter, parses: list[str]) -> None:
    known, path = KnownPaths(), str(checkpoint(files=2).path)
    first = known.manifest(path)
    assert all(known.manifest(path) is first for _ in range(3))
    assert parses == [path]


def touched(path: Path) -> None:
    os.utime(path / "model-0-of-2.safetensors", ns=(1, 1))


def replaced(path: Path) -> None:
    """By a copy with the same bytes and times: only the inode tells."""
    file = path / "model-1-of-2.safetensors"
    shutil.copy2(file, path / "copy")
    os.replace(path / "copy", file)


def added(path: Path) -> None:
    shutil.copy(path / "model-0-of-2.safetensors", path / "other.tmp")
    os.utime(path, ns=(5, 5))


@pytest.mark.parametrize("change", [touched, replaced, added])
def test_a_change_is_noticed(checkpoint: CheckpointWriter, parses: list[str], change: object) -> None:
    known, path = KnownPaths(), checkpoint(files=2).path
    before = known.manifest(str(path))
    change(path)  # type: ignore[operator]
    after = known.manifest(str(path))
    assert len(parses) == 2
    assert (after.identity == before.identity) == (change is added)
    known.manifest(str(path))
    assert len(parses) == 2, "the new state is known as well"


def test_an_index_that_changes_is_noticed(checkpoint: CheckpointWriter, parses: list[str]) -> None:
    written = checkpoint(files=2)
    index = written.path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.layers.0.weight": "model-0-of-2.safetensors"}}')
    known = KnownPaths()
    assert len(known.manifest(str(written.path)).files) == 1
    mode = os.stat(written.path)
    text = '{"weight_map": {"model.layers.1.weight": "model-1-of-2.safetensors"}}'
    index.write_text(text)
    os.utime(written.path, ns=(mode.st_atime_ns, mode.st_mtime_ns))
    assert [tensor.name for tensor in known.manifest(str(written.path)).tensors][-1].startswith("model.layers.1")
    assert len(parses) == 2


def test_a_checkpoint_that_went_or_broke_is_an_error_each_time(checkpoint: CheckpointWriter) -> None:
    known, written = KnownPaths(), checkpoint()
    known.manifest(str(written.path))
    written.files[0].write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(CheckpointError):
            known.manifest(str(written.path))
    shutil.rmtree(written.path)
    for _ in range(2):
        with pytest.raises(CheckpointNotFound):
            known.manifest(str(written.path))


def test_layers_are_never_answered_from_what_is_known(checkpoint: CheckpointWriter, parses: list[str]) -> None:
    known, path = KnownPaths(), str(checkpoint().path)
    plain = known.manifest(path)
    layers = {tensor.name: "all" for tensor in plain.tensors}
    assert len(known.manifest(path, layers).segments) == 1
    assert known.manifest(path) is plain
    assert len(parses) == 2


def test_only_the_last_paths_are_kept(
    checkpoint: CheckpointWriter, parses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_KEPT", 2)
    known = KnownPaths()
    every = [str(checkpoint(name).path) for name in ("a", "b", "c")]
    for path in (*every, every[2], every[1], every[0]):
        known.manifest(path)
    assert parses == [*every, every[0]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llama", "llama"),
        ("llama/model.safetensors", "llama"),
        ("llama/model.safetensors.index.json", "llama"),
        ("llama/lora.safetensors", "lora"),
        ("llama/v1.5.safetensors", "v1.5"),
        ("llama/lora.safetensors.index.json", "lora"),
        ("llama/pytorch_model.bin", "llama"),
        ("llama/q4_1.gguf", "q4_1"),
    ],
)
def test_a_model_is_named_after_its_directory_or_its_file(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / "llama").mkdir()
    file = tmp_path / "llama" / "weights.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    manifest = open_checkpoint(file)
    object.__setattr__(manifest, "path", str(tmp_path / path))
    assert default_name(manifest) == name


def test_the_root_directory_has_a_name_too(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    manifest = open_checkpoint(file)
    object.__setattr__(manifest, "path", "/")
    assert default_name(manifest) == "model"
