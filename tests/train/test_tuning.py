"""Fine-tuning as a whole: what the laws of objectives do not show."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import InputError, ModelConfig, forward
from model.adapters import Adapter
from model.store import open_model
from train import HParams, Recipe, RunOptions, TrainConfig, population, train, weights
from train.data import PairRows, completions
from train.data.shards import TokenShards
from train.lanes.build import compiled_programs
from train.objectives import Instruction, Preference, Rated, Reward
from train.objectives.log_probs import summed_log_probs
from train.reference import keep_reference, read_reference
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=4, d_ff=32, max_seq_len=32)
TRAIN = TrainConfig(batch_size=8, seq_len=32, norms=False, schedule="constant")
QUIET = RunOptions(evaluate_tokens=512, checkpoint_every=2)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run of a few steps, to be tuned."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(Recipe(CONFIG, TRAIN, HParams(learning_rate=1e-2), data=data, steps=4), run=run, shell=QUIET)
    return run


def recipe(base, folder, objective, steps=3, **hparams):
    config, objective = objective.fit(CONFIG)
    values = HParams(**{"learning_rate": 1e-2, "weight_decay": 0.0} | hparams)
    return Recipe(config, TRAIN, values, data=folder, steps=steps, objective=objective, start=weights(base))


def test_the_loss_of_a_conversation_does_not_see_its_neighbour(base, examples):
    """The gradient of the second document's own loss keeps every bit when the first one is another of its length."""
    config, params, _ = open_model(base)
    random = np.random.default_rng(0)
    tokens = random.integers(3, 320, (2, 32)).astype(np.int32)
    segments = np.broadcast_to(np.repeat(np.array([1, 2], np.int32), [14, 18]), (2, 32))
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segments,
        "positions": np.broadcast_to(np.concatenate([np.arange(14), np.arange(18)]).astype(np.int32), (2, 32)),
        "loss_mask": (segments == 2).astype(np.float32),
    }
    loss = functools.partial(Instruction().loss, config)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, None, batch)[0]))
    other = tokens.copy()
    other[:, :14] = random.integers(3, 320, (2, 14))
    assert (other != tokens).any()
    changed = batch | {"tokens": other, "targets": np.roll(other, -1, axis=1)}
    changed["targets"][:, -1] = batch["targets"][:, -1]
    one, two = gradient(params, batch), gradient(params, changed)
    # The table's rows of tokens that only one of them reads are 0 in both.
    jax.tree.map(np.testing.assert_array_equal, one, two)
    mixed = changed | {"segment_ids": np.ones_like(segments)}
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), one, gradient(params, mixed))))


def test_twelve_trials_of_dpo_are_one_program(base, examples, record, tmp_path):
    """Four betas and three rates, each equal to its run alone."""
    folder = examples("preference")
    config, params, _ = open_model(base)
    objective = Preference(reference=keep_reference(folder, config, params))
    settings = [(beta, rate) for beta in (0.03, 0.1, 0.3, 1.0) for rate in (1e-3, 3e-3, 1e-2)]
    recipes = [recipe(base, folder, objective, beta=beta, learning_rate=rate) for beta, rate in settings]
    before = compiled_programs()
    population(recipes, runs=[tmp_path / str(number) for number in range(12)], shell=QUIET)
    assert compiled_programs() == before + 1
    for number in (0, 7):
        train(recipes[number], run=tmp_path / f"alone-{number}", shell=QUIET)
        assert record(tmp_path / f"alone-{number}") == record(tmp_path / str(number))
    assert compiled_programs() == before + 1
    assert read_metrics(tmp_path / "0")[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # the policy is its reference


def test_the_kept_reference_is_that_of_the_frozen_model(base, examples, tmp_path):
    """Scored once or in every step: the same loss, whatever weight the longer answer's tokens have.

    An adapter without a name compares with its base.
    """
    folder = examples("preference")
    config, params, _ = open_model(base)
    name = keep_reference(folder, config, params)
    assert keep_reference(folder, config, params) == name
    shards = TokenShards(folder, "train")
    kept = read_reference(shards, name)
    batch = PairRows(shards, 32, kept).take(np.arange(8))
    hidden = jax.jit(lambda tokens: forward(config, params, tokens, outputs=("final_hidden",)).final_hidden)
    for side in ("chosen", "rejected"):
        tokens, mask = batch[f"{side}_tokens"], batch[f"{side}_mask"]
        found = summed_log_probs(config, params, hidden(tokens), jnp.asarray(tokens), jnp.asarray(mask[None]))[0]
        np.testing.assert_allclose(batch[f"reference_{side}"], found, rtol=1e-5)
    assert len(completions(shards)) == len(kept)
    runs = {}
    for reference in (name, None):
        objective = Preference(reference=reference, adapter=Adapter(rank=2))
        train(recipe(base, folder, objective, ld_alpha=0.5), run=tmp_path / str(reference), shell=QUIET)
        runs[reference] = [line["loss"] for line in read_metrics(tmp_path / str(reference))]
    np.testing.assert_allclose(runs[name], runs[None], rtol=1e-5)
    for split in ("train", "validation"):  # as an older version kept it
        (folder / "reference" / name / f"{split}-tail.npy").unlink()
    assert keep_reference(folder, config, params) == name
    objective = Preference(reference=name)
    with pytest.raises(InputError, match=r"kept without the parts that ld_alpha=0\.5 weighs; remove their folder"):
        train(recipe(base, folder, objective, ld_alpha=0.5), run=tmp_path / "weighted", shell=QUIET)
    assert not (tmp_path / "weighted").exists()
    whole = objective.rows(shards, 32).take(np.arange(8))
    np.testing.assert_array_equal(whole["reference_chosen"], batch["reference_chosen"])
    assert not whole["reference_chosen_tail"].any()
    (folder / "reference" / name / "train.npy").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        train(recipe(base, folder, Preference(reference=name)), run=tmp_path / "damaged", shell=QUIET)
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("adapter", [None, Adapter(rank=2)])
def test_a_reward_model_of_a_language_model(adapter, base, examples, crash, record, tmp_path):
    """Its head is drawn by the seed and trained, beside an adapter too; resumed it is the same run and opens whole."""
    folder = examples("preference")
    objective = Reward(adapter=adapter, trainable=() if adapter is None else ("head",))
    one = recipe(base, folder, objective, steps=4, seed=3)
    train(one, run=tmp_path / "run", shell=QUIET)
    with crash(3):
        train(one, run=tmp_path / "resumed", shell=QUIET)
    other = one.replace(hparams=one.hparams.replace(seed=4))
    population([one, other], runs=[tmp_path / "resumed", tmp_path / "other"], shell=QUIET)
    assert record(tmp_path / "resumed") == record(tmp_path / "run") != record(tmp_path / "other")
    opened = open_model(tmp_path / "run")
    assert opened.config.head == "scalar"
    assert opened.params["head"]["weight"].shape == (16, 1)
    evaluate = functools.partial(Reward().evaluate, opened.config, opened.params, None)
    batches = Reward().validation(opened.config, TRAIN, folder, 512)
    found = [jax.jit(lambda batch: evaluate(batch))(batch) for batch in batches]
    weight = np.array([float(one["loss_examples"]) for one in found])
    loss = np.dot(weight, [float(one["loss"]) for one in found]) / weight.sum()
    assert loss == pytest.approx(read_metrics(tmp_path / "run")[-1]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "objective", "hparams", "message"),
    [
        ("chat", Preference(reference="fixed"), {}, "is a data folder of kind=chat"),
        ("preference", Instruction(), {}, "is a data folder of kind=preference"),
        ("preference", Preference(), {}, "compares with a reference model: keep its log-probabilities"),
        ("preference", Preference(reference="unknown"), {}, "has no reference log-probabilities unknown"),
        ("preference", Preference(kind="robust", reference="fixed"), {"label_smoothing": 0.5}, "must be below 0.5"),
        ("preference", Preference(kind="exo_pair", reference="fixed"), {}, "needs a label_smoothing above 0"),
        ("rated", Rated(reference="fixed"), {"beta": 0.0}, "beta=0 must be above 0"),
        ("preference", Reward(adapter=Adapter(rank=2)), {}, "has no head of the model's shape"),
        ("preference", Reward(adapter=Adapter(rank=2), trainable=("layers", "head")), {}, "which the adapter changes"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_a_folder_is_made(
    kind, objective, hparams, message, base, examples, tmp_path
):
    with pytest.raises(InputError, match=message):
        train(recipe(base, examples(kind), objective, **hparams), run=tmp_path / "run", shell=QUIET)
    assert not (tmp_path / "run").exists()


def test_unknown_losses_and_divergences_are_listed():
    with pytest.raises(InputError, match="unknown preference loss 'dpoo'"):
        Preference(kind="dpoo")
    with pytest.raises(InputError, match="divergence 'kl'"):
        Preference(divergence="kl")
    with pytest.raises(InputError, match="is defined for divergence='reverse_kl' alone"):
        Preference(kind="kto", divergence="forward_kl")
    with pytest.raises(InputError, match="weighting 'dpo'"):
        Preference(weighting="dpo")
    with pytest.raises(InputError, match="in sorted order, so that no pair has a weight"):
        Preference(kind="aot", weighting="wpo")
