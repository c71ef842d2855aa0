"""transformers over the pool, by an exported directory and by `tiermem.transformers`: same results, one copy, and the
pool's bytes safe. Each model is in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors
from blake3 import blake3

from tests.engines.conftest import EngineDaemon
from tests.integration.child import Child, eventually
from tiermem.client import Client
from tiermem.export import export

START_S = 240
"""A child imports transformers and reads a model, beside others, on a machine that may be busy."""

EXPORT, POOL = "export", "pool"
ROUTES = (EXPORT, POOL)

ENGINE = """
import gc, hashlib, json, os, re, sys
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
transformers.utils.logging.disable_progress_bar()
import tiermem.transformers

def say(fact):
    print(json.dumps(fact), flush=True)

def pause():
    return sys.stdin.readline().strip()

def anonymous():
    gc.collect()
    text = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024

def made(how, source, **options):
    if how == "pool":
        return tiermem.transformers.from_pretrained(source, **options)
    return AutoModelForCausalLM.from_pretrained(source, **{"dtype": "auto", **options})

def mappings(model):
    "Which files the parameters lie in."
    found = set()
    regions = []
    for line in open("/proc/self/maps"):
        fields = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in fields[0].split("-"))
        regions.append((low, high, fields[5].strip() if len(fields) > 5 else ""))
    for parameter in model.parameters():
        found |= {name for low, high, name in regions if low <= parameter.data_ptr() < high}
    return sorted(found)

def digest(model):
    "Of every parameter and buffer, with its name and dtype, the computed ones too."
    found = hashlib.blake2b()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()

def tokens(model, ids, count):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist()

how, source = sys.argv[1:3]
"""


class Engine(Child):
    """A process that runs `text` with the functions above; says and takes JSON lines."""

    def __init__(self, text: str, address: str, how: str, source: Path | str, *more: object) -> None:
        prefix = ("env", f"TIERMEM_ADDRESS={address}", "HF_HUB_OFFLINE=1")
        super().__init__(["-c", ENGINE + text, how, str(source), *map(str, more)], prefix=prefix)

    def fact(self) -> Any:
        return json.loads(self.line(START_S))


@pytest.fixture
def client(daemon: EngineDaemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


def source_of(how: str, client: Client, model: Path, tmp_path: Path) -> Path:
    """What the engine is given: the checkpoint, or its export."""
    if how != EXPORT:
        return model
    export(client, model, tmp_path / model.name)
    return tmp_path / model.name


ANSWER = """
before = anonymous()
model = made(how, source)
say({
    "anon": anonymous() - before, "files": mappings(model), "class": type(model).__name__,
    "tied": model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(),
    "generation": model.generation_config.to_diff_dict(), "name": model.name_or_path, "training": model.training,
})
tokenizer = AutoTokenizer.from_pretrained(source)
chat = [{"role": "user", "content": "What is the capital of France?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
said = tokens(model, ids, 24)
say({"tokens": said, "text": tokenizer.decode(said), "anon": anonymous() - before, "digest": digest(model)})
if pause() == "write":
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    say(anonymous() - before)
    pause()
"""


def test_a_real_model_answers_as_it_does_without_us(
    daemon: EngineDaemon, client: Client, smollm2: Path, tmp_path: Path
) -> None:
    size = (smollm2 / "model.safetensors").stat().st_size
    with Engine(ANSWER, daemon.address, "stock", smollm2) as stock:
        told, answer = stock.fact(), stock.fact()
    assert "Paris" in answer["text"]
    assert told["tied"]
    for how in ROUTES:
        source = source_of(how, client, smollm2, tmp_path)
        with Engine(ANSWER, daemon.address, how, source) as engine:
            ours, said = engine.fact(), engine.fact()
            assert said["tokens"] == answer["tokens"]
            assert said["digest"] == answer["digest"]
            # Of what the library imports there is as much without us.
            assert ours["anon"] < told["anon"] + size / 10, "the weights are mapped, and not copied"
            assert said["anon"] < answer["anon"] + size / 10
            assert all(str(daemon.segments) in file for file in ours["files"]), ours["files"]
            same = ("class", "tied", "generation", "training")
            assert {key: ours[key] for key in same} == {key: told[key] for key in same}
            assert ours["name"] == str(source)
            engine.say("write")
            assert engine.fact() > size * 0.9, "what it writes is its own"
            assert content_of(how, client, source) == content_of("stock", client, smollm2)


def content_of(how: str, client: Client, source: Path) -> dict[str, bytes]:
    """Name -> digest of the bytes of each tensor, as others read them now."""
    if how == POOL:
        with client.open(source) as model:
            return {name: blake3(model.raw(name)).digest() for name in model}
    read = safetensors.deserialize((source / "model.safetensors").read_bytes())
    return {name: blake3(view["data"]).digest() for name, view in read}


EVERY = """
for name in sys.argv[3:]:
    path, dtype = name.split("=")
    model = made(how, path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    say([digest(model), tokens(model, torch.tensor([[1, 50, 60, 70]]), 8), tied, str(model.dtype)])
    del model
"""


def test_tied_sharded_and_cast_models_are_the_same(
    daemon: EngineDaemon, client: Client, tiny_llama: Path, tiny_tied: Path, tiny_sharded: Path, tmp_path: Path
) -> None:
    said = {}
    for how in ("stock", *ROUTES):
        cases = [f"{source_of(how, client, model, tmp_path)}={dtype}"
                 for model in (tiny_llama, tiny_tied, tiny_sharded) for dtype in ("auto", "float32")]  # fmt: skip
        with Engine(EVERY, daemon.address, how, "-", *cases) as engine:
            said[how] = [engine.fact() for _ in cases]
    assert [tied for _, _, tied, _ in said["stock"]] == [False, False, True, True, False, False]
    assert [dtype for *_, dtype in said["stock"][:2]] == ["torch.bfloat16", "torch.float32"]
    assert said[EXPORT] == said["stock"]
    assert said[POOL] == said["stock"]


CHOICES = """
from transformers import AutoModelForSequenceClassification, GenerationConfig, LlamaModel
from tiermem.errors import TiermemError
import shutil
from_pretrained = tiermem.transformers.from_pretrained

def refusal(*arguments, **options):
    try:
        return type(from_pretrained(*arguments, **options)).__name__
    except TiermemError as error:
        return f"{type(error).__name__}: {error}"

scratch = sys.argv[3]
shutil.copytree(source, scratch + "/odd")
config = json.load(open(scratch + "/odd/config.json"))
json.dump({**config, "architectures": ["FancyForCausalLM"]}, open(scratch + "/odd/config.json", "w"))
json.dump({"top_p": 0.77, "do_sample": True}, open(scratch + "/odd/generation_config.json", "w"))
shutil.copytree(source, scratch + "/bare", ignore=shutil.ignore_patterns("config.json"))
model, info = from_pretrained(source, output_loading_info=True)
say({
    "name": refusal(os.path.basename(source)),
    "auto": refusal(source, AutoModelForCausalLM),
    "base": refusal(source, LlamaModel),
    "auto base": refusal(source, AutoModel),
    "labels": from_pretrained(source, AutoModelForSequenceClassification, num_labels=7).num_labels,
    "attention": from_pretrained(source, attn_implementation="eager").config._attn_implementation,
    "old dtype": str(from_pretrained(source, torch_dtype=torch.float16).dtype),
    "config": from_pretrained(source, config=AutoConfig.from_pretrained(source, use_cache=False)).config.use_cache,
    "generation": from_pretrained(source, generation_config=GenerationConfig(top_k=3)).generation_config.top_k,
    "missing": sorted(info["missing_keys"]),
    "kept": from_pretrained(scratch + "/odd", transformers.LlamaForCausalLM).generation_config.top_p,
    "odd": refusal(scratch + "/odd"),
    "odd with class": refusal(scratch + "/odd", transformers.LlamaForCausalLM),
    "wrong auto": refusal(source, transformers.AutoModelForImageClassification),
    "bare": refusal(scratch + "/bare"),
    "unknown": refusal("nobody"),
    "state": refusal(source, state_dict={}),
    "gguf": refusal(sys.argv[4]),
})
"""


def test_classes_arguments_and_what_is_refused(
    daemon: EngineDaemon, client: Client, tiny_llama: Path, smollm2_gguf: Path, tmp_path: Path
) -> None:
    client.load(tiny_llama)
    with Engine(CHOICES, daemon.address, POOL, tiny_llama, tmp_path, smollm2_gguf) as engine:
        said = engine.fact()
    assert {key: said[key] for key in ("name", "auto", "base", "auto base", "odd with class")} == {
        "name": "LlamaForCausalLM", "auto": "LlamaForCausalLM", "base": "LlamaModel", "auto base": "LlamaModel",
        "odd with class": "LlamaForCausalLM",
    }  # fmt: skip
    assert (said["labels"], said["attention"], said["old dtype"]) == (7, "eager", "torch.float16")
    assert (said["config"], said["generation"], said["kept"], said["missing"]) == (False, 3, 0.77, [])
    for case, part in {
        "odd": "has no class FancyForCausalLM; pass it as model_class",
        "wrong auto": "knows no class for LlamaConfig",
        "bare": "CheckpointNotFound",
        "unknown": "ModelNotFound",
        "state": "leave state_dict out",
        "gguf": "no weights of this format",
    }.items():
        assert part in said[case], said[case]


PARTS = """
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=32, vocab_size=128, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"])
vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()
whole.save_pretrained(source)
ours = tiermem.transformers.from_pretrained
stock_text = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
for stock, model in ((stock_text, ours(source, AutoModelForCausalLM)), (whole, ours(source))):
    say([type(model).__name__, type(model) is type(stock), digest(model) == digest(stock)])
"""


def test_the_text_model_of_a_composite_one(daemon: EngineDaemon, tmp_path: Path) -> None:
    with Engine(PARTS, daemon.address, POOL, tmp_path / "parts") as engine:
        assert engine.fact() == ["Qwen3_5ForCausalLM", True, True]
        assert engine.fact() == ["Qwen3_5ForConditionalGeneration", True, True]


SHARE = """
model = made(how, source)
with torch.no_grad():
    say(model(torch.tensor([[1, 50, 60, 70]])).logits.double().sum().item())
sum(int(parameter.view(-1)[::64].ne(0).sum()) for parameter in model.parameters())  # map every OS page
say("touched")
pause()
"""


@pytest.mark.parametrize("how", ROUTES)
def test_four_processes_share_one_copy(
    daemon: EngineDaemon, client: Client, smollm2: Path, tmp_path: Path, how: str, memory_of: Callable[..., Any]
) -> None:
    source = source_of(how, client, smollm2, tmp_path)
    size = (smollm2 / "model.safetensors").stat().st_size
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(SHARE, daemon.address, how, source)) for _ in range(4)]
        sums = {engine.fact() for engine in engines}
        assert [engine.fact() for engine in engines] == ["touched"] * 4
        shared = [memory_of(engine.pid) for engine in engines]
    assert len(sums) == 1
    assert all(facts["shmem"] > size * 0.95 for facts in shared), "each has all of it mapped"
    # The daemon has it mapped as well, so that the four do not add up to the whole.
    assert sum(facts["shmem_pss"] for facts in shared) < size * 1.05


TALK = """
model = made(how, source)
ids = torch.tensor([[1, 50, 60, 70]])
for _ in range(12):
    ids = torch.tensor([tokens(model, ids, 1)])
    say(ids[0].tolist())
"""


@pytest.mark.parametrize("how", ROUTES)
def test_generation_goes_on_when_the_daemon_dies(
    daemon: EngineDaemon, client: Client, tiny_llama: Path, tmp_path: Path, how: str
) -> None:
    with Engine(TALK, daemon.address, "stock", tiny_llama) as stock:
        expected = [stock.fact() for _ in range(12)]
    source = source_of(how, client, tiny_llama, tmp_path)
    with Engine(TALK, daemon.address, how, source) as engine:
        said = [engine.fact() for _ in range(3)]
        daemon.kill()
        said += [engine.fact() for _ in range(9)]
        assert engine.exit_code(START_S) == 0
    assert said == expected
    daemon.start()
    with Engine(TALK, daemon.address, how, source) as engine:
        assert [engine.fact() for _ in range(12)] == expected


CAST = """
model = made(how, source, dtype=torch.float32)
say(mappings(model))
pause()
"""


def test_a_cast_copy_ends_the_lease(daemon: EngineDaemon, client: Client, tiny_llama: Path) -> None:
    with Engine(CAST, daemon.address, POOL, tiny_llama) as engine:
        files = engine.fact()
        assert not any(str(daemon.segments) in file for file in files)
        eventually(lambda: daemon.leases() == 0, "the lease ended with the last of the pool's tensors", 20)


def test_without_a_daemon_the_process_has_a_pool_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    nobody = f"unix:{tmp_path}/none"
    with Engine(TALK, nobody, "stock", tiny_llama) as stock, Engine(TALK, nobody, POOL, tiny_llama) as engine:
        assert engine.fact() == stock.fact()
