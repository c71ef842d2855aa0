"""Architectures that vLLM does not ship: Llamas that cannot all be attached to an image, and some with bad intent."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaForCausalLM


class BufferedLlama(LlamaForCausalLM):  # type: ignore[misc]
    """Prefers the least likely token, as a buffer says that loading sets."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.register_buffer("sign", torch.ones(1))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        self.sign.fill_(-1)
        return loaded

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden)
        return None if logits is None else logits * self.sign.to(logits.dtype)


class AttributeLlama(BufferedLlama):
    """The same, but an attribute says it."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.factor = 1.0
        return loaded

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden)
        return None if logits is None else logits * self.factor


class ComputedLlama(BufferedLlama):
    """The same, but the buffer is none of the checkpoint's."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        del self.sign
        self.register_buffer("sign", torch.ones(1), persistent=False)


class RewritingLlama(LlamaForCausalLM):  # type: ignore[misc]
    """Changes a weight in place once all are loaded."""

    def process_weights_after_loading(self) -> None:
        self.model.norm.weight.data.mul_(2)


class TransposedLlama(LlamaForCausalLM):  # type: ignore[misc]
    """Has a weight whose elements are not in order."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        weight = self.lm_head.weight
        weight.data = weight.data.t().contiguous().t()


class KillsBeforeLoading(LlamaForCausalLM):  # type: ignore[misc]
    """Ends the daemon whose number its configuration has, before the first weight is asked for."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._daemon = vllm_config.model_config.hf_config.daemon_pid

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.kill()
        loaded: set[str] = super().load_weights(weights)
        return loaded

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._daemon, signal.SIGKILL)
        # A zombie answers to signals, but has no files.
        while os.path.exists(f"/proc/{self._daemon}/fd/0"):
            time.sleep(0.01)


class KillsAfterLoading(KillsBeforeLoading):
    """The same, once all weights are there."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = LlamaForCausalLM.load_weights(self, weights)
        self.kill()
        return loaded


KINDS = (
    BufferedLlama, AttributeLlama, ComputedLlama, RewritingLlama, TransposedLlama, KillsBeforeLoading,
    KillsAfterLoading,
)  # fmt: skip


def register() -> None:
    for kind in KINDS:
        ModelRegistry.register_model(kind.__name__, kind)
