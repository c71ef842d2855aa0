"""What tests run in an interpreter where SGLang's package lies unpacked: its own loader, and ours through its plugins.

    python sglang_run.py DIRECTORY CHECKPOINT...

The package is the real one. Two of the packages that it imports are CUDA builds; loading on the CPU computes nothing
with them, so names out of them are stood in for. Importing it takes most of the time, so one process does all tasks;
their facts are a line of JSON, the last one on stdout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOOD_IN = ("sgl_kernel", "torchvision")


class _Named(type):
    """Its classes have every attribute, and give themselves when called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_: object, **__: object) -> Any:
        return cls


class _Anything(metaclass=_Named):
    pass


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = name.partition(".")[0] in STOOD_IN
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


class Warnings(logging.Handler):
    """What our loader warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("sglang.srt.tiermem").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def taken(self) -> list[str]:
        taken, self.texts = self.texts, []
        return taken


def prepare(checkpoint: str) -> None:
    """Config and groups of a process of SGLang that loads a model, as its scheduler has them, and its plugins."""
    import transformers.models.auto.image_processing_auto  # noqa: F401  before torchvision seems to be there

    sys.meta_path.append(_Finder())
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    publish(ServerArgs(model_path=checkpoint, device="cpu"), role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        method = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=method, backend="gloo"
    )  # fmt: skip
    initialize_model_parallel()


def loader(options: Any, **fields: Any) -> Any:
    """The loader that SGLang chooses, by the name under which others of its modules imported the choice."""
    from sglang.srt import model_loader
    from sglang.srt.configs.load_config import LoadConfig

    extra = json.dumps({} if options is None else {"tiermem": options})
    return model_loader.get_model_loader(load_config=LoadConfig(model_loader_extra_config=extra, **fields))


def loaded(chosen: Any, checkpoint: str) -> Any:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.model_config import ModelConfig

    return chosen.load_model(model_config=ModelConfig(model_path=checkpoint), device_config=DeviceConfig("cpu", 0))


def digest(tensors: Iterator[tuple[str, Any]]) -> str:
    import torch

    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def weights(model: Any) -> str:
    return digest(sorted(model.named_parameters()))


def raised(call: Callable[[], Any]) -> list[str]:
    try:
        return ["", type(call()).__name__]
    except Exception as error:
        return [type(error).__name__, str(error)]


def loads(*checkpoints: str) -> dict[str, Any]:
    """Each checkpoint by SGLang and from the pool; an update in place of what came from the pool."""
    found = {}
    for checkpoint in checkpoints:
        stock, ours = loader(None), loader({"address": os.environ["TIERMEM_ADDRESS"]})
        model = loaded(ours, checkpoint)
        theirs = weights(loaded(stock, checkpoint))
        facts = {"stock": type(stock).__name__, "ours": type(ours).__name__, "same": weights(model) == theirs}
        for parameter in model.parameters():
            parameter.data.zero_()
        emptied = weights(model)
        facts["update"] = updater(model, checkpoint).update_weights_from_disk(checkpoint, "auto")[0]
        facts["updated"] = emptied != theirs and weights(model) == theirs
        found[Path(checkpoint).name] = facts
    return found


def updater(model: Any, checkpoint: str) -> Any:
    """SGLang's own, of a running engine that has this model."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater(
        tp_rank=0, device="cpu", gpu_id=0, model_config=_model_config(checkpoint), custom_weight_loaders={},
        get_model=lambda: model, update_model_fields=lambda *_, **__: None, recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,  # type: ignore[arg-type, return-value]
    )  # fmt: skip


def _model_config(checkpoint: str) -> Any:
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(model_path=checkpoint)


def sources(checkpoint: str) -> dict[str, Any]:
    """The tensors that each way to them gives, from SGLang and from the pool, whatever their order."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    def given(chosen: Any, way: str) -> str:
        source = DefaultModelLoader.Source(checkpoint, None, prefix="x.")
        if way == "resolved":
            whole = chosen.resolve_model_weights(_model_config(checkpoint), object())[0]
            part = dataclasses.replace(whole, weight_files=whole.weight_files[1:])
            pairs = chosen._get_weights_iterator(
                source, resolved_source=part, startup_prefetch_started=True, startup_prefetch_active=False
            )
        else:
            pairs = chosen._get_weights_iterator(source)
        return digest(sorted(pairs))

    ways: dict[str, dict[str, Any]] = {"prefixed": {}, "resolved": {}, "draft": {"draft_model_idx": 0}}
    return {way: given(loader(None, **how), way) == given(loader({}, **how), way) for way, how in ways.items()}


def failures(directory: Path, checkpoint: str) -> dict[str, Any]:
    """What stands in the way, and what becomes of the load then."""
    import sglang

    from tiermem.adapters import vllm_checkpoint
    from tiermem.errors import ReadError

    said = Warnings()
    facts: dict[str, Any] = {"theirs": weights(loaded(loader(None), checkpoint))}

    def attempt(name: str, options: Any, **fields: Any) -> None:
        chosen = raised(lambda: loader(options, **fields))
        facts[name] = [*chosen, said.taken()]

    absent = f"unix:{directory}/absent"
    facts["absent, loaded"] = weights(loaded(loader({"address": absent}), checkpoint))
    facts["absent"] = said.taken()
    attempt("absent, no fallback", {"address": absent, "fallback": False})
    attempt("image", {"image": "mine"})
    attempt("unknown option", {"adress": absent})
    attempt("no object", "on")
    for format in ("dummy", "sharded_state", "npcache"):
        attempt(format, {}, load_format=format)
        attempt(f"{format}, no fallback", {"fallback": False}, load_format=format)
    for format in ("auto", "safetensors", "pt", "mistral"):
        attempt(format, {"fallback": False}, load_format=format)

    tensors = vllm_checkpoint.Checkpoint.tensors

    def broken(self: Any, client: Any) -> Iterator[tuple[str, Any]]:
        for count, pair in enumerate(tensors(self, client)):
            if count == 5:
                raise ReadError("the disk is gone")
            yield pair

    vllm_checkpoint.Checkpoint.tensors = broken  # type: ignore[method-assign]
    facts["broken, loaded"] = weights(loaded(loader({}), checkpoint))
    facts["broken"] = said.taken()
    facts["broken, no fallback"] = raised(lambda: loaded(loader({"fallback": False}), checkpoint))
    vllm_checkpoint.Checkpoint.tensors = tensors  # type: ignore[method-assign]

    sglang.__version__ = "0.6.0"
    attempt("version", {})
    attempt("version, no fallback", {"fallback": False})
    return facts


if __name__ == "__main__":
    where, first = Path(sys.argv[1]), sys.argv[2]
    prepare(first)
    found = {"loads": loads(*sys.argv[2:]), "sources": sources(first), "failures": failures(where, first)}
    print(json.dumps(found), flush=True)
