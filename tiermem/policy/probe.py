"""Probe: what is asked of a policy before it is trusted with a pool: made views, one after the other. Moves nothing.

It runs the policy in this process: tiermem.runner.check_file does it in one that may be lost.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import FrameType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tiermem.errors import PolicyError
from tiermem.policy.placing import check_place
from tiermem.policy.plan import Plan, check_plan
from tiermem.policy.sample import sample_request, subset, with_device
from tiermem.policy.sample import sample_view as sample_view
from tiermem.policy.source import describe, line_of
from tiermem.policy.view import Request, View
from tiermem.types import PAGE_BYTES

BUDGET_S = 0.1
"""Time that plan(view) may take, by the median of ROUNDS."""
PAGES = 1_000_000
ROUNDS = 5
_QUOTA_BYTES = 512 * PAGE_BYTES
_SMALL = 3000
_IO = ("open", "socket.", "subprocess.", "os.", "shutil.", "tempfile.", "ctypes.", "time.sleep", "urllib.")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was asked, and how it went; `line` of the policy's file."""

    name: str
    result: Literal["ok", "warning", "failed"]
    line: int | None = None
    detail: str = ""


def steps(policy: Any, path: str, pages: int = PAGES) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The checks of a policy whose file is `path`, by name, to be made in this order. None of them raises."""
    subject = _Subject(type(policy), path)
    for name, views in cases():
        yield subject.step(f"plan: {name}", lambda views=views: subject.plan_all(views))  # type: ignore[misc]
    if hasattr(policy, "place"):
        for name, request in requests():
            yield subject.step(f"place: {name}", lambda request=request: subject.place(request))  # type: ignore[misc]
    yield subject.step("equal views, equal plans", subject.pure)
    yield subject.step("no input or output", subject.quiet)
    yield subject.step(f"time for {pages:,} pages", lambda: subject.time(pages))


def cases() -> list[tuple[str, list[View]]]:
    """Sequences of views, each for a new policy."""
    usual = sample_view(_SMALL, 1, quota_bytes=_QUOTA_BYTES)
    nan = float("nan")
    dark = sample_view(_SMALL, 2, known=0.0, quota_bytes=_QUOTA_BYTES)
    unmeasured = [replace(tier, idle_latency_s=nan, latency_s=nan, bandwidth_bytes_s=nan, load=nan)
                  for tier in dark.tiers]  # fmt: skip
    half = np.arange(len(usual.models)) % 2 == 0
    none = np.zeros(len(half), np.bool_)
    return [
        ("no pages", [sample_view(0)]),
        ("one page", [sample_view(1, 1)]),
        ("two memory tiers and disk", [usual, replace(usual, now_s=usual.now_s + 1)]),
        ("three memory tiers and disk", [sample_view(_SMALL, 3, memory_tiers=3, quota_bytes=_QUOTA_BYTES)]),
        ("a device, two memory tiers and disk", [with_device(usual, _SMALL // 10)]),
        ("one memory tier, full, and a load waits",
         [sample_view(_SMALL, 4, memory_tiers=1, full=1.0, needed_bytes=128 * PAGE_BYTES)]),
        ("nothing known", [replace(dark, tiers=tuple(unmeasured))]),
        ("time stands still and goes back", [usual, usual, replace(usual, now_s=usual.now_s - 500)]),
        ("models come and go", [subset(usual, half), usual, subset(usual, ~half), subset(usual, none), usual]),
    ]  # fmt: skip


def requests() -> list[tuple[str, Request]]:
    """Requests for a place, each for a new policy."""
    tiers = sample_view(_SMALL, 1).tiers
    return [(name, sample_request(pages, tiers)) for name, pages in
            (("no pages", 0), ("a model that fits", 200), ("more than fits", _SMALL))]  # fmt: skip


class _Subject:
    """A policy's class, and what was seen of it so far."""

    def __init__(self, cls: type[Any], path: str) -> None:
        self._cls, self._path = cls, path
        self._impure: list[str] = []
        self._watch = _Watch(path)
        self._step = ""

    def step(self, name: str, run: Callable[[], str]) -> tuple[str, Callable[[], Check]]:
        def check() -> Check:
            self._step = name
            try:
                return Check(name, "ok", None, run())
            except _Warning as warning:
                return Check(name, "warning", warning.line, str(warning))
            except PolicyError as error:
                return Check(name, "failed", line_of(error, self._path), str(error))
            except BaseException as error:  # whatever a policy may raise
                return Check(name, "failed", line_of(error, self._path), describe(error, ""))

        return name, check

    def plan_all(self, views: list[View]) -> str:
        plans = [self._plans(views) for _ in range(2)]
        if plans[0] != plans[1]:
            self._impure.append(self._step)
        count = sum(len(plan) for plan in plans[0])
        return f"{count} moves" if count != 1 else "1 move"

    def _plans(self, views: list[View]) -> list[Plan]:
        policy, plans = self._cls(), []
        for view in views:
            before = _content(view)
            with self._watch.watching():
                plan = policy.plan(view)
            plans.append(list(check_plan(view, plan)))
            if _content(view) != before:
                raise PolicyError("plan(view) changed the view; copy a column before you change it")
        return plans

    def place(self, request: Request) -> str:
        placed = []
        for _ in range(2):
            policy = self._cls()
            with self._watch.watching():
                answer = policy.place(request)
            placed.append(check_place(request, answer))
        if not np.array_equal(placed[0], placed[1]):
            self._impure.append(self._step)
        return f"{len(request)} pages"

    def pure(self) -> str:
        if self._impure:
            raise PolicyError(
                f"two new policies that saw the same answered differently ({', '.join(self._impure)}): take the time "
                "from view.now_s, keep what you learn in self, and seed random numbers"
            )
        return ""

    def quiet(self) -> str:
        if self._watch.seen:
            line, event = min(self._watch.seen)
            raise _Warning(f"plan or place does {event}; a policy is a pure function: let it live by its view", line)
        return ""

    def time(self, pages: int) -> str:
        view = sample_view(pages, 5, quota_bytes=_QUOTA_BYTES)
        policy, took_s = self._cls(), []
        for number in range(ROUNDS):
            later = replace(view, now_s=view.now_s + number)
            start = time.perf_counter()
            plan = policy.plan(later)
            took_s.append(time.perf_counter() - start)
        check_plan(later, plan)
        if (median_s := statistics.median(took_s)) > BUDGET_S:
            raise PolicyError(
                f"plan(view) takes {median_s:.3f} s, {BUDGET_S} s are allowed: use whole numpy columns instead of "
                "loops, np.partition instead of sorting, and plan no more than view.quota_bytes"
            )
        return f"{median_s * 1e3:.1f} ms, the median of {ROUNDS}"


class _Warning(Exception):
    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


class _Watch:
    """Which lines of a policy did input or output while it was watched. A hook of audit events stays as long as the
    process; it does nothing at other times."""

    def __init__(self, path: str) -> None:
        self.seen: set[tuple[int, str]] = set()
        self._path = path
        self._on = False
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def _hook(self, event: str, arguments: object) -> None:
        if self._on and event.startswith(_IO):
            frame: FrameType | None = sys._getframe(1)
            while frame and frame.f_code.co_filename != self._path:
                if "importlib" in frame.f_code.co_filename:
                    return  # a library that loads the rest of itself at its first use
                frame = frame.f_back
            if frame:
                self.seen.add((frame.f_lineno, event))


def _content(view: View) -> list[bytes]:
    columns: list[npt.NDArray[Any]] = [getattr(view.pages, field.name) for field in fields(view.pages)]
    columns += [view.models.nbytes, view.models.opens, view.models.last_open_s, view.models.rate]
    return [column.tobytes() for column in columns]
