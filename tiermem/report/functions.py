"""Functions: samples summed up by the function whose instruction made the access."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiermem.perfdata import PerfData
from tiermem.recording import Recording
from tiermem.symbols import Symbols


@dataclass(frozen=True, slots=True)
class FunctionSamples:
    """One function; `symbol` is `file+0xoffset` where its name could not be read, `file` empty where nothing is known
    of the address. `share` is its part of all samples."""

    symbol: str
    file: str
    samples: int
    share: float


def functions(source: Recording | PerfData) -> tuple[list[FunctionSamples], list[str]]:
    """(all functions that were sampled, the most often sampled first; of which files no symbols could be read)."""
    if isinstance(source, PerfData):
        symbols = Symbols([image for image in source.images if image.executable])
    else:
        ended_unix_s = source.header.unix_s + source.end_s - source.header.time_s
        symbols = Symbols(source.images, ended_unix_s)
    index, found = symbols.resolve(source.samples)
    counts = np.bincount(index, minlength=len(found)).tolist()
    rows = [
        FunctionSamples(function.name, function.file, count, count / len(index))
        for function, count in zip(found, counts, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row.samples, row.symbol)), symbols.notes
