"""Formats: which reader a file's content and name ask for, and which files of a directory are its weights.

Looks at a file's first bytes, never further, and never runs what it finds.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence

from tiermem.checkpoint import gguf, mindspore_ckpt, safetensors, torch_bin, torch_zip
from tiermem.checkpoint.file import read_exactly, regular_file
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.strict_json import shown
from tiermem.errors import CheckpointError, CheckpointNotFound
from tiermem.types import CheckpointFile

FileReader = Callable[[str, int], tuple[CheckpointFile, list[RawTensor]]]
"""(path, file number) -> its facts and tensors"""

INDEX_ENDING = ".index.json"
SAFETENSORS = ".safetensors"

_ENDINGS: dict[str, FileReader] = {
    ".gguf": gguf.read_gguf, ".bin": torch_bin.read_torch, ".pt": torch_bin.read_torch, ".pth": torch_bin.read_torch,
    mindspore_ckpt.ENDING: mindspore_ckpt.read_mindspore,
}  # fmt: skip
ENDINGS = (SAFETENSORS, ".onnx", *_ENDINGS)
"""By which a path is known as a checkpoint's."""

_CHOICES = (
    "model.safetensors.index.json", "*.safetensors.index.json", "*.safetensors",
    "*.gguf",
    "pytorch_model.bin.index.json", "*.bin.index.json", "*pytorch_model.bin", "adapter_model.bin", "*.pth", "*.pt",
    "model.onnx", "*.onnx",
    "*.ckpt.index.json", "*.ckpt",
)  # fmt: skip
"""What a directory is read by: the first of these that it holds."""


def reader_of(path: str) -> FileReader:
    """The reader of the file at `path`: by its first bytes where they tell (a blob of a hub cache has no ending), else
    by its ending. Raises CheckpointError for a file of no format, and what `regular_file` raises."""
    ending = os.path.splitext(path)[1].lower()
    if ending == SAFETENSORS:
        return safetensors.read_header
    with regular_file(path) as (descriptor, facts):
        start = read_exactly(path, descriptor, 0, min(facts.size, safetensors.LENGTH_BYTES + 1))
    if start.startswith(gguf.MAGIC):
        return gguf.read_gguf
    if start.startswith(torch_zip.MAGIC):
        return torch_bin.read_torch
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if start[safetensors.LENGTH_BYTES :] == b"{":
        return safetensors.read_header
    raise CheckpointError(f"{path}: is of no format that is read here; convert it to safetensors")


def choose(root: str, names: Sequence[str]) -> list[str]:
    """The paths that the directory `root`, which holds `names`, is read by: an index, or files of one format.

    Raises CheckpointNotFound where it holds none, and CheckpointError where it holds several of which one is meant.
    """
    for pattern in _CHOICES:
        found = [os.path.join(root, name) for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            continue
        if pattern.endswith(SAFETENSORS) or len(found) == 1 or found == gguf.split_paths(found[0]):
            return found
        kind = "indexes" if pattern.endswith(INDEX_ENDING) else f"files {pattern}"
        named = shown([os.path.basename(path) for path in found])
        raise CheckpointError(f"{root}: holds {len(found)} {kind}, {named}; name the one to read")
    raise CheckpointNotFound(
        f"{root}: holds no *{SAFETENSORS} file, nor one of another format that is read (*.gguf, *.onnx, *.ckpt, "
        "pytorch_model.bin); name the directory that has the weights"
    )
