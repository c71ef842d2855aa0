"""Stack: a random model of equal layers, as a checkpoint and as a torch module, for what is timed on a device.

Owns its shapes and values. Equal seeds are equal layers, so that checkpoints have weights in common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

LAYERS = 24
_RATIO = 4
"""Of the inner width of a layer to the outer one, as in transformers."""
_WIDTH_STEP = 32
_ITEM_BYTES = 2
TENSORS = ("up.weight", "down.weight")


def width_for(nbytes: int) -> int:
    """The width of a stack of about so many bytes, and never more than that but for the smallest."""
    width = math.isqrt(nbytes // (LAYERS * len(TENSORS) * _RATIO * _ITEM_BYTES))
    return max(_WIDTH_STEP, width // _WIDTH_STEP * _WIDTH_STEP)


def write_stack(path: Path, width: int, seeds: Sequence[int]) -> None:
    """A safetensors file with a layer of bf16 for each seed; all values lie between 1/128 and 1/64, of either sign."""
    nbytes = _RATIO * width * width * _ITEM_BYTES
    shapes = {"up.weight": (_RATIO * width, width), "down.weight": (width, _RATIO * width)}
    header, start = {}, 0
    for layer in range(len(seeds)):
        for name in TENSORS:
            header[f"layers.{layer}.{name}"] = {
                "dtype": "BF16", "shape": shapes[name], "data_offsets": [start, start + nbytes]
            }  # fmt: skip
            start += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for seed in seeds:
            random = np.random.default_rng(seed)
            for _ in TENSORS:
                bits = np.frombuffer(random.bytes(nbytes), np.uint16)
                file.write((bits & 0x807F | 0x3C00).tobytes())


def stack_module(width: int) -> torch.nn.Module:
    """The module that computes with such a checkpoint, on `meta`: tokens [n, width] of bf16 go through LAYERS residual
    layers."""
    import torch

    linear = partial(torch.nn.Linear, bias=False, dtype=torch.bfloat16, device="meta")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = linear(width, _RATIO * width)
            self.down = linear(_RATIO * width, width)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            grown: torch.Tensor = self.down(torch.nn.functional.silu(self.up(tokens)))
            return tokens + grown

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                tokens = layer(tokens)
            return tokens

    return Stack()


def plain_module(width: int, device: str, raw: Callable[[str], memoryview]) -> torch.nn.Module:
    """The same on a device, with a checkpoint's values, which torch alone has copied."""
    import torch

    module = stack_module(width).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.frombuffer(bytearray(raw(name)), dtype=torch.bfloat16)
            parameter.copy_(values.reshape(parameter.shape))
    return module
