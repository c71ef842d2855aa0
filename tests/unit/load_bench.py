"""Bench: one load by hand, over memory and a source that a test controls."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.checkpoint.layout import RawTensor, lay_out
from tiermem.load import Load, Task, plan_checks, plan_reads
from tiermem.source.fill import Fill
from tiermem.types import CheckpointFile, Manifest

KIB = 1024


def manifest_of(sizes: Sequence[Sequence[tuple[int, str]]], header: int = 100) -> Manifest:
    """A manifest of files, each a list of (bytes, layer) of its tensors, packed behind a header."""
    raw, layers = [], {}
    for file, tensors in enumerate(sizes):
        at = header
        for i, (nbytes, layer) in enumerate(tensors):
            raw.append(RawTensor(f"{file}.{i}", "U8", (nbytes,), file, at, nbytes))
            layers[f"{file}.{i}"] = layer
            at += nbytes
    segments, infos = lay_out(raw, layers)
    files = tuple(CheckpointFile(f"/weights/{i}", 1, i, 1 << 40, 0, "digest") for i in range(len(sizes)))
    return Manifest("/weights", "id", files, segments, infos)


def record_of(manifest: Manifest) -> ModelRecord:
    return ModelRecord("model", manifest, [None] * len(manifest.tensors))


class Content:
    """A source whose byte i of file f is known; raises or waits where told."""

    def __init__(self) -> None:
        self.number = 0
        self.reads: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.changed: Exception | None = None
        self.gate: threading.Semaphore | None = None
        self.entered = threading.Semaphore(0)
        self.closed = False
        self.lied = False
        self.lies = 0  # reads that bring zeros, and are then not believed

    @staticmethod
    def bytes_of(file: int, offset: int, length: int) -> bytes:
        return bytes((file * 89 + at * 7 + at // 251) % 256 for at in range(offset, offset + length))

    def read(self, file: int, parts: Sequence[Fill], staging: Any) -> None:
        self.reads.append((self.number or file, parts[0][0]))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        lie, self.lies = self.lies > 0, max(0, self.lies - 1)
        for offset, length, destination, *_ in parts:
            ctypes.memmove(destination, bytes(length) if lie else self.bytes_of(file, offset, length), length)
        self.lied |= lie

    whole_segments = False
    reads_at_once: int | None = None

    def disbelieve(self, tensor: int) -> bool:
        lied, self.lied = self.lied, False
        return lied

    def check(self) -> None:
        if self.changed is not None:
            raise self.changed

    def close(self) -> None:
        self.closed = True


class Bench:
    """A load over anonymous segments, its source, and which segments it completed."""

    def __init__(self, manifest: Manifest, block: int = 4096, stock: Any = None, is_check: bool = False) -> None:
        self.record = record_of(manifest)
        self.source = Content()
        self.completed: list[int] = []
        self.lock = threading.RLock()
        self.segments = {
            i: _native.Segment.create(-1, f"{i}", segment.page_bytes) for i, segment in enumerate(manifest.segments)
        }
        for i, segment in enumerate(manifest.segments):
            self.record.begin(i, f"{i}", np.zeros(segment.pages, np.int8))
        tasks = plan_reads(manifest, self.segments, block)
        if is_check:
            tasks = plan_checks(self.record, self.segments)
        self.load = Load(
            self.record, self.segments, tasks, None if is_check else self.source, stock, self.lock,  # type: ignore[arg-type]
            lambda load, segment: self.completed.append(segment),
        )  # fmt: skip

    def tasks(self) -> list[Task]:
        return list(iter(self.load.next_task, None))

    def bytes_of(self, tensor: int) -> bytes:
        extent = self.record.manifest.tensors[tensor].extent
        return bytes(self.segments[extent.segment].buffer()[extent.offset : extent.offset + extent.length])

    def wanted(self, tensor: int) -> bytes:
        info = self.record.manifest.tensors[tensor]
        return Content.bytes_of(info.file, info.file_offset, info.nbytes)


LAYERS = manifest_of([[(4096, "a"), (4096, "a"), (9000, "b"), (0, "c")], [(5000, "b"), (1, "c")]], header=4096)
