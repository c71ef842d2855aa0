"""Bench of switching between models on one device. `python -m tests.bench.switching [--switches N] [--device NAME]`.

Twelve models, each of a trunk that three of them share and of weights of its own, behind a budget of a third of all;
which is next is Zipf's, by a seed. After each switch a tensor on the device, by chance, is compared by its digest; that
is not timed. Times are of this device, and say nothing of another: `cpu` copies from host memory to host memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

from tiermem.config import load_config
from tiermem.device import Switched, Switcher
from tiermem.embedded import EmbeddedPool
from tiermem.model import Model
from tiermem.units import format_bytes, format_seconds

MODELS, SIBLINGS, OWN, COMMON = 12, 3, 4, 2


def write_models(directory: Path, unit_bytes: int) -> list[Path]:
    """Checkpoints of twelve models; a tensor has 1 to 4 units, and a few bytes more."""
    paths = []
    for number in range(MODELS):
        tensors = {}
        for i in range(COMMON + OWN):
            random = np.random.default_rng([number // SIBLINGS if i < COMMON else number, i])
            nbytes = int(random.integers(unit_bytes, 4 * unit_bytes)) + i
            tensors[f"layers.0.{i}.weight"] = random.integers(0, 256, nbytes, np.uint8)
        paths.append(directory / f"m{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def digests_of(models: Iterable[Model]) -> dict[tuple[str, str], bytes]:
    """By name of model and of tensor, of the bytes in host memory."""
    return {(model.name, name): blake3(model.raw(name)).digest() for model in models for name in model}


def bytes_of(models: Iterable[Model]) -> int:
    """Of all tensors, equal ones once."""
    sizes = {digest: model.info(name).nbytes for model in models for name, digest in model.digests().items()}
    return sum(sizes.values())


def differs(switched: Switched, name: str, digests: dict[tuple[str, str], bytes]) -> bool:
    """Whether a tensor on the device has other bytes than the model."""
    return blake3(switched.tensors[name].cpu().numpy().data).digest() != digests[switched.name, name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--unit-kib", type=int, default=256, help="size of a small tensor")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory, EmbeddedPool(load_config()) as pool:
        models = [pool.open(path) for path in write_models(Path(directory), arguments.unit_kib << 10)]
        for model in models:
            model.wait()
        digests, budget = digests_of(models), bytes_of(models) // 3
        with Switcher(arguments.device, budget, staging_bytes=8 << 20, chunk_bytes=8 << 20) as switcher:
            for model in models:
                switcher.add(model.name, model)
            names = switcher.names
            spent_s, copied, shared, wrong = [], 0, 0, 0
            for choice in np.minimum(random.zipf(1.5, arguments.switches) - 1, MODELS - 1):
                switched = switcher.switch(names[choice], block=True)
                spent_s.append(switched.seconds)
                copied += switched.bytes_copied
                shared += switched.bytes_shared
                wrong += differs(switched, str(random.choice([*switched.tensors])), digests)
            switcher.residency.check()
            peak = switcher.residency.peak_bytes
        for model in models:
            model.close()
    print(
        f"{len(spent_s)} switches between {MODELS} models on {arguments.device}, {format_bytes(budget)} for "
        f"{format_bytes(3 * budget)}: {format_bytes(copied)} copied, {format_bytes(shared)} shared, "
        f"{format_bytes(peak)} at most, {wrong} tensors wrong"
    )
    median, longest = float(np.median(spent_s)), max(spent_s)
    print(f"a switch took {format_seconds(median)} in the median, {format_seconds(longest)} at most")
    return int(wrong > 0 or peak > budget)


if __name__ == "__main__":
    sys.exit(main())
