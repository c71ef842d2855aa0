"""SGLang's own package, unpacked without its dependencies: its loader and plugins with ours, and the names that we use.

Its runtime needs CUDA builds and is not run here. What loads models is run: a real model class takes its weights.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import models
from tests.engines.conftest import EngineDaemon
from tiermem.adapters.sglang import TARGET

SCRIPT = Path(__file__).with_name("sglang_run.py")
GROUP = "sglang.srt.plugins"

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def package() -> Path:
    """The directory that SGLang's package lies in."""
    unpacked = models.PLACE / "sglang"
    if not (unpacked / "sglang").exists():
        pytest.skip(f"{unpacked} has no sglang; make test-engines unpacks it there")
    return unpacked


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which Python finds this project's entry points of SGLang, whatever is installed."""
    project = tomllib.loads((models.REPOSITORY / "pyproject.toml").read_text())["project"]
    directory = tmp_path_factory.mktemp("plugin")
    facts = directory / "tiermem_here-0.dist-info"
    facts.mkdir()
    facts.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: tiermem-here\nVersion: 0\n")
    entries = "\n".join(f"{name} = {value}" for name, value in project["entry-points"][GROUP].items())
    facts.joinpath("entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
    return directory


@pytest.fixture(scope="module")
def ran(
    vllm_python: str, package: Path, plugin: Path, tiny_sharded: Path, tiny_tied: Path, tmp_path_factory: Any
) -> Iterator[Facts]:
    """The facts of `sglang_run.py`, and what the pool held after it."""
    path = os.pathsep.join(map(str, (plugin, package, models.REPOSITORY)))
    with EngineDaemon() as daemon:
        environment = os.environ | {
            "PYTHONPATH": path, "TIERMEM_ADDRESS": daemon.address, "HF_HUB_OFFLINE": "1",
            "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_PLUGINS": "tiermem",
        }  # fmt: skip
        command = [vllm_python, str(SCRIPT), str(tmp_path_factory.mktemp("run")), str(tiny_sharded), str(tiny_tied)]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1]) | {"models": daemon.status()["models"]}


def test_models_take_their_weights_from_the_pool(ran: Facts) -> None:
    same = {"stock": "DefaultModelLoader", "ours": "PoolLoader", "same": True, "update": True, "updated": True}
    assert ran["loads"] == {"tiny_sharded": same, "tiny_tied": same}
    assert {model["name"] for model in ran["models"]} == {"tiny_sharded", "tiny_tied"}


def test_every_way_to_the_tensors_gives_the_same(ran: Facts) -> None:
    assert ran["sources"] == {"prefixed": True, "resolved": True, "draft": True}


def test_without_the_pool_sglang_reads_the_weights_itself(ran: Facts) -> None:
    facts = ran["failures"]
    assert facts["absent, loaded"] == facts["broken, loaded"] == facts["theirs"]
    assert [text.partition(":")[0] for text in facts["absent"] + facts["broken"]] == [
        "SGLang reads the weights itself, since the pool cannot serve them"
    ] * 2
    assert facts["absent, no fallback"][0] == "DaemonUnreachable"
    assert facts["broken, no fallback"] == ["ReadError", "the disk is gone"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("dummy", "loads this model with DummyModelLoader"),
        ("sharded_state", "loads this model with ShardedStateLoader"),
        ("npcache", "--load-format npcache has its own way"),
        ("version", "SGLang 0.6.0 is not among the versions"),
    ],
)
def test_what_has_its_own_way_to_the_weights_keeps_it(case: str, words: str, ran: Facts) -> None:
    error, chosen, said = ran["failures"][case]
    assert not error
    assert chosen != "PoolLoader"
    assert [words in text for text in said] == [True]
    error, text, said = ran["failures"][f"{case}, no fallback"]
    assert error == "Refused"
    assert words in text
    assert not said


@pytest.mark.parametrize("case", ["auto", "safetensors", "pt", "mistral"])
def test_what_reads_files_as_they_are_is_served(case: str, ran: Facts) -> None:
    assert ran["failures"][case] == ["", "PoolLoader", []]


@pytest.mark.parametrize(
    ("case", "words"),
    [("image", "leave it out"), ("unknown option", "did you mean 'address'"), ("no object", "give a JSON object")],
)
def test_unusable_options_are_refused(case: str, words: str, ran: Facts) -> None:
    error, text, _ = ran["failures"][case]
    assert error == "ConfigError"
    assert words in text


# --- the names that we use, read in the source, so that a version that moves them is noticed without being run --------


class Source:
    """Definitions and imports of one module of the package."""

    def __init__(self, package: Path, module: str) -> None:
        self.tree = ast.parse(package.joinpath(*module.split(".")).with_suffix(".py").read_text())

    def arguments(self, *path: str) -> tuple[list[str], list[str]]:
        """Names of the positional and of the keyword-only arguments of a function or method."""
        function = self.find(*path)
        assert isinstance(function, ast.FunctionDef)
        given = function.args
        return [each.arg for each in given.args], [each.arg for each in given.kwonlyargs]

    def find(self, *path: str) -> ast.AST:
        node: ast.AST = self.tree
        for name in path:
            node = next(
                each for each in ast.iter_child_nodes(node)
                if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == name
            )  # fmt: skip
        return node

    def fields(self, name: str) -> set[str]:
        """What a class assigns in its body."""
        body = self.find(name)
        assert isinstance(body, ast.ClassDef)
        names = [each.target for each in body.body if isinstance(each, ast.AnnAssign)]
        names += [target for each in body.body if isinstance(each, ast.Assign) for target in each.targets]
        return {each.id for each in names if isinstance(each, ast.Name)}

    def imported(self) -> set[str]:
        return {alias.name for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.fixture(scope="module")
def loader(package: Path) -> Source:
    return Source(package, "sglang.srt.model_loader.loader")


def test_the_choice_of_a_loader_is_where_the_hook_is(package: Path, loader: Source) -> None:
    module, _, name = TARGET.rpartition(".")
    assert module == "sglang.srt.model_loader.loader"
    assert loader.arguments(name) == (["load_config", "model_config"], [])
    hooks = Source(package, "sglang.srt.plugins.hook_registry")
    assert hooks.arguments("HookRegistry", "register") == (["cls", "target", "hook", "hook_type"], ["source"])
    assert "AROUND" in hooks.fields("HookType")
    runner = Source(package, "sglang.srt.model_executor.model_runner_components.load_model_utils")
    assert name in runner.imported()
    plugins = (package / "sglang/srt/plugins/__init__.py").read_text()
    assert f'GENERAL_PLUGINS_GROUP = "{GROUP}"' in plugins
    assert "load_plugins()" in (package / "sglang/srt/managers/scheduler.py").read_text()


def test_the_default_loader_has_the_methods_that_ours_replaces_and_calls(loader: Source) -> None:
    kind = "DefaultModelLoader"
    assert loader.arguments(kind, "__init__") == (["self", "load_config"], [])
    assert loader.arguments(kind, "load_model") == (["self"], ["model_config", "device_config"])
    assert loader.arguments(kind, "_get_weights_iterator") == (
        ["self", "source"], ["resolved_source", "startup_prefetch_started", "startup_prefetch_active"]
    )  # fmt: skip
    assert loader.arguments(kind, "_prepare_weights")[0][1:] == [
        "model_name_or_path", "revision", "fall_back_to_pt", "allow_patterns_overrides"
    ]  # fmt: skip
    assert loader.arguments(kind, "_filter_mtp_weights")[0] == ["cls", "weights_iterator", "prefix", "draft_model_idx"]
    assert loader.fields(kind) >= {"counter_before_loading_weights"}
    assert {"maybe_add_mtp_safetensors", "SAFE_WEIGHTS_INDEX_NAME"} <= loader.imported()


def test_configs_have_the_fields_that_we_read(package: Path) -> None:
    configs = Source(package, "sglang.srt.configs.load_config")
    assert configs.fields("LoadConfig") >= {"load_format", "model_loader_extra_config", "draft_model_idx"}
    assert configs.fields("LoadFormat") >= {"AUTO", "SAFETENSORS", "PT", "MISTRAL"}
