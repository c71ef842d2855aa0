"""Checking: a policy's file put to the test in a process that may be lost. Never touches a pool."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from tiermem.errors import PolicyError
from tiermem.policy.probe import PAGES, Check
from tiermem.policy.source import warnings_of
from tiermem.runner.process import Died, Overran, PolicyProcess

STEP_S = 20.0
"""A check that takes longer fails, and those after it are not made."""


def check_file(path: str, pages: int = PAGES, step_s: float = STEP_S) -> Iterator[Check]:
    """The checks of a policy's file as they are made; after one that hangs or ends the process there are no more.

    Raises FileNotFoundError, and ConfigError where no process can be started.
    """
    os.stat(path)
    process = PolicyProcess()
    step = "loads"
    try:
        process.ask(("load", path))
        answer = process.answer(step_s)
        if answer[0] != "loaded":
            yield _unloadable(answer)
            return
        yield Check(step, "ok")
        yield from _imports(path)
        process.ask(("check", pages))
        while (answer := process.answer(step_s))[0] != "done":
            match answer:
                case ["begun", str(step)]:
                    pass
                case ["check", str(name), "ok" | "warning" | "failed" as result, None | int() as line, str(detail)]:
                    yield Check(name, result, line, detail)
                case _:
                    raise PolicyError("its process answered nonsense")
    except Overran:
        detail = f"took longer than {step_s:g} s and was stopped; the checks after it were not made"
        yield Check(step, "failed", process.line(path), detail)
    except (Died, PolicyError) as error:
        yield Check(step, "failed", None, f"{error}; the checks after it were not made{process.last_words}")
    finally:
        process.kill()


def _unloadable(answer: list[object]) -> Check:
    text = str(answer[-1])
    found = re.search(r"in line (\d+)$", text)
    return Check("loads", "failed", int(found[1]) if found else None, text)


def _imports(path: str) -> Iterator[Check]:
    warnings = warnings_of(path)
    for text in warnings:
        place, _, detail = text.partition(": ")
        yield Check("imports", "warning", int(place.removeprefix("line ")), detail)
    if not warnings:
        yield Check("imports", "ok")
