"""`tiermem replay` on what `tiermem record` wrote: a real pool, a real reader, and its touches as a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.child import REPOSITORY, Child
from tests.integration.weights import write_weights
from tiermem.replay.trace import read_trace

USE = """
import sys, time
import tiermem
with tiermem.connect() as client, client.open(sys.argv[1]) as model:
    arrays = [model[f"model.layers.{layer}.weight"] for layer in (1, 3)]
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        for array in arrays:
            array[::4096].sum()
    del array, arrays
print("used", flush=True)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a command that read two of four layers, with a pool of its own."""
    directory = tmp_path_factory.mktemp("replay")
    weights = write_weights(directory / "model", layers=4)
    command = ["-m", "tiermem", "record", "-o", str(directory / "run.tm"), "--address", f"unix:{directory}/none",
               "--epoch", "20ms", "--budget", "100%", "--", sys.executable, "-c", USE, str(weights.path)]  # fmt: skip
    with Child(command) as child:
        assert child.line() == "used"
        assert child.exit_code() == 0, child.errors
    return directory / "run.tm"


def test_a_recording_is_a_trace_of_the_pages_that_were_read(recorded: Path) -> None:
    trace = read_trace(recorded)
    assert trace.names == ("model",)
    assert trace.pages == 4
    assert set(trace.page.tolist()) == {1, 3}
    assert trace.use_change.tolist() == [1, -1]
    assert 1 < trace.end_s < 60


def test_policies_are_judged_on_it(recorded: Path) -> None:
    command = [sys.executable, "-m", "tiermem", "replay", str(recorded), "--policy", "hold,lru", "--tier",
               "dram=1/2,cxl=rest", "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "was not seen touched" in done.stderr
    rows = {row["policy"]: row for row in json.loads(done.stdout)["results"]["rows"]}
    assert rows["hold"]["hit_ratio"] < rows["oracle"]["hit_ratio"] == 1.0
    assert rows["oracle"]["hit_ratio"] >= rows["lru"]["hit_ratio"] >= rows["hold"]["hit_ratio"]
    assert {row["failure"] for row in rows.values()} == {""}
