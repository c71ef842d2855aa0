"""`python -m tests.bench.sampling`: what sampling by page tables costs a client, and how well it finds what is hot.

(a) A client that streams all of its weights in a loop, sampling on and off in turn: bytes per CPU second of the client.
(b) A fifth of the pages takes nine tenths of the accesses and moves at time 0: how much of it the rates tell 5 s later.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.bench.memory import recycle
from tiermem import _native
from tiermem.heat import Heat
from tiermem.sampler.budget import IDLE_PAUSE_S
from tiermem.sampler.client import ClientSampling, Order
from tiermem.segment import open_backing
from tiermem.types import PAGE_BYTES

PAGES = 1024
CHUNK = 32 << 20
HOT_PART, HOT_SHARE = 0.2, 0.9
BEFORE_S, SETTLE_S = 3.0, 5.0
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Accesses of a cold page in an epoch; a hot one has 36 times as many."""


def mapped(backing_kind: str) -> tuple[_native.Range, npt.NDArray[np.uint8], str]:
    """2 GiB of a sealed segment, prefaulted."""
    nbytes = PAGES * PAGE_BYTES
    recycle(nbytes)
    backing = open_backing(backing_kind, None, nbytes)
    segment = backing.create("weights", nbytes)
    segment.prefault(threads=2)
    segment.seal()
    fd = segment.share()
    range_ = _native.Range.reserve(nbytes)
    range_.map(0, fd, nbytes)
    segment.close()
    return range_, np.frombuffer(range_.buffer(), np.uint8), backing.kind


@dataclass(slots=True)
class Clock:
    """Ticks when they are due, from inside the client's own loop: an agent thread would wait for the interpreter."""

    sampling: ClientSampling
    due_s: float = 0.0
    agent_s: float = 0.0
    fault_s: float = 0.0
    sampled: int = 0
    windows: int = 0

    def tick(self) -> None:
        now = time.monotonic()
        if now < self.due_s:
            return
        begin = time.thread_time()
        report = self.sampling.tick(now)
        self.agent_s += time.thread_time() - begin
        pause_s = self.sampling.pause_s
        self.due_s = now + (IDLE_PAUSE_S if pause_s is None else pause_s)
        if report is not None:
            self.fault_s += report.fault_s
            self.windows += 1
            self.sampled += sum(len(window.bits.pages) for window in report.windows)


def stream(words: npt.NDArray[np.uint64], clock: Clock, seconds: float) -> tuple[float, float]:
    """Sum all weights again and again: bytes per CPU second of the whole process, and without the agent's part."""
    step, at, done = CHUNK // 8, 0, 0
    agent_s, begin, until = clock.agent_s, time.process_time(), time.monotonic() + seconds
    while time.monotonic() < until:
        words[at : at + step].sum()
        done += CHUNK
        at = (at + step) % len(words)
        clock.tick()
    cpu_s = time.process_time() - begin
    return done / cpu_s, done / (cpu_s - (clock.agent_s - agent_s))


def cost(range_: _native.Range, content: npt.NDArray[np.uint8], pairs: int, seconds: float) -> None:
    words = content.view(np.uint64)
    sampling = ClientSampling()
    sampling.add("weights", range_, PAGES)
    clock = Clock(sampling)
    stream(words, clock, seconds / 2)
    whole, client, base, agent, faults = [], [], [], [], []
    for pair in range(pairs):
        rates = {}
        for on in (True, False) if pair % 2 else (False, True):
            sampling.configure(Order("present" if on else "off"))
            clock.due_s = 0.0
            before, spent = time.process_time(), (clock.agent_s, clock.fault_s)
            rates[on] = stream(words, clock, seconds)
            if on:
                cpu_s = time.process_time() - before
                agent.append((clock.agent_s - spent[0]) / cpu_s)
                faults.append((clock.fault_s - spent[1]) / cpu_s)
        base.append(rates[False][0])
        whole.append(1 - rates[True][0] / rates[False][0])
        client.append(1 - rates[True][1] / rates[False][1])
    print(f"(a) 2 GiB streamed, {pairs} pairs of {seconds} s, median (quartiles)")
    print(f"    without sampling   {_median(base, 1e-9, 'GB')} a CPU second")
    print(f"    lost, with agent   {_median(whole, 100, '%')}")
    print(f"    lost, client only  {_median(client, 100, '%')}")
    print(f"    agent's CPU        {_median(agent, 100, '%')} of the process's")
    print(f"    faults, estimated  {_median(faults, 100, '%')}")
    print(f"    {clock.sampled / max(clock.windows, 1):.0f} of {PAGES} pages a window")


def _median(values: list[float], scale: float, unit: str) -> str:
    low, middle, high = np.percentile(np.array(values) * scale, (25, 50, 75))
    return f"{middle:6.2f} {unit} ({low:.2f} to {high:.2f})"


def hot_set(range_: _native.Range, content: npt.NDArray[np.uint8], rate: float, epoch_s: float) -> str:
    """One point of the curve: how much of the hot fifth is in the top fifth by rate, before the move and 5 s after it;
    then, of pages above the geometric mean of both true rates, how many are hot, and how many hot ones are there."""
    content[::PAGE_BYTES].sum()
    random = np.random.default_rng(1)
    hot_pages = int(PAGES * HOT_PART)
    ratio = HOT_SHARE / (1 - HOT_SHARE) * (PAGES - hot_pages) / hot_pages
    order = random.permutation(PAGES)
    sets = order[:hot_pages], order[hot_pages : 2 * hot_pages]
    sampling, heat = ClientSampling(), Heat(PAGES)
    sampling.add("weights", range_, PAGES)
    sampling.configure(Order("present", epoch_s=epoch_s))
    slice_s, due_s, agent_s, sampled, windows = epoch_s / 10, 0.0, 0.0, 0, 0
    begin, found = time.monotonic(), []
    begin_cpu = time.process_time()
    ends = [begin + BEFORE_S, begin + BEFORE_S + SETTLE_S]
    for hot, until in zip(sets, ends, strict=True):
        expected = np.full(PAGES, rate * slice_s / epoch_s)
        expected[hot] *= ratio
        while (now := time.monotonic()) < until:
            touched = np.flatnonzero(random.random(PAGES) < 1 - np.exp(-expected))
            content[touched * PAGE_BYTES + random.integers(0, PAGE_BYTES, len(touched))].sum()
            while time.monotonic() < now + slice_s:  # busy, as a client at work is
                content[: 1 << 16].sum() if 0 in touched else None
            if now >= due_s:
                report = sampling.tick(time.monotonic())
                due_s = now + (sampling.pause_s or 0.0)
                if report is not None:
                    agent_s += report.agent_s
                    windows += 1
                    for window in report.windows:
                        heat.add_bits(window.bits)
                        sampled += len(window.bits.pages)
        rates = np.nan_to_num(heat.columns(time.monotonic()).rate, nan=-1.0)
        top = np.argsort(rates, kind="stable")[::-1][:hot_pages]
        above = np.flatnonzero(rates > np.sqrt(ratio) * rate / epoch_s)
        right = len(np.intersect1d(above, hot))
        found.append((len(np.intersect1d(top, hot)) / hot_pages, right / max(len(above), 1), right / hot_pages))
    cpu = agent_s / (time.process_time() - begin_cpu)
    (first, *_), (top, precision, recall) = found
    return (f"    {rate:6.2f} {rate * ratio:8.2f} {first:8.3f} {top:8.3f} {precision:10.3f} {recall:8.3f} "
            f"{sampled / max(windows, 1):8.0f} {cpu * 100:7.2f} %")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backing", default="auto", help="kind of the memory (default: auto)")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each window of (a)")
    parser.add_argument("--epoch", type=float, default=0.1)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    asked = parser.parse_args(arguments)
    range_, content, kind = mapped(asked.backing)
    print(f"2 GiB on {kind}")
    if asked.pairs:
        cost(range_, content, asked.pairs, asked.seconds)
    print(
        f"(b) {PAGES} pages, a fifth takes 90 % of accesses and moves; epoch {asked.epoch} s, {SETTLE_S:.0f} s later:"
    )
    print("      accesses/epoch        top fifth     by threshold             sampled   agent")
    print("      cold      hot   before    after  precision   recall  a window     CPU")
    for rate in asked.rates:
        print(hot_set(range_, content, rate, asked.epoch), flush=True)


if __name__ == "__main__":
    main()
