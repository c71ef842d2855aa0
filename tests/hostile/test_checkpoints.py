"""Every bad checkpoint ends in its own error, that names the file, soon, and leaves no descriptor open."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.conftest import open_files
from tests.hostile.checkpoints import CORPUS, Case, write_good
from tiermem.checkpoint import open_checkpoint
from tiermem.errors import AccessDenied, TiermemError

LIMIT_S = 2.0
NOBODY = 65534


@pytest.mark.parametrize("case", CORPUS.values(), ids=CORPUS)
def test_bad_checkpoint_is_refused(case: Case, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    files = open_files()
    start = time.perf_counter()
    with pytest.raises(TiermemError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < LIMIT_S
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert case.words in message
    assert str(path) in message
    assert len(message) < 1000 + len(str(path))
    assert message.isprintable()
    assert open_files() == files


def test_unreadable_file_is_denied(tmp_path: Path) -> None:
    path = write_good(tmp_path / "secret.safetensors", "a")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(AccessDenied, match=r"secret\.safetensors: may not be read by user"):
            open_checkpoint(path)
    finally:
        os.seteuid(user)
