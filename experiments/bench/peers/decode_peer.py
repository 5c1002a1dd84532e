"""Generate greedily with Transformers, PyTorch or llama.cpp, in a separate Python that need not have isoflop.

The command line holds a spec; then one JSON answer when ready, and one per line: `{"do": "cell", "tokens": [[…]],
"steps": N}` gives {"seconds": of warming up, "note": …}; `{"do": "run"}` gives {"first": seconds until the first of N
tokens, "all": until the last, "tokens": [[…]] of every row}.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

Answer = dict[str, Any]


class TorchPeer:
    """Base class of the PyTorch peers: a Hugging Face folder on one device."""

    def __init__(self, spec: dict[str, Any]):
        import torch
        import transformers

        self.torch = torch
        if spec["threads"]:
            torch.set_num_threads(spec["threads"])
        if spec["device"] == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as XLA takes by default
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(spec["path"], dtype=getattr(torch, spec["dtype"])).to(spec["device"]).eval()
        self.model.generation_config.eos_token_id = None  # no row stops early
        self.device = spec["device"]
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.note = ""

    def cell(self, tokens: list[list[int]], steps: int) -> None:
        """Take the prompts."""
        self.prompt, self.steps = self.torch.tensor(tokens, device=self.device), steps

    def now(self) -> float:
        """Return the time in seconds after all pending work is done."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


class TransformersPeer(TorchPeer):
    """`generate` as users call it; the first token is timed by a call for one token."""

    def run(self) -> Answer:
        """Generate once and return the times and tokens."""
        start = self.now()
        self._generate(1)
        middle = self.now()
        tokens = self._generate(self.steps)
        end = self.now()
        return {"first": middle - start, "all": end - middle, "tokens": tokens}

    def _generate(self, count: int) -> list[list[int]]:
        ones = self.torch.ones_like(self.prompt)
        made = self.model.generate(
            self.prompt,
            attention_mask=ones,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )
        return made[:, self.prompt.shape[1] :].tolist()


class CompiledTorchPeer(TorchPeer):
    """A handwritten loop over the same model, with a static cache and a compiled decode step."""

    def cell(self, tokens: list[list[int]], steps: int) -> None:
        """Compile the step; if that fails it stays eager, and the note gives the reason."""
        import transformers

        super().cell(tokens, steps)
        self.torch.compiler.reset()
        self.cache = transformers.StaticCache(self.model.config, max_cache_len=self.prompt.shape[1] + steps)
        self.step: Any = self.torch.compile(self._choose)
        self.note = ""
        try:
            self.run()
        except Exception as error:  # a compiler may raise anything
            self.step, self.note = self._choose, f"eager: {' '.join(str(error).split())[:200]}"

    def run(self) -> Answer:
        """Generate once and return the times and tokens."""
        with self.torch.inference_mode():
            start = self.now()
            self.cache.reset()
            width = self.prompt.shape[1]
            token = self._choose(self.prompt, self.torch.arange(width, device=self.device)[None])
            chosen, middle = [token], self.now()
            for position in range(width, width + self.steps - 1):
                token = self.step(token, self.torch.tensor([[position]], device=self.device))
                chosen.append(token)
            tokens = self.torch.cat(chosen, dim=1).tolist()
            return {"first": middle - start, "all": self.now() - start, "tokens": tokens}

    def _choose(self, tokens: Any, positions: Any) -> Any:
        made = self.model(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return made.logits[:, -1].argmax(-1, keepdim=True)


class LlamaCppPeer:
    """llama.cpp through its C interface, one sequence, keys and values in float32."""

    def __init__(self, spec: dict[str, Any]):
        import llama_cpp
        import numpy

        self.api, self.numpy, self.threads = llama_cpp, numpy, spec["threads"] or os.cpu_count()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        if spec["device"] == "cuda":
            params.n_gpu_layers = 10_000
        self.model = llama_cpp.llama_model_load_from_file(spec["path"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {spec['path']}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.versions, self.context, self.note = {"llama-cpp-python": llama_cpp.__version__}, None, ""

    def cell(self, tokens: list[list[int]], steps: int) -> None:
        """Make a context that is long enough."""
        if len(tokens) != 1:
            raise ValueError("llama.cpp is compared at batch 1 only")
        if self.context:
            self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(tokens[0]) + steps
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        self.context = self.api.llama_init_from_model(self.model, params)
        self.prompt, self.steps = tokens[0], steps

    def run(self) -> Answer:
        """Generate once and return the times and tokens."""
        start = time.perf_counter()
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        chosen = [self._choose(self.prompt)]
        middle = time.perf_counter()
        for _ in range(self.steps - 1):
            chosen.append(self._choose(chosen[-1:]))
        return {"first": middle - start, "all": time.perf_counter() - start, "tokens": [chosen]}

    def _choose(self, tokens: list[int]) -> int:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if code := self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode gave {code}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(self.numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


PEERS = {"transformers": TransformersPeer, "torch": CompiledTorchPeer, "llama.cpp": LlamaCppPeer}


def main() -> None:
    """Read the spec from the command line, then answer line by line; a cell that fails has "error" in its answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    peer: Any = PEERS[spec["name"]](spec)
    say({"ready": True, "versions": peer.versions})
    for line in sys.stdin:
        told = json.loads(line)
        try:
            if told["do"] == "run":
                say(peer.run())
                continue
            start = time.perf_counter()
            peer.cell(told["tokens"], told["steps"])
            peer.run()
            say({"seconds": time.perf_counter() - start, "note": peer.note})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
