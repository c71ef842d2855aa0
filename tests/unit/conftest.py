"""Fixtures of the readers' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiermem import opening
from tiermem.config import load_config
from tiermem.embedded import EmbeddedPool


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedPool]:
    """The pool that readers of this process use, all to this test; it keeps models without readers."""
    monkeypatch.setenv("TIERMEM_ADDRESS", f"unix:{tmp_path}/none.sock")
    monkeypatch.setenv("TIERMEM_DIGESTS", str(tmp_path / "digests"))
    monkeypatch.setenv("TIERMEM_TIER", "dram=256MiB")
    with EmbeddedPool(load_config()) as pool:
        monkeypatch.setattr(opening, "_own", pool)
        monkeypatch.setattr(opening, "_own_pid", os.getpid())
        yield pool
