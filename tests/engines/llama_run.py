"""llama.cpp through the C API of the package llama-cpp-cffi: loads a GGUF file, continues a prompt greedily, says JSON.

    python llama_run.py FILE [--no-mmap]

Two lines: `{"load_s", "tokens"}` after half of the tokens, then, when a line came in, `{"tokens", "text"}` of all. Run
in a process of its own, because a fault in the library ends the process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "The capital of France is"
TOKENS = 16


def library() -> tuple[Any, Any]:
    """(ffi, lib) of the extension alone: its package imports a server, a tokenizer and torch."""
    package = importlib.util.find_spec("llama")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = next(Path(package.submodule_search_locations[0]).glob("_llama_cpp_cpu.*.so"))
    spec = importlib.util.spec_from_file_location("_llama_cpp_cpu", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffi, module.lib


class Llama:
    """A model and a context that is filled token by token."""

    def __init__(self, path: str, use_mmap: bool) -> None:
        self.ffi, self.lib = library()
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        if not use_mmap:
            params.use_mmap = False
        start = time.perf_counter()
        self.model = self.lib.llama_model_load_from_file(path.encode(), params)
        self.load_s = time.perf_counter() - start
        assert self.model != self.ffi.NULL, f"llama.cpp does not load {path}"
        context = self.lib.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = 256, 1, 1
        self.context = self.lib.llama_init_from_model(self.model, context)
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        room = self.ffi.new("int32_t[]", 256)
        count = self.lib.llama_tokenize(self.vocabulary, text.encode(), len(text.encode()), room, 256, True, True)
        assert count > 0
        return list(room[0:count])

    def next_after(self, tokens: list[int]) -> int:
        """The likeliest token after these, which follow those of earlier calls."""
        room = self.ffi.new("int32_t[]", tokens)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(room, len(tokens))) == 0
        scores = self.lib.llama_get_logits_ith(self.context, -1)
        return max(range(self.lib.llama_vocab_n_tokens(self.vocabulary)), key=scores.__getitem__)

    def piece(self, token: int) -> bytes:
        room = self.ffi.new("char[]", 64)
        count = self.lib.llama_token_to_piece(self.vocabulary, token, room, 64, 0, True)
        return bytes(self.ffi.buffer(room, count))


def main(path: str, *flags: str) -> None:
    llama = Llama(path, use_mmap="--no-mmap" not in flags)
    tokens = [llama.next_after(llama.tokenize(PROMPT))]
    while len(tokens) < TOKENS:
        if len(tokens) == TOKENS // 2:
            print(json.dumps({"load_s": llama.load_s, "tokens": tokens}), flush=True)
            sys.stdin.readline()
        tokens.append(llama.next_after(tokens[-1:]))
    text = b"".join(map(llama.piece, tokens)).decode()
    print(json.dumps({"tokens": tokens, "text": text}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
