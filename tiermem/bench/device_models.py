"""Models on a device timed: switching between two of them, and a forward pass that streams what does not fit.

Owns what is inside the clock. After each switch every tensor is read back and compared with its checkpoint's file;
each pass must give what the same module gives with plain weights on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from tiermem.bench.device import explained, waited
from tiermem.bench.device_stack import LAYERS, plain_module, stack_module, width_for, write_stack
from tiermem.bench.timings import digests_of
from tiermem.config import load_config
from tiermem.device import Device
from tiermem.device.arena import whole
from tiermem.device.switcher import Switcher
from tiermem.embedded import EmbeddedPool
from tiermem.errors import DigestMismatch
from tiermem.model import Model
from tiermem.opening import open_model
from tiermem.types import PAGE_BYTES

if TYPE_CHECKING:
    import torch

STREAMED = 3
"""Times its budget is the model whose passes are streamed."""

_TOKENS = 256
_SEEDS = {
    "plain.safetensors": range(LAYERS),
    "other.safetensors": range(LAYERS, 2 * LAYERS),
    "half.safetensors": [layer + layer % 2 * LAYERS for layer in range(LAYERS)],
}
PLAIN, OTHER, HALF = _SEEDS
_SLACK_PAGES = LAYERS + 1
"""Of a stack in the pool, at the most: each layer takes whole pages."""


@dataclass(frozen=True, slots=True)
class SwitchTiming:
    """Switches to models of `model_bytes` at the most, within `budget_bytes`; bytes are of all `seconds` together."""

    case: str
    model_bytes: int
    budget_bytes: int
    bytes_copied: int
    bytes_shared: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PassTiming:
    """Forward passes: `ahead` layers copied ahead, None where all weights lay on the device. `copied_bytes` a pass."""

    ahead: int | None
    model_bytes: int
    budget_bytes: int
    peak_bytes: int
    copied_bytes: int
    seconds: tuple[float, ...]


class Stacks:
    """Random stacks in a pool of this process. OTHER has no layer in common with PLAIN, HALF every second one."""

    def __init__(self, room: Path, nbytes: int, names: Sequence[str]) -> None:
        self.width = width_for(nbytes)
        for name in names:
            write_stack(room / name, self.width, _SEEDS[name])
        pages = len(names) * ((room / names[0]).stat().st_size // PAGE_BYTES + _SLACK_PAGES)
        options = {"state": str(room / "state"), "digests": str(room / "digests")}
        self._pool = EmbeddedPool(load_config({"tier": f"dram={pages * PAGE_BYTES}", **options}))
        self.models = dict[str, Model]()
        try:
            for name in names:
                self.models[name] = self._pool.open(room / name)
                self.models[name].wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for model in self.models.values():
            model.close()
        self._pool.close()


@contextmanager
def random_stacks(nbytes: int, *names: str) -> Iterator[Stacks]:
    """Of about `nbytes` each. Raises CapacityError, and OSError where there is no room for their files."""
    with TemporaryDirectory(prefix="tiermem-bench-device-") as room, closing(Stacks(Path(room), nbytes, names)) as made:
        yield made


@contextmanager
def own_models(paths_or_names: Sequence[str]) -> Iterator[tuple[Model, Model]]:
    """Two models of the user's. Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError."""
    with open_model(paths_or_names[0]) as first, open_model(paths_or_names[1]) as second:
        first.wait()
        second.wait()
        yield first, second


def room_for(model: Model) -> int:
    """Bytes that its weights take on a device."""
    return sum(whole(tensor.nbytes) for tensor in model.manifest.tensors)


def time_switches(device: Device, case: str, models: tuple[Model, Model], budget_bytes: int, runs: int) -> SwitchTiming:
    """From each to the other and back, `runs` times, after one switch to each that is not counted.

    Raises DeviceFull, CopyFailed, DeviceLost, DigestMismatch.
    """
    digests = [digests_of(model.manifest) for model in models]
    copied = shared = 0
    seconds = []
    with closing(Switcher(device.name, budget_bytes, chunk_bytes=budget_bytes)) as switcher:
        for number, model in enumerate(models):
            switcher.add(str(number), model)
        for turn in range(2 * (runs + 1)):
            waited(device)
            begin = time.perf_counter()
            switched = switcher.switch(str(turn % 2))
            waited(device)
            elapsed = time.perf_counter() - begin
            _check(device, switched.tensors, digests[turn % 2], models[turn % 2].name)
            if turn >= 2:
                seconds.append(elapsed)
                copied, shared = copied + switched.bytes_copied, shared + switched.bytes_shared
    largest = max(model.manifest.nbytes for model in models)
    return SwitchTiming(case, largest, budget_bytes, copied, shared, tuple(seconds))


def _check(device: Device, tensors: Mapping[str, torch.Tensor], digests: Mapping[str, bytes], name: str) -> None:
    import torch

    for tensor, digest in digests.items():
        with explained(device, "reading back"):
            found = tensors[tensor].cpu().reshape(-1).view(torch.uint8)
        if blake3(found.numpy().data).digest() != digest:
            raise DigestMismatch(
                f"{tensor} of {name} on {device.name} differs from its file; these timings are void, and nothing on "
                "this device can be trusted"
            )


class PassBench:
    """Forward passes of a stack on a device: with all weights there, and streamed within a budget."""

    def __init__(self, device: Device, stacks: Stacks, runs: int) -> None:
        import torch

        self._device, self._model, self._width, self._runs = device, stacks.models[PLAIN], stacks.width, runs
        with explained(device, "making tokens"):
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randn(_TOKENS, self._width, generator=generator, dtype=torch.float32)
            self._tokens = tokens.to(torch.bfloat16).to(device.name)

    def passes(self, budget_bytes: int) -> Iterator[PassTiming]:
        """All in place, then streamed without copies ahead, then with one layer ahead.

        Raises DeviceFull, which names the least budget, CopyFailed, DeviceLost, DigestMismatch where results differ.
        """
        with _deterministic():
            expected, timing = self._plain()
            yield timing
            for ahead in (0, 1):
                yield self._streamed(budget_bytes, ahead, expected)

    def _plain(self) -> tuple[torch.Tensor, PassTiming]:
        nbytes = self._model.manifest.nbytes
        with explained(self._device, "a module with plain weights"):
            module = plain_module(self._width, self._device.name, self._model.raw)
        expected, _ = self._run(module, None, runs=1)
        _, seconds = self._run(module, expected.cpu())
        return expected.cpu(), PassTiming(None, nbytes, nbytes, nbytes, 0, tuple(seconds))

    def _streamed(self, budget_bytes: int, ahead: int, expected: torch.Tensor) -> PassTiming:
        module = stack_module(self._width)
        with self._model.stream(self._device.name, budget_bytes, ahead=ahead) as placed, placed.attach(module):
            self._run(module, expected, runs=1)  # learns the order of the layers
            before = placed.residency.copied_bytes
            _, seconds = self._run(module, expected)
            copied = (placed.residency.copied_bytes - before) // self._runs
            return PassTiming(
                ahead, self._model.manifest.nbytes, budget_bytes, placed.peak_bytes, copied, tuple(seconds)
            )

    def _run(
        self, module: torch.nn.Module, expected: torch.Tensor | None, runs: int | None = None
    ) -> tuple[torch.Tensor, list[float]]:
        """The last result, on the device, and seconds of each pass."""
        import torch

        seconds = []
        with torch.inference_mode():
            for _ in range(runs or self._runs):
                waited(self._device)
                begin = time.perf_counter()
                with explained(self._device, "a forward pass"):
                    result: torch.Tensor = module(self._tokens)
                waited(self._device)
                seconds.append(time.perf_counter() - begin)
                if expected is not None and not torch.equal(result.cpu(), expected):
                    raise DigestMismatch(
                        f"two passes with the same weights on {self._device.name} have different results; these "
                        "timings are void"
                    )
        return result, seconds


@contextmanager
def _deterministic() -> Iterator[None]:
    """Equal passes have equal results, as far as the device's kernels can."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
