"""Check whether a model's activations, and their change during training, keep their size as the model grows.

Yang et al. 2022 ("Tensor Programs V"), appendix D: a few steps at several widths distinguish a wrong parameterization
from a right one, much cheaper than a sweep. The check over depth is the same (Dey et al. 2025, "CompleteP").
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments.report.style import MUTED, ORANGE, WIDTH, log_axis, new_figure, note, sequence, styled
from model import Execution, ModelConfig, Params, accounting, forward
from model.ambient import pinned
from model.config import Parameterization
from model.errors import InputError
from train import HParams, TrainConfig, init_state, train_step
from train.config import Optimizer
from train.objectives.objective import Batch

Axis = Literal["width", "depth"]
Quantity = Literal["scale", "change"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("standard", "mup")
TITLES: dict[Parameterization, str] = {"standard": "Standard parameterization", "mup": "muP"}
HOLDS = 2.0  # growth over all sizes up to which a change counts as constant
COMPILING = 1e8  # FLOPs per token of a model whose run takes as long as its compilation, to estimate the time left
DEFAULT = ModelConfig(vocab_size=256, d_model=64, num_layers=3, num_heads=4, max_seq_len=32, tie_embeddings=False)


@pinned()
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
    execution: Execution = Execution(),
    advance: Callable[..., None] = lambda amount, note: None,
) -> dict[str, Any]:
    """Train every size for `steps` steps on one batch (None: random tokens), and measure after each.

    The table has a row for every parameterization and size: "scale" and "change" [seeds][steps + 1][places] are the
    root mean square of the activations and of their difference from the first step's; "loss" [seeds][steps] is before
    each step. Without clipping and weight decay, at a constant rate. `advance(share, note)` is called with shares that
    add up to 1.
    Raises InputError if a size does not fit the heads or the model is not a language model.
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
    # Under muP the output of a random readout shrinks with width by design, which would hide the change.
    zero = not config.tie_embeddings
    models = [(name, size, made.replace(zero_readout=zero and name == "mup")) for name, size, made in models]
    train_config.check(execution)
    if axis == "depth" and execution.scan_layers is None:
        execution = execution.replace(scan_layers=True)  # unrolled, deep models compile slowly
    costs = [accounting.flops_per_token(made, seq_len) + COMPILING for *_, made in models]
    table = []
    for (name, size, made), cost in zip(models, costs, strict=True):
        runs = []
        for seed in seeds:
            runs.append(trajectory(made, train_config, base.replace(seed=seed), batch, steps, execution))
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
    """Return the model at a width (more heads of the same size, the rest in proportion) or depth.

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
    # Heads have a fixed size, so their number must be whole; other widths may be rounded.
    if (name in ("num_heads", "num_kv_heads") and exact != int(exact)) or (value and round(exact) < 1):
        raise InputError(f"width {size} leaves {exact:g} {name} of {value} at width {d_model}; take multiples of it")
    return round(exact)


def places(config: ModelConfig) -> list[str]:
    """Return the places where activations are measured: around every layer, and after the last, in order."""
    layers = [f"layer {i + 1} of {config.num_layers}" for i in range(config.num_layers - 1)]
    return ["embedding", *layers, "last layer", "final hidden", "logits"]


def random_batch(config: ModelConfig, rows: int = 4, seq_len: int = 32, seed: int = 0) -> Batch:
    """Return tokens drawn evenly, each the target of the one before it."""
    length = min(seq_len, config.max_seq_len)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def trajectory(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: HParams,
    batch: Batch,
    steps: int,
    execution: Execution = Execution(),
) -> dict[str, Any]:
    """Return {"scale", "change": [steps + 1][places], "loss": [steps]} of one run."""
    state = _init_state(config, train_config, hparams)
    start = now = activations(config, state.params, batch, execution)
    scale, change, loss = [_sizes(start)], [[0.0] * len(places(config))], []
    for _ in range(steps):
        state, metrics = _train_step(config, train_config, state, batch, hparams, execution=execution)
        now = activations(config, state.params, batch, execution)
        scale.append(_sizes(now))
        change.append(_sizes([a - b for a, b in zip(now, start, strict=True)]))
        loss.append(float(metrics["loss"]))
    return {"scale": scale, "change": change, "loss": loss}


# Three small programs compile faster than one large one, and compilation is most of a check's time.
_init_state = jax.jit(init_state, static_argnums=(0, 1))
_train_step = jax.jit(train_step, static_argnums=(0, 1), static_argnames="execution", donate_argnums=2)


def activations(
    config: ModelConfig, params: Params, batch: Batch, execution: Execution = Execution()
) -> list[np.ndarray]:
    """Return the residual stream before and after every layer, the final hidden states and the logits, in float32."""
    hidden, *rest = jax.device_get(_forward(config, params, batch["tokens"], execution))
    return [np.asarray(array, np.float32) for array in (*hidden, *rest)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _forward(config: ModelConfig, params: Params, tokens: Array, execution: Execution) -> tuple[Array | None, ...]:
    out = forward(config, params, tokens, outputs=("hidden", "final_hidden"), execution=execution)
    return out.hidden, out.final_hidden, out.logits


def _sizes(arrays: list[np.ndarray]) -> list[float]:
    return [float(np.sqrt(np.mean(np.square(array)))) for array in arrays]


def growth(check: dict[str, Any], parameterization: Parameterization, quantity: Quantity) -> dict[str, float]:
    """Return by place the ratio of `quantity` after the last step, largest over smallest size, mean over seeds."""
    rows = [row for row in check["table"] if row["parameterization"] == parameterization]
    small, large = at_the_end(rows[0], quantity), at_the_end(rows[-1], quantity)
    return {name: large[name] / small[name] if small[name] else math.inf for name in compared(rows)}


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """Return the places that all sizes have: over depth the embedding, the last layer and those after it."""
    return [name for name in rows[0]["places"] if all(name in row["places"] for row in rows)]


def at_the_end(row: dict[str, Any], quantity: Quantity) -> dict[str, float]:
    """Return by place the mean over seeds after the last step."""
    return dict(zip(row["places"], np.mean([run[-1] for run in row[quantity]], axis=0).tolist(), strict=True))


def judge(check: dict[str, Any], parameterization: Parameterization) -> dict[str, Any]:
    """Return {"holds", "place", "growth"}: whether the change keeps its size, and the place of largest deviation.

    The change is judged, not the activations, which are dominated by their initial values, whether the change grows or
    shrinks with size (in that case layers stop learning). Logits through a tied table are left out under "mup": its
    start is not zero, and the random part of them shrinks with 1/√width by design.
    """
    factors = growth(check, parameterization, "change")
    if parameterization == "mup" and check["config"]["tie_embeddings"]:
        factors.pop("logits")
    place = max(factors, key=lambda name: abs(math.log(factors[name])) if factors[name] > 0 else math.inf)
    return {"holds": 1 / HOLDS < factors[place] < HOLDS, "place": place, "growth": factors[place]}


@styled
def coordinate_figure(check: dict[str, Any]) -> Figure:
    """Draw the size of the activations, and of their change by training, over width or depth; one line per place."""
    names = list(dict.fromkeys(row["parameterization"] for row in check["table"]))
    figure = new_figure(WIDTH, 6.2)
    panels = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    quantities: dict[Quantity, str] = {"scale": "activations (RMS)", "change": "change since the start (RMS)"}
    for line, (quantity, label) in zip(panels, quantities.items(), strict=True):
        seen = []
        for axes, name in zip(line, names, strict=True):
            rows = [row for row in check["table"] if row["parameterization"] == name]
            places = compared(rows)
            for place, colour in zip(places, [*sequence(len(places) - 1), ORANGE], strict=True):
                values = [at_the_end(row, quantity)[place] for row in rows]
                axes.plot(check["sizes"], values, "o-", color=colour, label=place)
                seen += [value for value in values if value > 0]
            factors = growth(check, name, quantity)
            most = max(factors, key=lambda place: abs(math.log(factors[place])) if factors[place] else math.inf)
            axes.set_title(TITLES[name] if quantity == "scale" else "")
            note(axes, f"most: {most}, ×{factors[most]:.2g}")
        log_axis(line[0].yaxis, min(seen), max(seen))
        line[0].set_ylabel(label)
    for axes in panels[-1]:
        log_axis(axes.xaxis, check["sizes"][0], check["sizes"][-1])
        axes.set_xticks(check["sizes"], [f"{size:,}" for size in check["sizes"]])
        axes.set_xlabel("d_model" if check["axis"] == "width" else "layers")
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"After {check['steps']} steps of {check['optimizer']} at learning rate {check['learning_rate']:g}",
        fontsize=10,
        color=MUTED,
    )
    return figure
