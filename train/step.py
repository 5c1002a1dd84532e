"""Run one training step or one evaluation step: pure functions, to be jitted, vmapped and sharded freely."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from model import Execution, ModelConfig, Params, forward, head
from model.ambient import lenient
from model.errors import InputError
from model.target import target
from train.config import HParams, TrainConfig
from train.norms import groups_of, norms_by_group, total_norm
from train.objectives.language_modeling import LanguageModeling
from train.objectives.objective import Batch, Metrics, Objective
from train.objectives.tokens import cross_entropy
from train.optimizer import clip_by_norm, make_optimizer
from train.schedule import rate
from train.state import TrainState

_NORMS = ("grad_norm", "param_norm", "update_norm")
_METRICS = (*_NORMS, "learning_rate", "finite", "skipped", "skipped_in_a_row")


def metric_names(
    config: ModelConfig, train_config: TrainConfig, objective: Objective = LanguageModeling()
) -> tuple[str, ...]:
    """Return the names of the metrics of `train_step`."""
    groups = groups_of(config, objective) if train_config.norms else ()
    norms = [f"{name}/{group}" for name in _NORMS for group in groups]
    return (*objective.metric_names(config), *_METRICS, *norms)


@lenient()
def train_step(
    config: ModelConfig,
    train_config: TrainConfig,
    state: TrainState,
    batch: Batch,
    hparams: HParams,
    *,
    objective: Objective = LanguageModeling(),
    frozen: Params | None = None,
    execution: Execution = Execution(),
    active: bool | Bool[Array, ""] = True,
) -> tuple[TrainState, Metrics]:
    """Update `state.params` once; the parameters `frozen` (`Objective.split`) are only read.

    active: whether to update at all; if false, the state is returned unchanged.

    metrics: those of the objective (loss and total_loss; for text in nats per unmasked token), grad_norm (before
    clipping), param_norm (after the update), update_norm (of what was subtracted), each also by group if
    `train_config.norms`, learning_rate, finite, skipped and skipped_in_a_row. If the loss, the gradient or the update
    is not finite, `finite` is 0 and the step is skipped: it is counted, and parameters and optimizer are returned
    unchanged.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step) if train_config.dropout else None
    grads, metrics = gradients(
        config, train_config, state.params, batch, hparams, key, objective=objective, frozen=frozen, execution=execution
    )
    grad_norms = norms_by_group(grads)
    grad_norm = total_norm(grad_norms)
    learning_rate = rate(train_config, hparams, state.step)
    optimizer = make_optimizer(config, train_config, hparams)

    def update() -> tuple[Params, Any]:
        """Return what is subtracted from the parameters, and the new state of the optimizer."""
        clipped = clip_by_norm(grads, grad_norm, hparams.clip_norm)
        updates, optimizer_state = optimizer.update(clipped, state.optimizer, state.params)
        return jax.tree.map(lambda leaf: learning_rate * leaf, updates), optimizer_state

    updates, _ = update()
    update_norms = norms_by_group(updates)
    update_norm = total_norm(update_norms)
    finite = jnp.isfinite(metrics["total_loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    updated = finite & active
    take = lambda: (jax.tree.map(jnp.subtract, state.params, updates), update()[1])
    leave = lambda: (state.params, state.optimizer)
    if _on_one_cpu(execution):
        # The branch computes the optimizer's new state again, so that it overwrites the old one (docs/LOG.md).
        params, optimizer_state = jax.lax.cond(updated, take, leave)
    else:
        params, optimizer_state = keep_if(updated, take(), leave())  # a GPU would wait for the value of a condition
    param_norms = norms_by_group(params)
    param_norm = total_norm(param_norms)
    skipped = 1 - finite.astype(jnp.int32)
    step, skipped, skipped_in_a_row = keep_if(
        jnp.asarray(active),
        (state.step + 1, state.skipped + skipped, (state.skipped_in_a_row + 1) * skipped),
        (state.step, state.skipped, state.skipped_in_a_row),
    )
    new = TrainState(
        step=step,
        params=params,
        optimizer=optimizer_state,
        rng=state.rng,
        skipped=skipped,
        skipped_in_a_row=skipped_in_a_row,
    )
    metrics |= {
        "grad_norm": grad_norm,
        "param_norm": param_norm,
        "update_norm": update_norm,
        "learning_rate": learning_rate,
        "finite": finite.astype(jnp.float32),
        "skipped": new.skipped.astype(jnp.float32),
        "skipped_in_a_row": new.skipped_in_a_row.astype(jnp.float32),
    }
    if train_config.norms:
        for name, norms in zip(_NORMS, (grad_norms, param_norms, update_norms), strict=True):
            metrics |= {f"{name}/{group}": norm for group, norm in norms.items()}
    return new, metrics


@lenient()
def gradients(
    config: ModelConfig,
    train_config: TrainConfig,
    params: Params,
    batch: Batch,
    hparams: HParams,
    key: Array | None = None,
    *,
    objective: Objective = LanguageModeling(),
    frozen: Params | None = None,
    execution: Execution = Execution(),
) -> tuple[Params, Metrics]:
    """Return the gradient of `total_loss` over the batch, and its metrics, from `execution.accumulate` microbatches.

    The result does not depend on their number, except for rounding, the experts' balance loss and dropout. Raises
    InputError if it does not divide the batch.
    """
    microbatches, independent = execution.accumulate, _independent_parts(config, params, batch, execution, objective)
    if (rows := _rows(batch)) % microbatches:
        raise InputError(f"accumulate={microbatches} does not divide the batch's {rows} rows")
    count = objective.count(batch)
    own_loss = functools.partial(objective.loss, config, count=count, microbatches=microbatches, execution=execution)
    # Microbatch k of n takes rows k, k + n, k + 2n, …, spread as evenly over the devices as the whole batch: of 8 rows
    # in 2 microbatches the first takes the rows 0, 2, 4, 6 and the second the rows 1, 3, 5, 7.
    split = lambda x, parts: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def one(part: Batch, key: Array | None) -> tuple[dict[str, Array], Params]:
        loss = lambda params: own_loss(params, frozen, part, hparams, key)
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, grads

    def one_of_many(index: int | Array, part: Batch) -> tuple[dict[str, Array], Params]:
        return one(part, None if key is None else jax.random.fold_in(key, index))

    if microbatches > 1:
        parts = (jnp.arange(microbatches), jax.tree.map(lambda x: split(x, microbatches), batch))
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_of_many, *jax.tree.map(lambda x: x[0], parts)))
        add = lambda total, part: (jax.tree.map(jnp.add, total, one_of_many(*part)), None)
        (sums, grads), _ = jax.lax.scan(add, zeros, parts)
    elif independent > 1:
        parts = jax.tree.map(lambda x: split(x, independent), batch)
        made = [one_of_many(index, jax.tree.map(lambda x, i=index: x[i], parts)) for index in range(independent)]
        sums, grads = jax.tree.map(lambda *values: sum(values), *made)
    else:
        sums, grads = one(batch, key)
    return grads, objective.finish(sums)


_WORTH_SPLITTING = 1024  # tokens in a batch, from which on two independent parts are faster on a CPU
_PARAMS_PER_TOKEN = 4096  # with more, adding the gradients of two parts costs more than it saves (docs/LOG.md)


def _independent_parts(
    config: ModelConfig, params: Params, batch: Batch, execution: Execution, objective: Objective
) -> int:
    """Return the number of independent parts of one program that a batch is split into: 2 on a CPU if that is faster.

    XLA's CPU backend splits few operations besides large products into threads, but runs operations that do not depend
    on each other concurrently (docs/LOG.md). Batches of experts stay whole because of their balance loss.
    """
    if config.experts is not None or not objective.separable:
        return 1
    rows, tokens = _rows(batch), max(leaf.size for leaf in jax.tree.leaves(batch))
    trained = sum(leaf.size for leaf in jax.tree.leaves(params))
    worth = tokens >= _WORTH_SPLITTING and trained <= _PARAMS_PER_TOKEN * tokens
    return 2 if _on_one_cpu(execution) and rows % 2 == 0 and worth else 1


def _on_one_cpu(execution: Execution) -> bool:
    return target(execution.platform).platform == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


@lenient()
def eval_step(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    objective: Objective = LanguageModeling(),
    frozen: Params | None = None,
    hparams: HParams | None = None,
    execution: Execution = Execution(),
) -> Metrics:
    """Return {"loss", "loss_tokens"} of one batch, or the objective's own metrics, without dropout.

    No expert drops a token. hparams: read only for an adapter's rank and alpha (`Objective.merged`).
    """
    return objective.evaluate(_dropless(config), params, frozen, batch, hparams=hparams, execution=execution)


@lenient()
def score_step(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    objective: Objective = LanguageModeling(),
    frozen: Params | None = None,
    hparams: HParams | None = None,
    execution: Execution = Execution(),
) -> Float[Array, "batch scored"]:
    """Return the nats of each target where `loss_mask` is 1, else 0, for packed choices (`train.task_sets.pack`).

    Logits are computed where a target is predicted only. The objective says which parameters the model has; no expert
    drops a token. hparams: as in `eval_step`.
    """
    config, params = _dropless(config), objective.merged(params, frozen, hparams)
    inputs = {name: batch[name] for name in ("positions", "segment_ids")}
    out = forward(config, params, batch["tokens"], **inputs, outputs=("final_hidden",), execution=execution)
    assert out.final_hidden is not None
    hidden = jnp.take_along_axis(out.final_hidden, batch["scored"][..., None], axis=1)
    nats, _ = cross_entropy(head(config, params, hidden), batch["targets"])
    return jnp.where(batch["loss_mask"] > 0, nats, 0)


def _dropless(config: ModelConfig) -> ModelConfig:
    """Return the model whose experts drop no token."""
    return config if config.experts is None else config.replace(experts=config.experts.replace(dispatch="dropless"))


def _rows(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def keep_if(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return the tree `new` if the condition holds, else `old`, bit by bit."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
