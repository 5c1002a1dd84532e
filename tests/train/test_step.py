"""A training step is the textbook's: schedules, AdamW, clipping, loss, and hyperparameters that compile nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model import ModelConfig, apply, init
from train import HParams, TrainConfig, eval_step, init_state, train_step
from train.objectives import LanguageModeling
from train.optimizer import decay_mask
from train.step import metric_names

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=16)
LEARNED = CONFIG.replace(
    position="learned", norm="layernorm", use_bias=True, gated=False, activation="gelu_tanh", tie_embeddings=False
)
TRAIN = TrainConfig(batch_size=4, seq_len=8, schedule="constant", norms=False)
DROPPING = TRAIN.replace(schedule="wsd", dropout=True)


def loss_and_metrics(config, params, batch, hparams):
    """What is differentiated, and the metrics, of a whole batch."""
    total, sums = LanguageModeling().loss(config, params, None, batch, hparams)
    return total, LanguageModeling().finish(sums)


step_of = jax.jit(train_step, static_argnums=(0, 1))
init_of = jax.jit(init_state, static_argnums=(0, 1))
gradient_of = jax.jit(jax.grad(loss_and_metrics, argnums=1, has_aux=True), static_argnums=0)


@functools.cache
def start(config=CONFIG, train_config=TRAIN):
    return init_of(config, train_config, HParams(seed=1))


def random_batch(seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 32, (TRAIN.batch_size, TRAIN.seq_len + 1)).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same_bits(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(leaves_of(a), leaves_of(b), strict=True))


# ---- the update


def test_a_step_is_adamw_written_by_hand():
    """Loshchilov and Hutter 2019, algorithm 2, in float64, with clipping before it and decay on matrices only."""
    hparams = HParams(learning_rate=0.01, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3, clip_norm=0.5)
    state = start(LEARNED)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    first, second = ([np.zeros(leaf.shape) for leaf in leaves_of(state.params)] for _ in range(2))
    for step in range(1, 4):
        batch = random_batch(step)
        grads, _ = gradient_of(LEARNED, state.params, batch, hparams)
        grads = [np.float64(grad) for grad in leaves_of(grads)]
        norm = math.sqrt(sum((grad**2).sum() for grad in grads))
        assert norm > 0.5, "clipping must do something here"
        new, metrics = step_of(LEARNED, TRAIN, state, batch, hparams)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        for index, (before, after, grad) in enumerate(
            zip(leaves_of(state.params), leaves_of(new.params), grads, strict=True)
        ):
            grad = grad * 0.5 / norm
            first[index] = 0.8 * first[index] + 0.2 * grad
            second[index] = 0.9 * second[index] + 0.1 * grad**2
            update = first[index] / (1 - 0.8**step) / (np.sqrt(second[index] / (1 - 0.9**step)) + 1e-3)
            if "weight" in names[index] or "tokens" in names[index]:
                update += 0.3 * before
            np.testing.assert_allclose(after, before - 0.01 * update, atol=2e-6, err_msg=names[index])
        state = new
    assert int(state.step) == 3


def test_a_step_is_optax_adamw():
    """The same, against Optax's own chain of clipping, AdamW and a schedule."""
    train_config = TRAIN.replace(schedule="cosine")
    hparams = HParams(learning_rate=0.02, weight_decay=0.1, warmup_steps=2, total_steps=6, epsilon=1e-4, clip_norm=0.7)
    falling = (0.1 + 0.9 * (1 + math.cos(math.pi * min(step / 4, 1))) / 2 for step in range(6))
    rates = [0.01, 0.02, *(0.02 * factor for factor in falling)]
    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("weight", "tokens"), params)
    adamw = optax.adamw(lambda count: jnp.array(rates)[count], 0.9, 0.95, 1e-4, weight_decay=0.1, mask=mask)
    optimizer = optax.chain(optax.clip_by_global_norm(0.7), adamw)

    @jax.jit
    def update(params, state, batch):
        grads, _ = gradient_of(CONFIG, params, batch, hparams)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = start(CONFIG, train_config)
    params, optimizer_state = state.params, optimizer.init(state.params)
    for step in range(8):
        state, metrics = step_of(CONFIG, train_config, state, random_batch(step), hparams)
        params, optimizer_state = update(params, optimizer_state, random_batch(step))
        assert float(metrics["learning_rate"]) == pytest.approx(rates[step], rel=1e-5)
        for ours, theirs in zip(leaves_of(state.params), leaves_of(params), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_clipping_only_shortens_what_is_too_long():
    state, batch = start(), random_batch()
    step = lambda clip: step_of(CONFIG, TRAIN, state, batch, HParams(clip_norm=clip, beta1=0.0))[0]
    moment = lambda new: leaves_of(new.optimizer[0].mu)
    grads, _ = gradient_of(CONFIG, state.params, batch, HParams())
    for unreached in (0.0, 1e6):
        for mu, grad in zip(moment(step(unreached)), leaves_of(grads), strict=True):
            np.testing.assert_allclose(mu, grad, atol=1e-6)
    clipped = math.sqrt(sum((np.float64(mu) ** 2).sum() for mu in moment(step(0.01))))
    assert clipped == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, LEARNED, CONFIG.replace(use_bias=True, tie_embeddings=False)])
def test_every_parameter_has_a_role(config):
    """A new parameter must be entered in the table; it is never silently decayed or not."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(shapes))
    assert len(mask) == len(jax.tree.leaves(shapes))
    for path, decays in mask:
        assert decays == (path[-1].key in ("weight", "tokens")), path
    with pytest.raises(KeyError, match="embedding/gadget"):
        decay_mask({"embedding": {"gadget": jnp.zeros(2)}})


# ---- the loss


def test_the_loss_is_cross_entropy_and_the_total_adds_z_loss(random_params):
    params, batch = random_params(CONFIG), random_batch()
    mask = np.random.default_rng(5).integers(0, 2, batch["tokens"].shape).astype(np.float32)
    loss = jax.jit(loss_and_metrics, static_argnums=0)
    logits = np.float64(jax.jit(apply, static_argnums=0)(CONFIG, params, batch["tokens"]))
    log_z = np.log(np.exp(logits).sum(axis=-1))
    nats = log_z - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    for weights, given in ((np.ones_like(mask), batch), (mask, {**batch, "loss_mask": mask})):
        total, metrics = loss(CONFIG, params, given, HParams(z_loss=0.01))
        assert float(metrics["loss"]) == pytest.approx((nats * weights).sum() / weights.sum(), rel=1e-5)
        z_loss = 0.01 * (log_z**2 * weights).sum() / weights.sum()
        assert float(total) == pytest.approx(float(metrics["loss"]) + z_loss, rel=1e-5)
        assert float(metrics["total_loss"]) == float(total)
        assert float(metrics["loss_tokens"]) == weights.sum()
        evaluated = jax.jit(eval_step, static_argnums=0)(CONFIG, params, given)
        assert float(evaluated["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_a_masked_target_does_not_matter(random_params):
    params, batch = random_params(CONFIG), random_batch()
    mask = np.ones_like(batch["targets"])
    mask[:, 3:] = 0
    other = np.where(mask == 1, batch["targets"], 31 - batch["targets"])
    one, two = (
        gradient_of(CONFIG, params, {**batch, "targets": targets, "loss_mask": mask}, HParams(z_loss=0.1))
        for targets in (batch["targets"], other)
    )
    assert same_bits(one, two)
    nothing, metrics = gradient_of(CONFIG, params, {**batch, "loss_mask": np.zeros_like(mask)}, HParams())
    assert float(metrics["loss"]) == 0
    assert all((leaf == 0).all() for leaf in leaves_of(nothing)), "a batch without targets teaches nothing, not NaN"


def test_memorises_one_batch():
    state, batch = start(), random_batch()
    first = None
    for _ in range(40):
        state, metrics = step_of(CONFIG, TRAIN, state, batch, HParams(learning_rate=0.02))
        first = float(metrics["loss"]) if first is None else first
    assert abs(first - math.log(32)) < 1, "an untrained model knows nothing"
    assert float(metrics["loss"]) < 0.5 * first


# ---- what must not happen


def assert_skipped(before, after, metrics, in_a_row):
    """The batch was seen and counted, and changed nothing else."""
    assert float(metrics["finite"]) == 0
    assert same_bits(after.params, before.params)
    assert same_bits(after.optimizer, before.optimizer)
    assert int(after.step) == int(before.step) + 1
    assert int(after.skipped) == float(metrics["skipped"]) == int(before.skipped) + 1
    assert int(after.skipped_in_a_row) == float(metrics["skipped_in_a_row"]) == in_a_row


def test_a_step_that_overflows_is_skipped_and_counted():
    state, _ = step_of(CONFIG, TRAIN, start(), random_batch(), HParams())
    for in_a_row, rate in enumerate((1e30, 3e38), start=1):
        new, metrics = step_of(CONFIG, TRAIN, state, random_batch(1), HParams(learning_rate=rate))
        assert_skipped(state, new, metrics, in_a_row)
        state = new
    new, metrics = step_of(CONFIG, TRAIN, state, random_batch(1), HParams())
    assert float(metrics["finite"]) == 1
    assert int(new.step) == int(state.step) + 1
    assert (int(new.skipped), int(new.skipped_in_a_row)) == (2, 0)
    assert not same_bits(new.params, state.params)


def test_so_is_one_of_a_nan_parameter():
    state = start()
    scale = state.params["final_norm"]["scale"].at[0].set(jnp.nan)
    state = state.replace(params={**state.params, "final_norm": {"scale": scale}})
    new, metrics = step_of(CONFIG, TRAIN, state, random_batch(), HParams())
    assert_skipped(state, new, metrics, 1)


def test_metrics_are_those_that_are_named():
    for train_config in (TRAIN, TRAIN.replace(norms=True)):
        step = functools.partial(train_step, CONFIG, train_config)
        _, metrics = jax.eval_shape(step, start(), random_batch(), HParams())
        assert set(metrics) == set(metric_names(CONFIG, train_config))


def test_the_seed_decides():
    batch = random_batch()
    states = [init_of(CONFIG, DROPPING, HParams(seed=seed)) for seed in (7, 7, 8)]
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0].params, states[2].params)
    hparams = HParams(dropout_rate=0.5)
    runs = [step_of(CONFIG, DROPPING, state, batch, hparams) for state in states[:2]]
    assert same_bits(runs[0], runs[1])
    same_params = states[0].replace(step=jnp.int32(1))
    other = step_of(CONFIG, DROPPING, same_params, batch, hparams)[1]
    assert float(other["loss"]) != float(runs[0][1]["loss"]), "every step drops others"


def test_init_scale_multiplies_matrices_only():
    one, two = (init_of(LEARNED, TRAIN, HParams(init_scale=scale)).params for scale in (1.0, 2.0))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal((1 if path[-1].key in ("scale", "bias") else 2) * a, b)


# ---- hyperparameters

OTHERS = {
    "mask_rate": 0.3,
    "lora_rank": 2,
    "lora_alpha": 3.0,
    "learning_rate": 1e-4,
    "weight_decay": 0,
    "beta1": 0.5,
    "beta2": 0.99,
    "epsilon": 1e-6,
    "warmup_steps": 5,
    "warmup_fraction": 0.5,
    "total_steps": 50,
    "decay_fraction": 1,
    "decay_steps": 3,
    "final_fraction": 0,
    "clip_norm": 2,
    "z_loss": 1e-4,
    "balance_loss": 0.02,
    "router_z_loss": 1e-4,
    "dropout_rate": 0.25,
    "beta": 0.2,
    "label_smoothing": 0.1,
    "simpo_gamma": 1.0,
    "nll_weight": 1.0,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "divergence_alpha": 2.0,
    "ld_alpha": 0.5,
    "center_weight": 0.01,
    "init_scale": 0.5,
    "seed": 3,
    "data_seed": 5,
}


def test_no_hyperparameter_compiles_anything():
    assert set(OTHERS) == set(HParams.NAMES)
    state, batch = init_of(CONFIG, DROPPING, HParams()), random_batch()
    state, _ = step_of(CONFIG, DROPPING, state, batch, HParams())
    compiled = step_of._cache_size(), init_of._cache_size()
    for hparams in (HParams(), *(HParams(**{name: value}) for name, value in OTHERS.items())):
        init_of(CONFIG, DROPPING, hparams)
        state, _ = step_of(CONFIG, DROPPING, state, batch, hparams)
        for leaf in jax.tree.leaves(hparams):
            assert not jax.typeof(leaf).weak_type
            assert leaf.dtype in (np.float32, np.int32)
    assert (step_of._cache_size(), init_of._cache_size()) == compiled
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state)), (
        "the state stays strong, or a step would recompile"
    )
