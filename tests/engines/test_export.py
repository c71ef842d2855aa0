"""`tiermem export`: what stock readers get from an exported directory, and what stays of the pool and of the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from gguf import GGUFReader, GGUFWriter
from safetensors.numpy import load_file, save_file

from tests.conftest import CheckpointWriter
from tests.engines.conftest import EngineDaemon
from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tiermem.client import Client
from tiermem.errors import CapacityError, CheckpointChanged, CheckpointNotFound, ModelNotFound, Refused
from tiermem.export import export, undo
from tiermem.export.layout import INDEX_NAME
from tiermem.types import PAGE_BYTES

LOAD_S = 120
"""A child imports torch and reads a model."""


@pytest.fixture
def client(daemon: EngineDaemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


def run(daemon: Daemon, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`tiermem ...` with the daemon's address in the environment."""
    environment = os.environ | {"TIERMEM_ADDRESS": daemon.address}
    command = [sys.executable, "-m", "tiermem", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LOAD_S)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name != ".tiermem-export.json")


def models(client: Client) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in client.status()["models"]}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_makes_and_undoes_a_directory(
    daemon: EngineDaemon, client: Client, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    made = checkpoint(layers=3, files=2)
    for name in ("config.json", "tokenizer.model", "other.gguf", "stale.index.json", ".git"):
        (made.path / name).write_text(name)
    (made.path / "1_Pooling").mkdir()
    out = tmp_path / "out"
    done = run(daemon, "export", made.path, out, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == "tiermem.export/1"
    assert told["results"]["weights"] == [path.name for path in made.files]
    assert told["results"]["bytes"] == made.nbytes
    assert told["results"]["linked"] == 3
    assert names(out) == sorted(
        ["1_Pooling", "config.json", "tokenizer.model", INDEX_NAME, *(path.name for path in made.files)]
    )
    assert (out / "config.json").read_text() == "config.json"
    read = {}
    for path in made.files:
        exported = out / path.name
        assert exported.is_symlink()
        assert exported.stat().st_size % PAGE_BYTES == 0
        read |= load_file(exported)
    assert same(read, made.tensors)
    # One copy stays: the image. The model was loaded for it alone.
    found = models(client)
    assert found["model.export"]["pins"] == 1
    assert found["model"]["resident_bytes"] == 0
    with pytest.raises(Refused, match="pinned"):
        client.evict("model.export")

    undone = run(daemon, "export", "--undo", out)
    assert undone.returncode == 0, undone.stderr
    assert not out.exists()
    assert list(models(client)) == ["model"]
    assert [path.exists() for path in made.files] == [True, True]


def test_metadata_and_mixed_dtypes_are_kept(client: Client, tmp_path: Path) -> None:
    directory = tmp_path / "mixed"
    directory.mkdir()
    tensors = {
        "a.odd": np.arange(3, dtype=np.uint8), "b.f32": np.arange(5, dtype=np.float32), "c.none": np.empty((0, 4)),
        "d.f16": np.arange(7, dtype=np.float16), "e.i64": np.arange(3), "f.scalar": np.array(7, np.float32),
    }  # fmt: skip
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "note": "ä"})
    export(client, directory, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}
    assert same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_a_resident_model_stays_and_its_name_will_do(
    client: Client, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    made = checkpoint()
    client.load(made.path)
    for _ in range(2):
        exported = export(client, "model", tmp_path / "out")
    assert exported.created is False
    assert models(client)["model"]["state"] == "resident"
    assert models(client)["model.export"]["pins"] == 1, "exporting again pins no second time"


def test_two_exports_share_an_image_until_the_last_is_undone(
    client: Client, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    made = checkpoint()
    first, second = tmp_path / "first", tmp_path / "second"
    assert export(client, made.path, first).created is True
    assert export(client, made.path, second).created is False
    assert os.readlink(first / "model.safetensors") == os.readlink(second / "model.safetensors")
    assert undo(client, first) is True
    assert same(load_file(second / "model.safetensors"), made.tensors)
    assert undo(client, second) is True
    assert "model.export" not in models(client)


def test_links_outlive_the_daemon_and_its_death(
    daemon: EngineDaemon, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    made = checkpoint()
    with daemon.client() as client:
        export(client, made.path, tmp_path / "out")
    daemon.kill()
    assert same(load_file(tmp_path / "out" / "model.safetensors"), made.tensors)
    daemon.start()
    daemon.settle()
    assert same(load_file(tmp_path / "out" / "model.safetensors"), made.tensors)
    with daemon.client() as client:
        assert models(client)["model.export"]["pins"] == 1
        assert export(client, made.path, tmp_path / "out").created is False
        assert models(client)["model.export"]["pins"] == 1
        assert undo(client, tmp_path / "out") is True


def test_anonymous_memory_is_exported_anew_after_its_daemon(checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    made, out, other = checkpoint(), tmp_path / "out", tmp_path / "other"
    with Daemon(backing="memfd") as daemon:
        with daemon.client() as client:
            export(client, made.path, out)
            export(client, made.path, other)
        assert same(load_file(out / "model.safetensors"), made.tensors)
        daemon.restart()
        assert not (out / "model.safetensors").exists()
        with daemon.client() as client:
            assert export(client, made.path, out).created is True
            assert models(client)["model.export"]["pins"] == 1
            assert undo(client, other) is True
            assert models(client)["model.export"]["pins"] == 1, "its pin went with the daemon that it was in"
            assert same(load_file(out / "model.safetensors"), made.tensors)
            assert undo(client, out) is True
            assert "model.export" not in models(client)


def test_an_image_that_was_removed_by_hand_is_no_obstacle(
    client: Client, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    export(client, checkpoint().path, tmp_path / "out")
    client.unpin("model.export")
    client.remove("model.export")
    assert undo(client, tmp_path / "out") is True
    assert not (tmp_path / "out").exists()


def test_gguf_is_exported_as_it_is(client: Client, smollm2_gguf: Path, tmp_path: Path) -> None:
    exported = export(client, smollm2_gguf, tmp_path / "out")
    assert exported.form == "verbatim"
    assert names(tmp_path / "out") == [smollm2_gguf.name]
    original, copy = smollm2_gguf.read_bytes(), (tmp_path / "out" / smollm2_gguf.name).read_bytes()
    assert copy[: len(original)] == original
    assert not any(copy[len(original) :])
    theirs, ours = (GGUFReader(path) for path in (smollm2_gguf, tmp_path / "out" / smollm2_gguf.name))
    assert [(tensor.name, tensor.data_offset) for tensor in ours.tensors] == [
        (tensor.name, tensor.data_offset) for tensor in theirs.tensors
    ]


def test_what_lies_between_the_tensors_of_gguf_is_kept(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "llama")
    for i in range(3):
        writer.add_tensor(f"blk.{i}.weight", np.full(5, i + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(path.read_bytes())
    first = GGUFReader(path).tensors[0].data_offset
    content[first + 20 : first + 32] = b"between them"
    path.write_bytes(content)
    export(client, path, tmp_path / "out")
    assert (tmp_path / "out" / "odd.gguf").read_bytes().rstrip(b"\0") == bytes(content).rstrip(b"\0")


SAVE_BIN = """
import torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
say('saved')
"""


def test_a_pytorch_file_is_exported_as_safetensors(client: Client, minilm: Path, tmp_path: Path) -> None:
    directory = tmp_path / "bin"
    shutil.copytree(minilm, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    with Child.script(SAVE_BIN, minilm / "model.safetensors", directory / "pytorch_model.bin") as child:
        assert child.line(LOAD_S) == "saved"
    assert export(client, directory, tmp_path / "out").weights == ("model.safetensors",)
    assert "pytorch_model.bin" not in names(tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(minilm / "model.safetensors"))


EMBED = """
import torch
from transformers import AutoModel, AutoTokenizer
tokens = AutoTokenizer.from_pretrained(sys.argv[1])(["the sun", "a star", "one bank"], return_tensors="pt")
model = AutoModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    say(model(**tokens).last_hidden_state.double().sum((0, 1))[:8].tolist())
"""


def test_a_stock_engine_computes_the_same(client: Client, minilm: Path, tmp_path: Path) -> None:
    export(client, minilm, tmp_path / "out")
    said = []
    for directory in (minilm, tmp_path / "out"):
        with Child.script(EMBED, directory) as child:
            said.append(child.line(LOAD_S))
    assert said[0] == said[1]


# --- what bad input gets -------------------------------------------------------------------------------------------


def test_a_full_pool_leaves_nothing(checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    made = checkpoint(kib=3072)
    with Daemon(tier="dram=12MiB") as daemon, daemon.client() as client:
        with pytest.raises(CapacityError):
            export(client, made.path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        eventually(lambda: client.status()["tiers"][0]["used_bytes"] == 0, "draft and load were given up", 20)


def test_what_is_not_there_is_said(daemon: EngineDaemon, client: Client, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        export(client, "nobody", tmp_path / "out")
    with pytest.raises(CheckpointNotFound):
        export(client, tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = run(daemon, "export", "nobody", tmp_path / "out")
    assert (done.returncode, done.stdout) == (4, "")
    done = run(daemon, "export", "nobody")
    assert (done.returncode, "Missing argument 'DIR'" in done.stderr) == (2, True)
    done = run(daemon, "export", "one", "two", "--undo", "three")
    assert done.returncode == 2


def test_directories_of_others_are_left_alone(client: Client, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    made, other = checkpoint(), checkpoint("other", seed=1)
    before = sorted(os.listdir(made.path))
    with pytest.raises(Refused, match="no export made"):
        export(client, made.path, made.path)
    with pytest.raises(Refused, match="was not made by an export"):
        undo(client, made.path)
    assert sorted(os.listdir(made.path)) == before
    assert models(client) == {}, "refused before anything was loaded"
    export(client, made.path, tmp_path / "out")
    with pytest.raises(Refused, match="undo it first"):
        export(client, other.path, tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), made.tensors)


def test_a_directory_inside_the_checkpoints_does_not_link_itself(client: Client, checkpoint: CheckpointWriter) -> None:
    made = checkpoint()
    for _ in range(2):
        export(client, made.path, made.path / "pooled")
    assert names(made.path / "pooled") == ["model.safetensors"]


def test_images_are_not_exported(client: Client, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    export(client, checkpoint().path, tmp_path / "out")
    with pytest.raises(Refused, match="is an image"):
        export(client, "model.export", tmp_path / "more")


def test_a_name_whose_files_changed_is_refused(client: Client, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    made = checkpoint()
    client.load(made.path)
    checkpoint(seed=1)
    with pytest.raises(CheckpointChanged, match="export the path"):
        export(client, "model", tmp_path / "out")


def test_onnx_is_refused_with_the_way_that_works(client: Client, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    onnx.save_model(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"tiermem\.onnxruntime\.session"):
        export(client, tmp_path / "model.onnx", tmp_path / "out")


@pytest.mark.root
def test_reserved_pages_are_refused(reserved: int, checkpoint: CheckpointWriter, tmp_path: Path) -> None:
    tier = f"dram={8 * PAGE_BYTES}B"
    with (
        Daemon(backing="hugetlb", tier=tier) as daemon,
        daemon.client() as client,
        pytest.raises(Refused, match="--backing tmpfs"),
    ):
        export(client, checkpoint().path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WRITER = """
import torch
from safetensors.torch import load_file
weights = load_file(sys.argv[1])
for tensor in weights.values():
    tensor.zero_()
say(sum(int(tensor.view(torch.uint8).count_nonzero()) for tensor in weights.values()))
pause()
"""


def test_what_an_engine_writes_stays_its_own(
    client: Client, checkpoint: CheckpointWriter, tmp_path: Path, memory_of: Callable[..., dict[str, int]]
) -> None:
    made = checkpoint(kib=8192)
    export(client, made.path, tmp_path / "out")
    with Child.script(WRITER, tmp_path / "out" / "model.safetensors") as child:
        assert child.line(LOAD_S) == "0"
        assert memory_of(child.pid)["anon"] > made.nbytes, "it has a copy of its own by now"
        assert same(load_file(tmp_path / "out" / "model.safetensors"), made.tensors)
