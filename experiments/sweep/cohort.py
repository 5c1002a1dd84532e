"""Group trials into cohorts of one static shape, and compute how many lanes fit into one program."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.sweep.trial import Trial
from model import ModelConfig, accounting, init
from model.layout import layer_kinds
from model.weights import bytes_of
from train import HParams, TrainConfig, init_state
from train.lanes.build import frozen_shapes, prefers_vmap
from train.loop.memory import device_memory
from train.objectives import Objective
from train.overlay import OBJECTIVE

_MOST_SEQUENTIAL = 1  # several lanes would evict each other's state from the cache
_MOST_VMAPPED = 64
_USABLE = 0.5  # share of a device's memory: the prediction is rough, and other programs need memory too


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Trials of one static shape. name: `Trial.cohort`. label: the fields that distinguish the cohort."""

    name: str
    label: str
    trials: tuple[Trial, ...]

    @property
    def config(self) -> ModelConfig:
        """The model of all its trials."""
        return self.trials[0].recipe.model

    @property
    def train_config(self) -> TrainConfig:
        """The TrainConfig of all its trials."""
        return self.trials[0].recipe.train


def group(trials: Iterable[Trial]) -> list[Cohort]:
    """Return the cohorts, in the order of their first trials."""
    members: dict[str, list[Trial]] = {}
    for trial in trials:
        members.setdefault(trial.cohort, []).append(trial)
    labels = _labels([found[0] for found in members.values()])
    return [Cohort(name, label, tuple(found)) for (name, found), label in zip(members.items(), labels, strict=True)]


def lanes_for(trial: Trial, count: int, limit: int | None = None, memory: int | None = None) -> int:
    """Return the number of lanes for `count` trials, so that the last batch is about as full as the others.

    At most `limit` (None: one where lanes run sequentially), and what the memory of a device (bytes; None: this one's)
    is predicted to hold; at least one.
    """
    memory = device_memory() if memory is None else memory
    most = _MOST_VMAPPED if prefers_vmap() else _MOST_SEQUENTIAL
    state, temporary = state_bytes(trial), temporary_bytes(trial)
    once, each = (0, state + temporary) if prefers_vmap() else (temporary, state)
    fit = max(1, int((_USABLE * memory - once - frozen_bytes(trial)) // each))
    most = min(limit or most, fit)
    return math.ceil(count / math.ceil(count / most))


def state_bytes(trial: Trial) -> int:
    """Return the bytes of one lane's state, which are also those of its checkpoint."""
    return _state_bytes(trial.recipe.model, trial.recipe.train, trial.recipe.objective)


@functools.lru_cache(maxsize=256)
def _state_bytes(config: ModelConfig, train_config: TrainConfig, objective: Objective) -> int:
    state = jax.eval_shape(functools.partial(init_state, config, train_config, objective=objective), HParams())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def temporary_bytes(trial: Trial) -> int:
    """Predict a lane's temporary bytes: gradients, updates, and the activations for the backward pass.

    Of a layer and token: residuals and norms, queries, keys and values, the scores of whole rows, the feed-forward;
    once a layer under remat. Of the head the logits, their probabilities and gradients.
    """
    config, train_config, execution = trial.recipe.model, trial.recipe.train, trial.execution
    tokens = train_config.tokens_per_step // execution.accumulate
    layer = 6 * config.d_model + 2 * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer += 3 * config.num_heads * train_config.seq_len
    layer += 4 * (config.d_ff if config.experts is None else config.experts.top_k * config.experts.d_ff)
    layers = len(layer_kinds(config))
    floats = layer + layers * config.d_model if execution.remat == "full" else layers * layer
    size = jnp.dtype(config.compute_dtype).itemsize
    logits = 3 * 4 * config.vocab_size / execution.loss_chunks
    return int(2 * _trained_bytes(config, trial.recipe.objective) + tokens * (floats * size + logits))


def frozen_bytes(trial: Trial) -> int:
    """Return the bytes of the parameters that no lane trains, on the devices once."""
    return bytes_of(frozen_shapes(trial.recipe.model, trial.recipe.objective))


@functools.lru_cache(maxsize=256)
def _trained_bytes(config: ModelConfig, objective: Objective) -> int:
    if not objective.freezes:
        return accounting.parameter_bytes(config)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return bytes_of(jax.eval_shape(functools.partial(objective.trained, config), params, jax.random.key(0)))


def memory_bytes(trial: Trial, lanes: int) -> int:
    """Predict the bytes on a device that trains this many lanes: states, temporary memory and frozen parameters."""
    temporary = (lanes if prefers_vmap() else 1) * temporary_bytes(trial)
    return lanes * state_bytes(trial) + temporary + frozen_bytes(trial)


def _labels(trials: list[Trial]) -> list[str]:
    """Return the fields in which they differ, except fields that are derived from others."""
    recipes = [trial.recipe for trial in trials]
    flat = [_fields(trial) for trial in trials]
    plain = [{name: str(value) for name, value in fields.items()} for fields in flat]
    shared = [name for name in flat[0] if all(name in fields for fields in flat)]  # not those of one objective
    names = [name for name in shared if len({fields[name] for fields in plain}) > 1]
    given = [name for name in names if not all(name in recipe.model.derived for recipe in recipes)]
    return [", ".join(f"{name}={_short(fields[name])}" for name in given) for fields in flat]


def _fields(trial: Trial) -> dict[str, Any]:
    """Return the fields of a program, as settings name them."""
    recipe = trial.recipe
    parts = (recipe.model, recipe.train, trial.execution)
    flat = {name: value for part in parts for name, value in part.to_dict().items()}
    inside = {name: value for name, value in recipe.objective.to_dict().items() if name != "name"}
    of_objective = {f"{OBJECTIVE}.{name}": value for name, value in inside.items()}
    return flat | {OBJECTIVE: recipe.objective.NAME} | of_objective


def _short(value: Any) -> str:
    """Return a short text for a part of a model: its values without names."""
    return "/".join(map(str, value.values())) if isinstance(value, dict) else str(value)
