"""Prepacking of vLLM on the CPU: a private copy of each weight in the layout of its matrix kernels, put off.

Weights that are shared are computed with where they are. Owns the substitution, which lasts for one `with` only.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class PlainGemm:
    """While entered, vLLM's post-processing leaves matrices as they are; `prepack` makes up for it."""

    def __init__(self) -> None:
        self._put_off: list[tuple[torch.nn.Module, bool]] = []
        self._prepack: Callable[[torch.nn.Module, bool], None] | None = None

    def __enter__(self) -> PlainGemm:
        from vllm.model_executor.layers import utils

        self._prepack = utils.dispatch_cpu_unquantized_gemm
        utils.dispatch_cpu_unquantized_gemm = self._dispatch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = self._prepack

    def prepack(self) -> None:
        """What the engine would have done, for a model whose weights turned out to be its own."""
        assert self._prepack is not None
        for layer, remove_weight in self._put_off:
            self._prepack(layer, remove_weight)

    def _dispatch(self, layer: Any, remove_weight: bool) -> None:
        import torch

        if layer.weight.is_meta or layer.weight.ndim != 2:
            # Other weights than matrices have kernels that may need their own layout.
            assert self._prepack is not None
            self._prepack(layer, remove_weight)
            return
        layer.cpu_linear = torch.nn.functional.linear
        self._put_off.append((layer, remove_weight))
