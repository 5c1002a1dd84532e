"""Cuts of a batch and of a sequence change where the numbers are made, not the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Execution, Experts, InputError, ModelConfig, init
from train import HParams, TrainConfig
from train.loop.memory import Memory
from train.objectives import LanguageModeling
from train.step import eval_step, gradients

DENSE = ModelConfig(vocab_size=64, d_model=16, num_layers=1, num_heads=4, d_ff=24, max_seq_len=16)
MODELS = {
    "dense": DENSE,
    "experts": DENSE.replace(experts=Experts(count=4, top_k=2, d_ff=12, dispatch="dropless")),
}
TRAIN = TrainConfig(batch_size=8, seq_len=16)
# A cut's balance loss is its own: it alone may depend on the cuts.
HPARAMS = HParams(z_loss=0.1, balance_loss=0.0, router_z_loss=0.1)


@pytest.fixture(scope="module")
def batch():
    """The first row has one token that counts, the last one all of them."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (8, 17)).astype(np.int32)
    mask = (np.arange(16) < np.linspace(1, 16, 8).round()[:, None]).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}


@pytest.fixture(scope="module")
def of_cuts(batch, random_params):
    @functools.cache
    def compute(name, **cuts):
        function = jax.jit(functools.partial(gradients, MODELS[name], TRAIN, execution=Execution(**cuts)))
        return jax.device_get(function(random_params(MODELS[name]), batch, HPARAMS))

    return compute


def check_equal(one, other):
    (grads, metrics), (expected_grads, expected) = one, other
    assert metrics.keys() == expected.keys()
    for name in expected.keys() - {"balance_loss"}:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        error, size = np.linalg.norm(value - wanted), np.linalg.norm(wanted)
        assert error <= 1e-5 * size, f"{jax.tree_util.keystr(path)} is off by {error / size}"
        assert size > 0, "a gradient of nothing tells nothing"


@pytest.mark.parametrize("cuts", [4, pytest.param(2, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MODELS)
def test_cuts_of_a_batch_add_up(of_cuts, name, cuts):
    check_equal(of_cuts(name, accumulate=cuts), of_cuts(name))


@pytest.mark.parametrize(
    ("cuts", "chunks"), [(1, 2), (4, 8), *(pytest.param(*both, marks=pytest.mark.long) for both in ((1, 8), (4, 4)))]
)
def test_chunks_of_a_sequence_add_up(of_cuts, cuts, chunks):
    check_equal(of_cuts("dense", accumulate=cuts, loss_chunks=chunks), of_cuts("dense"))


def test_a_mean_of_the_cuts_means_would_be_wrong(of_cuts, batch, random_params):
    """The mask is uneven enough for the tests above to tell."""
    metrics = jax.jit(lambda params, part: LanguageModeling().loss(DENSE, params, None, part)[0])
    halves = [{name: values[cut::2] for name, values in batch.items()} for cut in range(2)]
    mean = np.mean([metrics(random_params(DENSE), half) for half in halves])
    assert abs(mean / of_cuts("dense")[1]["loss"] - 1) > 1e-4


@pytest.mark.parametrize(("name", "of"), [("accumulate", "rows"), ("loss_chunks", "tokens in a row")])
def test_what_does_not_divide_a_batch_is_said(batch, random_params, name, of):
    params, execution = random_params(DENSE), Execution(**{name: 7})
    with pytest.raises(InputError, match=f"{name}=7 does not divide the batch's .* {of}"):
        jax.eval_shape(functools.partial(gradients, DENSE, TRAIN, execution=execution), params, batch, HPARAMS)
    if name == "loss_chunks":
        with pytest.raises(InputError, match="loss_chunks=7"):
            jax.eval_shape(functools.partial(eval_step, DENSE, execution=execution), params, batch)


def test_chunks_need_no_room_for_all_logits():
    """Compiled only: the logits of 256 tokens over 2¹⁸ words are 256 MiB."""
    vocab, seq = 2**18, 256
    config = DENSE.replace(vocab_size=vocab, max_seq_len=seq)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)

    def temporary(chunks):
        own, how = LanguageModeling(), Execution(loss_chunks=chunks)
        loss = lambda params, batch, hparams: own.loss(config, params, None, batch, hparams, execution=how)
        function = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return Memory.of(function.lower(params, {"tokens": tokens, "targets": tokens}, HPARAMS).compile()).temporary

    plain = temporary(1)
    assert plain > 4 * seq * vocab
    assert temporary(16) < plain / 4
