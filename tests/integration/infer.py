"""A process that runs a real sentence model through unmodified transformers, its weights shared and read-only.

`python infer.py DIRECTORY PASSES PAUSE_S`: prints the distinct token ids that it looks up, then computes.
"""

from __future__ import annotations

import json
import os
import sys
import time

TEXTS = ["The cat watches the birds in the garden behind the old house."] * 16


def main(directory: str, passes: int, pause_s: float) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers

    import tiermem.torch

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(directory)
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(TEXTS, return_tensors="pt", padding=True)
    weights = tiermem.torch.load_model(directory, writable=False)
    model = transformers.BertModel.from_pretrained(None, config=config, state_dict=weights)
    shared = {weight.data_ptr() for weight in weights.values()}
    aliased = sum(parameter.data_ptr() in shared for parameter in model.parameters())
    facts = {"tokens": sorted(set(tokens["input_ids"].flatten().tolist())), "aliased": aliased}
    print(json.dumps(facts), flush=True)
    with torch.inference_mode():
        for _ in range(passes):
            time.sleep(pause_s)
            model(**tokens)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
