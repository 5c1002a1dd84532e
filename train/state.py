"""Define the state that training carries from step to step, and initialize it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import PRNGKeyArray

from model import Execution, ModelConfig, Params, init
from model.ambient import lenient
from model.parameterization import names_of, role_of
from train.config import HParams, TrainConfig
from train.objectives.language_modeling import LanguageModeling
from train.objectives.objective import Objective
from train.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """State of training after some steps.

    step: batches seen, int32 []. optimizer: Optax's state. rng: the raw key of dropout, uint32 [words]; the step's key
    is folded from it. skipped, skipped_in_a_row: steps that were not finite and changed nothing, in total and since the
    last finite one, int32 []. Leaves are Any because JAX also fills the tree with shapes, shardings and stacked lanes.
    """

    step: Any
    params: Params
    optimizer: Any
    rng: Any
    skipped: Any
    skipped_in_a_row: Any


@lenient()
def init_state(
    config: ModelConfig,
    train_config: TrainConfig,
    hparams: HParams,
    key: PRNGKeyArray | None = None,
    *,
    objective: Objective = LanguageModeling(),
    frozen: Params | None = None,
    execution: Execution = Execution(),
) -> TrainState:
    """Return the state before the first step, with fresh values of the parameters that the objective trains.

    key None: `jax.random.key(hparams.seed)`. Works under jit and vmap. frozen, execution: accepted for symmetry with
    `train_step`; they do not affect the state.
    """
    del frozen, execution
    key = jax.random.key(hparams.seed) if key is None else key
    init_key, step_key = jax.random.split(key)
    adapter_key = jax.random.fold_in(init_key, 1)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if role_of(names_of(path)) == "vector" else leaf * hparams.init_scale,
        objective.trained(config, init(config, init_key), adapter_key, hparams),
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=jax.tree.map(_in_float32, make_optimizer(config, train_config, hparams).init(params)),
        rng=jax.random.key_data(step_key),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def _in_float32(leaf: Any) -> Any:
    """Cast float64 to float32: Optax gives constants such as Muon's coefficients JAX's default dtype."""
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf
