"""numpy: models and safetensors files as numpy arrays that alias the pool's memory; the verbs of `safetensors.numpy`.

Owns what safetensors lets an index of a numpy slice be. Dtypes are in `tiermem.dtypes`. Never copies a whole tensor.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tiermem.opening import open_model
from tiermem.safe_open import Device, ReaderError, safe_open

if TYPE_CHECKING:
    from safetensors.numpy import save_file as save_file

    from tiermem.model import Model

__all__ = ["load_file", "load_model", "safe_open", "save_file"]

_I32 = range(-(1 << 31), 1 << 31)


def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, npt.NDArray[Any]]:
    """All tensors of a safetensors file, in the order of their bytes. `safetensors.numpy.load_file`, less the copy.

    Arrays are writable and copy-on-write. Raises what `safe_open` raises, what stopped the load (CheckpointChanged,
    DigestMismatch, ReadError), and Refused for a dtype that numpy cannot hold (BF16 and FP8 need ml_dtypes).
    """
    with safe_open(filename, "np", backend=backend) as file:
        return file.get_tensors()


def load_model(directory_or_name: str | os.PathLike[str], *, writable: bool = True) -> dict[str, npt.NDArray[Any]]:
    """All tensors of a model, of every file of its directory, once the whole is loaded and verified.

    Takes a directory, an index, a file, or the name of a model in the pool. Arrays are copy-on-write, or with
    `writable=False` read-only views of shared memory, whose use can be sampled.

    Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError, DigestMismatch, ReadError, Refused.
    """
    model = open_model(directory_or_name, writable=writable)
    return tensors_of(model, model, "cpu")


def check_device(device: Device) -> None:
    """numpy has the CPU alone. Raises ReaderError."""
    if device != "cpu":
        raise ReaderError(f"Device {device} is not supported for framework numpy")


def tensors_of(model: Model, names: Iterable[str], device: Device) -> dict[str, npt.NDArray[Any]]:
    """Arrays by name; waits until all may be read. Raises Refused for a dtype that numpy cannot hold."""
    model.wait(None if names is model else names)
    return {name: model[name] for name in names}


def part_of(model: Model, name: str, index: Any, device: Device) -> npt.NDArray[Any]:
    """`array[index]` by safetensors' rules: contiguous, a view where that is contiguous already."""
    shape = model.info(name).shape
    part = model[name][(*_checked(index, shape), ...)]
    # Writers of safetensors files take an array's address and length, and would write what lies between its rows.
    return part if part.flags.c_contiguous else part.copy()


def _checked(index: Any, shape: Sequence[int]) -> tuple[int | slice, ...]:
    """The index for numpy, where safetensors' reader takes it; its errors, in its order. Raises ReaderError.

    Unlike numpy it takes neither None nor arrays, neither negative bounds nor ones beyond a dimension. The original
    ends negative bounds in an OverflowError and reversed ones in a SystemError.
    """
    if isinstance(index, list):
        if index:
            raise ReaderError("Non empty lists are not implemented")
        index = slice(0, 0)
    items = list(index) if isinstance(index, tuple) else [index]
    items = _expanded([_item(place, item) for place, item in enumerate(items)], len(shape))
    items = [_from_end(item, axis, shape) for axis, item in enumerate(items)]
    shown = f"Error during slicing [{', '.join(map(_shown, items))}] with shape {list(shape)}"
    if len(items) > len(shape):
        raise ReaderError(f"{shown}: more slicing indexes than dimensions in tensor")
    for axis in reversed(range(len(items))):
        size = shape[axis]
        start, stop = _bounds(items[axis], size)
        if start >= size or stop > size:
            asked = start if start >= size else stop - 1
            raise ReaderError(f"{shown}: index {asked} out of bounds for tensor dimension #{axis} of size {size}")
        if start > stop:
            raise ReaderError(f"{shown}: the slice ends before it starts")
    return tuple(items)


def _item(place: int, item: Any) -> Any:
    if item is Ellipsis:
        return item
    if isinstance(item, slice):
        parts = (item.start, item.stop, item.step)
        start, stop, step = (None if part is None else operator.index(part) for part in parts)
        if step is not None and step < 1:
            raise ReaderError(f"Slice step must be a positive integer, got {step}")
        for bound in (start, stop):
            if bound is not None and bound < 0:
                raise ReaderError(f"slice bound {bound} is negative; bounds count from 0")
        return slice(start, stop, step)
    try:
        number = operator.index(item)
    except TypeError:
        number = _I32.stop
    if number not in _I32:
        raise ReaderError(f"Unsupported slice index at position {place}: expected slice, int, or ellipsis")
    return number


def _expanded(items: list[Any], dimensions: int) -> list[Any]:
    """The items with an ellipsis replaced by whole dimensions."""
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(places) > 1:
        raise ReaderError("Only one ellipsis (...) is allowed in slice index")
    for place in places:
        items[place : place + 1] = [slice(None)] * (dimensions - len(items) + 1)
    return items


def _from_end(item: Any, axis: int, shape: Sequence[int]) -> Any:
    if isinstance(item, slice) or item >= 0:
        return item
    size = shape[axis] if axis < len(shape) else 0
    if item + size < 0:
        raise ReaderError(f"Invalid index {item} for dimension {axis} of size {size}")
    return item + size


def _bounds(item: int | slice, size: int) -> tuple[int, int]:
    if isinstance(item, slice):
        return item.start or 0, size if item.stop is None else item.stop
    return item, item + 1


def _shown(item: int | slice) -> str:
    if not isinstance(item, slice):
        return str(item)
    start, stop = ("" if bound is None else bound for bound in (item.start, item.stop))
    return f"{start}:{stop}" + ("" if item.step in (None, 1) else f":{item.step}")


def __getattr__(name: str) -> Any:
    # At first use, because reading needs no safetensors.
    if name != "save_file":
        raise AttributeError(f"module 'tiermem.numpy' has no attribute {name!r}")
    from safetensors.numpy import save_file

    return save_file
