"""Asking a policy: its plan or its places, checked, within its budget, or a PolicyError. Owns the policy's life.

After a failure a runner answers no more: what a policy that failed keeps in itself is worth nothing. Open a new one.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError, PolicyError
from tiermem.policy import Plan, Request, View, check_plan, fill_fastest, load_policy
from tiermem.policy.placing import check_place
from tiermem.policy.source import describe, is_file, seconds_of, sources_of, warnings_of
from tiermem.runner.frames import unpack_plan
from tiermem.runner.process import Died, Overran, PolicyProcess

LOAD_S = 10.0
"""Starting a child and loading a file takes 0.3 s, most of it for numpy."""


class Runner(Protocol):
    """A policy that can be asked. Safe to use from several threads: one question at a time.

    `warnings` are about the file's imports, each with its line.
    """

    name: str
    period_s: float
    guard_s: float
    sources: tuple[str, ...]
    warnings: list[str]

    @property
    def cpu_s(self) -> float:
        """CPU time that it used so far; of a child, with its start."""

    def plan(self, view: View) -> Plan:
        """What to move, possible as of this view. Raises PolicyError: it raised, overran, died, or asked for what
        cannot be."""

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        """A memory tier for each page, or NOWHERE once all are full: the policy's choice, or else `fill_fastest`.
        Raises PolicyError as `plan` does."""

    def changed(self) -> bool:
        """Whether the file is another than the one that was loaded, or gone; False for a shipped policy."""

    def close(self) -> None:
        """End it; safe to call again."""


def open_runner(name: str, budget_s: float) -> Runner:
    """A runner of a shipped name or a file, which may take `budget_s` for an answer. Raises ConfigError."""
    return _File(name, budget_s) if is_file(name) else _Shipped(name, budget_s)


class _Asked(ABC):
    """What both kinds share: the lock, the checks, and the memory of a failure."""

    period_s: float
    guard_s: float
    sources: tuple[str, ...]
    warnings: list[str]

    def __init__(self, name: str, budget_s: float) -> None:
        self.name = name
        self._budget_s = budget_s
        self._lock = threading.Lock()  # guards the policy's state and the pipes of a child
        self._failure = ""

    def plan(self, view: View) -> Plan:
        with self._asking():
            return check_plan(view, self._plan(view))

    def place(self, request: Request) -> npt.NDArray[np.int8]:
        with self._asking():
            return check_place(request, self._place(request))

    def close(self) -> None:
        with self._lock:
            self._failure = self._failure or "it was closed"
            self._end()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            if self._failure:
                raise PolicyError(f"policy {self.name} answers no more: {self._failure}; set it anew")
            try:
                yield
            except PolicyError as error:
                self._failure = str(error)
                self._end()
                raise PolicyError(f"policy {self.name}: {error}") from error

    def _overrun(self, step: str, took: str) -> PolicyError:
        advice = f"tiermem policy check {self.name} times it" if is_file(self.name) else "the pool is too large for it"
        return PolicyError(f"{step} took {took}, {self._budget_s:g} s are allowed; {advice}")

    @abstractmethod
    def _plan(self, view: View) -> object:
        """The policy's answer. Raises PolicyError."""

    @abstractmethod
    def _place(self, request: Request) -> object:
        """The policy's answer. Raises PolicyError."""

    @abstractmethod
    def _end(self) -> None:
        """Give up what it holds; safe to call again."""


class _Shipped(_Asked):
    """Runs in this process: it is ours. Its time is judged afterwards."""

    def __init__(self, name: str, budget_s: float) -> None:
        super().__init__(name, budget_s)
        policy = load_policy(name)
        self.period_s, self.guard_s = seconds_of(policy, "period_s", name), seconds_of(policy, "guard_s", name)
        self.sources = sources_of(policy, name)
        self.warnings = []
        self.cpu_s = 0.0
        self._policy: Any = policy
        self._places = hasattr(policy, "place")

    def changed(self) -> bool:
        return False

    def _plan(self, view: View) -> object:
        return self._timed("plan(view)", lambda: self._policy.plan(view))

    def _place(self, request: Request) -> object:
        if not self._places:
            return fill_fastest(request)
        return self._timed("place(request)", lambda: self._policy.place(request))

    def _timed(self, step: str, call: Callable[[], object]) -> object:
        start_s, cpu_s = time.monotonic(), time.thread_time()
        try:
            answer = call()
        except Exception as error:
            path = sys.modules[type(self._policy).__module__].__file__ or ""
            raise PolicyError(f"{step} {describe(error, path)}") from error
        finally:
            self.cpu_s += time.thread_time() - cpu_s
        if (took_s := time.monotonic() - start_s) > self._budget_s:
            raise self._overrun(step, f"{took_s:.2g} s")
        return answer

    def _end(self) -> None:
        self._policy = None


class _File(_Asked):
    """Runs in a child process, which is killed when it takes too long."""

    def __init__(self, name: str, budget_s: float) -> None:
        super().__init__(name, budget_s)
        if (found := _identity(name)) is None:
            raise ConfigError(f"policy {name}: no such file")
        self._identity = found  # taken before it is read: what changes meanwhile is seen as a change
        self._process = PolicyProcess()
        try:
            self._process.ask(("load", name))
            self.period_s, self.guard_s, self.sources, self._places = self._loaded(self._process.answer(LOAD_S))
            self.warnings = warnings_of(name)
        except Overran:
            line = _in_line(self._process.line(name))
            self._process.kill()
            raise ConfigError(f"policy {name}: importing it took longer than {LOAD_S:g} s{line}") from None
        except (Died, PolicyError) as error:
            text = f"policy {name}: while it was imported, it {error}{self._process.last_words}"
            self._process.kill()
            raise ConfigError(text) from None
        except BaseException:
            self._process.kill()
            raise

    @property
    def cpu_s(self) -> float:
        return self._process.cpu_s

    def changed(self) -> bool:
        return _identity(self.name) != self._identity

    def _loaded(self, answer: list[Any]) -> tuple[float, float, tuple[str, ...], bool]:
        match answer:
            case ["loaded", float(period_s), float(guard_s), [*sources], bool(places)]:
                return period_s, guard_s, tuple(map(str, sources)), places
            case ["failed", str(text)]:
                raise ConfigError(text)
        raise PolicyError("answered nonsense")

    def _plan(self, view: View) -> object:
        return unpack_plan(self._ask("plan(view)", ("plan", view)))

    def _place(self, request: Request) -> object:
        if not self._places:
            return fill_fastest(request)
        match self._ask("place(request)", ("place", request)):
            case [bytes(placed)]:
                return np.frombuffer(placed, np.int8)
        raise PolicyError("its process answered nonsense")

    def _ask(self, step: str, question: tuple[Any, ...]) -> list[Any]:
        try:
            self._process.ask(question)
            answer = self._process.answer(LOAD_S)
            if answer == ["begun"]:  # the question has arrived, and the policy's time runs
                answer = self._process.answer(self._budget_s)
        except Overran:
            raise self._overrun(step, f"longer{_in_line(self._process.line(self.name))}") from None
        except Died as error:
            raise PolicyError(f"{step} {error}{self._process.last_words}") from None
        if answer[0] == "failed":
            raise PolicyError(str(answer[-1]))
        return answer[1:]

    def _end(self) -> None:
        self._process.kill()


def _in_line(line: int | None) -> str:
    return f" (it is in line {line})" if line else ""


def _identity(path: str) -> tuple[int, int, int] | None:
    """By which a change of a file is noticed; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if stat.S_ISREG(found.st_mode) else None
