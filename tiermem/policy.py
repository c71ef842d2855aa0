"""Policy interface: a pure function from a frozen view of the pool to a plan of moves. Never acts, never does I/O.

A policy is a file with one class that has `plan(view) -> Plan`. It sees pages as numpy columns, row by row in the
order (model, segment, page); it takes time from the view. The migrator checks every move again before it acts.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.types import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier. `needed_bytes`: what a load waits for beyond the free capacity; 0 without pressure."""

    id: int
    name: str
    capacity_bytes: int | None
    used_bytes: int
    needed_bytes: int


@dataclass(frozen=True, slots=True)
class Pages:
    """One row a page. Arrays are read-only and of equal length."""

    model: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]
    tier: npt.NDArray[np.int8]
    last_used_s: npt.NDArray[np.float64]
    leased: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.model)


@dataclass(frozen=True, slots=True)
class Run:
    """The pages of one whole segment: rows [first, first + pages)."""

    first: int
    pages: int
    last_used_s: float

    @property
    def nbytes(self) -> int:
        return self.pages * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees. `models[i]` is the name of model number i of the pages' `model` column."""

    now_s: float
    tiers: tuple[TierView, ...]
    models: tuple[str, ...]
    pages: Pages

    def segments(self, tier: int) -> Iterator[Run]:
        """Segments that lie wholly in `tier` and are neither leased nor pinned, in row order."""
        pages = self.pages
        if not len(pages):
            return
        change = (np.diff(pages.model) != 0) | (np.diff(pages.segment) != 0)
        starts = np.concatenate(([0], np.flatnonzero(change) + 1))
        free = (pages.tier == tier) & ~pages.leased & ~pages.pinned
        whole = np.logical_and.reduceat(free, starts)
        lengths = np.diff(np.concatenate((starts, [len(pages)])))
        for first, count in zip(starts[whole].tolist(), lengths[whole].tolist(), strict=True):
            yield Run(first, count, float(pages.last_used_s[first]))


@dataclass(frozen=True, slots=True)
class Move:
    """Rows [first, first + pages) of the view's pages go from tier `source` to tier `target`."""

    first: int
    pages: int
    source: int
    target: int
    reason: str


Plan = list[Move]


class Policy(Protocol):
    """What a policy file's class must have."""

    def plan(self, view: View) -> Plan: ...


def _module_of(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix != ".py":
        try:
            return importlib.import_module(f"tiermem.policies.{name}")
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"no policy {name!r}; name a shipped one (hold, lru) or the path of a .py file"
            ) from error
    spec = importlib.util.spec_from_file_location(f"tiermem_policy_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"policy {name}: no such file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"policy {name}: importing it raised {type(error).__name__}: {error}") from error
    return module


def load_policy(name: str) -> Policy:
    """The policy of a shipped name (`lru`) or of a file (`./mine.py`). Raises ConfigError saying what is wrong."""
    module = _module_of(name)
    classes: list[type[Any]] = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and callable(getattr(cls, "plan", None))
    ]
    if len(classes) != 1:
        raise ConfigError(f"policy {name}: {len(classes)} classes with a method `plan(self, view)`; one is needed")
    (cls,) = classes
    if list(inspect.signature(cls.plan).parameters) != ["self", "view"]:
        raise ConfigError(f"policy {name}: plan{inspect.signature(cls.plan)} must be plan(self, view)")
    try:
        policy: Policy = cls()
    except Exception as error:
        raise ConfigError(f"policy {name}: {cls.__name__}() raised {type(error).__name__}: {error}") from error
    return policy
