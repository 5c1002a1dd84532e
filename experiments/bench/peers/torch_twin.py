"""Train a PyTorch decoder of the same shape with AdamW and clipping, as a separate program.

It imports nothing of this project, so that any Python with torch can run it:

    python torch_twin.py '{"model": {…}, "optimizer": {…}, "batch_size": 8, "seq_len": 128, "mode": "compile", …}'

and communicates by lines: it writes {"ready": true, …}; for every line "run K" it trains K steps on fresh random tokens
and writes {"seconds": …, "losses": […]}; it ends when its input does. While it waits it blocks on a read.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
Fields = dict[str, Any]


class TorchNorm(nn.Module):
    """RMSNorm or LayerNorm over the features."""

    def __init__(self, model: Fields):
        super().__init__()
        width, self.epsilon = model["d_model"], model["norm_epsilon"]
        self.layer = model["norm"] == "layernorm"
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.layer and model["norm_bias"] else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [batch, seq, d_model]."""
        if self.layer:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class TorchAttention(nn.Module):
    """Causal attention with grouped key/value heads; one matrix computes queries, keys and values."""

    def __init__(self, model: Fields):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model["num_heads"], model["num_kv_heads"], model["head_dim"]
        self.scale = model["attention_scale"]
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(model["d_model"], width, bias=model["attention_bias"])
        self.output = nn.Linear(self.heads * self.head_dim, model["d_model"], bias=model["attention_output_bias"])

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply to x [batch, seq, d_model]; rotary: (cos, sin) [seq, head_dim / 2]."""
        batch, seq, _ = x.shape
        heads = self.qkv(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return self.output(mixed.transpose(1, 2).reshape(batch, seq, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (i, i + half) of every head."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TorchFeedForward(nn.Module):
    """Plain, or gated with one matrix for gate and up."""

    def __init__(self, model: Fields):
        super().__init__()
        self.gated, self.activation = model["gated"], ACTIVATIONS[model["activation"]]
        self.up = nn.Linear(model["d_model"], (1 + self.gated) * model["d_ff"], bias=model["use_bias"])
        self.down = nn.Linear(model["d_ff"], model["d_model"], bias=model["use_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [batch, seq, d_model]."""
        hidden = self.up(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.down(self.activation(gate) * hidden)
        return self.down(self.activation(hidden))


class TorchBlock(nn.Module):
    """Two residual branches with pre-norm."""

    def __init__(self, model: Fields):
        super().__init__()
        self.attention_norm, self.attention = TorchNorm(model), TorchAttention(model)
        self.feed_forward_norm, self.feed_forward = TorchNorm(model), TorchFeedForward(model)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply to x [batch, seq, d_model]."""
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TorchDecoder(nn.Module):
    """The model from tokens to loss, so that it compiles as one graph."""

    def __init__(self, model: Fields, seq_len: int):
        super().__init__()
        width, vocabulary = model["d_model"], model["vocab_size"]
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(model["max_seq_len"], width) if model["position"] == "learned" else None
        self.layers = nn.ModuleList(TorchBlock(model) for _ in range(model["num_layers"]))
        self.final_norm = TorchNorm(model)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if model["tie_embeddings"]:
            self.head.weight = self.tokens.weight
        self.rotary = model["position"] == "rotary"
        frequencies = model["rope_base"] ** -(torch.arange(0, model["head_dim"], 2) / model["head_dim"])
        angles = torch.arange(seq_len)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, in float32; both [batch, seq]."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        rotary = (self.cos, self.sin) if self.rotary else None
        for layer in self.layers:
            x = layer(x, rotary)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class TorchTrainer:
    """The step: loss and gradient, clipping by the global norm, fused AdamW."""

    def __init__(self, spec: Fields):
        self.spec, self.device = spec, torch.device(spec["device"])
        decoder = TorchDecoder(spec["model"], spec["seq_len"])
        if spec.get("weights"):
            with np.load(spec["weights"]) as weights:
                decoder.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights})
        self.decoder = decoder.to(self.device)
        self.loss = torch.compile(self.decoder) if spec["mode"] == "compile" else self.decoder
        self.optimizer = self._make_optimizer(spec["optimizer"])
        self.random = np.random.default_rng(spec["seed"])

    def prepare(self) -> float:
        """Return seconds of a first forward and backward pass, compilation included, without an update."""
        start = time.perf_counter()
        shape = (self.spec["batch_size"], self.spec["seq_len"] + 1)
        rows = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._forward(rows[:, :-1], rows[:, 1:]).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        return time.perf_counter() - start

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        shape = (count, self.spec["batch_size"], self.spec["seq_len"] + 1)
        batches = torch.from_numpy(self.random.integers(0, self.spec["model"]["vocab_size"], shape))
        batches = batches.pin_memory() if self.device.type == "cuda" else batches
        parameters = list(self.decoder.parameters())
        losses = []
        start = time.perf_counter()
        for batch in batches:
            rows = batch.to(self.device, non_blocking=True)
            loss = self._forward(rows[:, :-1], rows[:, 1:])
            loss.backward()
            if self.spec["optimizer"]["clip_norm"]:
                nn.utils.clip_grad_norm_(parameters, self.spec["optimizer"]["clip_norm"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        self._synchronize()
        seconds = time.perf_counter() - start
        return seconds, [float(loss) for loss in losses]

    def _forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        low = self.spec["dtype"] == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            return self.loss(tokens, targets)

    def _make_optimizer(self, values: Fields) -> torch.optim.Optimizer:
        """Return parameter groups: weight decay on matrices and the token table, none on vectors and positions."""
        named = dict(self.decoder.named_parameters())
        plain = [p for name, p in named.items() if p.ndim < 2 or name.startswith("positions.")]
        decayed = [p for p in named.values() if not any(p is other for other in plain)]
        groups = [
            {"params": decayed, "weight_decay": values["weight_decay"]},
            {"params": plain, "weight_decay": 0.0},
        ]
        betas = (values["beta1"], values["beta2"])
        return torch.optim.AdamW(groups, lr=values["learning_rate"], betas=betas, eps=values["epsilon"], fused=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Read the spec from the command line, then answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be mixed with the answers

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    spec = json.loads(sys.argv[1])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    if spec["device"] == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA takes by default
    torch.manual_seed(spec["seed"])
    trainer = TorchTrainer(spec)
    compile_seconds = trainer.prepare()
    say(
        {
            "ready": True,
            "parameters": sum(parameter.numel() for parameter in trainer.decoder.parameters()),
            "compile_seconds": compile_seconds,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    )
    for line in sys.stdin:
        seconds, losses = trainer.run(int(line.split()[1]))
        say({"seconds": seconds, "losses": losses})


if __name__ == "__main__":
    main()
