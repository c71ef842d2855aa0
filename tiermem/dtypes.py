"""dtypes of numpy and of torch for the names of the safetensors format, as far as what is installed has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiermem.errors import Refused

if TYPE_CHECKING:
    import torch

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F4": "float4_e2m1fn_x2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of a tensor's dtype name. Raises Refused for one that numpy cannot hold."""
    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    if name in _ML_DTYPES:
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            raise Refused(
                f"numpy has no dtype for {name}; pip install ml_dtypes, read the tensor through tiermem.torch, "
                "or take its bytes: model.raw(name)"
            ) from None
        dtype: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
        return dtype
    raise Refused(f"numpy has no dtype for packed {name}; take the tensor's bytes: model.raw(name)")


def torch_names() -> dict[torch.dtype, str]:
    """The name of each of torch's dtypes that has one."""
    import torch

    return {getattr(torch, theirs): name for name, theirs in _TORCH.items() if hasattr(torch, theirs)}


def torch_layout(dtype: str, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """A tensor's dtype and shape in torch, which counts pairs of F4. Raises Refused for what torch lacks."""
    import torch

    found = getattr(torch, _TORCH.get(dtype, ""), None)
    if found is None:
        raise Refused(f"torch {torch.__version__} has no dtype for {dtype}; take the tensor's bytes")
    if dtype != "F4":
        return found, shape
    if not shape or shape[-1] % 2:
        raise Refused(f"torch counts pairs of F4, and shape {list(shape)} ends with half of one; take the bytes")
    return found, (*shape[:-1], shape[-1] // 2)
