"""The index of a sharded checkpoint: `*.index.json` -> which file holds which tensor, none outside.

Follows transformers: the map decides which files belong to the checkpoint, and all of their tensors count.
Never opens a shard.
"""

from __future__ import annotations

import os

from tiermem.checkpoint.file import read_exactly, regular_file
from tiermem.checkpoint.strict_json import parse_object, shown
from tiermem.errors import CheckpointError

MAX_INDEX_BYTES = 100_000_000


def read_index(path: str) -> dict[str, str]:
    """Tensor name -> path of its file, for the index at `path`.

    A file lies in the index's directory or below it. Only its last component may be a link that leads elsewhere, as
    in a hub cache, where `snapshots/REVISION/FILE` points to `blobs/DIGEST`.
    Raises CheckpointError, CheckpointNotFound, AccessDenied, ReadError.
    """
    with regular_file(path) as (descriptor, facts):
        if facts.size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path}: has {facts.size} bytes, more than the {MAX_INDEX_BYTES} of any sane index")
        text = read_exactly(path, descriptor, 0, facts.size)
    try:
        weight_map = parse_object(text).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"weight_map must map tensor names to files, but is {shown(weight_map)}")
        root = os.path.realpath(os.path.dirname(path))
        paths: dict[str, str] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise ValueError(f"tensor {shown(name)} must be in a file, but is in {shown(file)}")
            if file not in paths:
                paths[file] = _inside(path, root, name, file)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; download the checkpoint again") from error
    return {name: paths[file] for name, file in weight_map.items()}


def _inside(index: str, root: str, name: str, file: str) -> str:
    path = os.path.join(os.path.dirname(index), file)
    folder = os.path.realpath(os.path.dirname(path))
    if os.path.isabs(file) or ".." in file.split("/") or os.path.commonpath((root, folder)) != root:
        raise ValueError(f"tensor {shown(name)} is said to be in {shown(file)}, which is outside the checkpoint")
    if not os.path.exists(path):
        raise ValueError(f"tensor {shown(name)} is said to be in {shown(file)}, which is missing")
    return path
