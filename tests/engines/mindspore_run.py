"""What tests run in MindSpore's own interpreter: one task a process, its facts as a line of JSON on stdout.

    python mindspore_run.py TASK DIRECTORY [CHECKPOINT]

`DIRECTORY` is the test's; `CHECKPOINT` a path, or the name of a model in the pool at TIERMEM_ADDRESS.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore
import numpy as np
from mindspore.common import np_dtype
from mindspore.train import serialization

import tiermem
import tiermem.mindspore

TYPES = (
    "bool_", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "bfloat16", "float32",
    "float64",
)  # fmt: skip


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def pause() -> None:
    sys.stdin.readline()


def described(values: dict[str, Any]) -> dict[str, list[Any]]:
    """Name -> dtype, shape and digest of the bytes of a parameter; or a string itself."""
    return {
        name: [value] if isinstance(value, str)
        else [str(value.dtype), list(value.shape), hashlib.sha256(value.asnumpy().tobytes()).hexdigest()]
        for name, value in values.items()
    }  # fmt: skip


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two dicts of parameters, in their order too."""
    one, two = described(theirs), described(ours)
    assert all(isinstance(value, str | mindspore.Parameter) for value in ours.values())
    found = [f"{name}: {one.get(name)} {two.get(name)}" for name in one | two if one.get(name) != two.get(name)]
    return found if list(one) == list(two) else [*found, f"order {list(one)} {list(two)}"]


def shared(values: dict[str, Any]) -> bool:
    """Whether every parameter's bytes lie in a mapping of a file, as the pool's are, and not in this process's heap."""
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        low, high = (int(end, 16) for end in span.split("-"))
        if inode != "0":
            mapped.append((low, high))
    return all(any(low <= value.data_ptr() < high for low, high in mapped) for value in values.values())


def memory() -> dict[str, int]:
    """Bytes of this process: what it alone has written, the most that it had resident, and shared memory of that."""
    rollup = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, shm = (int(status[key].split()[0]) * 1024 for key in ("VmHWM", "RssShmem"))
    return {"private": rollup["Private_Dirty"], "peak": peak, "shm": shm}


def array(kind: str, shape: tuple[int, ...]) -> Any:
    numbers = np.arange(1, 1 + int(np.prod(shape))).reshape(shape)
    return mindspore.Tensor(numbers.astype(np.float32) if kind == "bfloat16" else numbers, getattr(mindspore, kind))


def types(directory: Path, _: str) -> None:
    """All that `save_checkpoint` takes, saved by MindSpore and read by it and from the pool."""
    saved = [
        {"name": f"{kind}.{len(shape)}", "data": array(kind, shape)}
        for kind in TYPES
        for shape in ((), (1,), (3, 5), (2, 1, 4))
    ]
    text = {"note": "weights \u00e9", "epoch": 7, "rate": 0.5, "done": True}
    mindspore.save_checkpoint(saved, str(directory / "a.ckpt"), append_dict=text)
    mindspore.save_checkpoint(saved, str(directory / "crc.ckpt"), crc_check=True)
    # As the asynchronous writer has it: slices by rows, and not by bytes.
    mindspore.save_checkpoint(saved, str(directory / "late.ckpt"), async_save=True)
    serialization._wait_async_thread_save_ckpt()
    nibbles = [{"name": "four", "data": mindspore.Tensor(np.arange(6, dtype=np.int8), mindspore.qint4x2)}]
    mindspore.save_checkpoint(nibbles, str(directory / "four.safetensors"), format="safetensors")
    mindspore.save_checkpoint(saved, str(directory / "b.safetensors"), format="safetensors")
    found = {}
    for name in ("a.ckpt", "crc.ckpt", "late.ckpt", "four.safetensors", "b.safetensors"):
        path, kind = str(directory / name), name.rpartition(".")[2]
        theirs = dict(sorted(mindspore.load_checkpoint(path, format=kind).items()))
        ours = tiermem.mindspore.load_checkpoint(path, format=kind)
        found[name] = differences(theirs, dict(sorted(ours.items())))
    say(differences=found, types=len(TYPES), loaded=len(tiermem.mindspore.load_checkpoint(str(directory / "a.ckpt"))))


def slices(directory: Path, _: str) -> None:
    """Tensors in slices, which MindSpore cuts at `SLICE_SIZE` KiB, by bytes and by rows."""
    saved = [
        {"name": "first", "data": array("float32", (7,))},
        {"name": "layers.0.big", "data": array("bfloat16", (100, 300))},
        {"name": "layers.0.small", "data": array("int8", (5,))},
        {"name": "layers.1.big", "data": array("int64", (9, 501))},
    ]
    found, aliased, counts = {}, {}, {}
    for kib in (4, 1):
        serialization.SLICE_SIZE = kib
        for late in (False, True):
            path = str(directory / f"{kib}-{late}.ckpt")
            mindspore.save_checkpoint(saved, path, async_save=late)
            serialization._wait_async_thread_save_ckpt()
            ours = tiermem.mindspore.load_checkpoint(path)
            found[path] = differences(mindspore.load_checkpoint(path), ours)
            aliased[f"{kib} {late}"] = shared(ours)
            with tiermem.open(path) as model:
                counts[f"{kib} {late}"] = sum(name.startswith("layers.1.big.slice.") for name in model)
    ours = tiermem.mindspore.load_checkpoint(path, choice_func=lambda name: name == "layers.1.big")
    say(differences=found, aliased=aliased, counts=counts, chosen=list(ours))


class Pooler(mindspore.nn.Cell):  # type: ignore[misc]
    """The head of MiniLM, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = mindspore.nn.CellDict({"dense": mindspore.nn.Dense(384, 384)})

    def construct(self, x: Any) -> Any:
        return mindspore.ops.tanh(self.pooler["dense"](x))


def real(directory: Path, checkpoint: str) -> None:
    """Real weights: parameters, a net that computes with them, a training step, and the pool's bytes after it."""
    theirs = mindspore.load_checkpoint(f"{checkpoint}/model.safetensors", format="safetensors")
    net = Pooler()
    ours = tiermem.mindspore.load_checkpoint(checkpoint, net)
    with tiermem.open(checkpoint) as model:
        weight, bias = model["pooler.dense.weight"], model["pooler.dense.bias"]
        before = hashlib.sha256(weight.tobytes()).hexdigest()
        x = np.linspace(-1, 1, 384, dtype=np.float32)[None]
        error = float(np.abs(net(mindspore.Tensor(x)).asnumpy() - np.tanh(x @ weight.T + bias)).max())
        differing = differences(theirs, dict(sorted(ours.items())))
        aliased = shared(ours) and shared(dict(net.parameters_and_names()))
        optimiser = mindspore.nn.SGD(net.trainable_params(), 0.5)
        step = mindspore.value_and_grad(lambda x: net(x).sum(), None, optimiser.parameters)
        optimiser(step(mindspore.Tensor(x))[1])
        trained = float(np.abs(net.pooler["dense"].weight.asnumpy() - weight).max())
        after = hashlib.sha256(weight.tobytes()).hexdigest()
    say(differences=differing, error=error, aliased=aliased, trained=trained, kept=before == after, count=len(ours))


def convert(directory: Path, checkpoint: str) -> None:
    """The checkpoint as MindSpore itself writes it."""
    loaded = mindspore.load_checkpoint(f"{checkpoint}/model.safetensors", format="safetensors")
    mindspore.save_checkpoint(loaded, str(directory / "model.ckpt"))
    say(tensors=len(loaded))


def cost(directory: Path, checkpoint: str, load: Callable[..., dict[str, Any]]) -> None:
    """Seconds and memory of one load, and of a first look at all of it."""
    mindspore.Tensor(np.zeros(4, np.float32)).asnumpy()
    tiermem.connect(os.environ["TIERMEM_ADDRESS"]).close()  # which imports what a client needs
    before, begin = memory(), time.perf_counter()
    values = load(checkpoint, format=checkpoint.rpartition(".")[2])
    load_s = time.perf_counter() - begin
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(values[name].asnumpy().view(np.uint8).data)
    after = memory()
    peak = after["peak"] - after["shm"] - before["peak"]
    say(load_s=load_s, read_s=time.perf_counter() - begin, private=after["private"] - before["private"], peak=peak,
        digest=digest.hexdigest())  # fmt: skip


def stock(directory: Path, checkpoint: str) -> None:
    cost(directory, checkpoint, mindspore.load_checkpoint)


def pooled(directory: Path, checkpoint: str) -> None:
    cost(directory, checkpoint, tiermem.mindspore.load_checkpoint)


def held(directory: Path, checkpoint: str) -> None:
    """A model in the pool, loaded by its name and held through what the test does, until it is let go."""
    values = tiermem.mindspore.load_checkpoint(checkpoint)
    first = described(values)
    say(count=len(values))
    pause()
    say(same=described(values) == first)
    last = values.popitem()
    values.clear()
    gc.collect()
    say(left=last[0])
    pause()
    del last
    gc.collect()  # a parameter refers to itself
    say(left=None)
    pause()


def refusals(directory: Path, checkpoint: str) -> None:
    """What each of some calls raises."""
    load, found = tiermem.mindspore.load_checkpoint, {}
    tables: dict[str, Callable[[], Any]] = {
        "key": lambda: load(checkpoint, dec_key=b"0123456789abcdef"),
        "crc": lambda: load(checkpoint, crc_check=True),
        "format": lambda: load(checkpoint, format="ckpt"),
        "no format": lambda: load(checkpoint, format="gguf"),
        "nothing": lambda: load(checkpoint, choice_func=lambda name: False),
        "prefix": lambda: load(checkpoint, filter_prefix=["a", ""]),
        "bytes": lambda: load(io.BytesIO(b"")),  # type: ignore[arg-type]
        "absent": lambda: load(str(directory / "absent.ckpt")),
        "no model": lambda: load("no-such-model"),
        "net": lambda: load(checkpoint, net=7),
        "shape": lambda: load(checkpoint, mindspore.nn.Dense(3, 3), choice_func=lambda name: name == "weight"),
    }  # fmt: skip
    wrong = {"weight": mindspore.Tensor(np.zeros((2, 2), np.float32))}
    path = str(directory / "wrong.safetensors")
    mindspore.save_checkpoint([{"name": name, "data": data} for name, data in wrong.items()], path,
                              format="safetensors", remove_redundancy=True)  # fmt: skip
    tables["shape"] = lambda: load(path, mindspore.nn.Dense(3, 3))
    tables["ranks"] = lambda: load(path, mindspore.nn.Dense(2, 2))
    for name, call in tables.items():
        try:
            call()
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
        else:
            found[name] = ["", "nothing was raised"]
    say(**found)


def choices(directory: Path, checkpoint: str) -> None:
    """Names that each choice leaves, from MindSpore and from the pool; in its .ckpt the original takes all of them."""
    found = {}
    tables: list[dict[str, Any]] = [
        {"filter_prefix": "encoder"}, {"specify_prefix": ("pooler", "embeddings")},
        {"specify_prefix": "encoder", "filter_prefix": ["encoder.layer.1", "encoder.layer.2"]},
        {"choice_func": lambda name: name.endswith("bias")},
        {"choice_func": lambda name: False, "filter_prefix": "embeddings"},
    ]  # fmt: skip
    for i, table in enumerate(tables):
        theirs = mindspore.load_checkpoint(checkpoint, **table)
        found[str(i)] = [len(theirs), differences(theirs, tiermem.mindspore.load_checkpoint(checkpoint, **table))]
    say(**found)


if __name__ == "__main__":
    assert np_dtype.np_dtype_valid(True), "MindSpore 2.10 needs numpy<2"
    task = {
        each.__name__: each
        for each in (types, slices, real, convert, stock, pooled, held, refusals, choices)
    }[sys.argv[1]]  # fmt: skip
    task(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
