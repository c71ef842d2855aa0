"""The bytes that a tensor takes, from its dtype and shape. Pure: trusts no dimension and knows no format."""

from __future__ import annotations

from collections.abc import Sequence

from tiermem.checkpoint.strict_json import shown
from tiermem.types import DTYPE_BITS

_MAX_BITS = 1 << 63


def bits_of(name: str, element_bits: int, shape: Sequence[object]) -> int:
    """Bits of a tensor of `element_bits` an element; 0 where a dimension is.

    The product skips zeros, so that none hides an overflow, which numpy would refuse later. Raises ValueError.
    """
    bits = element_bits
    for size in shape:
        # type() and not isinstance(): a bool is an int, but no size.
        if type(size) is not int or size < 0:
            raise ValueError(f"tensor {shown(name)} has shape {shown(shape)}: {shown(size)} is no size of a dimension")
        bits *= size or 1
        if bits > _MAX_BITS:
            raise ValueError(f"tensor {shown(name)} has shape {shown(shape)}, whose product overflows 63 bits")
    return 0 if 0 in shape else bits


def nbytes_of(name: str, dtype: str, shape: Sequence[object]) -> int:
    """Bytes of a tensor of a dtype that DTYPE_BITS knows. Raises ValueError, also where it would end within a byte."""
    bits = bits_of(name, DTYPE_BITS[dtype], shape)
    if bits % 8:
        raise ValueError(f"tensor {shown(name)} of dtype {dtype} and shape {shown(shape)} ends within a byte")
    return bits // 8
