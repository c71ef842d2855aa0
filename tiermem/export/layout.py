"""The files that an export puts into the pool: which bytes of a checkpoint's file go where in a segment of whole pages.

Owns the header that makes a safetensors file a whole number of pages. Reads no tensor, and never names a path outside
the directory that is exported to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tiermem.checkpoint.formats import ENDINGS, reader_of
from tiermem.checkpoint.gguf import read_gguf
from tiermem.checkpoint.mindspore_ckpt import read_mindspore
from tiermem.checkpoint.onnx import ENDING as ONNX_ENDING
from tiermem.checkpoint.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, read_header
from tiermem.errors import Refused
from tiermem.types import DTYPE_BITS, PAGE_BYTES, CheckpointFile, Manifest, TensorInfo, pages_of

SAFETENSORS, VERBATIM = "safetensors", "verbatim"
"""Forms of an export."""

INDEX_NAME = "model.safetensors.index.json"

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of `page_bytes`: `header`, then tensors at their offsets; what lies in `gaps` is copied from `source`.

    `name` is relative to the exported directory. All offsets count from the start of the file.
    """

    name: str
    page_bytes: int
    header: bytes
    tensors: tuple[tuple[TensorInfo, int], ...]
    gaps: tuple[tuple[int, int], ...]
    source: CheckpointFile


def lay_out_files(manifest: Manifest) -> tuple[str, tuple[WeightsFile, ...]]:
    """Form and files in which the checkpoint is exported.

    Raises Refused where it holds no weights, lies outside its directory or is ONNX, and what reading the first bytes of
    its files raises.
    """
    root = manifest.path if os.path.isdir(manifest.path) else os.path.dirname(manifest.path)
    names = [_inside(root, file.path) for file in manifest.files]
    if names[0].endswith(ONNX_ENDING):
        raise Refused(
            f"{manifest.path}: ONNX Runtime follows no link out of a model's directory, so that weights are not shared "
            "by links; open it with tiermem.onnxruntime.session"
        )
    form = VERBATIM if reader_of(manifest.files[0].path) is read_gguf else SAFETENSORS
    place = _verbatim if form == VERBATIM else _converted
    files = tuple(place(manifest, number, name) for number, name in enumerate(names))
    if not any(tensor.nbytes for file in files for tensor, _ in file.tensors):
        raise Refused(f"{manifest.path}: its tensors have no bytes to share; use the checkpoint as it is")
    names = [file.name for file in files]
    if double := {name for name in names if names.count(name) > 1}:
        raise Refused(f"{manifest.path}: two of its files would both be {min(double)}; rename one of them")
    return form, files


def index_of(files: Sequence[WeightsFile]) -> bytes:
    """The text of the index of a checkpoint of several safetensors files."""
    homes = {tensor.name: file.name for file in files for tensor, _ in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor, _ in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": homes}, indent=2).encode()


def safetensors_file(
    name: str, tensors: Iterable[TensorInfo], source: CheckpointFile, metadata: Mapping[str, str] | None
) -> WeightsFile:
    """A safetensors file of whole pages. The format has no room for padding but at the end of its header, so the data
    end where the file ends, and begin wherever that is.

    Tensors are in file order, those of larger elements behind those of smaller: counted back from the end, which is a
    multiple of a page, each then begins at a multiple of its element's size, whatever the sum of all sizes is.
    """
    ordered = sorted(tensors, key=lambda tensor: DTYPE_BITS[tensor.dtype])
    begins = list(accumulate((tensor.nbytes for tensor in ordered), initial=0))
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    for tensor, begin in zip(ordered, begins, strict=False):
        if tensor.name == _METADATA:
            raise Refused(
                f"{source.path}: a tensor is called {_METADATA}, which safetensors has no room for; rename it"
            )
        offsets = (begin, begin + tensor.nbytes)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    page_bytes = pages_of(LENGTH_BYTES + len(text) + begins[-1]) * PAGE_BYTES
    start = page_bytes - begins[-1]
    length = start - LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise Refused(
            f"{source.path}: {len(ordered)} tensors need a header of {length} bytes, more than the {MAX_HEADER_BYTES} "
            "that the format allows; split the checkpoint into several files"
        )
    placed = tuple((tensor, start + begin) for tensor, begin in zip(ordered, begins, strict=False))
    return WeightsFile(
        name, page_bytes, length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length), placed, (), source
    )


def _converted(manifest: Manifest, number: int, name: str) -> WeightsFile:
    file = manifest.files[number]
    reader = reader_of(file.path)
    metadata = file.metadata
    if reader is not read_header:
        metadata = {**(metadata or {}), "format": "ms" if reader is read_mindspore else "pt"}
    folder, base = os.path.split(name)
    stem, ending = os.path.splitext(base)
    # A blob of a hub cache has no ending: what is behind a dot in its name is a part of the name.
    stem = re.sub(r"^pytorch_model\b", "model", stem if ending in ENDINGS else base)
    return safetensors_file(os.path.join(folder, stem + ENDINGS[0]), _tensors(manifest, number), file, metadata)


def _verbatim(manifest: Manifest, number: int, name: str) -> WeightsFile:
    """The very bytes of a file, and zeros behind them up to the page."""
    file = manifest.files[number]
    placed = [(tensor, tensor.file_offset) for tensor in _tensors(manifest, number)]
    gaps = []
    end = 0
    for tensor, offset in placed:
        if offset > end:
            gaps.append((end, offset))
        end = offset + tensor.nbytes
    if file.size > end:
        gaps.append((end, file.size))
    return WeightsFile(name, pages_of(file.size) * PAGE_BYTES, b"", tuple(placed), tuple(gaps), file)


def _tensors(manifest: Manifest, number: int) -> list[TensorInfo]:
    """The tensors of a file, by their place in it."""
    return sorted((t for t in manifest.tensors if t.file == number), key=lambda tensor: tensor.file_offset)


def _inside(root: str, path: str) -> str:
    name = os.path.relpath(path, root)
    if name.split(os.sep)[0] == os.pardir:
        raise Refused(f"{path}: is outside the checkpoint's directory {root}; export the directory that holds it")
    return name
