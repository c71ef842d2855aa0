"""vLLM with the pool, where something stands in the way: what the engine does instead, and what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.engines.conftest import EngineDaemon
from tests.engines.vllm_process import EngineError, VllmProcess, pool_options, warnings
from tests.integration.daemon import Daemon

Tokens = list[list[int]]
FORMAT = {"format": "pt"}
"""Metadata of a safetensors file that transformers accepts."""


class Bench:
    """One process of vLLM, in which a test starts engines, and what they say."""

    def __init__(self, process: VllmProcess) -> None:
        self.process = process
        self._logged = 0

    def start(self, model: Path, address: str, *, config: dict[str, Any] | None = None, **options: Any) -> Tokens:
        """Tokens of an engine that loads `model` from the pool; `config` are further loader options."""
        self._logged = len(self.process.log)
        self.process.ask("start", model=str(model), **pool_options(address, **(config or {})), **options)
        return self.generate()

    def own(self, model: Path, **options: Any) -> Tokens:
        """Tokens of an engine that loads `model` as it would without the pool."""
        self.process.ask("start", model=str(model), load_format="auto", **options)
        return self.generate()

    def generate(self) -> Tokens:
        tokens: Tokens = self.process.ask("generate")
        return tokens

    @property
    def image(self) -> str | None:
        images: list[str | None] = self.process.ask("images")
        return images[0]

    @property
    def warnings(self) -> list[str]:
        """Of the engine started last."""
        return warnings(self.process.log[self._logged :])


@pytest.fixture(scope="module")
def bench(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with VllmProcess(vllm_python, tmp_path_factory.mktemp("vllm")) as process:
        yield Bench(process)


@pytest.fixture(scope="module")
def pool() -> Iterator[EngineDaemon]:
    with EngineDaemon() as started:
        yield started


@pytest.fixture(scope="module")
def tokens(bench: Bench, tiny_llama: Path) -> Tokens:
    """What the tiny Llama says without the pool."""
    return bench.own(tiny_llama)


def states(daemon: Daemon) -> dict[str, str]:
    return {model["name"]: model["state"] for model in daemon.status()["models"]}


def copied(model: Path, to: Path) -> Path:
    """A copy of a checkpoint, as another checkpoint."""
    return Path(shutil.copytree(model, to))


def test_a_mapped_model_refuses_to_be_reloaded(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, tokens: Tokens
) -> None:
    bench.start(tiny_llama, pool.address)
    assert bench.start(tiny_llama, pool.address) == tokens
    assert bench.image is not None
    for command, options in (
        ("reload", {}),
        ("reload_from", {"kernel_format": True}),
        ("reload_from", {"kernel_format": False}),
        ("load_weights", {}),
    ):
        with pytest.raises(EngineError, match=r"Refused: .*not reloaded in place; start an engine"):
            bench.process.ask(command, **options)
    assert bench.generate() == tokens


def test_a_streamed_model_is_reloaded_from_the_pool(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, tokens: Tokens
) -> None:
    options = {"hf_overrides": {"architectures": ["TransposedLlama"]}}
    assert bench.start(tiny_llama, pool.address, **options) == tokens
    opens = {model["name"]: model["opens"] for model in pool.status()["models"]}["tiny_llama"]
    bench.process.ask("reload")
    assert bench.generate() == tokens
    assert {model["name"]: model["opens"] for model in pool.status()["models"]}["tiny_llama"] == opens + 1


def test_what_loading_changes_in_a_buffer_is_kept(bench: Bench, pool: EngineDaemon, tiny_llama: Path) -> None:
    options = {"hf_overrides": {"architectures": ["BufferedLlama"]}}
    expected = bench.own(tiny_llama, **options)
    for _ in range(2):
        assert bench.start(tiny_llama, pool.address, **options) == expected
        assert bench.image is not None
        assert bench.warnings == []


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("AttributeLlama", "loading it changes attribute .factor"),
        ("ComputedLlama", "loading it changes buffer sign"),
        ("RewritingLlama", "rewrites weights once they are loaded"),
        ("TransposedLlama", "parameter lm_head.weight is not plain and dense"),
    ],
)
def test_a_class_that_cannot_be_attached_is_streamed(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, architecture: str, reason: str
) -> None:
    options = {"hf_overrides": {"architectures": [architecture]}}
    expected = bench.own(tiny_llama, **options)
    before = states(pool).keys() | {"tiny_llama"}
    assert bench.start(tiny_llama, pool.address, **options) == expected
    assert bench.image is None
    assert len(bench.warnings) == 1
    assert "streamed" in bench.warnings[0]
    assert reason in bench.warnings[0]
    assert states(pool).keys() == before


def test_a_quantised_model_is_streamed(bench: Bench, pool: EngineDaemon, tiny_llama: Path, tmp_path: Path) -> None:
    quantised = quantise(tiny_llama, tmp_path / "int8")
    expected = bench.own(quantised)
    assert bench.start(quantised, pool.address) == expected
    assert bench.image is None
    assert ["it is quantised (compressed-tensors)" in line for line in bench.warnings] == [True]
    assert states(pool)["int8"] == "resident"


def test_without_a_daemon_the_engine_loads_by_itself(
    bench: Bench, tiny_llama: Path, tokens: Tokens, tmp_path: Path
) -> None:
    socket = f"{tmp_path}/s"
    nowhere = f"unix:{socket}"
    assert bench.start(tiny_llama, nowhere) == tokens
    assert ["vLLM reads the weights itself" in line and socket in line for line in bench.warnings] == [True]
    with pytest.raises(EngineError, match=f"DaemonUnreachable: .*{socket}"):
        bench.start(tiny_llama, nowhere, config={"fallback": False})


def test_a_full_pool_leaves_loading_to_the_engine(bench: Bench, tiny_llama: Path, tokens: Tokens) -> None:
    with Daemon(tier="dram=16MiB") as small:
        assert bench.start(tiny_llama, small.address) == tokens
        assert bench.image is None
        assert len(bench.warnings) == 1
        assert "all memory is 16.0 MiB" in bench.warnings[0]
        with pytest.raises(EngineError, match="CapacityError"):
            bench.start(tiny_llama, small.address, config={"fallback": False})


def test_a_pool_with_room_for_the_image_alone_gets_it(bench: Bench, tiny_llama: Path, tokens: Tokens) -> None:
    with Daemon(tier="dram=60MiB") as small:
        assert bench.start(tiny_llama, small.address) == tokens
        assert bench.image is not None
        assert ["vLLM reads the weights itself" in line for line in bench.warnings] == [True]
        assert bench.start(tiny_llama, small.address, config={"fallback": False}) == tokens
        assert bench.warnings == []


def test_a_checkpoint_that_changed_gets_another_image(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, tokens: Tokens, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path / "changing")
    assert bench.start(model, pool.address, config={"image": "changing"}) == tokens
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"] = np.roll(weights["model.embed_tokens.weight"], 7, axis=0)
    save_file(weights, file, FORMAT)
    with pytest.raises(EngineError, match=r"FingerprintMismatch: .*checkpoint is"):
        bench.start(model, pool.address, config={"image": "changing"})
    changed = bench.start(model, pool.address)
    assert changed == bench.own(model) != tokens


def test_an_image_of_another_dtype_is_refused_by_its_name(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, tokens: Tokens, tmp_path: Path
) -> None:
    model, named = copied(tiny_llama, tmp_path / "named"), {"image": "for-bf16"}
    for _ in range(2):
        assert bench.start(model, pool.address, config=named) == tokens
        assert bench.image == "for-bf16"
    with pytest.raises(EngineError, match="FingerprintMismatch: these weights are image 'for-bf16' already"):
        bench.start(model, pool.address, config={"image": "another"})
    with pytest.raises(EngineError, match=r"FingerprintMismatch: .*for-bf16.* dtype is 'bfloat16', not 'float32'"):
        bench.start(model, pool.address, config=named, dtype="float32")
    assert bench.start(model, pool.address, dtype="float32") == bench.own(model, dtype="float32")


def test_a_version_that_was_not_tested_is_streamed_or_refused(
    bench: Bench, pool: EngineDaemon, tiny_llama: Path, tokens: Tokens
) -> None:
    assert bench.start(tiny_llama, pool.address, version="9.9.9") == tokens
    assert bench.image is None
    assert ["vLLM 9.9.9 is not among the versions" in line for line in bench.warnings] == [True]
    with pytest.raises(EngineError, match=r"Refused: vLLM 9\.9\.9 is not among"):
        bench.start(tiny_llama, pool.address, config={"fallback": False}, version="9.9.9")


def test_an_unknown_option_is_an_error(bench: Bench, pool: EngineDaemon, tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match=r"ConfigError: unknown option 'adress'.*did you mean 'address'"):
        bench.start(tiny_llama, pool.address, config={"adress": pool.address})


@pytest.mark.parametrize(
    ("architecture", "warning"),
    [("KillsBeforeLoading", "vLLM reads the weights itself"), ("KillsAfterLoading", "did not keep image")],
)
def test_the_daemon_dies_while_an_engine_loads(
    bench: Bench, tiny_llama: Path, tokens: Tokens, architecture: str, warning: str
) -> None:
    with EngineDaemon() as mortal:
        overrides = {"architectures": [architecture], "daemon_pid": mortal.pid}
        assert bench.start(tiny_llama, mortal.address, hf_overrides=overrides) == tokens
        assert bench.image is None
        assert [warning in line for line in bench.warnings] == [True]
        mortal.start()
        assert not [name for name in states(mortal) if name.endswith(".vllm")]
        assert bench.start(tiny_llama, mortal.address) == tokens
        assert bench.image is not None


def test_a_checkpoint_leaves_memory_unless_it_was_there_before(
    bench: Bench, pool: EngineDaemon, tiny_sharded: Path, tokens: Tokens, tmp_path: Path
) -> None:
    fresh, known = copied(tiny_sharded, tmp_path / "fresh"), copied(tiny_sharded, tmp_path / "known")
    with pool.client() as client:
        client.load(known)
    for model in (fresh, known):
        assert bench.start(model, pool.address) == tokens
        assert bench.image is not None
    assert states(pool)["fresh"] == "disk"
    assert states(pool)["known"] == "resident"


def test_two_engines_that_start_at_once_end_with_one_image(
    bench: Bench, vllm_python: str, tiny_llama: Path, tokens: Tokens, tmp_path: Path
) -> None:
    with EngineDaemon() as daemon, VllmProcess(vllm_python, tmp_path) as other:
        other.ask("start", model=str(tiny_llama), load_format="auto")
        processes = (bench.process, other)
        for process in processes:
            process.tell("start", model=str(tiny_llama), **pool_options(daemon.address, fallback=False))
        for process in processes:
            process.answer()
        assert [process.ask("generate") for process in processes] == [tokens, tokens]
        assert [process.ask("images") for process in processes] == [["tiny_llama.vllm"]] * 2
        assert states(daemon) == {"tiny_llama.vllm": "resident", "tiny_llama": "disk"}


def quantise(model: Path, to: Path) -> Path:
    """A checkpoint of int8 weights with a scale per row, as compressed-tensors describes them."""
    to.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, to)
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        wide = tensors[name].astype(np.float32)
        scale = np.abs(wide).max(axis=1, keepdims=True) / 127
        tensors[name] = np.round(wide / scale).astype(np.int8)
        tensors[f"{name}_scale"] = scale.astype(ml_dtypes.bfloat16)
    save_file(tensors, to / "model.safetensors", FORMAT)
    config = json.loads((model / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = weights | {"strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    (to / "config.json").write_text(json.dumps(config))
    return to
