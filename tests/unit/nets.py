"""Nets: small torch modules, their checkpoints, and models of them in a pool of the test, for tests of devices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import ConfigMaker
from tests.unit.test_device_backend import SlowDevice
from tiermem.device import ALIGN
from tiermem.device.module import Attached
from tiermem.device.placed import DeviceModel
from tiermem.embedded import EmbeddedPool
from tiermem.model import Model

X = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)
"""An input of nets that are 16 wide."""


class Block(torch.nn.Module):
    """A residual layer of 4 tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Net(torch.nn.Module):
    """Blocks, a parameter and a buffer of its own, and a buffer that no checkpoint has."""

    def __init__(self, width: int = 16, blocks: int = 6) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(width) for _ in range(blocks)])
        self.gain = torch.nn.Parameter(torch.rand(width))
        self.register_buffer("bias", torch.rand(width))
        self.register_buffer("shift", torch.rand(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = x * self.gain + self.bias + self.shift
        return result


def seeded(seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def write_raw(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file of tensors of any dtype, given as (dtype, shape, bytes)."""
    header, start = dict[str, Any](), 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
        start += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, _, content in tensors.values()))


@contextmanager
def opened(config: ConfigMaker, path: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> Iterator[Model]:
    """The model of a file, which is written first where `tensors` are given, in a pool of this process."""
    if tensors is not None:
        save_file(dict(tensors), path)
    with EmbeddedPool(config()) as pool, pool.open(path) as model:
        yield model


class Computing(SlowDevice):
    """A slow device in whose compute stream `compute` reads tensors later, as kernels do."""

    def compute(self, *tensors: torch.Tensor) -> list[int]:
        """Have the bytes of tensors summed when it is their turn; the list has the sum then."""
        sums = list[int]()
        views = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
        self.module.compute.enqueue("compute", lambda: sums.append(sum(int(view.sum()) for view in views)))
        return sums


def rounded(*tensors: torch.Tensor) -> int:
    """Bytes that tensors take on a device."""
    return sum(-(-tensor.nbytes // ALIGN) * ALIGN for tensor in tensors)


BLOCK_BYTES = rounded(*Block(16).parameters())
LOOSE_BYTES = 2 * ALIGN


def blank(**sizes: int) -> Net:
    """A net without values, but for the buffer that no checkpoint has."""
    with torch.device("meta"):
        net = Net(**sizes).eval()
    net.shift = seeded(**sizes).shift
    return net


@contextmanager
def streamed(model: Model, net: torch.nn.Module, stages: int, **options: Any) -> Iterator[tuple[DeviceModel, Attached]]:
    """Within the bytes of so many blocks, beside what is in none."""
    with model.stream("cpu", LOOSE_BYTES + stages * BLOCK_BYTES, **options) as on, on.attach(net) as attached:
        yield on, attached


def away(net: torch.nn.Module) -> bool:
    """Whether no parameter is in place."""
    return all("not on cpu now" in repr(parameter) for parameter in net.parameters())


def held(on: DeviceModel) -> int:
    """Bytes on the device that are held."""
    return sum(replica.nbytes for replica in on.residency._replicas.values() if replica.holds)
