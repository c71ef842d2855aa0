"""Placing: whether a policy's answer to a request can be done. Never chooses a tier."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.errors import PolicyError
from tiermem.policy.view import Request
from tiermem.types import PAGE_BYTES

NOWHERE = -1
"""The place of a page that no memory tier has room for."""


def check_place(request: Request, placed: object) -> npt.NDArray[np.int8]:
    """The tier of each page as int8, if these can take them: memory tiers, and no more than they have free. A page may
    be NOWHERE only once all of them are full. Raises PolicyError that says what is wrong."""
    if not isinstance(placed, np.ndarray | list | tuple):
        raise PolicyError(f"place(request) must return an array of tier ids, not {type(placed).__name__}")
    try:
        array = np.asarray(placed)
    except ValueError as error:
        raise PolicyError(f"place(request) must return an array of tier ids: {error}") from None
    if array.shape != (len(request),):
        raise PolicyError(f"place(request) returned shape {array.shape}; {len(request)} pages ask, one entry each")
    if not len(request):
        return np.empty(0, np.int8)
    if array.dtype.kind not in "iu":
        raise PolicyError(f"place(request) returned {array.dtype}; tier ids are whole numbers, int8")
    free = {tier.id: max(0, tier.free_bytes) // PAGE_BYTES for tier in request.tiers if tier.is_memory}
    ids, counts = np.unique(array, return_counts=True)
    for tier, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if tier == NOWHERE:
            continue
        if tier not in free:
            raise PolicyError(f"place(request) names tier {tier}; the memory tiers are {sorted(free)}")
        if count > free[tier]:
            raise PolicyError(f"place(request) puts {count} pages into tier {tier}, which has room for {free[tier]}")
        free[tier] -= count
    if (array == NOWHERE).any() and (room := [tier for tier, pages in free.items() if pages]):
        raise PolicyError(f"place(request) leaves pages out; tier {room[0]} has room for {free[room[0]]} more")
    return array.astype(np.int8)
