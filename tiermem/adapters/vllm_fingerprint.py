"""Fingerprint of a vLLM image: every input that decides which bytes vLLM's weight loaders write, and where.

Also names the engine's versions that this was tested with, and the reasons for which weights cannot be shared.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import torch

TESTED = ("0.32.0",)
"""Versions of vLLM whose loaders and post-processing are known."""

_LAYOUT = "1"
"""Changes when an image of the same weights would be laid out otherwise."""

_GROUPS = ("tp", "pp")
"""Groups of ranks that divide a dense model's weights among them, by their names in vLLM."""


def fingerprint_of(model_config: Any, model: torch.nn.Module, *, checkpoint: str, layout: str) -> dict[str, str]:
    """Fields of the image of `model`, which is constructed but not loaded. `checkpoint`: its identity; `layout`: a
    digest of the parameters' names, dtypes and shapes. The ranks are those of this process."""
    import torch
    import vllm

    kind = type(model)
    return {
        "engine": "vllm",
        "engine_version": vllm.__version__,
        "torch_version": torch.__version__,
        "device": "cpu",
        "checkpoint": checkpoint,
        "architecture": f"{kind.__module__}.{kind.__qualname__}",
        "source": _source_of(kind),
        "config": _digest(json.dumps(_config_of(model_config), sort_keys=True, default=str)),
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "quantization": str(model_config.quantization or "none"),
        "layout": layout,
        "layout_version": _LAYOUT,
        **_ranks(),
    }


def version_trouble(version: str) -> str | None:
    """Why this version of vLLM gets no images; None for a tested one."""
    if version.partition("+")[0] in TESTED:
        return None
    return f"vLLM {version} is not among the versions that images were tested with ({', '.join(TESTED)})"


def why_not_shared(vllm_config: Any, model_config: Any, device: str) -> str | None:
    """What of the configuration rules out weights in shared read-only memory; None if nothing does."""
    speculative = vllm_config.speculative_config
    multimodal = model_config.multimodal_config
    reasons = (
        (device != "cpu", f"the device is {device}, and only the CPU computes in shared memory"),
        (model_config.quantization or vllm_config.quant_config, f"it is quantised ({model_config.quantization})"),
        (model_config.is_moe, "its experts are repacked once they are loaded"),
        (model_config.enable_sleep_mode, "sleep mode is on, which takes weights out of memory"),
        (vllm_config.weight_transfer_config, "a trainer is to update its weights in place"),
        (speculative and model_config is speculative.draft_model_config, "it is a draft model for speculation"),
        (multimodal and multimodal.mm_encoder_only, "only its encoder is wanted"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def rank_label(fingerprint: dict[str, str]) -> str:
    """What tells the images of one engine's ranks apart, as a part of their names; empty for a single rank."""
    sizes = [(group, fingerprint[f"{group}_rank"], fingerprint[f"{group}_size"]) for group in _GROUPS]
    return "".join(f".{group}{rank}of{size}" for group, rank, size in sizes if size != "1")


def _ranks() -> dict[str, str]:
    """Size of each group, and this process's rank in it."""
    from vllm.distributed import parallel_state

    fields = {}
    for group in _GROUPS:
        found = getattr(parallel_state, f"get_{group}_group")()
        fields[f"{group}_size"], fields[f"{group}_rank"] = str(found.world_size), str(found.rank_in_group)
    return fields


def _config_of(model_config: Any) -> dict[str, Any]:
    """The model's own configuration, less where it lies."""
    config: dict[str, Any] = model_config.hf_config.to_dict()
    config.pop("_name_or_path", None)
    return config


def _source_of(kind: type) -> str:
    """Digest of the file that defines a class that is not vLLM's own, whose version says nothing of it."""
    if kind.__module__.split(".")[0] == "vllm":
        return "vllm"
    try:
        return _digest(Path(inspect.getfile(kind)).read_bytes())
    except (OSError, TypeError):
        return "unknown"


def _digest(content: str | bytes) -> str:
    return blake3(content.encode() if isinstance(content, str) else content).hexdigest()[:32]
