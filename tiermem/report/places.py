"""Places: what each sample of a recording touched, as model, layer, tensor and page, by columns. Sums nothing up."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tiermem.perfdata import PerfData
from tiermem.recording import Recording
from tiermem.report.mappings import MappedPages
from tiermem.rollup import TensorIndex


class Places:
    """One entry a sample. `model`: intp, index in `models`, -1 where it is none of ours; `page`: int64; `layer` and
    `tensor`: intp, indices in `layers[model]` and `tensors[model]`, -1 where there is none.

    Of a perf.data file, which knows no models, mapped files stand for them: `[anon]` is everything else.
    """

    def __init__(self, source: Recording | PerfData) -> None:
        self.layers: list[list[str]]
        self.tensors: list[list[str]]
        if isinstance(source, PerfData):
            self._of_files(source)
        else:
            self._of_models(source)

    def _of_files(self, source: PerfData) -> None:
        mapped = MappedPages(source)
        self.models = [os.path.basename(path) or path for path in mapped.files]
        self.model: npt.NDArray[np.intp] = mapped.file
        self.page: npt.NDArray[np.int64] = mapped.page
        self.layer: npt.NDArray[np.intp] = np.full(len(mapped.file), -1, np.intp)
        self.tensor: npt.NDArray[np.intp] = self.layer
        self.layers = self.tensors = [[] for _ in self.models]

    def _of_models(self, source: Recording) -> None:
        resolved = source.resolved
        self.models = [model.name for model in source.models]
        self.layers = [[segment.layer for segment in model.manifest.segments] for model in source.models]
        self.tensors = [[tensor.name for tensor in model.manifest.tensors] for model in source.models]
        self.model = resolved.model.astype(np.intp)
        self.page = resolved.page.astype(np.int64)
        self.layer = np.full(len(self.model), -1, np.intp)
        self.tensor = np.full(len(self.model), -1, np.intp)
        for number in np.unique(self.model[self.model >= 0]).tolist():
            model, mine = source.models[number], self.model == number
            self.layer[mine] = np.searchsorted(model.first_page, resolved.page[mine], "right") - 1
            self.tensor[mine] = TensorIndex(model.manifest).find(resolved.offset[mine])

    def names(self, row: int) -> tuple[str, str, str]:
        """(model, layer, tensor) of one sample; empty where there is none."""
        model, layer, tensor = (int(column[row]) for column in (self.model, self.layer, self.tensor))
        if model < 0:
            return "", "", ""
        return (
            self.models[model],
            self.layers[model][layer] if layer >= 0 else "",
            self.tensors[model][tensor] if tensor >= 0 else "",
        )


def comm_of(names: Mapping[tuple[int, int], str], pid: int, tid: int) -> str:
    """What a thread is called, else its process; empty where neither is known."""
    return names.get((pid, tid)) or names.get((pid, pid), "")
