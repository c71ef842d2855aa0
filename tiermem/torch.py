"""torch: models and safetensors files as torch tensors that alias the pool's memory; the verbs of `safetensors.torch`.

Owns the making of tensors over a mapping. Never copies weights, except to another device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiermem.dtypes import torch_layout
from tiermem.errors import Refused
from tiermem.opening import open_model
from tiermem.safe_open import Device, ReaderError, parse_device, safe_open

if TYPE_CHECKING:
    from safetensors.torch import save_file as save_file

    from tiermem.model import Model
    from tiermem.types import TensorInfo

__all__ = ["load_file", "load_model", "safe_open", "save_file"]


def load_file(
    filename: str | os.PathLike[str], device: Device | torch.device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in the order of their bytes. `safetensors.torch.load_file`, less the copy.

    Tensors on the CPU are writable and copy-on-write. Raises what `safe_open` raises, and what stopped the load
    (CheckpointChanged, DigestMismatch, ReadError).
    """
    with safe_open(filename, "pt", device, backend=backend) as file:
        return file.get_tensors()


def load_model(
    directory_or_name: str | os.PathLike[str], device: Device | torch.device = "cpu", *, writable: bool = True
) -> dict[str, torch.Tensor]:
    """All tensors of a model, of every file of its directory, once the whole is loaded and verified.

    Takes a directory, an index, a file, or the name of a model in the pool. Unlike `safetensors.torch.load_model` it
    fills no module: hand its result to `module.load_state_dict(..., assign=True)`.

    Tensors are copy-on-write: writes stay in this process. With `writable=False` they are in shared read-only
    memory, where their use can be sampled; **torch does not know read-only tensors, and writing to one ends the
    process with SIGSEGV** (optimisers, in-place operations; gradients are private and harmless).

    Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError, DigestMismatch, ReadError.
    """
    target = parse_device(device)
    model = open_model(directory_or_name, writable=writable)
    return tensors_of(model, model, target)


def check_device(device: Device) -> None:
    """torch itself says at the first tensor whether it has the device."""


def tensors_of(model: Model, names: Iterable[str], device: Device) -> dict[str, torch.Tensor]:
    """Tensors by name, each with a storage of exactly its own bytes; waits until all may be read.

    Raises ReaderError for a dtype that torch lacks.
    """
    model.wait(None if names is model else names)
    tensors = {}
    buffer: Any = None
    for name in names:
        info = model.info(name)
        start, memory = model.place(info)
        if buffer is None:
            buffer = memory if model.writable else _seemingly_writable(memory)
        dtype, shape = _layout(info)
        if info.nbytes:
            # torch drops the buffer's export but keeps the object, and through it the mapping and its lease.
            flat = torch.frombuffer(buffer, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=start)
            tensors[name] = flat.view(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    if device != "cpu":
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors


def part_of(model: Model, name: str, index: Any, device: Device) -> torch.Tensor:
    """What torch makes of `tensor[index]`, as in the original: a view where torch gives one."""
    part = tensors_of(model, (name,), "cpu")[name][index]
    return part if device == "cpu" else part.to(device)


def _layout(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """A tensor's dtype and shape in torch; errors begin as the original's do."""
    try:
        return torch_layout(info.dtype, info.shape)
    except Refused as error:
        pairs = "f4_x2 dtype requires that the last dim be divisible by 2 in torch"
        what = pairs if info.dtype == "F4" else f"Dtype not understood: {info.dtype}"
        raise ReaderError(f"{what}; {error}: model.raw({info.name!r})") from error


class _Interface:
    """Memory as numpy's array interface describes it, and its owner."""

    def __init__(self, memory: memoryview) -> None:
        address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
        self.owner = memory
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": memory.shape, "data": (address, False)}


def _seemingly_writable(memory: memoryview) -> Any:
    """Read-only memory that says it were writable: torch would warn of it at every first use, and has no better."""
    return np.asarray(_Interface(memory)) if memory.nbytes else memory


def __getattr__(name: str) -> Any:
    # At first use, because reading needs no safetensors.
    if name != "save_file":
        raise AttributeError(f"module 'tiermem.torch' has no attribute {name!r}")
    from safetensors.torch import save_file

    return save_file
