"""vLLM: the entry point of its plugins. Makes `--load-format tiermem` known, and imports nothing of vLLM before."""

from __future__ import annotations

from functools import cache


@cache
def register() -> None:
    """Make `tiermem` a load format of this process's vLLM, which calls this in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader

    from tiermem.adapters.vllm_loader import PoolLoader

    register_model_loader("tiermem")(PoolLoader)
