"""Checkpoints: a path -> a Manifest, trusting nothing. Reads headers only; never a tensor's bytes, never a pickle.

A format is one file here, with a function `(path, file number) -> (CheckpointFile, [RawTensor])`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tiermem.checkpoint.file import FileFacts, check_unchanged, directory_names, file_facts, read_exactly, regular_file
from tiermem.checkpoint.index import INDEX_ENDING, read_index
from tiermem.checkpoint.layout import RawTensor, identity_of, lay_out
from tiermem.checkpoint.safetensors import LENGTH_BYTES, read_header
from tiermem.checkpoint.strict_json import shown
from tiermem.errors import CheckpointError, CheckpointNotFound
from tiermem.types import CheckpointFile, Manifest

__all__ = ["FileFacts", "check_unchanged", "file_facts", "open_checkpoint"]

_ENDING = ".safetensors"
_INDEX = "model" + INDEX_ENDING


def open_checkpoint(path: str | os.PathLike[str], layers: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of the checkpoint at `path`: a safetensors file, an index of such files, or a directory.

    A directory is read by `model.safetensors.index.json`, else by its only `*.safetensors.index.json`, else as all of
    its `*.safetensors` files, sorted by name. `layers` overrides tensor name -> layer key; a tensor that it does not
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
    if os.path.isdir(root):
        names = directory_names(root)
        if index := _index_among(root, names):
            return _read_indexed(os.path.join(root, index))
        paths = [os.path.join(root, name) for name in names if name.endswith(_ENDING)]
        if not paths:
            raise CheckpointNotFound(f"{root}: holds no *{_ENDING} file; name the directory that has the weights")
        return _read_files(paths)
    if root.endswith(INDEX_ENDING):
        return _read_indexed(root)
    _refuse_other_formats(root)
    return _read_files([root])


def _index_among(root: str, names: list[str]) -> str | None:
    indexes = [name for name in names if name.endswith(INDEX_ENDING)]
    if len(indexes) > 1 and _INDEX not in indexes:
        raise CheckpointError(f"{root}: holds {len(indexes)} indexes, {shown(indexes)}; name the one to read")
    return _INDEX if _INDEX in indexes else next(iter(indexes), None)


def _refuse_other_formats(path: str) -> None:
    if path.endswith(_ENDING):
        return
    with regular_file(path) as (descriptor, facts):
        # A blob of a hub cache has no ending; its JSON header begins behind the header's length.
        if facts.size <= LENGTH_BYTES or read_exactly(path, descriptor, LENGTH_BYTES, 1) != b"{":
            raise CheckpointError(f"{path}: is of no format that is read here; convert it to safetensors")


def _read_files(paths: list[str]) -> tuple[list[CheckpointFile], list[RawTensor]]:
    files: list[CheckpointFile] = []
    raw: list[RawTensor] = []
    holders: dict[str, str] = {}
    for number, path in enumerate(paths):
        file, tensors = read_header(path, number)
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
