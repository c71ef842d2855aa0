"""onnxruntime over the pool: the same numbers as the stock runtime, and no private byte of a weight."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Checkpoint, until
from tests.engines.conftest import EngineDaemon
from tests.integration.child import Child
from tiermem.checkpoint import open_checkpoint
from tiermem.checkpoint.onnx_outline import outline_of
from tiermem.client import Client
from tiermem.errors import CheckpointChanged, CheckpointError, CheckpointNotFound, ModelNotFound, Refused
from tiermem.model import Model

onnxruntime = pytest.importorskip("onnxruntime", reason="make test-engines installs onnxruntime")

RUN = Path(__file__).parent / "ort_run.py"
START_S = 120
MIB = 1 << 20
NOT_REPACKED = "session.disable_prepacking=1"
TYPES = [
    "FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32", "UINT64",
    "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "UINT4", "INT4",
]  # fmt: skip


@pytest.fixture(scope="module", params=["inline", "external"])
def encoder(request: pytest.FixtureRequest, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM as an ONNX model of 90 MB."""
    from tests.engines import ort_minilm

    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    ort_minilm.write(minilm, path, external=request.param == "external")
    return path


@pytest.fixture
def client(daemon: EngineDaemon, monkeypatch: pytest.MonkeyPatch) -> Client:
    """This process's client of a daemon, which sessions of this process take by default."""
    from tiermem.client import shared_client

    monkeypatch.setenv("TIERMEM_ADDRESS", daemon.address)
    return shared_client(daemon.address)


def process(*arguments: object) -> Child:
    return Child([str(RUN), *map(str, arguments)])


def told(child: Child) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(child.line(START_S))
    return found


def result(*arguments: object) -> dict[str, Any]:
    with process(*arguments) as child:
        return told(child)


def write(path: Path, *weights: onnx.TensorProto, nodes: int = 0, **options: Any) -> Path:
    """A model whose outputs are its weights as floats, by the weights' names with `y.` before."""
    casts = [helper.make_node("Cast", [weight.name], [f"y.{weight.name}"], to=TensorProto.FLOAT) for weight in weights]
    casts += [helper.make_node("Identity", ["x"], [f"unused.{i}"]) for i in range(nodes)]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in casts]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(casts, "graph", [x], outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {"made": "by hand"})
    onnx.save(model, path, **options)
    return path


def weight(name: str, kind: str = "FLOAT", shape: tuple[int, ...] = (61, 63)) -> onnx.TensorProto:
    """A tensor of zeros and ones of any type, as raw bytes."""
    values = np.random.default_rng(len(name)).integers(0, 2, shape)
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    made = numpy_helper.from_array(values.astype(np.float32).astype(dtype), name)
    assert made.data_type == getattr(TensorProto, kind)
    return made


def wipe(model: Model) -> None:
    """Overwrite the weights in the model's files with zeros; the files look as they did."""
    for tensor in model.manifest.tensors:
        path = model.manifest.files[tensor.file].path
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(tensor.file_offset)
            file.write(bytes(tensor.nbytes))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def unoptimised() -> Any:
    options = onnxruntime.SessionOptions()
    # Otherwise a cast of a weight is computed once and for all, out of the files.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def outputs(session: Any) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": np.zeros(1, np.float32)}), strict=True))


def test_numbers_are_the_stock_runtimes_and_no_weight_is_private(encoder: Path, daemon: EngineDaemon) -> None:
    stock, same_kernels = result(encoder, "stock"), result(encoder, "stock", NOT_REPACKED)
    pooled = result(encoder, daemon.address)
    assert pooled["output"] == same_kernels["output"]
    assert np.allclose(pooled["output"], stock["output"], rtol=1e-4)
    # 90 MB of weights; 42 MB of them are matrices, which the stock runtime repacks even from files that it maps.
    assert stock["private"] > 40 * MIB
    # The session's own arenas, which the stock session has too.
    assert pooled["private"] < 8 * MIB


def test_with_prepacking_the_runtime_repacks_as_ever(encoder: Path, daemon: EngineDaemon) -> None:
    stock, pooled = result(encoder, "stock"), result(encoder, daemon.address, "session.disable_prepacking=0")
    assert pooled["output"] == stock["output"]
    assert 40 * MIB < pooled["private"] < 60 * MIB


def test_processes_share_one_copy(
    encoder: Path, daemon: EngineDaemon, memory_of: Callable[..., dict[str, int]]
) -> None:
    with process(encoder, daemon.address) as one, process(encoder, daemon.address) as two:
        assert told(one)["output"] == told(two)["output"]

        def is_one_copy() -> bool:
            # Both read all again, because sampling may just have unmapped some of it from one of them.
            for child in (one, two):
                child.say()
            assert told(one) == told(two)
            found = [memory_of(child.pid) for child in (one, two)]
            return all(
                42 * MIB < memory["shmem"] < memory["rss"] - memory["private"]
                and memory["pss"] - memory["private"] < (memory["rss"] - memory["private"]) / 1.9
                for memory in found
            )

        until(is_one_copy)


def test_sessions_go_on_when_the_daemon_dies(encoder: Path, daemon: EngineDaemon) -> None:
    with process(encoder, daemon.address) as child:
        before = told(child)["output"]
        daemon.kill()
        child.say()
        assert told(child)["output"] == before
        daemon.start()
        until(lambda: daemon.leases() == 1)
        assert result(encoder, daemon.address)["output"] == before
        child.say()
        assert told(child)["output"] == before


@pytest.mark.parametrize("external", [False, True])
def test_weights_of_every_type_are_the_pools(external: bool, client: Client, tmp_path: Path) -> None:
    from tiermem.onnxruntime import session

    weights = [weight(kind, kind) for kind in TYPES]
    options = {"save_as_external_data": True, "location": "data", "size_threshold": 0} if external else {}
    path = write(tmp_path / "m.onnx", *weights, **options)
    expected = outputs(onnxruntime.InferenceSession(path, unoptimised()))
    assert len(expected) == len(TYPES)
    with client.open(path) as model:
        model.wait()
        wipe(model)
        found = outputs(session(path, unoptimised()))
    assert not any(values.any() for values in outputs(onnxruntime.InferenceSession(path, unoptimised())).values())
    for name, values in expected.items():
        assert values.any()
        assert np.array_equal(found[name], values), name


def test_a_model_is_known_by_its_name(client: Client, tmp_path: Path) -> None:
    from tiermem.onnxruntime import session

    path = write(tmp_path / "known.onnx", weight("w"))
    client.load(path)
    assert outputs(session("known"))["y.w"].shape == (61, 63)


def test_the_outline_is_the_model(tmp_path: Path) -> None:
    tensors = [weight("big"), weight("INT4", "INT4"), weight("small", shape=(3,)), weight("shape", "INT64", (2,))]
    path = write(tmp_path / "m.onnx", *tensors, nodes=300)
    write(tmp_path / "e.onnx", *tensors, nodes=300, save_as_external_data=True, location="data", size_threshold=0)
    original = onnx.load(path)
    for name in ("m.onnx", "e.onnx"):
        outline = outline_of(open_checkpoint(tmp_path / name))
        assert len(outline.proto) < 16_000 < path.stat().st_size
        read = onnx.load_from_string(outline.proto)
        onnx.external_data_helper.load_external_data_for_model(read, outline.directory)
        for tensor in read.graph.initializer:
            tensor.ClearField("data_location")
        assert read == original
    assert set(outline_of(open_checkpoint(path)).weights) == {"big", "INT4"}


def test_links_of_a_hub_cache(client: Client, tmp_path: Path) -> None:
    from tiermem.onnxruntime import session

    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = write(tmp_path / "model.onnx", weight("w"), save_as_external_data=True, location="model.data")
    expected = outputs(onnxruntime.InferenceSession(path))
    for name, blob in (("model.onnx", "1f"), ("model.data", "2e")):
        (tmp_path / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    found = outputs(session(tmp_path / "snapshot"))
    assert np.array_equal(found["y.w"], expected["y.w"])


def test_the_lease_lasts_as_long_as_session_or_options(client: Client, tmp_path: Path) -> None:
    from tiermem.onnxruntime import session

    path = write(tmp_path / "leased.onnx", weight("w"))
    options = unoptimised()
    first = session(path, options)
    del options
    gc.collect()
    with pytest.raises(Refused):
        client.remove("leased")
    expected = outputs(first)["y.w"]
    options = unoptimised()
    second = session(path, options)
    del first, second
    gc.collect()
    with pytest.raises(Refused):
        client.remove("leased")
    with pytest.raises(Refused, match=r"carry the weights of leased already"):
        session(path, options)
    del options
    gc.collect()
    assert client.remove("leased") > 0
    assert np.array_equal(outputs(session(path))["y.w"], expected)


def test_options_are_not_spent_by_a_refusal(client: Client, tmp_path: Path, checkpoint: Callable[..., Any]) -> None:
    from tiermem.onnxruntime import session

    options = unoptimised()
    made: Checkpoint = checkpoint("other")
    with pytest.raises(Refused, match=r"no ONNX model") as kept:
        session(made.path, options)
    assert client.remove("other") > 0, f"{kept.value} keeps the model"
    assert outputs(session(write(tmp_path / "m.onnx", weight("w")), options))["y.w"].shape == (61, 63)


def test_what_the_pool_lacks_is_said(client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tiermem.onnxruntime import session

    numbers = helper.make_tensor("numbers", TensorProto.INT64, [300], list(range(300)))
    path = write(tmp_path / "m.onnx", weight("w"), numbers)
    with caplog.at_level(logging.INFO, "tiermem.onnxruntime"):
        made = session(path)
    assert "own copy of what the pool does not hold: numbers;" in caplog.text
    assert outputs(made)["y.numbers"].tolist() == list(range(300))


def test_what_is_missing_or_changed_is_refused(client: Client, tmp_path: Path) -> None:
    from tiermem.onnxruntime import session

    with pytest.raises(ModelNotFound, match=r"nobody"):
        session("nobody")
    with pytest.raises(CheckpointNotFound):
        session(tmp_path / "absent.onnx")
    path = write(tmp_path / "m.onnx", weight("w"), save_as_external_data=True, location="data")
    client.load(path)
    shutil.copy(tmp_path / "data", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "data")
    with pytest.raises(CheckpointChanged, match=r"data: changed"):
        session("m")
    (tmp_path / "data").unlink()
    with pytest.raises(CheckpointError, match=r"missing"):
        session(path)


def test_an_unusable_runtime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiermem.onnxruntime import session

    with monkeypatch.context() as patch:
        patch.delattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type")
        with pytest.raises(Refused, match=r"onnxruntime \d.* cannot take .* --upgrade onnxruntime"):
            session(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Refused, match=r"pip install onnxruntime"):
        session(tmp_path / "m.onnx")
