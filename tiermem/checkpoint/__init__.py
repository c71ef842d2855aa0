"""Checkpoints: a path -> a Manifest, trusting nothing. Reads headers only; never a tensor's bytes, never runs a pickle.

A format is one file here, with a function `(path, file number) -> (CheckpointFile, [RawTensor])`; an ONNX model, which
may refer to further files, gives a list of them. `docs/formats.md` says what is read of each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tiermem.checkpoint.file import FileFacts, check_unchanged, directory_names, file_facts
from tiermem.checkpoint.formats import INDEX_ENDING, choose, reader_of
from tiermem.checkpoint.gguf import split_paths
from tiermem.checkpoint.index import read_index
from tiermem.checkpoint.layout import RawTensor, identity_of, lay_out
from tiermem.checkpoint.onnx import ENDING as ONNX_ENDING
from tiermem.checkpoint.onnx import read_onnx
from tiermem.checkpoint.strict_json import shown
from tiermem.errors import CheckpointError
from tiermem.types import CheckpointFile, Manifest

__all__ = ["FileFacts", "check_unchanged", "file_facts", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str], layers: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of the checkpoint at `path`: a file of any format, an index of such files, or a directory.

    A directory is read by the first that it holds of: `model.safetensors.index.json`, its only
    `*.safetensors.index.json`, all of its `*.safetensors` files, sorted by name; then GGUF, PyTorch, ONNX, MindSpore,
    each with one index, file or split set. `layers` overrides tensor name -> layer key; a tensor that it does not
    name keeps the key that `layer_of` derives.

    Raises CheckpointNotFound (nothing there to read), CheckpointError (malformed, with the file and the tensor),
    CheckpointChanged, TensorNotFound (`layers` names a tensor that is not there), AccessDenied, ReadError.
    """
    # Absolute, because a pool outlives its working directory; not resolved, because errors name what was asked for.
    root = os.path.join(os.getcwd(), os.fspath(path))
    files, raw = _read(root)
    segments, tensors = lay_out(raw, layers)
    return Manifest(root, identity_of(files), tuple(files), segments, tensors)


def _read(root: str) -> tuple[list[CheckpointFile], list[RawTensor]]:
    if not os.path.isdir(root):
        return _read_path(root)
    paths = choose(root, directory_names(root))
    return _read_path(paths[0]) if len(paths) == 1 else _read_files(paths)


def _read_path(path: str) -> tuple[list[CheckpointFile], list[RawTensor]]:
    if path.endswith(INDEX_ENDING):
        return _read_indexed(path)
    return read_onnx(path) if path.endswith(ONNX_ENDING) else _read_files(split_paths(path))


def _read_files(paths: list[str]) -> tuple[list[CheckpointFile], list[RawTensor]]:
    files: list[CheckpointFile] = []
    raw: list[RawTensor] = []
    holders: dict[str, str] = {}
    for number, path in enumerate(paths):
        file, tensors = reader_of(path)(path, number)
        for tensor in tensors:
            if (holder := holders.setdefault(tensor.name, path)) != path:
                raise CheckpointError(
                    f"{path}: tensor {shown(tensor.name)} is in {holder} as well; remove the file that is not wanted"
                )
        files.append(file)
        raw += tensors
    return files, raw


def _read_indexed(index: str) -> tuple[list[CheckpointFile], list[RawTensor]]:
    homes = read_index(index)
    files, raw = _read_files(sorted(set(homes.values())))
    held = {tensor.name: files[tensor.file].path for tensor in raw}
    for name, home in homes.items():
        if held.get(name) != home:
            raise CheckpointError(
                f"{index}: says that tensor {shown(name)} is in {home}, which lacks it; download the checkpoint again"
            )
    return files, raw
