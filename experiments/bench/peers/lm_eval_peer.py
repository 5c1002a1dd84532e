"""Score continuations with lm-evaluation-harness's Hugging Face backend, as a separate program.

It imports nothing of this project, so that any Python with lm-eval, torch and transformers can run it:

    python lm_eval_peer.py '{"folder": "model", "threads": 2}'

and communicates by JSON lines: it writes {"ready": true, "versions": {…}}; {"do": "load", "file": …} names a JSON list
of [context, continuation] and gets {"requests": N}; {"do": "run", "batch_size": B, "first": K} scores the first K of
them, or with null all, and gets {"seconds": …, "cpu_seconds": …, "logprobs": […]}. The model is on the CPU, in float32.
It ends when its input does.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main() -> None:
    """Read the spec from the command line, then answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    model: Any = HFLM(pretrained=spec["folder"], device="cpu", dtype="float32", batch_size=1)
    names = ("lm_eval", "torch", "transformers")
    say({"ready": True, "versions": {name: version(name) for name in names}, "threads": torch.get_num_threads()})
    instances: list[Any] = []
    for line in sys.stdin:
        told = json.loads(line)
        if told["do"] == "load":
            pairs = json.loads(Path(told["file"]).read_text(encoding="utf-8"))
            instances = [
                Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=number)
                for number, pair in enumerate(pairs)
            ]
            say({"requests": len(instances)})
        else:
            model.batch_size_per_gpu = told["batch_size"]
            start, cpu_start = time.perf_counter(), time.process_time()
            found = model.loglikelihood(instances[: told["first"]], disable_tqdm=True)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            say({"seconds": seconds, "cpu_seconds": cpu_seconds, "logprobs": [logprob for logprob, _ in found]})


if __name__ == "__main__":
    main()
