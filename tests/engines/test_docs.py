"""docs/engines.md: each of its commands runs, as it stands there, and does what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import ort_minilm
from tests.engines.conftest import EngineDaemon
from tests.engines.models import REPOSITORY

PAGE = (REPOSITORY / "docs" / "engines.md").read_text()
LIMIT_S = 400


def blocks(page: str) -> dict[str, str]:
    """Heading of the second level -> the commands under it."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, text = section.split("\n", 1)
        for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            assert heading not in found, f"{heading} has two commands; each needs a heading"
            found[heading] = block
    return found


class Shell:
    """Runs a section's commands where a reader would: beside a daemon, with MODEL set."""

    def __init__(self, daemon: EngineDaemon, directory: Path) -> None:
        self.daemon, self.directory = daemon, directory

    def run(self, heading: str, model: Path, python: str = sys.executable, **settings: str) -> str:
        """What the commands print. `python` is the interpreter whose directory comes first on the path."""
        path = f"{Path(python).parent}:{os.environ['PATH']}"
        environment = os.environ | {"MODEL": str(model), "TIERMEM_ADDRESS": self.daemon.address, "PATH": path}
        # One thread: several wait for one another actively, which takes minutes on a busy machine.
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}
        command = ["bash", "-euo", "pipefail", "-c", blocks(PAGE)[heading]]
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout

    def models(self) -> dict[str, bool]:
        """Name -> whether it is an image, of what the pool has in memory."""
        models = self.daemon.status()["models"]
        return {model["name"]: bool(model["fingerprint"]) for model in models if model["resident_bytes"]}


@pytest.fixture
def shell(daemon: EngineDaemon, tmp_path: Path) -> Shell:
    return Shell(daemon, tmp_path)


def test_every_command_of_the_page_is_run_here() -> None:
    run = {"vLLM", "transformers", "A path for any engine", "llama.cpp", "ONNX Runtime", "MindSpore", "Measuring"}
    assert blocks(PAGE).keys() == run


def test_vllm(shell: Shell, smollm2: Path, vllm_python: str) -> None:
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    cache = {"VLLM_CACHE_ROOT": str(shell.directory / "cache")}
    assert "Paris" in shell.run("vLLM", smollm2, vllm_python, **one_process, **cache)
    assert True in shell.models().values()


def test_transformers(shell: Shell, smollm2: Path) -> None:
    assert "Paris" in shell.run("transformers", smollm2)
    assert shell.models() == {"smollm2": False}


def test_an_export_for_any_engine(shell: Shell, smollm2: Path) -> None:
    assert "Paris" in shell.run("A path for any engine", smollm2)
    assert shell.models() == {}  # it ends with undoing the export


def test_llama_cpp(shell: Shell, smollm2_gguf: Path) -> None:
    shell.run("llama.cpp", smollm2_gguf)
    file = shell.directory / "exported" / smollm2_gguf.name
    assert file.is_symlink()
    with file.open("rb") as exported, smollm2_gguf.open("rb") as plain:
        assert exported.read(smollm2_gguf.stat().st_size) == plain.read()


def test_onnx_runtime(shell: Shell, minilm: Path) -> None:
    model = shell.directory / "encoder.onnx"
    ort_minilm.write(minilm, model, external=True)
    assert "['ids']" in shell.run("ONNX Runtime", model)
    assert shell.models() == {"encoder": False}


def test_mindspore(shell: Shell, minilm: Path, mindspore_python: str) -> None:
    assert "104 parameters over the memory of the pool" in shell.run("MindSpore", minilm, mindspore_python)
    assert shell.models() == {"model": False}


def test_measuring(shell: Shell, tiny_llama: Path) -> None:
    said = shell.run("Measuring", tiny_llama)
    assert all(word in said for word in ("own ", "populate ", "attach ", "2 at once, attach", "the same answers"))
