"""A process with one onnxruntime session: says what it took and what it computes, as JSON lines.

    python ort_run.py MODEL ADDRESS|stock [KEY=VALUE of the session's configuration ...]

Says `{"create_s", "private", "output"}` after its first run, and `{"output"}` again for each line that comes in.
`private` are the bytes of anonymous memory that session and run added.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

IDS = (np.arange(64).reshape(4, 16) * 7919) % 30000


def anonymous() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


def opened(path: str, address: str, options: Any) -> Any:
    if address == "stock":
        return onnxruntime.InferenceSession(path, options)
    import tiermem.onnxruntime

    return tiermem.onnxruntime.session(path, options, address=address)


def computed(session: Any) -> list[float]:
    """A few numbers of the output, and its sum of squares."""
    (hidden,) = session.run(None, {session.get_inputs()[0].name: IDS})
    return [*map(float, hidden[:, 5, 7]), float((hidden.astype(np.float64) ** 2).sum())]


def main(path: str, address: str, *entries: str) -> None:
    if address != "stock":
        # What a client of the pool needs once per process is not the session's.
        import tiermem.onnxruntime  # noqa: F401
        from tiermem.client import shared_client

        shared_client(address).status()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for entry in entries:
        options.add_session_config_entry(*entry.split("=", 1))
    before, start = anonymous(), time.perf_counter()
    session = opened(path, address, options)
    create_s = time.perf_counter() - start
    output = computed(session)
    told = {"create_s": create_s, "private": anonymous() - before, "output": output}
    start = time.perf_counter()
    for _ in range(5):
        computed(session)
    print(json.dumps(told | {"run_s": (time.perf_counter() - start) / 5}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"output": computed(session)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
