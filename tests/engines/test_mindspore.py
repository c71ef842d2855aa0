"""MindSpore loads from the pool: the values that its own loader gives, with no copy, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EngineDaemon
from tests.integration.child import eventually

SCRIPT = Path(__file__).with_name("mindspore_run.py")
REPOSITORY = SCRIPT.parents[2]
MB = 10**6

Run = Callable[..., Any]


def environment(address: str) -> dict[str, str]:
    return os.environ | {"TIERMEM_ADDRESS": address, "PYTHONPATH": str(REPOSITORY), "GLOG_v": "3"}


@pytest.fixture
def run(mindspore_python: str, daemon: EngineDaemon, tmp_path: Path) -> Run:
    """`run(task, checkpoint)`: the facts of one task, run to its end in MindSpore's interpreter."""

    def to_its_end(task: str, *arguments: object) -> Any:
        command = [mindspore_python, str(SCRIPT), task, str(tmp_path), *map(str, arguments)]
        done = subprocess.run(command, env=environment(daemon.address), cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return to_its_end


def test_all_that_mindspore_saves_is_read_as_mindspore_reads_it(run: Run) -> None:
    facts = run("types")
    assert len(facts["differences"]) == 5
    assert not any(facts["differences"].values()), facts["differences"]
    assert facts["loaded"] == 4 * facts["types"] + 4  # four shapes of each, and what was appended


def test_tensors_in_slices_are_whole_again(run: Run) -> None:
    facts = run("slices")
    assert len(facts["differences"]) == 4
    assert not any(facts["differences"].values()), facts["differences"]
    # Slices of whole OS pages lie behind one another in the pool, so nothing is copied.
    assert facts["aliased"] == {"4 False": True, "4 True": False, "1 False": False, "1 True": False}
    assert facts["counts"] == {"4 False": 9, "4 True": 9, "1 False": 36, "1 True": 36}
    assert facts["chosen"] == ["layers.1.big"]


def test_a_net_computes_and_trains_on_the_pools_memory(run: Run, minilm: Path, daemon: EngineDaemon) -> None:
    facts = run("real", minilm)
    assert facts["differences"] == []
    assert facts["count"] == 104
    assert facts["aliased"]
    assert facts["error"] < 1e-4
    assert facts["trained"] > 1e-3
    assert facts["kept"]
    assert len(daemon.status()["models"]) == 1


def test_prefixes_and_functions_choose_as_in_the_original(run: Run, minilm: Path, tmp_path: Path) -> None:
    assert run("convert", minilm)["tensors"] == 104
    facts = run("choices", tmp_path / "model.ckpt")
    assert {key: found for key, (_, found) in facts.items() if found} == {}
    assert {key: count for key, (count, _) in facts.items()} == {"0": 8, "1": 8, "2": 64, "3": 50, "4": 98}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_weights_are_not_copied(kind: str, run: Run, smollm2: Path, tmp_path: Path, daemon: EngineDaemon) -> None:
    path = smollm2 / "model.safetensors"
    if kind == "ckpt":
        run("convert", smollm2)
        path = tmp_path / "model.ckpt"
    nbytes = path.stat().st_size
    stock = run("stock", path)
    with daemon.client() as client:
        client.load(path)
    pooled = run("pooled", path)
    print(json.dumps({"kind": kind, "bytes": nbytes, "stock": stock, "pooled": pooled}))
    assert pooled["digest"] == stock["digest"]
    assert pooled["private"] < nbytes / 10
    assert pooled["peak"] < nbytes / 4
    # Its own loader maps a safetensors file, and copies a .ckpt twice on the way.
    assert kind == "safetensors" or stock["peak"] > 1.5 * nbytes


def test_parameters_hold_their_model_and_outlive_the_daemon(
    mindspore_python: str, daemon: EngineDaemon, minilm: Path, tmp_path: Path
) -> None:
    with daemon.client() as client:
        name = client.load(minilm, "small")
    command = [mindspore_python, str(SCRIPT), "held", str(tmp_path), name]
    with subprocess.Popen(
        command, env=environment(daemon.address), cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert json.loads(child.stdout.readline()) == {"count": 104}
            eventually(lambda: daemon.leases() == 1, "the parameters hold the lease")
            daemon.kill()
            print(file=child.stdin, flush=True)
            assert json.loads(child.stdout.readline()) == {"same": True}
            assert json.loads(child.stdout.readline())["left"]
            daemon.start()
            eventually(lambda: daemon.leases() == 1, "the last parameter's lease is announced to the next daemon")
            print(file=child.stdin, flush=True)
            assert json.loads(child.stdout.readline()) == {"left": None}
            eventually(lambda: daemon.leases() == 0, "the lease ended with the last parameter")
        finally:
            child.kill()


@pytest.mark.parametrize("served", [True, False])
def test_what_cannot_be_honoured_is_refused(served: bool, run: Run, minilm: Path, daemon: EngineDaemon) -> None:
    if not served:
        daemon.kill()
    facts = run("refusals", minilm)
    expected = {
        "key": ("Refused", "dec_key cannot be used"),
        "crc": ("Refused", "leave crc_check out"),
        "format": ("ConfigError", "is not of the format 'ckpt'"),
        "no format": ("ConfigError", "format is 'gguf'"),
        "nothing": ("ConfigError", "its 104 tensors do not pass"),
        "prefix": ("ConfigError", "none empty"),
        "bytes": ("TypeError", "BytesIO"),
        "absent": ("CheckpointNotFound", "absent.ckpt"),
        "no model": ("ModelNotFound", "no-such-model"),
        "net": ("TypeError", "should be a Cell"),
        "shape": ("RuntimeError", "should have the same shape"),
        "ranks": ("TypeError", "only be used in parallel"),
    }  # fmt: skip
    assert {name: kind for name, (kind, _) in facts.items()} == {name: kind for name, (kind, _) in expected.items()}
    assert [name for name, (_, words) in expected.items() if words not in facts[name][1]] == [], facts
