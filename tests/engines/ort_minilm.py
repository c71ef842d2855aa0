"""all-MiniLM-L6-v2 as an ONNX graph, written out of its safetensors file: token ids -> hidden states.

The graph that an exporter would write: matrices transposed as MatMul wants them, LayerNormalization, Gelu by Erf.
Sentences are taken as unpadded.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

LAYERS, HEADS, HIDDEN = 6, 12, 384
EPSILON = 1e-12

Array = npt.NDArray[np.generic]


class Graph:
    """Nodes and initializers as they are added; each method returns the name of what it computes."""

    def __init__(self, weights: dict[str, npt.NDArray[np.float32]]) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        output = f"{op.lower()}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, array: Array, name: str | None = None) -> str:
        name = name or f"constant.{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, name: str) -> str:
        return self.constant(self.weights[name], name)

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def linear(self, x: str, name: str) -> str:
        product = self.add("MatMul", x, self.constant(self.weights[f"{name}.weight"].T, f"{name}.weight"))
        return self.add("Add", product, self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)

    def heads(self, x: str, name: str) -> str:
        """(batch, tokens, hidden) -> (batch, heads, tokens, hidden / heads)"""
        shape = self.constant(np.array([0, 0, HEADS, HIDDEN // HEADS]))
        return self.add("Transpose", self.add("Reshape", self.linear(x, name), shape), perm=[0, 2, 1, 3])

    def attention(self, x: str, name: str) -> str:
        query, key, value = (self.heads(x, f"{name}.self.{part}") for part in ("query", "key", "value"))
        scores = self.add("MatMul", query, self.add("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self.add("Softmax", self.add("Mul", scores, self.number(1 / math.sqrt(HIDDEN // HEADS))), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", scores, value), perm=[0, 2, 1, 3])
        return self.add("Reshape", mixed, self.constant(np.array([0, 0, HIDDEN])))

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", self.add("Div", x, self.number(math.sqrt(2))))
        return self.add("Mul", self.add("Mul", x, self.add("Add", erf, self.number(1))), self.number(0.5))

    def layer(self, x: str, name: str) -> str:
        out = self.linear(self.attention(x, f"{name}.attention"), f"{name}.attention.output.dense")
        x = self.norm(self.add("Add", x, out), f"{name}.attention.output.LayerNorm")
        inner = self.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(self.add("Add", x, self.linear(inner, f"{name}.output.dense")), f"{name}.output.LayerNorm")


def write(source: Path, path: Path, *, external: bool) -> None:
    """Write the model at `path`, its weights inline or in one file of external data beside it."""
    graph = Graph(load_file(source / "model.safetensors"))
    words = graph.add("Gather", graph.weight("embeddings.word_embeddings.weight"), "ids")
    length = graph.add("Shape", "ids", start=1, end=2)
    positions = graph.add(
        "Slice", graph.weight("embeddings.position_embeddings.weight"), graph.constant(np.array([0])), length
    )
    kind = graph.constant(graph.weights["embeddings.token_type_embeddings.weight"][0], "token_type")
    x = graph.norm(graph.add("Add", graph.add("Add", words, positions), kind), "embeddings.LayerNorm")
    for i in range(LAYERS):
        x = graph.layer(x, f"encoder.layer.{i}")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    hidden = helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", "tokens", HIDDEN])
    made = helper.make_graph(graph.nodes, "minilm", [ids], [hidden], graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)
