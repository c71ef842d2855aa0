"""Generated traces: what a pool of models could be asked for, from a seed. Equal arguments give equal traces.

    dense   one model, decoded token by token: every page once a step, layer by layer.
    moe     one mixture of experts: the dense part of each layer, and the experts that its router names.
    switch  300 models; each request opens one, passes over it many times, and releases it. Several at once.
    mixed   the three of them in one pool.
    passes  for devices: 300 models of one size; each request passes over one of them once.

Sizes and rates are those of serving on CPUs, where a step is as fast as its weights can be read: tens of GB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.replay.trace import Builder, Trace
from tiermem.types import PAGE_BYTES, TENSOR_CLASSES

_CODE = {name: number for number, name in enumerate(TENSOR_CLASSES)}
_READ_BYTES_S = 20e9
"""What one request reads a second at most: a socket's DRAM gives 100 GB/s, and several requests share it."""

_VISIT_PAGES = 64
"""Pages of small models that are touched at one time: 128 MiB, 6 ms at _READ_BYTES_S."""

_LARGEST = 1 / 16
"""Part of all bytes that one model of switch takes at most: a pool of 300 is not one of them and its satellites."""

_CHUNK = 64
"""Steps whose experts are drawn together."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What to generate: `nbytes` of weights for `duration_s`.

    steps_per_s   tokens (of a batch) a second of dense and moe: readers follow 5 to 20 words a second
    layers        of dense and moe
    experts, top_k, batch, skew   of moe: 128 experts of which a token takes 8, as in Qwen3-30B-A3B; tokens in a step;
                  the exponent of Zipf's law by which experts of a layer are popular (measured routers: 0.5 to 1.2)
    drift_s       after so long, two experts of each layer have exchanged their popularity
    models, popularity   of switch and passes, with the exponent of Zipf's law by which they are asked for (0.9 to 1.1
                  for the functions and models of public clouds); sizes of switch are Pareto distributed (exponent 1.2)
    requests_per_s, request_s   of switch and passes: arrivals are Pareto distributed (exponent 1.5: bursts), and a
                  request of switch lasts so long in the mean, exponentially distributed, at least half a second
    """

    kind: str
    seed: int = 0
    nbytes: int = 16 << 30
    duration_s: float = 240.0
    steps_per_s: float = 5.0
    layers: int = 32
    experts: int = 128
    top_k: int = 8
    batch: int = 4
    skew: float = 1.0
    drift_s: float = 2.0
    models: int = 300
    popularity: float = 1.0
    requests_per_s: float = 1.0
    request_s: float = 10.0


DEFAULTS: dict[str, dict[str, Any]] = {
    "dense": {"nbytes": 16 << 30, "duration_s": 240.0, "steps_per_s": 5.0, "layers": 32},
    "moe": {"nbytes": 56 << 30, "duration_s": 240.0, "steps_per_s": 5.0, "layers": 48},
    "switch": {"nbytes": 96 << 30, "duration_s": 300.0, "requests_per_s": 2.0, "request_s": 5.0},
    "mixed": {"nbytes": 96 << 30, "duration_s": 240.0, "steps_per_s": 3.0, "requests_per_s": 0.5},
}
"""Kind -> what it has other defaults for: about 10 million page touches each."""

DEVICE_DEFAULTS: dict[str, dict[str, Any]] = {
    "passes": {"nbytes": 300 * 64 * PAGE_BYTES, "duration_s": 1000.0, "requests_per_s": 10.0},
}
"""The same of kinds whose every visit is a request: about 10,000 of them, to models of 128 MiB."""


def workload(kind: str, **given: Any) -> Workload:
    """Of a kind, with its defaults where None is given. Raises ConfigError for what cannot be generated."""
    defaults = (DEFAULTS | DEVICE_DEFAULTS)[kind]
    made = Workload(kind, **(defaults | {name: value for name, value in given.items() if value is not None}))
    least = {"dense": made.layers + 2, "moe": made.layers * 8, "switch": made.models * 2,
             "mixed": made.layers * 10 + made.models * 4, "passes": made.models}[kind]  # fmt: skip
    if made.nbytes < least * 2 * PAGE_BYTES:
        raise ConfigError(f"--size {made.nbytes >> 20} MiB is too small for {kind}; it takes {least * 4} MiB and more")
    for name in ("duration_s", "steps_per_s", "drift_s", "requests_per_s", "request_s", "layers", "batch", "models"):
        if not 0 < getattr(made, name) < 1e6:
            raise ConfigError(f"{name} is {getattr(made, name)}; it must be above 0")
    if not 0 < made.top_k <= made.experts:
        raise ConfigError(f"--top-k {made.top_k} of {made.experts} experts; a token takes 1 to all of them")
    if made.skew < 0 or made.popularity < 0:
        raise ConfigError("exponents of Zipf's law are 0 (all alike) or more")
    return made


def generate(asked: Workload) -> Trace:
    """The trace of a workload. At half time the popular experts become others: in moe that is marked as its shift; in
    mixed it is not, since requests of other models come and go at the same time."""
    random, builder = np.random.default_rng(asked.seed), Builder()
    _KINDS[asked.kind](builder, random, asked, asked.nbytes // PAGE_BYTES)
    shifts = (asked.duration_s / 2,) if asked.kind == "moe" else ()
    return builder.finish(asdict(asked), asked.duration_s, shifts)


def _model(builder: Builder, name: str, layers: list[int], body: npt.NDArray[np.int8] | None = None) -> int:
    """A model of embeddings, layers and head, of so many pages each; `body`: tensor classes of a layer. Its number."""
    segment = np.repeat(np.arange(len(layers)), layers)
    classes = np.full(len(segment), _CODE["mlp"], np.int8)
    for number, pages in enumerate(layers[1:-1], 1):
        rows = slice(sum(layers[:number]), sum(layers[:number]) + pages)
        if body is None:
            classes[rows.start : rows.start + pages // 3] = _CODE["attention"]
        else:
            classes[rows] = body
    classes[: layers[0]], classes[len(classes) - layers[-1] :] = _CODE["embedding"], _CODE["head"]
    return builder.add_model(name, segment, np.arange(len(segment)), classes)


def _dense(builder: Builder, random: np.random.Generator, asked: Workload, pages: int) -> None:
    body = max(1, round(pages * 0.94 / asked.layers))
    ends = max(1, (pages - body * asked.layers) // 2)
    layers = [ends, *[body] * asked.layers, ends]
    first = builder.pages
    model = _model(builder, "dense", layers)
    builder.add_use(model, 0.0, asked.duration_s)
    steps = int(asked.duration_s * asked.steps_per_s)
    share = np.cumsum([0, *layers[:-1]]) / sum(layers)
    visit_s = (np.arange(steps)[:, None] + share).ravel() / asked.steps_per_s
    page = np.arange(first, first + sum(layers), dtype=np.int32)
    builder.add_visits(visit_s, np.tile(layers, steps), np.tile(page, steps))


def _moe(builder: Builder, random: np.random.Generator, asked: Workload, pages: int) -> None:
    per_layer = pages // (asked.layers + 1)
    dense = max(1, per_layer // 8)
    expert_pages = per_layer - dense
    # Experts are packed: a page may hold the end of one and the beginning of the next.
    edges = np.arange(expert_pages) * asked.experts / expert_pages
    low = edges.astype(np.int64)
    high = np.minimum(np.ceil(edges + asked.experts / expert_pages).astype(np.int64) - 1, asked.experts - 1)
    body = np.repeat(np.array([_CODE["attention"], _CODE["expert"]], np.int8), [dense, expert_pages])
    ends = max(1, per_layer // 2)
    first = builder.pages
    model = _model(builder, "moe", [ends, *[per_layer] * asked.layers, ends], body)
    builder.add_use(model, 0.0, asked.duration_s)
    steps = int(asked.duration_s * asked.steps_per_s)
    router = _Router(random, asked)
    columns = 2 * ends + asked.layers * per_layer
    offsets = np.cumsum([0, ends, *[per_layer] * asked.layers])
    for chunk in range(0, steps, _CHUNK):
        count = min(_CHUNK, steps - chunk)
        touched = np.ones((count, columns), np.bool_)
        layers = touched[:, ends : columns - ends].reshape(count, asked.layers, per_layer)
        active = router.draw(count, chunk)
        layers[:, :, dense:] = active[:, :, low] | active[:, :, high]
        lengths = np.add.reduceat(touched, offsets, axis=1, dtype=np.int64)
        visit_s = (chunk + np.arange(count)[:, None] + np.arange(len(offsets)) / len(offsets)) / asked.steps_per_s
        builder.add_visits(visit_s.ravel(), lengths.ravel(), np.nonzero(touched)[1] + first)


class _Router:
    """Draws the experts of each token, by a popularity that each layer has of its own; it drifts, and shifts once."""

    def __init__(self, random: np.random.Generator, asked: Workload) -> None:
        self._random, self._asked = random, asked
        self._shift = int(asked.duration_s * asked.steps_per_s) // 2
        self._drifted = 0
        self._weight = np.empty((asked.layers, asked.experts), np.float32)
        self._deal()

    def _deal(self) -> None:
        popular = np.arange(1, self._asked.experts + 1, dtype=np.float32) ** -self._asked.skew
        self._weight[:] = self._random.permuted(np.tile(popular, (self._asked.layers, 1)), axis=1)

    def draw(self, count: int, step: int) -> npt.NDArray[np.bool_]:
        """Which experts (count, layers, experts) are read in the steps from `step` on."""
        asked = self._asked
        chosen = np.zeros((count, asked.layers, asked.experts), np.bool_)
        begin = 0
        while begin < count:
            if step + begin == self._shift:
                self._deal()
            self._drift((step + begin) / asked.steps_per_s)
            end = min(count, begin + max(1, int(asked.drift_s * asked.steps_per_s)))
            if step + begin < self._shift < step + end:
                end = self._shift - step
            self._choose(chosen[begin:end])
            begin = end
        return chosen

    def _drift(self, now_s: float) -> None:
        layers = np.arange(self._asked.layers)
        while (self._drifted + 1) * self._asked.drift_s <= now_s:
            self._drifted += 1
            one, two = self._random.integers(0, self._asked.experts, (2, len(layers)))
            self._weight[layers, one], self._weight[layers, two] = self._weight[layers, two], self._weight[layers, one]

    def _choose(self, chosen: npt.NDArray[np.bool_]) -> None:
        """The first top_k arrivals of a race of exponential clocks: draws without replacement, by weight."""
        asked = self._asked
        shape = (len(chosen), asked.layers, asked.batch, asked.experts)
        times = self._random.standard_exponential(shape, np.float32) / self._weight[:, None, :]
        last = np.partition(times, asked.top_k - 1, axis=3)[..., asked.top_k - 1 : asked.top_k]
        chosen[:] = (times <= last).any(axis=2)


def _switch(builder: Builder, random: np.random.Generator, asked: Workload, pages: int) -> None:
    weights = random.pareto(1.2, asked.models) + 1
    shares = np.minimum(weights / weights.sum(), _LARGEST)
    sizes = np.maximum(2, shares / shares.sum() * pages).astype(np.int64)
    chances = _chances(random, asked)
    firsts = builder.pages + np.cumsum(sizes) - sizes
    numbers = _models(builder, sizes)
    for start in _arrivals(random, asked).tolist():
        i = int(random.choice(asked.models, p=chances))
        end = min(asked.duration_s, start + max(0.5, random.exponential(asked.request_s)))
        builder.add_use(numbers[i], start, end)
        _request(builder, start, end, int(firsts[i]), int(sizes[i]))


def _chances(random: np.random.Generator, asked: Workload) -> npt.NDArray[np.float64]:
    """Of each model to be the one that is asked for."""
    popular = random.permutation(np.arange(1, asked.models + 1) ** -asked.popularity)
    return np.asarray(popular / popular.sum())


def _models(builder: Builder, sizes: npt.NDArray[np.int64]) -> list[int]:
    """Models of so many pages, in a few layers each. Their numbers."""
    numbers = []
    for i, size in enumerate(sizes.tolist()):
        parts = min(32, max(2, size // 8))
        cuts = np.diff(np.linspace(0, size, parts + 1).astype(np.int64)).tolist()
        numbers.append(_model(builder, f"model-{i:03}", cuts))
    return numbers


def _arrivals(random: np.random.Generator, asked: Workload) -> npt.NDArray[np.float64]:
    gaps = random.pareto(1.5, int(asked.duration_s * asked.requests_per_s * 4) + 64) * 0.5 / asked.requests_per_s
    starts = np.cumsum(gaps)
    return np.asarray(starts[starts < asked.duration_s])


def _request(builder: Builder, start: float, end: float, first: int, pages: int) -> None:
    """Steps over a whole model, as many a second as its size allows, and no more than 50."""
    step_s = 1 / min(50.0, _READ_BYTES_S / (pages * PAGE_BYTES))
    steps = max(1, int((end - start) / step_s))
    parts = -(-pages // _VISIT_PAGES)
    cuts = np.linspace(0, pages, parts + 1).astype(np.int64)
    visit_s = start + (np.arange(steps)[:, None] + cuts[:-1] / pages).ravel() * step_s
    page = np.tile(np.arange(first, first + pages, dtype=np.int32), steps)
    lengths = np.tile(np.diff(cuts), steps)
    inside = np.searchsorted(visit_s, end)
    builder.add_visits(visit_s[:inside], lengths[:inside], page[: int(lengths[:inside].sum())])


def _mixed(builder: Builder, random: np.random.Generator, asked: Workload, pages: int) -> None:
    _dense(builder, random, asked, pages // 8)
    _moe(builder, random, asked, pages * 3 // 8)
    _switch(builder, random, asked, pages // 2)


def _passes(builder: Builder, random: np.random.Generator, asked: Workload, pages: int) -> None:
    size = pages // asked.models
    numbers = np.array(_models(builder, np.full(asked.models, size)))
    starts, chances = _arrivals(random, asked), _chances(random, asked)
    chosen = random.choice(asked.models, len(starts), p=chances)
    page = chosen[:, None] * size + np.arange(size)
    builder.add_visits(starts, np.full(len(starts), size), page.ravel())
    for start, model in zip(starts.tolist(), numbers[chosen].tolist(), strict=True):
        builder.add_use(model, start, min(asked.duration_s, start + size * PAGE_BYTES / _READ_BYTES_S))


_KINDS: dict[str, Callable[[Builder, np.random.Generator, Workload, int], None]] = {
    "dense": _dense, "moe": _moe, "switch": _switch, "mixed": _mixed, "passes": _passes,
}  # fmt: skip
