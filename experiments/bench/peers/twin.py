"""Prepare PyTorch's side of a comparison: supported models, weights, and the child process that trains."""

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.peers.child import Child, python_has
from model import ModelConfig, Params
from model.errors import InputError
from train import HParams, TrainConfig

TWIN = Path(__file__).with_name("torch_twin.py")
_OPTIMIZER = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "clip_norm")

_SHAPE = {"vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len"}
# Fields that do not affect the logits of a supported model.
_IDLE = {"num_encoder_layers", "layer_pattern", "local_rope_base", "relative_buckets", "relative_max_distance"}
_IDLE |= {"num_labels", "base_d_model", "zero_readout", "eos_token_ids", "decoder_start_token_id"}

# Fields of which the PyTorch twin supports any value, and those of which it supports some.
_FREE = {"rope_base", "attention_scale", "norm", "norm_epsilon", "gated", "use_bias", "norm_bias", "attention_bias"}
_FREE |= {"attention_output_bias", "tie_embeddings", "compute_dtype"}
_SOME: dict[str, tuple[Any, ...]] = {
    "position": ("rotary", "learned"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "final_norm": (True,),
}


def check_fields(
    config: ModelConfig, free: Collection[str], words: str, some: Mapping[str, tuple[Any, ...]] | None = None
) -> None:
    """Raise InputError for the first field whose value the peer does not support; the message contains `words`.

    The shape and the fields in `free` may have any value, those in `some` the values given, all others their default.
    """
    default = ModelConfig(vocab_size=2, d_model=2, num_layers=1, num_heads=1).to_dict()
    for name, value in config.to_dict().items():
        allowed = (some or {}).get(name, (default[name],))
        if name not in {*_SHAPE, *_IDLE, *free} and value not in allowed:
            wish = " or ".join(repr(choice) for choice in allowed)
            raise InputError(f"{name}={value!r} {words}; it must be {wish}")


def check_has_twin(config: ModelConfig, train_config: TrainConfig) -> None:
    """Raise InputError for a model or a step that the PyTorch side does not have."""
    check_fields(config, _FREE, "has no twin in PyTorch to compare with", _SOME)
    wanted = TrainConfig(batch_size=train_config.batch_size, seq_len=train_config.seq_len)
    for name, value in train_config.replace(schedule=wanted.schedule).to_dict().items():
        if value != wanted.to_dict()[name]:
            raise InputError(f"{name}={value!r} has no twin in PyTorch; it must be {wanted.to_dict()[name]!r}")
    if train_config.seq_len > config.max_seq_len:
        raise InputError(f"seq_len={train_config.seq_len} exceeds max_seq_len={config.max_seq_len}")


class Twin(Child):
    """The PyTorch program of `torch_twin.py`."""

    def __init__(self, spec: dict[str, Any], log: Path):
        super().__init__([torch_python(), str(TWIN), json.dumps(spec)], f"PyTorch ({spec['mode']})", log)

    def run(self, count: int) -> tuple[float, list[float]]:
        """Train `count` steps; return (seconds in total, loss of each step)."""
        answer = self.ask(f"run {count}")
        return answer["seconds"], answer["losses"]


def torch_python() -> str:
    """Return the Python that runs the twin: ISOFLOP_TORCH_PYTHON, or else this one."""
    return os.environ.get("ISOFLOP_TORCH_PYTHON") or sys.executable


def require_torch() -> None:
    """Raise InputError if that Python has no torch."""
    python = torch_python()
    if not python_has(python, "torch"):
        raise InputError(
            f"{python} has no torch: install isoflop[peers], or name a Python that has it in ISOFLOP_TORCH_PYTHON"
        )


def twin_spec(
    config: ModelConfig, train_config: TrainConfig, hparams: HParams, mode: str, weights: Path, threads: int | None
) -> dict[str, Any]:
    """Return the specification that `torch_twin.py` reads from its command line."""
    values = hparams.to_dict()
    return {
        "model": config.to_dict(),
        "optimizer": {name: values[name] for name in _OPTIMIZER},
        "batch_size": train_config.batch_size,
        "seq_len": train_config.seq_len,
        "mode": mode,
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
        "dtype": config.compute_dtype,
        "threads": threads,
        "seed": values["seed"],
        "weights": str(weights),
    }


def twin_weights(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return our parameters under the twin's names, matrices (out, in), joined as the twin joins them."""
    tokens = params["embedding"]["tokens"]
    weights = {"tokens.weight": tokens, **_norm("final_norm", params["final_norm"])}
    weights["head.weight"] = tokens if config.tie_embeddings else params["head"]["weight"].T
    if config.position == "learned":
        weights["positions.weight"] = params["embedding"]["positions"]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"]["dense"])
        attention, feed_forward, at = layer["attention"], layer["feed_forward"], f"layers.{index}"
        weights |= _norm(f"{at}.attention_norm", layer["attention_norm"])
        weights |= _norm(f"{at}.feed_forward_norm", layer["feed_forward_norm"])
        weights |= _linear(f"{at}.attention.qkv", *(attention[name] for name in ("query", "key", "value")))
        weights |= _linear(f"{at}.attention.output", attention["output"])
        ups = ("gate", "up") if config.gated else ("up",)
        weights |= _linear(f"{at}.feed_forward.up", *(feed_forward[name] for name in ups))
        weights |= _linear(f"{at}.feed_forward.down", feed_forward["down"])
    return weights


def _norm(name: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.{ {'scale': 'weight'}.get(key, key) }": leaf for key, leaf in leaves.items()}


def _linear(name: str, *parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    joined = {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}
    return {f"{name}.{key}": leaf.T for key, leaf in joined.items()}
