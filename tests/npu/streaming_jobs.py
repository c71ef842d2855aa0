"""A module of twelve layers whose weights are streamed to a simulated device, and what comes of it where that fails: a
job for processes of their own. torch is imported inside functions, once the simulated ACL is loaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.npu.apart import Tell
from tests.npu.device_jobs import outcome, simulated
from tests.sim_acl.control import Fault
from tiermem.config import Config
from tiermem.device import backend
from tiermem.device.placed import DeviceModel
from tiermem.embedded import EmbeddedPool

LAYERS, WIDTH = 12, 512
LAYER_BYTES = WIDTH * WIDTH * 4
BUDGET_BYTES = LAYERS // 3 * LAYER_BYTES


def twelve_layers(reading: bool = True) -> Any:
    """A module. A layer is a matrix product, whose kernel computes nothing here, and with `reading` then a copy of the
    weight's bytes out of the device in the same stream: work of the device that reads them when it is its turn.
    `layer.seen` has one tensor a call."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            self.seen: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            if reading:
                self.seen.append(torch.empty(WIDTH, WIDTH, pin_memory=True))
                self.seen[-1].copy_(self.linear.weight, non_blocking=True)
            return x

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Net()


def weights() -> list[Any]:
    """Of each layer."""
    import torch

    random = torch.Generator().manual_seed(1)
    return [torch.rand(WIDTH, WIDTH, generator=random) for _ in range(LAYERS)]


@contextmanager
def streamed(config: Config, directory: Path) -> Iterator[DeviceModel]:
    """The weights, with room for a third of them on npu:0."""
    from safetensors.torch import save_file

    path = directory / "layers.safetensors"
    save_file({f"layers.{n}.linear.weight": weight for n, weight in enumerate(weights())}, path)
    with (
        EmbeddedPool(config) as pool,
        pool.open(path) as model,
        model.stream("npu:0", budget=BUDGET_BYTES) as on,
    ):
        yield on


def trouble(tell: Tell, config: Config, directory: Path, fault: str, phase: str) -> None:
    """What a fault before that phase comes to, how closing ends, and what is left on the device after it."""
    backend._STALL_S, backend._ANSWER_S = 0.2, 0.5
    acl = simulated()
    begin: dict[str, Callable[[], None]] = {
        "memory": lambda: acl.fail(Fault.MALLOC, count=1000),
        "copy": lambda: acl.fail(Fault.COPY, first=2),
        "refusal": lambda: acl.fail(Fault.COPY_ISSUE, first=2),
        "loss": acl.lose_device,
    }
    told = dict[str, Any]()
    with ExitStack() as stack:
        on = stack.enter_context(streamed(config, directory))
        told["raised"] = _outcome_of_phases(on, phase, begin[fault])
        told["closed"] = outcome(on.close)
    if os.environ["TASK_QUEUE_ENABLE"] == "0":  # else torch_npu may wait for ever for what its queue has dropped
        acl.heal()
        _forget()
    tell(told | {"left": acl.device_bytes()})


def _outcome_of_phases(on: DeviceModel, faulty: str, begin: Callable[[], None]) -> str:
    """What the first phase raises that does."""
    import torch

    net, x = twelve_layers(reading=False), torch.zeros(1, WIDTH).to("npu:0")

    def compute() -> None:
        with torch.no_grad():
            net(x)
        torch.npu.current_stream().synchronize()

    phases = {"attach": lambda: on.attach(net), "first": compute, "second": compute, "third": compute, "last": compute}
    for phase, action in phases.items():
        if phase == faulty:
            begin()
        if raised := outcome(action):
            return raised
    return ""


def _forget() -> None:
    """Have torch give back what nobody has any more."""
    import torch

    gc.collect()
    torch.npu.empty_cache()
