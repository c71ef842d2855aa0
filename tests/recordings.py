"""Recordings made by hand: a model of three layers, and the frames of a process that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiermem.observations import Bits, Rung
from tiermem.perfdata import EventInfo, Fork, Image, PerfData
from tiermem.recording import Recorder, bits_frame, frame, samples_frames
from tiermem.rpc.codec import encode_manifest
from tiermem.samples import SAMPLE, Samples
from tiermem.types import PAGE_BYTES, CheckpointFile, Extent, Manifest, SegmentInfo, TensorInfo

MODEL = "ab" * 32
ADDRESS = 0x7F0000000000
PID, TID = 100, 101


def manifest(layers: Sequence[str] = ("embeddings", "model.layers.0", "model.layers.1", "head"),
             pages: int = 2) -> Manifest:  # fmt: skip
    """Layers of `pages` pages, in this order; in each one tensor `LAYER.weight` that fills all but 8 bytes."""
    length = pages * PAGE_BYTES - 8
    tensors = tuple(
        TensorInfo(f"{layer}.weight", "U8", (length,), 0, i * length, Extent(i, 0, length))
        for i, layer in enumerate(layers)
    )
    files = (CheckpointFile("/m/model.safetensors", 1, 2, length * len(layers), 3, "ab"),)
    return Manifest("/m", "cd" * 32, files, tuple(SegmentInfo(layer, length) for layer in layers), tensors)


def header(time_s: float = 0.0) -> bytes:
    return frame("header", time_s, version=1, tiermem="0.1.0", host={"cpus": 2}, config={"dram": 1 << 30},
                 command=["tiermem", "record"], unix_s=1.7e9)  # fmt: skip


def model(described: Manifest | None = None, time_s: float = 0.0, **fields: Any) -> bytes:
    told = {"id": MODEL, "name": "tiny", "manifest": encode_manifest(described or manifest())} | fields
    return frame("model", time_s, **told)


def mapped(time_s: float = 0.0, pid: int = PID, pages: int = 8, address: int = ADDRESS, lease: str = "l") -> bytes:
    return frame("map", time_s, pid=pid, lease=lease, model=MODEL, address=address, pages=pages)


def window(begin_s: float, end_s: float, pages: Iterable[int], touched: Iterable[int], pid: int = PID) -> bytes:
    numbers, seen = np.array(sorted(pages), np.int32), set(touched)
    bits = Bits(Rung.PRESENT, begin_s, end_s, numbers, np.array([page in seen for page in numbers.tolist()], np.bool_))
    return bits_frame(end_s, pid, "l", MODEL, bits)


def events(*names: str, rung: str = "perf", period: int = 1000) -> bytes:
    return frame("events", 0.0, names=list(names), periods=[period] * len(names), rung=rung)


def samples(rows: Iterable[tuple[float, int]], tid: int = TID, **columns: int) -> Samples:
    """One sample for each (time_s, page), in the middle of the page."""
    times = list(rows)
    made = np.zeros(len(times), SAMPLE)
    made["pid"], made["tid"], made["period"] = PID, tid, 1000
    made["time"] = [int(time_s * 1e9) for time_s, _ in times]
    made["addr"] = [ADDRESS + page * PAGE_BYTES + PAGE_BYTES // 2 for _, page in times]
    for name, value in columns.items():
        made[name] = value
    return made


def sampled(rows: Iterable[tuple[float, int]], **columns: int) -> bytes:
    return samples_frames(0.0, samples(rows, **columns))


def end(time_s: float) -> bytes:
    return frame("end", time_s, reason="it was enough")


def record(path: Path, *frames: bytes) -> Path:
    """A recording with the header and the model, then these frames."""
    with Recorder(path) as recorder:
        recorder.append(header())
        recorder.append(model())
        for data in frames:
            recorder.append(data)
    return path


def perf_data() -> PerfData:
    """Process 1 maps a.so from its second page on, in whose place b.so is mapped later, and has one page of no file;
    process 2 is its child."""
    a, elsewhere = 0x40000000, 1016 * PAGE_BYTES
    images = (
        Image(1, 10, a, 2 * PAGE_BYTES, PAGE_BYTES, "/lib/a.so", False),
        Image(1, 50, a, 2 * PAGE_BYTES, 0, "/lib/b.so", True),
    )
    made = np.zeros(7, SAMPLE)
    made["time"] = [20, 21, 22, 23, 24, 60, 61]
    made["pid"] = made["tid"] = [1, 1, 1, 1, 1, 1, 2]
    made["addr"] = [a, a + 5, a + PAGE_BYTES, elsewhere, elsewhere + 9, a, a]
    made["ip"] = [0, 0, 0, 0, 0, a + 0x10, 0]
    return PerfData(
        path="perf.data", events=(EventInfo("faults", 1, 2),), samples=made,
        names={(1, 1): ((0, "main"),), (2, 2): ((0, "child"),)}, images=images, forks=(Fork(2, 2, 1, 1, 40),), exits=(),
        lost=0, lost_samples=0, throttled=0, unthrottled=0, hostname="", os_release="", perf_version="", arch="",
        cpus=0, cpu="", cpuid="", memory_bytes=0, command=(), build_ids={}, notes=(),
    )  # fmt: skip
