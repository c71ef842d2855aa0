"""The hook around SGLang's choice of a loader, with stand-ins for SGLang; `tests/engines` runs the real one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tiermem.adapters import sglang


@dataclass
class LoadConfig:
    model_loader_extra_config: Any
    load_format: str = "auto"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the maker of our loader: the loader that SGLang chose, and our options."""
    calls: list[Any] = []
    module = ModuleType("tiermem.adapters.sglang_loader")
    module.pooled = lambda chosen, extra: calls.append((chosen, extra)) or "ours"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def original(load_config: Any, model_config: Any) -> tuple[Any, Any]:
    return load_config, model_config


@pytest.mark.parametrize("extra", [{}, {"num_threads": 4}, None, ""])
def test_without_our_key_nothing_is_changed(extra: Any, given: list[Any]) -> None:
    config = LoadConfig(extra)
    assert sglang.loader_of(original, config, "model") == (config, "model")
    assert sglang.loader_of(original, config)[0] is config
    assert given == []


def test_with_our_key_sglang_chooses_without_it(given: list[Any]) -> None:
    config = LoadConfig({"tiermem": {"fallback": False}, "num_threads": 4}, "safetensors")
    assert sglang.loader_of(original, load_config=config, model_config="model") == "ours"
    assert given == [((LoadConfig({"num_threads": 4}, "safetensors"), "model"), {"fallback": False})]
    assert "tiermem" in config.model_loader_extra_config


def test_the_hook_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType = type("HookType", (), {"AROUND": "around"})  # type: ignore[attr-defined]
    module.HookRegistry = type(  # type: ignore[attr-defined]
        "HookRegistry", (), {"register": staticmethod(lambda *given: registered.append(given))}
    )
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sglang.register.cache_clear()
    sglang.register()
    sglang.register()
    sglang.register.cache_clear()
    assert registered == [("sglang.srt.model_loader.loader.get_model_loader", sglang.loader_of, "around")]
