"""SGLang: the entry point of its plugins. Has SGLang's choice of a loader answered by ours where its options say so.

Imports nothing of SGLang before `register` is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

KEY = "tiermem"
"""Of the JSON object in `--model-loader-extra-config`; its value holds our options."""

TARGET = "sglang.srt.model_loader.loader.get_model_loader"


@cache
def register() -> None:
    """Stand around SGLang's `get_model_loader`. SGLang calls this in each of its processes, before it loads a model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, loader_of, HookType.AROUND)


def loader_of(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """The loader that SGLang would choose; in the place of the one that reads checkpoint files itself, ours.

    Raises ConfigError for unusable options, and Refused where SGLang would choose another loader than that one and the
    option `fallback` is off.
    """
    extra = load_config.model_loader_extra_config
    if not isinstance(extra, dict) or KEY not in extra:
        return original(load_config, model_config)
    rest = {key: value for key, value in extra.items() if key != KEY}
    without = dataclasses.replace(load_config, model_loader_extra_config=rest)
    from tiermem.adapters.sglang_loader import pooled

    return pooled(original(without, model_config), extra[KEY])
