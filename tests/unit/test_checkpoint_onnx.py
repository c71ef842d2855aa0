"""ONNX models that its own library wrote: what that reads, the pool serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiermem.numpy
from tiermem.checkpoint import open_checkpoint
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CheckpointError

RAW = [
    "FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32", "UINT64",
    "COMPLEX64", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0",
]  # fmt: skip
SMALL = ["UINT4", "INT4", "FLOAT4E2M1", "UINT2", "INT2"]


def model(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    # More than a window's worth of a graph, so that initializers are not where the file begins.
    nodes = [helper.make_node("Identity", ["x" * 50], [f"{i}" * 50]) for i in range(100)]
    return helper.make_model(helper.make_graph(nodes, "graph", [], [], list(tensors)))


def raw(name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def typed(kind: str, name: str | None = None) -> onnx.TensorProto:
    """A tensor of 3 x 5 of any type, as raw bytes."""
    values = numpy_helper.from_array(np.arange(15, dtype=np.float32).reshape(3, 5) % 2, "x")
    number = getattr(TensorProto, kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    made = numpy_helper.from_array(numpy_helper.to_array(values).astype(dtype), name or kind)
    assert made.data_type == number
    return made


def test_every_type_is_served(tmp_path: Path, pool: EmbeddedPool) -> None:
    tensors = [typed(kind) for kind in RAW]
    onnx.save(model(*tensors), tmp_path / "m.onnx")
    served = tiermem.numpy.load_model(tmp_path)
    assert list(served) == RAW
    for tensor in tensors:
        expected = numpy_helper.to_array(tensor)
        assert served[tensor.name].dtype == expected.dtype
        assert served[tensor.name].shape == (3, 5)
        assert served[tensor.name].tobytes() == expected.tobytes()


def test_types_of_less_than_a_byte_are_bytes(tmp_path: Path, pool: EmbeddedPool) -> None:
    tensors = [typed(kind) for kind in SMALL]
    onnx.save(model(*tensors), tmp_path / "m.onnx")
    served = tiermem.numpy.load_model(tmp_path)
    metadata = open_checkpoint(tmp_path).files[0].metadata
    assert metadata == {f"tiermem.onnx.{kind}": f"{kind} [3, 5]" for kind in SMALL}
    assert all(served[tensor.name].tobytes() == tensor.raw_data for tensor in tensors)


@pytest.mark.parametrize("together", [True, False])
def test_external_data(together: bool, tmp_path: Path, pool: EmbeddedPool) -> None:
    arrays = {f"model.layers.{i}.w": np.random.default_rng(i).random((50, 40 + i)) for i in range(4)}
    arrays["embed"] = np.arange(12, dtype=np.int64).reshape(3, 4)
    made = model(*[raw(name, array) for name, array in arrays.items()])
    onnx.save(
        made, tmp_path / "model.onnx", save_as_external_data=True, all_tensors_to_one_file=together,
        location="weights.bin" if together else None, size_threshold=1000,
    )  # fmt: skip
    served = tiermem.numpy.load_model(tmp_path)
    assert served.keys() == arrays.keys()
    assert all(np.array_equal(served[name], array) for name, array in arrays.items())
    manifest = open_checkpoint(tmp_path)
    assert len(manifest.files) == (2 if together else 5)
    assert manifest.tensors[0].name == "embed"
    layers = {segment.layer for segment in manifest.segments}
    assert layers == {"embeddings", *(f"model.layers.{i}" for i in range(4))}


def test_initializers_may_share_external_data(tmp_path: Path, pool: EmbeddedPool) -> None:
    made = model(raw("a", np.arange(100.0)), raw("b", np.zeros(100)))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    made = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    del made.graph.initializer[1].external_data[:]
    made.graph.initializer[1].external_data.extend(made.graph.initializer[0].external_data)
    onnx.save(made, tmp_path / "m.onnx")
    served = tiermem.numpy.load_model(tmp_path)
    assert np.array_equal(served["a"], np.arange(100.0))
    assert np.array_equal(served["b"], served["a"])


def test_a_hub_cache_keeps_model_and_data_side_by_side(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    onnx.save(model(raw("a", np.arange(100.0))), blobs / "m.onnx", save_as_external_data=True, location="m.data",
              size_threshold=0)  # fmt: skip
    for name in ("m.onnx", "m.data"):
        (blobs / name).rename(blobs / f"blob-{name}")
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    assert len(open_checkpoint(snapshot).tensors) == 1
    (tmp_path / "elsewhere").write_bytes(bytes(800))
    (snapshot / "m.data").unlink()
    (snapshot / "m.data").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"tensor 'a' should be in 'm.data', which is outside the model"):
        open_checkpoint(snapshot)


def test_numbers_in_typed_fields(tmp_path: Path, pool: EmbeddedPool) -> None:
    """Packed floats are bytes like any; what is packed as varints has no bytes, and is named."""
    made = model(
        helper.make_tensor("floats", TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]),
        helper.make_tensor("doubles", TensorProto.DOUBLE, [2], [0.5, 0.25]),
        helper.make_tensor("shape", TensorProto.INT64, [2], [7, -1]),
        helper.make_tensor("half", TensorProto.FLOAT16, [2], [1, 2]),
        helper.make_tensor("text", TensorProto.STRING, [1], [b"a"]),
        helper.make_tensor("none", TensorProto.FLOAT, [0, 3], []),
        helper.make_tensor("scalar", TensorProto.FLOAT, [], [5]),
    )
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("values", TensorProto.FLOAT, [1], [1]),
        helper.make_tensor("at", TensorProto.INT64, [1], [1]),
        [3],
    )
    made.graph.sparse_initializer.append(sparse)
    onnx.save(made, tmp_path / "m.onnx")
    served = tiermem.numpy.load_model(tmp_path)
    assert {name: array.tolist() for name, array in served.items()} == {
        "floats": [[1, 2], [3, 4]], "doubles": [0.5, 0.25], "none": [], "scalar": 5,
    }  # fmt: skip
    assert open_checkpoint(tmp_path).files[0].metadata == {
        "tiermem.skipped.shape": "int64_data", "tiermem.skipped.half": "int32_data",
        "tiermem.skipped.text": "string_data", "tiermem.skipped": "1 sparse initializers",
    }  # fmt: skip


def test_a_change_of_the_external_file_is_a_change_of_the_model(tmp_path: Path) -> None:
    onnx.save(model(raw("a", np.arange(100.0))), tmp_path / "m.onnx", save_as_external_data=True, location="w",
              size_threshold=0)  # fmt: skip
    before = open_checkpoint(tmp_path).identity
    (tmp_path / "w").write_bytes(bytes(800))
    assert open_checkpoint(tmp_path).identity != before
