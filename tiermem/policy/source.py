"""Policy source: the class in a policy's file, found, checked and made. Never runs a plan.

A shipped policy goes by its name, any other by the path of its file. Loading a file runs it in this process: whoever
does not trust it opens a runner (tiermem.runner), which loads it in a process of its own.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tiermem.errors import ConfigError
from tiermem.policy.plan import Plan
from tiermem.policy.view import View

PERIOD_S = 1.0
"""How often a policy is asked that does not say."""
GUARD_S = 10.0
"""How long a page stays where it was moved to, where the policy does not say."""
PEER, DISK = "peer", "disk"
"""Sources of weights that are in no memory of this host. Where a policy does not say, peers are asked first."""
MAX_TEXT = 1000
"""Characters of a policy's own words that go on into messages."""

_RANGES = {"period_s": (0.01, 3600.0), "guard_s": (0.0, 3600.0)}
_SIGNATURES = {"plan": ["self", "view"], "place": ["self", "request"]}
_EXPECTED_IMPORTS = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "itertools", "math", "numpy",
    "tiermem.policy", "tiermem.types", "typing",
}  # fmt: skip
_SHIPPED = "tiermem.policies"
_serial = itertools.count()


class Policy(Protocol):
    """What a policy file's class must have. It may also have `period_s`, `guard_s`, `sources` and
    `place(self, request)`."""

    def plan(self, view: View) -> Plan: ...


def is_file(name: str) -> bool:
    """Whether the name of a policy means a file."""
    return Path(name).suffix == ".py"


def load_policy(name: str) -> Policy:
    """The policy of a shipped name (`lru`) or of a file (`./mine.py`). Raises ConfigError saying what is wrong."""
    module = _of_file(name) if is_file(name) else _shipped(name)
    classes: list[type[Any]] = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and callable(getattr(cls, "plan", None))
    ]
    if len(classes) != 1:
        raise ConfigError(f"policy {name}: {len(classes)} classes with a method `plan(self, view)`; one is needed")
    (cls,) = classes
    for method, parameters in _SIGNATURES.items():
        if (function := getattr(cls, method, None)) is not None:
            _check_signature(name, method, function, parameters)
    try:
        policy: Policy = cls()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"policy {name}: {cls.__name__}() {describe(error, name)}") from error
    seconds_of(policy, "period_s", name)
    seconds_of(policy, "guard_s", name)
    sources_of(policy, name)
    return policy


def seconds_of(policy: Policy, attribute: str, name: str) -> float:
    """`period_s` or `guard_s` of a policy, or what stands for it. Raises ConfigError if it is no such time."""
    value = getattr(policy, attribute, PERIOD_S if attribute == "period_s" else GUARD_S)
    low, high = _RANGES[attribute]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"policy {name}: {attribute} = {value!r:.100} must be seconds from {low:g} to {high:g}")
    return float(value)


def sources_of(policy: Policy, name: str) -> tuple[str, ...]:
    """`sources` of a policy, or what stands for it. Raises ConfigError unless it is DISK, with or without PEER."""
    value: object = getattr(policy, "sources", (PEER, DISK))
    if not isinstance(value, tuple | list) or tuple(value) not in ((PEER, DISK), (DISK, PEER), (DISK,)):
        raise ConfigError(
            f"policy {name}: sources = {value!r:.100} must be ({PEER!r}, {DISK!r}), ({DISK!r}, {PEER!r}) or ({DISK!r},)"
        )
    return tuple(value)


def describe(error: BaseException, path: str) -> str:
    """`raised ValueError: why, in line 7`: what a policy did and the innermost line of its file that did it."""
    if isinstance(error, SystemExit):
        what = "called sys.exit()"
    else:
        try:
            text = error.msg if isinstance(error, SyntaxError) else str(error)
        except Exception:  # an exception of the policy's own
            text = "its text raises, too"
        what = f"raised {type(error).__name__}" + (f": {text[:MAX_TEXT]}" if text else "")
    line = line_of(error, path)
    return f"{what}, in line {line}" if line else what


def line_of(error: BaseException, path: str) -> int | None:
    """The line of that file in which an error arose; None if it never passed through."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    frames = traceback.walk_tb(error.__traceback__)
    return next((line for frame, line in reversed([*frames]) if frame.f_code.co_filename == path), None)


def warnings_of(path: str) -> list[str]:
    """Imports of a policy's file that a pure function hardly needs, each with its line. Runs nothing of it; empty for a
    file that is no Python: loading it says so. Raises OSError."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [
        f"line {line}: imports {module}; a plan needs no more than its view"
        for line, module in sorted(set(_imports(tree)))
        if not any(module == known or module.startswith(f"{known}.") for known in _EXPECTED_IMPORTS)
    ]


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "tiermem":
            yield from ((node.lineno, f"tiermem.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def _check_signature(name: str, method: str, function: Any, parameters: list[str]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ConfigError(f"policy {name}: {method} must be a method {method}({', '.join(parameters)})") from None
    if list(signature.parameters) != parameters:
        raise ConfigError(f"policy {name}: {method}{signature} must be {method}({', '.join(parameters)})")


def _shipped(name: str) -> ModuleType:
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(_SHIPPED).__path__))
    if name not in names:
        raise ConfigError(f"no policy {name!r}; name a shipped one ({', '.join(names)}) or the path of a .py file")
    return importlib.import_module(f"{_SHIPPED}.{name}")


def _of_file(name: str) -> ModuleType:
    """The module of a file. Compiled here and not by the import system, which would leave a cache beside the file."""
    if not os.path.isfile(name):
        raise ConfigError(f"policy {name}: no such file")
    module = ModuleType(f"tiermem_policy_{next(_serial)}_{Path(name).stem}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # dataclasses look there, while the class is made
    try:
        exec(compile(Path(name).read_bytes(), name, "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"policy {name}: importing it {describe(error, name)}") from error
    finally:
        sys.modules.pop(module.__name__, None)
    return module
