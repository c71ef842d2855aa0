"""pytest plugin: safetensors' own tests, reading through tiermem. Replaces its readers and counts what they opened.

Loaded with `-p tests.conformance.plugin`, before the test modules import the names that it replaces. Writers, and
readers of bytes, stay the original's.
"""

from __future__ import annotations

from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch

from tiermem import safe_open as readers

opened = 0


class CountedOpen(readers.safe_open):
    """Ours, with a count of the files that it did open."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        global opened
        super().__init__(*args, **kwargs)
        opened += 1


for module in (readers, safetensors, safetensors.torch, safetensors.numpy):
    vars(module)["safe_open"] = CountedOpen
vars(safetensors)["_safe_open_handle"] = readers.safe_open_handle


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run in which nothing went through tiermem proves nothing."""
    if not opened and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{opened} files opened by tiermem")
