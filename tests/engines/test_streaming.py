"""Models of transformers that stream: with a third of their weights on the device they say what they say with all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ConfigMaker
from tiermem.device import ALIGN
from tiermem.device.placed import DeviceModel
from tiermem.embedded import EmbeddedPool
from tiermem.model import Model

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-engines installs it"
)

TOKENS = 20
PROMPT = [1, 504, 3575, 282, 4649, 314]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch sees no CUDA device, on which streaming computes as on cpu"
        ),
    ),
]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def pool(config: ConfigMaker) -> Iterator[EmbeddedPool]:
    with EmbeddedPool(config(tier="dram=2GiB")) as pool:
        yield pool


def hollow(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration without a weight: what is not put in place cannot be computed with."""
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    net.model.rotary_emb = type(net.model.rotary_emb)(config)
    return net


def needed_bytes(model: Model) -> int:
    """What all weights take on a device, equal ones once."""
    model.wait()
    sizes = {digest: model.info(name).nbytes for name, digest in model.digests().items()}
    return sum(-(-nbytes // ALIGN) * ALIGN for nbytes in sizes.values())


def said(net: Any, prompt: list[int], device: str, on: DeviceModel | None = None) -> list[torch.Tensor]:
    """Logits of the prompt, and of each of the likeliest tokens after it, with a cache of keys and values."""
    ids, cache, logits = torch.tensor([prompt], device=device), None, list[torch.Tensor]()
    for _ in range(1 + TOKENS):
        before = on.residency.copied_bytes if on else 0
        out = net(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits.clone())
        ids = out.logits[:, -1:].argmax(-1)
        if on:
            print(f"{on}: {on.residency.copied_bytes - before} bytes copied in a pass, peak {on.peak_bytes}")
    return logits


def check_streamed(model: Model, plain: Any, net: Any, device: str, prompt: list[int], **options: Any) -> None:
    total = needed_bytes(model)
    wanted = said(plain, prompt, device)
    tokens = plain.generate(torch.tensor([prompt], device=device), max_new_tokens=4, do_sample=False)
    plain.to("cpu")
    with model.stream(device, total // 3, **options) as on:
        with on.attach(net):
            assert net.device.type == torch.device(device).type
            got = said(net, prompt, device, on)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
            ids = torch.tensor([prompt], device=device)
            assert torch.equal(net.generate(ids, max_new_tokens=4, do_sample=False), tokens)
        assert 0 < on.peak_bytes <= on.budget_bytes <= total // 3
        assert on.residency.copied_bytes > 2 * total, "it came and went"
        on.residency.check()


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_model_with_a_third_of_it_there(pool: EmbeddedPool, smollm2: Path, device: str) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto").eval().to(device)
    with pool.open(smollm2) as model:
        net = hollow(plain.config, plain.dtype)
        net.generation_config = plain.generation_config
        check_streamed(model, plain, net, device, PROMPT)
        assert net.lm_head.weight.is_meta, "what it had is there again"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("hidden", "layers", "inner", "heads", "vocabulary", "tied", "dtype", "options"),
    [
        (64, 12, 172, 4, 96, True, torch.float32, {}),
        (64, 12, 172, 4, 96, False, torch.float32, {"ahead": 3}),
        (96, 7, 200, 6, 301, False, torch.bfloat16, {"policy": "lru"}),
        (128, 3, 128, 2, 33, True, torch.bfloat16, {"ahead": 0}),
        (512, 6, 1376, 8, 1000, False, torch.float32, {}),
    ],
)
def test_a_random_llama_with_a_third_of_it_there(
    pool: EmbeddedPool, tmp_path: Path, device: str, hidden: int, layers: int, inner: int, heads: int,
    vocabulary: int, tied: bool, dtype: torch.dtype, options: dict[str, Any],
) -> None:  # fmt: skip
    torch.manual_seed(hidden)
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    plain.save_pretrained(tmp_path / "llama")
    with pool.open(tmp_path / "llama") as model:
        check_streamed(model, plain.to(device), hollow(config, dtype), device, [5, 7, 11, 13, 17], **options)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_is_there_whole(pool: EmbeddedPool, tiny_tied: Path, device: str) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_tied, dtype="auto").eval().to(device)
    with pool.open(tiny_tied) as model, model.to(device) as on:
        net = hollow(plain.config, plain.dtype)
        with on.attach(net):
            copied = on.residency.copied_bytes
            wanted = said(plain, PROMPT, device)
            assert all(torch.equal(*pair) for pair in zip(said(net, PROMPT, device), wanted, strict=True))
            assert on.residency.copied_bytes == copied
            assert net.lm_head.weight.data_ptr() == net.model.embed_tokens.weight.data_ptr()
