"""`python -m tests.bench.sampling`: what sampling by page tables costs a client, and how well it finds what is hot.

A real daemon, and this process as its client, with a model of 2 GiB in 32 layers mapped shared and read-only.

(a) It streams all weights in a loop, while its agent is ordered to sample and not to sample in turn: bytes per CPU
    second of the whole process, with the agent's thread and its calls to the daemon.
(b) A fifth of the pages takes nine tenths of the accesses and moves at time 0: how much of it the pool's rates tell 5 s
    later, at the default cost; and how that falls when cold pages too are touched in every epoch.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

import tiermem
from tests.bench.launch import daemon
from tests.bench.memory import recycle
from tiermem.model import Model
from tiermem.rpc.messages import SamplingOrder
from tiermem.types import PAGE_BYTES

LAYERS, PAGES = 32, 1024
CHUNK = 32 << 20
HOT_PART, HOT_SHARE = 0.2, 0.9
BEFORE_S, SETTLE_S, STRETCH_S = 4.0, 5.0, 0.01
EPOCH_S, BUDGET = 0.1, 0.01
RATES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 3.0, 10.0)
"""Accesses of a cold page in an epoch; a hot one has 36 times as many."""


def write_checkpoint(path: Path) -> None:
    """2 GiB, all holes but for the number of each page at its begin."""
    nbytes = PAGES // LAYERS * PAGE_BYTES
    header = {
        f"model.layers.{i:02}.weight": {
            "dtype": "U8",
            "shape": [nbytes],
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(LAYERS)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for page in range(PAGES):
            file.seek(start + page * PAGE_BYTES)
            file.write(struct.pack("<Q", page))
        file.truncate(start + PAGES * PAGE_BYTES)


def stream(words: npt.NDArray[np.uint64], seconds: float) -> float:
    """Sum all weights again and again: bytes per CPU second of the process. Raises ValueError for a wrong sum."""
    total = done = at = 0
    step = CHUNK // 8
    begin, until = time.process_time(), time.monotonic() + seconds
    while at or time.monotonic() < until:
        total += int(words[at : at + step].sum())
        at = (at + step) % len(words)
        done += CHUNK
    if total * (len(words) * 8) != done * (PAGES * (PAGES - 1) // 2):
        raise ValueError("the weights that were summed are not those that were written")
    return done / (time.process_time() - begin)


class Subject:
    """This process as a client, and what it can order its agent to do."""

    def __init__(self, client: tiermem.Client, model: Model, name: str) -> None:
        self.client, self.name = client, name
        start, memory = model.place(model.manifest.tensors[0])
        assert start == 0
        self.content = np.frombuffer(memory, np.uint8)
        self.content[::PAGE_BYTES].sum()

    def order(self, rung: str) -> None:
        self.client._agent.submit(partial(self.client._reporting.obey, SamplingOrder(rung, EPOCH_S, BUDGET)))

    def costs(self) -> dict[str, float]:
        """What the pool was told of the rung so far."""
        return dict(self.client.status()["sampling"]["rungs"].get("present", {"pages": 0, "windows": 1}))


def cost(subject: Subject, pairs: int, seconds: float) -> None:
    words = subject.content.view(np.uint64)
    stream(words, seconds)
    lost, base = [], []
    before = subject.costs()
    for pair in range(pairs):
        rates = {}
        for rung in ("present", "off") if pair % 2 else ("off", "present"):
            subject.order(rung)
            stream(words, seconds / 2)  # the budget settles
            rates[rung] = stream(words, seconds)
        base.append(rates["off"])
        lost.append(1 - rates["present"] / rates["off"])
    subject.order("present")
    stream(words, 2.5)
    after = subject.costs()
    spent = {key: after[key] - before.get(key, 0) for key in ("sampler_s", "fault_s", "client_s", "pages", "windows")}
    print(f"(a) 2 GiB streamed, {pairs} pairs of {seconds} s, median (quartiles)")
    print(f"    without sampling   {_median(base, 1e-9, 'GB')} a CPU second")
    print(f"    lost to sampling   {_median(lost, 100, '%')}")
    print(f"    as it counts       {100 * spent['sampler_s'] / spent['client_s']:6.2f} % agent, "
          f"{100 * spent['fault_s'] / spent['client_s']:.2f} % faults, "
          f"{spent['pages'] / spent['windows']:.0f} of {PAGES} pages a window")  # fmt: skip


def _median(values: list[float], scale: float, unit: str) -> str:
    low, middle, high = np.percentile(np.array(values) * scale, (25, 50, 75))
    return f"{middle:6.2f} {unit} ({low:.2f} to {high:.2f})"


def touch(content: npt.NDArray[np.uint8], expected: npt.NDArray[np.float64], until_s: float) -> None:
    """Touch pages at random, each as often as expected in every stretch, and be busy in between."""
    random = np.random.default_rng(1)
    chance = 1 - np.exp(-expected)
    while (now := time.monotonic()) < until_s:
        touched = np.flatnonzero(random.random(PAGES) < chance)
        content[touched * PAGE_BYTES + random.integers(0, PAGE_BYTES, len(touched))].sum()
        while time.monotonic() < now + STRETCH_S:
            pass


def hot_set(subject: Subject, rate: float) -> str:
    """One point of the curve: how many of the hot fifth are in the top fifth by rate, before the move and 5 s after."""
    order = np.random.default_rng(2).permutation(PAGES)
    hot_pages = int(PAGES * HOT_PART)
    ratio = HOT_SHARE / (1 - HOT_SHARE) * (PAGES - hot_pages) / hot_pages
    before, found = subject.costs(), []
    for hot, seconds in ((order[:hot_pages], BEFORE_S), (order[hot_pages : 2 * hot_pages], SETTLE_S)):
        expected = np.full(PAGES, rate * STRETCH_S / EPOCH_S)
        expected[hot] *= ratio
        touch(subject.content, expected, time.monotonic() + seconds)
        rates = np.nan_to_num(subject.client.heat(subject.name).columns.rate, nan=-1.0)
        top = np.argsort(rates, kind="stable")[::-1][:hot_pages]
        found.append(len(np.intersect1d(top, hot)) / hot_pages)
    after = subject.costs()
    spent = {key: after[key] - before.get(key, 0) for key in ("sampler_s", "fault_s", "client_s", "pages", "windows")}
    share = (spent["sampler_s"] + spent["fault_s"]) / spent["client_s"]
    return (f"    {rate:6.2f} {rate * ratio:8.2f} {found[0]:8.3f} {found[1]:8.3f} "
            f"{spent['pages'] / spent['windows']:9.0f} {share * 100:8.2f} %")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each window of (a)")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    asked = parser.parse_args(arguments)
    recycle(PAGES * PAGE_BYTES)
    with tempfile.TemporaryDirectory(prefix="tiermem-bench-") as place, daemon(PAGES * PAGE_BYTES) as pool:
        path = Path(place, "weights.safetensors")
        write_checkpoint(path)
        name = pool.client.load(path)
        with pool.client.open(name) as model:
            subject = Subject(pool.client, model, name)
            print(f"2 GiB on {pool.client.status()['pool']['backing']}; epoch {EPOCH_S} s, budget {BUDGET:.0%}")
            if asked.pairs:
                cost(subject, asked.pairs, asked.seconds)
            print(f"(b) {PAGES} pages, a fifth takes 90 % of accesses and moves; {SETTLE_S:.0f} s later:")
            print("      accesses/epoch  of the hot, in the top fifth   sampled   counted")
            print("      cold      hot   before    after               a window      cost")
            for rate in asked.rates:
                print(hot_set(subject, rate), flush=True)
            del subject, model


if __name__ == "__main__":
    main()
