"""A process of the demo: gets a model's weights, builds the model with transformers, answers one question.

Owns what is measured in the process, and when. Never prints; speaks with the demo through one connection, in steps, so
that four of them do each step at the same time.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TIERMEM, SAFETENSORS = "tiermem", "safetensors"

COLD, WARM, MEASURE = STEPS = ("cold", "warm", "measure")
"""Orders of the demo: answer with the checkpoint out of the kernel's page cache, and again with it there. Memory is
measured when all have answered: pages that another process maps too are not private."""

PASSAGES = (
    "All processes share one copy.",
    "The cat watches the birds.",
    "Dough rises in a warm kitchen.",
    "The last train leaves at nine.",
)
QUESTIONS = (
    "How do programs share memory?",
    "What is the pet looking at?",
    "How do I bake a loaf of bread?",
    "When does my train depart tonight?",
)


def run(kind: str, directory: str, address: str, question: str, connection: Connection[Any, Any]) -> None:
    """The process: import, say so, obey the steps, and hold the model until the demo hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo ends us
    room = os.path.dirname(address.removeprefix("unix:"))  # torch leaves a directory where temporary files go
    os.environ |= {"TIERMEM_ADDRESS": address, "TMPDIR": room, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        reader = _Reader(kind, directory)
        connection.send({})
        while (step := connection.recv()) != MEASURE:
            connection.send(reader.answer(question, step))
        connection.send(reader.measured())
        connection.recv()
    except EOFError:
        return
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})


class _Reader:
    def __init__(self, kind: str, directory: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self._weights: Callable[[], dict[str, torch.Tensor]]
        if kind == TIERMEM:
            import tiermem.client
            import tiermem.torch

            self._weights = lambda: tiermem.torch.load_model(directory)
        else:
            import safetensors.torch

            self._weights = lambda: safetensors.torch.load_file(os.path.join(directory, "model.safetensors"))
        self._result: dict[str, Any] = {"kind": kind, "pid": os.getpid()}
        self._config = transformers.AutoConfig.from_pretrained(directory)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        # What torch and transformers do once per process is not the weights' cost.
        small = transformers.BertConfig(
            vocab_size=self._config.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )  # fmt: skip
        weights = transformers.BertModel(small).state_dict()
        self._embeddings(transformers.BertModel.from_pretrained(None, config=small, state_dict=weights), PASSAGES)
        gc.collect()

    def answer(self, question: str, step: str) -> dict[str, Any]:
        """Get the weights, build the model, answer. Returns, and keeps, the seconds of each part."""
        import transformers

        if step == COLD:  # not earlier: a library's pages are private until the other processes map them too
            self._private_bytes = private_bytes()
        begin = time.perf_counter()
        weights = self._weights()
        got = time.perf_counter()
        self._model = transformers.BertModel.from_pretrained(None, config=self._config, state_dict=weights)
        built = time.perf_counter()
        embeddings = self._embeddings(self._model, (*PASSAGES, question))
        end = time.perf_counter()
        similarities = embeddings[:-1] @ embeddings[-1]
        best = int(similarities.argmax())
        times = {"weights_s": got - begin, "model_s": built - got, "answer_s": end - built, "total_s": end - begin}
        self._result |= {
            "question": question, "answer": PASSAGES[best], "similarity": float(similarities[best]),
            "embeddings": embeddings.numpy().tobytes(), step: times,
        }  # fmt: skip
        return times

    def measured(self) -> dict[str, Any]:
        """All results, and by how much the memory that only this process has grew since the imports."""
        return self._result | {"private_bytes": private_bytes() - self._private_bytes}

    def _embeddings(self, model: Any, texts: tuple[str, ...]) -> Any:
        """Unit vectors, texts x hidden size: the mean over a text's tokens, as the model's authors pool it."""
        import torch

        tokens = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def private_bytes() -> int:
    """Bytes of this process that no other process maps (Private_* of /proc/self/smaps_rollup, proc(5))."""
    with open("/proc/self/smaps_rollup") as rollup:
        return sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Private_"))
