"""vLLM's adapter without vLLM: its options, and which configurations may have weights in shared memory."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tiermem.adapters.vllm_fingerprint import rank_label, version_trouble, why_not_shared
from tiermem.adapters.vllm_options import Options, options_of
from tiermem.errors import ConfigError


def test_options_have_defaults() -> None:
    assert options_of({}) == Options(address=None, image=None, fallback=True)
    assert options_of({"address": "unix:/s", "fallback": False}) == Options("unix:/s", None, False)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"adress": "unix:/s"}, "unknown option 'adress' in model_loader_extra_config; did you mean 'address'?"),
        ({"zzz": 1}, "unknown option 'zzz' in model_loader_extra_config; the options are address, image, fallback"),
        ({"fallback": "no"}, "option 'fallback' in model_loader_extra_config is 'no'; it must be true or false"),
        ({"image": 3}, "option 'image' in model_loader_extra_config is 3; it must be text"),
        ("address", "model_loader_extra_config is a str; give a JSON object, such as {}"),
    ],
)
def test_unusable_options_are_errors(extra: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        options_of(extra)


def configured(**changes: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Configurations of an engine and of its model, with nothing special but these."""
    draft = object()
    engine = SimpleNamespace(
        speculative_config=None,
        quant_config=None,
        weight_transfer_config=None,
    )
    model = SimpleNamespace(quantization=None, is_moe=False, enable_sleep_mode=False, multimodal_config=None)
    if changes.pop("draft", False):
        draft = model
    if changes.pop("speculates", False):
        engine.speculative_config = SimpleNamespace(draft_model_config=draft)
    for name, value in changes.items():
        setattr(engine if hasattr(engine, name) else model, name, value)
    return engine, model


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", None),
        ({"speculates": True}, "cpu", None),
        ({"multimodal_config": SimpleNamespace(mm_encoder_only=False)}, "cpu", None),
        ({}, "npu", "the device is npu, and only the CPU computes in shared memory"),
        ({"quantization": "awq"}, "cpu", "it is quantised (awq)"),
        ({"quant_config": object()}, "cpu", "it is quantised (None)"),
        ({"enable_sleep_mode": True}, "cpu", "sleep mode is on, which takes weights out of memory"),
        ({"weight_transfer_config": object()}, "cpu", "a trainer is to update its weights in place"),
        ({"is_moe": True}, "cpu", "its experts are repacked once they are loaded"),
        ({"speculates": True, "draft": True}, "cpu", "it is a draft model for speculation"),
        ({"multimodal_config": SimpleNamespace(mm_encoder_only=True)}, "cpu", "only its encoder is wanted"),
    ],
)
def test_what_rules_out_shared_weights(changes: dict[str, Any], device: str, reason: str | None) -> None:
    assert why_not_shared(*configured(**changes), device) == reason


def test_versions() -> None:
    assert version_trouble("0.32.0") is None
    assert version_trouble("0.32.0+cpu") is None
    trouble = version_trouble("0.33.0")
    assert trouble is not None
    assert "vLLM 0.33.0" in trouble


def test_ranks_are_told_apart_by_name() -> None:
    alone = {f"{group}_{what}": value for group in ("tp", "pp") for what, value in
             (("rank", "0"), ("size", "1"))}  # fmt: skip
    assert rank_label(alone) == ""
    assert rank_label({**alone, "tp_rank": "1", "tp_size": "2", "pp_size": "4"}) == ".tp1of2.pp0of4"


def test_the_entry_point_imports_nothing_heavy() -> None:
    script = (
        "import sys, tiermem.adapters.vllm; print([name for name in ('vllm', 'torch', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
