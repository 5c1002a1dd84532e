"""Coordinate check: do a model's activations, and what training adds to them, keep their size as it grows?

Yang et al. 2022 ("Tensor Programs V"), appendix D: a few steps at several widths tell a wrong parameterization from a
right one, long before a sweep would. Of depth it is asked in the same way (Dey et al. 2025, "CompleteP").
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from experiments.report.style import INK, MUTED, log_axis, new_figure, sequence, styled
from model import ModelConfig, Params, accounting, forward
from model.config import Parameterization
from model.errors import InputError
from train import HParams, TrainConfig, TrainState, init_state, train_step
from train.config import Optimizer
from train.objective import Batch

Axis = Literal["width", "depth"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("standard", "mup")
TITLES = {"standard": "Standard parameterization", "mup": "muP"}
HOLDS = 2.0  # a change that stays within this factor over all sizes is said to keep its size
DEFAULT = ModelConfig(
    vocab_size=256, d_model=64, num_layers=3, num_heads=4, max_seq_len=32, tie_embeddings=False, scan_layers=False
)


def coordinate_check(
    config: ModelConfig,
    sizes: Sequence[int],
    *,
    axis: Axis = "width",
    steps: int = 5,
    learning_rate: float = 3e-3,
    seeds: Sequence[int] = (0, 1),
    optimizer: Optimizer = "adamw",
    parameterizations: Sequence[Parameterization] = PARAMETERIZATIONS,
    batch: Batch | None = None,
    advance: Callable[..., None] = lambda amount, note: None,
) -> dict[str, Any]:
    """Train every size for `steps` steps on one batch (None: random tokens), and measure after each.

    The table has a row for every parameterization and size: "scale" and "change" [seeds][steps + 1][places] are the
    root mean square of the activations and of their difference from the first step's; "loss" [seeds][steps] is before
    each step. Neither clipping nor weight decay, the rate constant. `advance(share, note)` is told of shares of 1.
    Raises InputError where a size does not fit the heads or the model is no language model.
    """
    if config.stack == "encoder-decoder" or config.head not in ("language-model", "masked-language-model"):
        raise InputError("a coordinate check needs one stack with a head over the vocabulary; take a language model")
    sizes = sorted(set(sizes))
    if len(sizes) < 2:
        raise InputError(f"sizes {sizes} must be at least two different ones")
    batch = random_batch(config) if batch is None else batch
    rows, seq_len = batch["tokens"].shape
    train_config = TrainConfig(batch_size=rows, seq_len=seq_len, optimizer=optimizer, schedule="constant")
    base = HParams(learning_rate=learning_rate, weight_decay=0.0, clip_norm=0.0)
    models = [(name, size, resize(config, axis, size, sizes[0], name)) for name in parameterizations for size in sizes]
    costs = [accounting.flops_per_token(made, seq_len) for *_, made in models]
    table = []
    for (name, size, made), cost in zip(models, costs, strict=True):
        runs = []
        for seed in seeds:
            runs.append(trajectory(made, train_config, base.replace(seed=seed), batch, steps))
            advance(cost / sum(costs) / len(seeds), f"{name} {axis} {size}")
        table.append(
            {"parameterization": name, "size": size, "parameters": accounting.parameters(made).total}
            | {"places": places(made)}
            | {key: [run[key] for run in runs] for key in runs[0]}
        )
    return {
        "axis": axis,
        "sizes": sizes,
        "steps": steps,
        "learning_rate": learning_rate,
        "seeds": list(seeds),
        "optimizer": optimizer,
        "config": config.to_dict(),
        "table": table,
    }


def resize(
    config: ModelConfig, axis: Axis, size: int, base: int, parameterization: Parameterization = "standard"
) -> ModelConfig:
    """The model at that width, by more heads of the same size and everything else in proportion, or at that depth.

    Under "mup" it equals the standard one at size `base`: the smallest that is compared.
    """
    if axis == "depth":
        scaled = {"parameterization": "mup", "base_d_model": config.d_model, "base_num_layers": base}
        return config.replace(num_layers=size, **(scaled if parameterization == "mup" else {}))
    changes: dict[str, Any] = {"d_model": size, "head_dim": config.head_dim}
    for name in ("num_heads", "num_kv_heads", "d_ff"):
        changes[name] = _in_proportion(name, getattr(config, name), size, config.d_model)
    if config.experts is not None:
        widths = {name: getattr(config.experts, name) for name in ("d_ff", "shared_d_ff")}
        made = {name: _in_proportion(name, width, size, config.d_model) for name, width in widths.items()}
        changes["experts"] = config.experts.replace(**made)
    if config.latent is not None:
        ranks = {name: getattr(config.latent, name) for name in ("kv_rank", "q_rank")}
        made = {name: _in_proportion(name, rank, size, config.d_model) for name, rank in ranks.items() if rank}
        changes["latent"] = config.latent.replace(**made)
    if parameterization == "mup":
        changes |= {"parameterization": "mup", "base_d_model": base}
    return config.replace(**changes)


def _in_proportion(name: str, value: int, size: int, d_model: int) -> int:
    exact = value * size / d_model
    # Heads have one size, so their number must come out whole; the other widths may be rounded.
    if (name in ("num_heads", "num_kv_heads") and exact != int(exact)) or (value and round(exact) < 1):
        raise InputError(f"width {size} leaves {exact:g} {name} of {value} at width {d_model}; take multiples of it")
    return round(exact)


def places(config: ModelConfig) -> list[str]:
    """Where activations are measured, in order."""
    return ["embedding", *(f"layer {i + 1}" for i in range(config.num_layers)), "final hidden", "logits"]


def random_batch(config: ModelConfig, rows: int = 4, seq_len: int = 32, seed: int = 0) -> Batch:
    """Tokens drawn evenly, each the target of the one before it."""
    length = min(seq_len, config.max_seq_len)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def trajectory(
    config: ModelConfig, train_config: TrainConfig, hparams: HParams, batch: Batch, steps: int
) -> dict[str, Any]:
    """{"scale", "change": [steps + 1][places], "loss": [steps]} of one run."""
    state = _init_state(config, train_config, hparams)
    start = now = activations(config, state.params, batch)
    scale, change, loss = [_sizes(start)], [[0.0] * len(places(config))], []
    for _ in range(steps):
        state, metrics = _train_step(config, train_config, state, batch, hparams)
        now = activations(config, state.params, batch)
        scale.append(_sizes(now))
        change.append(_sizes([a - b for a, b in zip(now, start, strict=True)]))
        loss.append(float(metrics["loss"]))
    return {"scale": scale, "change": change, "loss": loss}


# Three small programs compile faster than one of everything, and compiling is most of a check's time.
_init_state = jax.jit(init_state, static_argnums=(0, 1))
_train_step = jax.jit(train_step, static_argnums=(0, 1), donate_argnums=2)


def activations(config: ModelConfig, params: Params, batch: Batch) -> list[np.ndarray]:
    """The residual stream before and after every layer, the final hidden states and the logits, in float32."""
    hidden, *rest = jax.device_get(_forward(config, params, batch["tokens"]))
    return [np.asarray(array, np.float32) for array in (*hidden, *rest)]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Params, tokens: Array) -> tuple[Array | None, ...]:
    out = forward(config, params, tokens, outputs=("hidden", "final_hidden"))
    return out.hidden, out.final_hidden, out.logits


def _sizes(arrays: list[np.ndarray]) -> list[float]:
    return [float(np.sqrt(np.mean(np.square(array)))) for array in arrays]
