"""vLLM engines, one after another, run by vLLM's interpreter: obeys lines on stdin, {"do": command, ...}.

Answers are lines on the descriptor that was stdout, since engines print there: {"value": ...}, or {"error": ...} where
something was raised.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tiermem.bench.engine_memory import memory_of

PROMPTS = ["The capital of France is", "Water boils at"]
TOKENS = 16
OPTIONS = {"dtype": "bfloat16", "seed": 0, "max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines = Engines()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            body = {"value": getattr(engines, command.pop("do"))(**command)}
        except Exception as error:
            body = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(body), file=answers, flush=True)


class Engines:
    """The engine of the moment."""

    def __init__(self) -> None:
        self._llm: Any = None

    def start(self, version: str | None = None, **options: Any) -> dict[str, float]:
        """Start an engine in place of the one before; seconds of its loader's construction and of its `load_model`,
        where that is in this process. `version`: what vLLM says it were."""
        import vllm
        from vllm.plugins import load_general_plugins

        from tests.engines import vllm_models

        load_general_plugins()
        vllm_models.register()
        self.stop()
        with _timed(options["load_format"]) as seconds, _version(vllm, version or vllm.__version__):
            self._llm = vllm.LLM(**{**OPTIONS, **options})
        return seconds

    def stop(self) -> None:
        """End the engine, if there is one."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self._llm is not None:
            self._llm = None
            gc.collect()
            cleanup_dist_env_and_memory()

    def generate(self, tokens: int = TOKENS) -> list[list[int]]:
        """Greedy token ids of each prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        outputs = self._llm.generate(PROMPTS, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def text(self) -> str:
        """What follows the first prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=TOKENS, temperature=0)
        return str(self._llm.generate(PROMPTS[:1], sampling, use_tqdm=False)[0].outputs[0].text)

    def memory(self) -> dict[str, int]:
        """Bytes of this process and its children."""
        return memory_of(os.getpid(), tree=True)

    def images(self) -> list[str | None]:
        """Of each rank the image that its weights are in."""
        return list(self._llm.apply_model(_image))

    def reload(self) -> None:
        """Reload all weights from the checkpoint."""
        self._llm.collective_rpc("reload_weights")

    def reload_from(self, kernel_format: bool) -> None:
        """Reload one weight from a tensor, in the checkpoint's format or in the engine's own."""
        name, weight = self._llm.apply_model(_first_weight)[0]
        options = {"weights_iterator": [(name, weight)], "is_checkpoint_format": not kernel_format}
        self._llm.collective_rpc("reload_weights", kwargs=options)

    def load_weights(self) -> None:
        """Give the model's own weight loaders a weight."""
        self._llm.apply_model(_load_one)


@contextlib.contextmanager
def _version(vllm: Any, version: str) -> Iterator[None]:
    was, vllm.__version__ = vllm.__version__, version
    try:
        yield
    finally:
        vllm.__version__ = was


@contextlib.contextmanager
def _timed(load_format: str) -> Iterator[dict[str, float]]:
    """Seconds of each method of the loader, while this lasts."""
    from vllm.model_executor import model_loader

    kind = model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format]
    seconds: dict[str, float] = {}

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[name] = time.perf_counter() - began
            return result

        return call

    methods = {name: timed(name, getattr(kind, name)) for name in ("__init__", "load_model")}
    loader = type(kind.__name__, (kind,), methods)
    model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format] = loader
    try:
        yield seconds
    finally:
        model_loader._LOAD_FORMAT_TO_MODEL_LOADER[load_format] = kind


def _image(model: Any) -> str | None:
    return getattr(getattr(model, "tiermem_image", None), "name", None)


def _first_weight(model: Any) -> Any:
    return next((name, weight.detach() * 0) for name, weight in model.named_parameters())


def _load_one(model: Any) -> None:
    model.load_weights([_first_weight(model)])


if __name__ == "__main__":
    main()
