"""SGLang's loader: the model's own weight loaders take their tensors from the pool instead of from files.

Owns where the tensors come from, and what happens where the pool cannot serve them: SGLang reads the files itself.
Everything else is SGLang's. Weights end in the engine's own memory, so that updating them in place stays allowed.
Imported by `tiermem.adapters.sglang` alone, in a process of SGLang, since its class is derived from one of SGLang's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import sglang
from sglang.srt.model_loader import loader as stock

from tiermem.adapters.vllm_checkpoint import Checkpoint
from tiermem.adapters.vllm_options import options_of
from tiermem.errors import ConfigError, Refused, TiermemError

if TYPE_CHECKING:
    import torch

    from tiermem.adapters.vllm_options import Options
    from tiermem.client import Client

TESTED = ("0.5.23",)
"""Versions of SGLang whose loader is known."""

_PLAIN = ("auto", "safetensors", "pt", "mistral")
"""Values of `--load-format` by which files are read as they are."""

# Below SGLang's own loggers, whose level it sets.
_log = logging.getLogger("sglang.srt.tiermem")


def pooled(chosen: Any, extra: Any) -> Any:
    """A loader that streams from the pool, in the place of `chosen`; or that one, after a warning, where it is not the
    one that reads files with plain tensors, or of a version that is not known.

    Raises ConfigError for unusable options, Refused in the place of the warning where the option `fallback` is off.
    """
    options = options_of(extra)
    if options.image is not None:
        raise ConfigError("option 'image': weights are streamed to SGLang, so there is no image to name; leave it out")
    reason = None
    if type(chosen) is not stock.DefaultModelLoader:
        reason = f"SGLang loads this model with {type(chosen).__name__}, which has its own way to the weights"
    elif chosen.load_config.load_format.value not in _PLAIN:
        reason = f"--load-format {chosen.load_config.load_format.value} has its own way to the weights"
    elif sglang.__version__ not in TESTED:
        reason = f"SGLang {sglang.__version__} is not among the versions that are known ({', '.join(TESTED)})"
    if reason is None:
        return PoolLoader(chosen.load_config, options)
    if not options.fallback:
        raise Refused(f"{reason}; the option fallback would have it load without the pool")
    _log.warning("The pool is not used: %s", reason)
    return chosen


class PoolLoader(stock.DefaultModelLoader):  # type: ignore[misc]
    """SGLang's default loader, less the reading of files."""

    def __init__(self, load_config: Any, options: Options) -> None:
        super().__init__(load_config)
        self._options = options
        self.counter_before_loading_weights = 0.0
        self._client: Client | None = None
        self._connect()

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """The loaded model. Raises, without `fallback`, whatever keeps the pool from serving its weights."""
        model: torch.nn.Module
        try:
            model = super().load_model(model_config=model_config, device_config=device_config)
            return model
        except TiermemError as error:
            self._fall_back(error)
        # The model that was begun is dropped together with the error.
        model = super().load_model(model_config=model_config, device_config=device_config)
        return model

    def _get_weights_iterator(
        self, source: Any, *, resolved_source: Any = None, **prefetch: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        weights: Iterator[tuple[str, torch.Tensor]]
        if self._client is None:
            weights = super()._get_weights_iterator(source, resolved_source=resolved_source, **prefetch)
            return weights
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        found = Checkpoint(self._files(source, resolved_source)).tensors(self._client)
        if self.load_config.draft_model_idx is not None:
            weights = self._filter_mtp_weights(found, source.prefix, self.load_config.draft_model_idx)
            return weights
        return ((source.prefix + name, tensor) for name, tensor in found)

    def _files(self, source: Any, resolved_source: Any) -> Sequence[str]:
        """The files that SGLang would read, downloaded if they are not there."""
        if resolved_source is not None:
            return list(resolved_source.weight_files)
        folder, files, safetensors = self._prepare_weights(
            source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
        )
        if safetensors and source.model_config is not None:
            index = stock.SAFE_WEIGHTS_INDEX_NAME
            files = stock.maybe_add_mtp_safetensors(files, folder, index, source.model_config.hf_config)
        return list(files)

    def _connect(self) -> None:
        from tiermem.client import shared_client

        try:
            self._client = shared_client(self._options.address)
        except TiermemError as error:
            self._fall_back(error)

    def _fall_back(self, error: TiermemError) -> None:
        """Go on without the pool, after a warning; raises the error where the options say so."""
        if not self._options.fallback:
            raise error
        self._client = None
        _log.warning("SGLang reads the weights itself, since the pool cannot serve them: %s", error)
