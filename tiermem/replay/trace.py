"""Trace: which pages of which models were touched when, as numpy columns, and the file that holds them. Judges nothing.

A visit is a run of distinct pages of one model that were touched at one time: those of a layer, as a rule. Pages are
numbered through, model by model; a model is loaded before the trace begins, and stays.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.errors import RecordingError
from tiermem.types import PAGE_BYTES, TENSOR_CLASSES

SCHEMA = "tiermem.trace/1"
MAGIC = b"PK\x03\x04"
"""A trace's file is a zip archive of numpy arrays; so it begins."""

_ARRAYS: Mapping[str, type[Any]] = {
    "model": np.int32, "segment": np.int32, "order": np.int32, "tensor_class": np.int8,
    "visit_s": np.float64, "length": np.int32, "step": np.int32, "use_s": np.float64, "use_model": np.int32,
    "use_change": np.int8,
}  # fmt: skip
"""Arrays in the file. `length`: pages of each visit; `step`: from each touched page's number to the next one's, which
compresses well. The others are those of Trace."""

_DAMAGE = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError,
    OverflowError, MemoryError, struct.error, IndexError,
)  # fmt: skip
"""What numpy and zipfile raise for bytes that are no archive of arrays."""

_MAX_PAGES, _MAX_TIME_S = 1 << 30, 1e9


@dataclass(frozen=True)
class Trace:
    """Columns of pages, of visits and of uses; arrays are read-only.

    `names`: of the models. By page: `model` i32 (ascends), `segment` i32 (number in the model; also its layer), `order`
    i32 (place in the model's reading order), `tensor_class` i8. By visit: `visit_s` f64 (ascends, from 0); its pages
    are `page[first[i]:first[i + 1]]` (i32). By use: `use_s` f64 (ascends), `use_model` i32, `use_change` i8: 1 where a
    client opened a model, -1 where it released it. `shifts_s`: when the popular pages became others. `facts`: what the
    trace was made of; `notes`: what is to be said about it.
    """

    facts: Mapping[str, Any]
    names: tuple[str, ...]
    end_s: float
    shifts_s: tuple[float, ...]
    model: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    tensor_class: npt.NDArray[np.int8]
    visit_s: npt.NDArray[np.float64]
    first: npt.NDArray[np.int64]
    page: npt.NDArray[np.int32]
    use_s: npt.NDArray[np.float64]
    use_model: npt.NDArray[np.int32]
    use_change: npt.NDArray[np.int8]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        self._check()

    @property
    def pages(self) -> int:
        return len(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of all models."""
        return self.pages * PAGE_BYTES

    @property
    def touches(self) -> int:
        """Page touches of all visits."""
        return len(self.page)

    def _check(self) -> None:
        """Raises RecordingError where the columns contradict each other: a file may hold anything."""
        if not 0 < self.pages <= _MAX_PAGES:
            raise RecordingError(f"it has {self.pages} pages of models; 1 to {_MAX_PAGES} can be replayed")
        per_page = (self.segment, self.order, self.tensor_class)
        if any(len(column) != self.pages or int(column.min()) < 0 for column in per_page):
            raise RecordingError(f"columns that have not one number for each of the {self.pages} pages")
        if not _within(self.tensor_class, len(TENSOR_CLASSES)):
            raise RecordingError(f"tensor classes beyond {len(TENSOR_CLASSES) - 1}")
        edges = (int(self.model[0]), int(self.model[-1]) - len(self.names) + 1)
        if edges != (0, 0) or not np.isin(np.diff(self.model), (0, 1)).all():
            raise RecordingError(f"pages that do not belong to {len(self.names)} models, one after another")
        lengths = np.diff(self.first)
        if len(lengths) != len(self.visit_s) or int(lengths.sum()) != self.touches or (lengths < 1).any():
            raise RecordingError(f"{len(self.visit_s)} visits that do not share out {self.touches} touches")
        if not _within(self.page, self.pages):
            raise RecordingError(f"touches of pages that are not among the {self.pages} of its models")
        if not len(self.use_s) == len(self.use_model) == len(self.use_change):
            raise RecordingError(f"{len(self.use_s)} times of {len(self.use_model)} uses")
        if not (_within(self.use_model, len(self.names)) and np.isin(self.use_change, (-1, 1)).all()):
            raise RecordingError("uses of models that it has not, or that are neither an opening nor a release")
        if not 0 < self.end_s < _MAX_TIME_S:
            raise RecordingError(f"it ends at {self.end_s} s; a trace takes from 0 to {_MAX_TIME_S:.0f} s")
        for times in (self.visit_s, self.use_s, np.array(self.shifts_s)):
            if len(times) and not (times[0] >= 0 and times[-1] <= self.end_s and (np.diff(times) >= 0).all()):
                raise RecordingError(f"times that do not ascend from 0 to {self.end_s} s")

    def write(self, path: str | Path) -> None:
        """Into a file; equal traces give equal bytes. Raises OSError."""
        told = {"schema": SCHEMA, "names": self.names, "end_s": self.end_s, "shifts_s": self.shifts_s,
                "facts": dict(self.facts)}  # fmt: skip
        arrays: dict[str, npt.NDArray[Any]] = {name: getattr(self, name) for name in _ARRAYS if hasattr(self, name)}
        arrays["length"] = np.diff(self.first).astype(np.int32)
        arrays["step"] = np.diff(self.page, prepend=np.int32(0))
        arrays["told"] = np.frombuffer(json.dumps(told, sort_keys=True).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def _within(values: npt.NDArray[np.integer], limit: int) -> bool:
    return not len(values) or (int(values.min()) >= 0 and int(values.max()) < limit)


def read_trace(path: str | Path) -> Trace:
    """The trace in a file: one that was generated, or a recording (tiermem.replay.recorded says what becomes of it).

    Raises RecordingError for a file that is neither or is damaged; OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        generated = file.read(len(MAGIC)) == MAGIC
    if not generated:
        from tiermem.replay.recorded import trace_of

        return trace_of(path)
    try:
        return _read(path)
    except RecordingError as error:
        raise RecordingError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise RecordingError(f"{path}: it is no trace, or is damaged ({error}); tiermem trace makes one") from None


def _read(path: str | Path) -> Trace:
    # From memory, so that an OSError is the file system's, and never an offset that damage made impossible.
    with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as archive:
        told = json.loads(archive["told"].tobytes())
        if told.get("schema") != SCHEMA:
            raise RecordingError(f"it is of schema {told.get('schema')!r:.80}; this tiermem reads {SCHEMA}")
        arrays = {name: archive[name] for name in _ARRAYS}
    for name, dtype in _ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise RecordingError(f"array {name} is {arrays[name].dtype} of {arrays[name].ndim} dimensions")
    first = np.concatenate(([0], np.cumsum(arrays.pop("length"), dtype=np.int64)))
    page = np.cumsum(arrays.pop("step"), dtype=np.int32)
    names = tuple(str(name) for name in told["names"])
    shifts = tuple(float(at_s) for at_s in told["shifts_s"])
    return Trace(told["facts"], names, float(told["end_s"]), shifts, first=first, page=page, **arrays)


class Builder:
    """A trace while its models and visits are collected, in any order of time."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._columns: list[tuple[npt.NDArray[Any], ...]] = []
        self._visits: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._uses: list[tuple[float, int, int]] = []
        self._pages = 0

    def add_model(
        self, name: str, segment: npt.NDArray[Any], order: npt.NDArray[Any], tensor_class: npt.NDArray[Any]
    ) -> int:
        """Its number; the columns have one row a page of it."""
        self._columns.append((np.full(len(segment), len(self.names)), segment, order, tensor_class))
        self.names.append(name)
        self._pages += len(segment)
        return len(self.names) - 1

    @property
    def pages(self) -> int:
        """Of all models so far: the number of the next one's first page."""
        return self._pages

    def add_visits(self, visit_s: npt.NDArray[Any], lengths: npt.NDArray[Any], page: npt.NDArray[Any]) -> None:
        """Visits whose pages follow one another in `page`, `lengths` of them each; empty ones are dropped."""
        keep = lengths > 0
        self._visits.append((visit_s[keep], lengths[keep], page.astype(np.int32, copy=False)))

    def add_use(self, model: int, open_s: float, release_s: float) -> None:
        self._uses += [(open_s, model, 1), (release_s, model, -1)]

    def finish(
        self, facts: Mapping[str, Any], end_s: float, shifts_s: tuple[float, ...] = (), notes: tuple[str, ...] = ()
    ) -> Trace:
        """The trace of all that was added. Raises RecordingError where that is none."""
        if not self._columns:
            raise RecordingError("there is no model in it, so there is nothing to replay")
        columns = [np.concatenate(parts) for parts in zip(*self._columns, strict=True)]
        visits = self._visits or [(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int32))]
        visit_s, lengths, page = (np.concatenate(parts) for parts in zip(*visits, strict=True))
        by_time = np.argsort(visit_s, kind="stable")
        begin = (np.cumsum(lengths) - lengths)[by_time]
        lengths = lengths[by_time]
        first = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        if len(self._visits) > 1 or not (by_time[1:] > by_time[:-1]).all():
            page = page[np.repeat(begin - first[:-1], lengths) + np.arange(len(page))]
        uses = np.array(sorted(self._uses), np.float64).reshape(-1, 3)
        arrays: dict[str, Any] = dict(zip(("model", "segment", "order", "tensor_class"), columns, strict=True))
        arrays |= {"visit_s": visit_s[by_time], "first": first, "page": page}
        arrays |= {"use_s": uses[:, 0], "use_model": uses[:, 1], "use_change": uses[:, 2]}
        arrays |= {name: arrays[name].astype(dtype) for name, dtype in _ARRAYS.items() if name in arrays}
        return Trace(facts, tuple(self.names), end_s, shifts_s, notes=notes, **arrays)
