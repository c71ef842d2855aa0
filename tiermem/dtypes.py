"""numpy dtype of every dtype name of the safetensors format that numpy, or ml_dtypes where installed, can hold."""

from __future__ import annotations

import numpy as np

from tiermem.errors import Refused

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
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
