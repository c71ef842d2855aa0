"""The process that is measured: one engine, one model, one way to load it, then it ends.

`python -m tiermem.bench.engine_run` speaks lines of JSON with engine_process.py: it gets a task, says when the engine
is imported, loads and puts out something at the next line, and answers at the line after that. Then it is killed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tiermem.bench.engine_cases import ENGINES


def main() -> None:
    # Engines print: what they say is not the report.
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)
        task = json.loads(sys.stdin.readline())
        path, way, room = task["path"], task["way"], Path(task["room"])
        engine = ENGINES[task["engine"]]()
        try:
            engine.prepare(way, room)
        except ImportError as problem:
            _say(report, {"unusable": f"{type(problem).__name__}: {problem}"})
            return
        _say(report, {"ready": True})
        sys.stdin.readline()
        begin = time.perf_counter()
        load_s = engine.load(path, way, room)
        loaded_s = time.perf_counter() - begin
        engine.first()
        first_s = time.perf_counter() - begin
        _say(report, {"load_s": loaded_s if load_s is None else load_s, "first_output_s": first_s})
        sys.stdin.readline()
        _say(report, {"answer": engine.answer()})
        sys.stdin.readline()  # holds the model until it is killed, or the bench died


def _say(report: IO[str], message: Mapping[str, object]) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()


if __name__ == "__main__":
    main()
