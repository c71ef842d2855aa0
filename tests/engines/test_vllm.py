"""vLLM with the pool, with real weights: the same tokens as without it, and one copy of the weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import EngineDaemon
from tests.engines.vllm_process import REPOSITORY, START_S, VllmProcess, pool_options, vllm_environment, warnings
from tests.integration.child import eventually

MODEL_BYTES = 800_664_576
"""Of the tensors of `llama800`."""

MiB = 1 << 20

full = pytest.mark.skipif(
    os.environ.get("TIERMEM_ENGINES") != "full", reason="takes a minute and finds little more; TIERMEM_ENGINES=full"
)


def test_a_second_engine_shares_the_weights(
    daemon: EngineDaemon, vllm_python: str, llama800: Path, tmp_path: Path
) -> None:
    pool = pool_options(daemon.address, fallback=False)
    with VllmProcess(vllm_python, tmp_path) as plain:
        plain.ask("start", model=str(llama800), load_format="auto")
        tokens, plain_bytes = plain.ask("generate"), plain.ask("memory")
    with VllmProcess(vllm_python, tmp_path) as first, VllmProcess(vllm_python, tmp_path) as second:
        first.ask("start", model=str(llama800), **pool)
        assert first.ask("generate") == tokens
        second.ask("start", model=str(llama800), **pool)
        assert second.ask("generate") == tokens
        assert first.ask("images") == second.ask("images") == ["llama800.vllm"]
        assert warnings(first.log + second.log) == []

        readers = [first.ask("memory"), second.ask("memory")]
        for reader in readers:
            assert plain_bytes["anon"] - reader["anon"] >= MODEL_BYTES
        held = {tier["name"]: tier["used_bytes"] for tier in daemon.status()["tiers"]}
        assert MODEL_BYTES <= held["dram"] <= MODEL_BYTES + 64 * MiB
        assert sum(reader["shmem"] for reader in readers) <= 2 * held["dram"]
        assert sum(reader["shmem_pss"] for reader in readers) <= held["dram"]

        # The daemon dies under engines that generate; they go on, and the next one finds the image again.
        longer = second.ask("generate", tokens=64)
        second.tell("generate", tokens=64)
        daemon.kill()
        assert second.answer() == longer
        assert first.ask("generate") == tokens
        daemon.start()
        second.ask("start", model=str(llama800), **pool)
        assert second.ask("generate") == tokens
        assert second.ask("images") == ["llama800.vllm"]
        assert warnings(second.log) == []


def best_load_s(process: VllmProcess, **options: Any) -> float:
    """Of two starts, since other work on the machine may stretch one."""
    return float(min(process.ask("start", **options)["load_model"] for _ in range(2)))


def test_a_real_model_with_tied_embeddings_says_the_same(
    daemon: EngineDaemon, vllm_python: str, smollm2: Path, tmp_path: Path
) -> None:
    with VllmProcess(vllm_python, tmp_path) as process:
        process.ask("start", model=str(smollm2), load_format="auto")
        tokens = process.ask("generate")
        assert "Paris" in process.ask("text")
        for _ in range(2):
            process.ask("start", model=str(smollm2), **pool_options(daemon.address, fallback=False))
            assert process.ask("generate") == tokens
            assert process.ask("images") == ["smollm2.vllm"]


@pytest.mark.parametrize("model", ["llama800", pytest.param("tiny_tied", marks=full)])
def test_each_rank_of_tensor_parallelism_has_an_image(
    daemon: EngineDaemon, vllm_python: str, model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = {"model": str(request.getfixturevalue(model)), "tensor_parallel_size": 2}
    with VllmProcess(vllm_python, tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1") as process:
        process.ask("start", load_format="auto", **options)
        tokens = process.ask("generate")
        for _ in range(2):
            process.ask("start", **pool_options(daemon.address, fallback=False), **options)
            assert process.ask("generate") == tokens
            assert process.ask("images") == [f"{model}.vllm.tp0of2", f"{model}.vllm.tp1of2"]
        assert warnings(process.log) == []

        def evicted() -> bool:
            return {entry["name"]: entry["state"] for entry in daemon.status()["models"]}[model] == "disk"

        eventually(evicted, "the checkpoint left memory once both ranks had read it", 60)


def test_a_compiled_model_runs_on_an_image(
    daemon: EngineDaemon, vllm_python: str, tiny_llama: Path, tmp_path: Path
) -> None:
    options = {"model": str(tiny_llama), **pool_options(daemon.address, fallback=False)}
    with VllmProcess(vllm_python, tmp_path) as process:
        process.ask("start", **options)
        tokens = process.ask("generate")
        process.ask("start", enforce_eager=False, **options)
        assert process.ask("generate") == tokens
        assert process.ask("images") == ["tiny_llama.vllm"]


def test_the_server_answers_from_an_image(
    daemon: EngineDaemon, vllm_python: str, smollm2: Path, tmp_path: Path
) -> None:
    with served(vllm_python, smollm2, daemon.address, tmp_path) as address:
        body = {"model": str(smollm2), "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        answer = post(f"{address}/v1/completions", body)
        assert "Paris" in answer["choices"][0]["text"]
        [image] = [entry for entry in daemon.status()["models"] if entry["name"] == "smollm2.vllm"]
        assert image["leases"] == 1


@contextmanager
def served(python: str, model: Path, address: str, directory: Path) -> Iterator[str]:
    """URL of an OpenAI server, once it is healthy."""
    port = 20000 + os.getpid() % 20000
    log = directory / "server.log"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4",
        "--load-format", "tiermem", "--model-loader-extra-config", json.dumps({"address": address, "fallback": False}),
    ]  # fmt: skip
    environment = vllm_environment(directory) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=REPOSITORY, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_S) as reply:
        return json.load(reply)
