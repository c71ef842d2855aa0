"""The process that is measured: one loader, one model, then it ends. `python -m tests.bench.worker`.

Owns what is inside the clock. Speaks lines of JSON with launch.py: it gets a task, says when everything is imported,
begins at the next line, reports, and keeps its tensors until the line after that.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tests.bench import limits, memory
from tests.bench.limits import Measurement
from tests.bench.loaders import LOADERS, Tensors

Bytes = Mapping[str, npt.NDArray[np.uint8]]

_TOUCH_BYTES = 4096
_FLOOR_PASSES = 3


def main() -> None:
    task = json.loads(sys.stdin.readline())
    run = _TASKS[task.pop("kind")](**task)
    _say({"ready": True})
    sys.stdin.readline()
    _say(run())
    sys.stdin.readline()
    # Not through the interpreter's end: peers' threads would be in it, and nothing is measured any more.
    os._exit(0)


def loading(
    loader: str, directory: str, files: list[str], digests: dict[str, str], later: int, recycle_bytes: int
) -> Measurement:
    """Load, read one byte of every 4 KiB, read them again, compare digests, and load `later` times more.

    What is loaded is kept unless there are later loads. `recycle_bytes` of memory are made ready before the clock.
    """
    begin = time.perf_counter()
    importlib.import_module("torch")
    torch_there = time.perf_counter()
    LOADERS[loader].prepare()
    imports = {"import_torch_s": torch_there - begin, "import_s": time.perf_counter() - torch_there}
    load = LOADERS[loader].load
    kept: list[object] = []

    def timed() -> tuple[tuple[float, float], tuple[Tensors, object]]:
        gc.collect()
        begin = _clocks()
        loaded = load(directory, files)
        return _since(begin), loaded

    def run() -> dict[str, Any]:
        memory.recycle(recycle_bytes)
        memory.reset_peak()
        resident, private = memory.status()["VmRSS"], memory.private_bytes()
        (load_s, load_cpu_s), loaded = timed()
        views = bytes_of(loaded[0])
        touch_s, touch_cpu_s = touch(views)
        floors = [touch(views) for _ in range(_FLOOR_PASSES)]
        result: dict[str, Any] = imports | {
            "load_s": load_s, "touch_s": touch_s, "touch_again_s": statistics.median(wall for wall, _ in floors),
            "load_cpu_s": load_cpu_s, "touch_cpu_s": touch_cpu_s,
            "touch_again_cpu_s": statistics.median(cpu for _, cpu in floors),
        }  # fmt: skip
        result |= {"peak_growth_bytes": memory.status()["VmHWM"] - resident, "private_before_bytes": private}
        result["wrong"] = wrong_tensors(views, digests)
        if later:
            del views, loaded
            result["later_s"] = [timed()[0][0] for _ in range(later)]
        else:
            kept.append(loaded)
        return result

    return run


def bytes_of(tensors: Tensors) -> Bytes:
    """The bytes of torch tensors on the CPU, without a copy."""
    import torch

    return {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}


def touch(views: Bytes) -> tuple[float, float]:
    """Seconds of the clock, and of this process's CPUs, to read one byte of every 4 KiB."""
    strided = [view[::_TOUCH_BYTES] for view in views.values() if view.size]
    begin = _clocks()
    for view in strided:
        np.bitwise_or.reduce(view)
    return _since(begin)


def wrong_tensors(views: Bytes, digests: Mapping[str, str]) -> list[str]:
    """Names of tensors that are missing, that should not be there, or whose bytes are not the checkpoint's."""
    wrong = set(views) ^ set(digests)
    wrong |= {name for name in views if name in digests and blake3(views[name].data).hexdigest() != digests[name]}
    return sorted(wrong)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begin: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _say(message: Mapping[str, object]) -> None:
    print(json.dumps(message), flush=True)


_TASKS: dict[str, Callable[..., Measurement]] = {
    "loading": loading,
    "direct": limits.direct,
    "prefault": limits.prefault,
}

if __name__ == "__main__":
    main()
