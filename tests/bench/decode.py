"""`python -m tests.bench.decode`: how many samples a second one core decodes, and that it decodes them right.

Times whole calls over a ring's worth of records, as a sampler makes them; the fastest of several, because others share
the machine.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem import samples
from tiermem._native import Decoder, Layout

TARGET = 10_000_000
"""Records a second, of the usual layout: more than any number of cores is let to sample."""

RECORDS, RUNS = 200_000, 15
SAMPLE_TYPE = 9
USUAL = (
    samples.IP | samples.TID | samples.TIME | samples.ADDR | samples.CPU | samples.PERIOD | samples.WEIGHT_STRUCT
    | samples.DATA_SRC
)  # fmt: skip
CHAIN = 8
Fields = list[tuple[Any, ...]]
HEADER: Fields = [("type", "<u4"), ("misc", "<u2"), ("size", "<u2")]
BEFORE_CHAIN: Fields = [("ip", "<u8"), ("pid", "<u4"), ("tid", "<u4"), ("time", "<u8"), ("addr", "<u8"), ("cpu", "<u4"),
                ("reserved", "<u4"), ("period", "<u8")]  # fmt: skip
AFTER_CHAIN: Fields = [("weight", "<u4"), ("weight2", "<u2"), ("weight3", "<u2"), ("data_src", "<u8")]
LAYOUTS: dict[str, tuple[int, Fields]] = {
    "usual": (USUAL, HEADER + BEFORE_CHAIN + AFTER_CHAIN),
    "four events by id": (USUAL | samples.IDENTIFIER, [*HEADER, ("id", "<u8"), *BEFORE_CHAIN, *AFTER_CHAIN]),
    f"call chain of {CHAIN}": (
        USUAL | samples.CALLCHAIN,
        [*HEADER, *BEFORE_CHAIN, ("frames", "<u8"), ("chain", "<u8", (CHAIN,)), *AFTER_CHAIN],
    ),
}
IDS = {1000 + event: event for event in range(4)}


def records(fields: Fields) -> npt.NDArray[np.void]:
    """Records of random content."""
    dtype = np.dtype(fields)
    made = np.frombuffer(np.random.default_rng(1).bytes(RECORDS * dtype.itemsize), dtype).copy()
    made["type"], made["size"] = SAMPLE_TYPE, dtype.itemsize
    if "frames" in (dtype.names or ()):
        made["frames"] = CHAIN
    if "id" in (dtype.names or ()):
        made["id"] = 1000 + made["tid"] % len(IDS)
    return made


def seconds(decoder: Decoder, data: npt.NDArray[np.void]) -> float:
    """Of one call; raises AssertionError unless every column is what was encoded."""
    begin = time.perf_counter()
    decoded = decoder.decode(data)
    taken = time.perf_counter() - begin
    assert (decoded.used, len(decoded.samples), len(decoded.records)) == (data.nbytes, len(data), 0)
    for column in (data.dtype.names or ())[1:]:
        if column in (decoded.samples.dtype.names or ()):
            assert np.array_equal(decoded.samples[column], data[column]), column
    return taken


def main() -> int:
    rates = {}
    for name, (sample_type, fields) in LAYOUTS.items():
        data, layout = records(fields), Layout(sample_type)
        decoder = Decoder([layout] * len(IDS), IDS) if "id" in (data.dtype.names or ()) else Decoder([layout])
        rates[name] = RECORDS / min(seconds(decoder, data) for _ in range(RUNS))
        print(f"{name:20} {rates[name] / 1e6:6.1f} M records/s of {data.itemsize} bytes")
    met = rates["usual"] >= TARGET
    print(f"target: {TARGET / 1e6:.0f} M records/s of the usual layout: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
