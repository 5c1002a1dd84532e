"""Losses and gradients of fine-tuning are TRL's, on a tiny model with fixed batches. Without TRL they are skipped."""

import collections
import functools
import types

import jax
import numpy as np
import pytest

from model import ModelConfig, init
from model.convert import save_hf
from train import HParams, Recipe, RunOptions, TrainConfig, train, weights
from train.data import PairRows
from train.data.examples.batches import Conversations
from train.data.shards import TokenShards
from train.objectives import Instruction, Preference, Rated, Reward
from train.reference import keep_reference
from train.run.metrics import read_metrics

pytest.importorskip("trl", reason="TRL is not installed: make peers")
torch = pytest.importorskip("torch")

CONFIG = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=32)
ROWS, SEQ = 4, 24
# TRL's name → ours, with a label smoothing. TRL's "sigmoid" takes label_smoothing and does not read it.
PAIR_LOSSES = {
    "sigmoid": ("dpo", 0.0),
    "robust": ("robust", 0.1),
    "ipo": ("ipo", 0.0),
    "hinge": ("hinge", 0.0),
    "sigmoid_norm": ("normalized", 0.0),
    "exo_pair": ("exo_pair", 0.1),
    "nca_pair": ("nca_pair", 0.0),
    "bco_pair": ("bco_pair", 0.0),
    "sppo_hard": ("sppo_hard", 0.0),
    "aot": ("aot", 0.1),
    "aot_unpaired": ("aot_unpaired", 0.1),
    "apo_zero": ("apo_zero", 0.0),
    "apo_down": ("apo_down", 0.0),
    "discopop": ("discopop", 0.0),
}


def params_of(seed, config=CONFIG):
    return jax.tree.map(lambda leaf: 1.5 * np.asarray(leaf), jax.device_get(init(config, jax.random.key(seed))))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The policy and its reference as TRL's trainers hold them."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import add_fused_lm_head

    models = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("theirs")
        save_hf(CONFIG, params_of(seed), folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        add_fused_lm_head(model, outputs=("entropy", "is_top1", "mean_logits", "label_mask", "log_sum_sq_probs"))
        models.append(model)
    return models


def rows(seed, sides=("chosen_", "rejected_")):
    """Prompts and answers of several lengths, padded on the right."""
    random = np.random.default_rng(seed)
    batch = {}
    for side in sides:
        tokens = random.integers(1, CONFIG.vocab_size, (ROWS, SEQ))
        lengths, prompts = random.integers(12, SEQ + 1, (ROWS, 1)), random.integers(3, 8, (ROWS, 1))
        real = np.arange(SEQ) < lengths
        batch[f"{side}tokens"] = np.where(real, tokens, 0).astype(np.int32)
        batch[f"{side}mask"] = (real & (np.arange(SEQ) >= prompts)).astype(np.float32)
        batch[f"{side}segment_ids"] = real.astype(np.int32)
    return batch


def as_torch(batch, name, sides=("chosen_", "rejected_")):
    return torch.tensor(np.concatenate([batch[f"{side}{name}"] for side in sides])).long()


def trainer(**settings):
    """What TRL's `_compute_loss` reads of a trainer."""
    from accelerate import Accelerator

    plain = {
        "accelerator": Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "_metrics": {"train": collections.defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return types.SimpleNamespace(**plain | settings)


def loss_and_norm(loss, model):
    """The loss and the norm of its gradient, in float64."""
    model.zero_grad()
    loss.backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    return loss.item(), sum(squares) ** 0.5


@functools.lru_cache(maxsize=64)
def _compiled(objective):
    def total(params, reference, batch, hparams):
        return objective.loss(CONFIG, params, reference, batch, hparams)[0]

    return jax.jit(jax.value_and_grad(total))


def ours(objective, batch, reference=None, **hparams):
    loss, grads = _compiled(objective)(params_of(0), reference, batch, HParams(**hparams))
    squares = [np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(grads)]
    return float(loss), sum(squares) ** 0.5


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=2e-6)
    assert one[1] == pytest.approx(other[1], rel=1e-5)


def pair_loss(theirs, batch, kind, smoothing=0.0, divergence="reverse_kl", beta=0.1, alpha=None, weighting=False):
    from trl.trainer.dpo_trainer import DPOTrainer

    model, reference = theirs
    model.train()
    me = trainer(
        model=model,
        ref_model=reference,
        precompute_ref_logps=False,
        ld_alpha=alpha,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        beta=beta,
        label_smoothing=smoothing,
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=weighting,
        args=types.SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    )
    inputs = {
        "input_ids": as_torch(batch, "tokens"),
        "attention_mask": as_torch(batch, "segment_ids"),
        "completion_mask": as_torch(batch, "mask"),
    }
    return loss_and_norm(DPOTrainer._compute_loss(me, model, inputs, False), model)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_losses_of_pairs(kind, theirs):
    """And another β is another loss: the comparison can fail."""
    name, smoothing = PAIR_LOSSES[kind]
    batch, objective = rows(0), Preference(kind=name)
    expected = pair_loss(theirs, batch, kind, smoothing)
    assert_same(ours(objective, batch, params_of(1), beta=0.1, label_smoothing=smoothing), expected)
    other = ours(objective, batch, params_of(1), beta=0.1001, label_smoothing=smoothing)
    assert abs(other[0] - expected[0]) > 1e-5 * abs(expected[0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_desensitised_to_length(kind, alpha, theirs):
    """LD-DPO: computed in the step, and from a reference whose sums are kept in two parts."""
    batch, objective = rows(0), Preference(kind=PAIR_LOSSES[kind][0])
    expected = pair_loss(theirs, batch, kind, alpha=alpha)
    assert_same(ours(objective, batch, params_of(1), ld_alpha=alpha), expected)
    whole, shared = (kept_reference(batch, ld_alpha) for ld_alpha in (1.0, 0.0))
    kept = {f"reference_{side}": whole[side] for side in whole}
    kept |= {f"reference_{side}_tail": whole[side] - shared[side] for side in whole}
    assert_same(ours(objective, batch | kept, ld_alpha=alpha), expected)
    plain = pair_loss(theirs, batch, kind)
    assert (alpha == 1) == (expected == pytest.approx(plain, rel=1e-6))


def kept_reference(batch, ld_alpha):
    """{side: the reference's log-probability of every answer}: what the policy's would be with its parameters."""
    sums = {}
    for side in ("chosen", "rejected"):
        weights = np.zeros(ROWS, np.float32)
        sums[side] = np.zeros(ROWS, np.float32)
        for row in range(ROWS):
            weights[:] = np.arange(ROWS) == row
            found = log_probs_of(params_of(1), batch | {"weights": weights.copy()}, HParams(ld_alpha=ld_alpha))
            sums[side][row] = found[f"{side}_log_prob"]
    return sums


@functools.cache
def _compiled_sums():
    return jax.jit(lambda params, batch, hparams: Preference(kind="cpo").loss(CONFIG, params, None, batch, hparams)[1])


def log_probs_of(params, batch, hparams):
    return _compiled_sums()(params, batch, hparams)


@pytest.mark.parametrize(("kind", "alpha"), [("sigmoid", None), ("robust", None), ("ipo", 0.5), ("apo_zero", None)])
def test_weighted_by_the_policy(kind, alpha, theirs):
    """WPO: weights of pairs have no gradient; with LD-DPO they count every token of an answer as much."""
    name, smoothing = PAIR_LOSSES[kind]
    batch, objective = rows(0), Preference(kind=name, weighting="wpo")
    expected = pair_loss(theirs, batch, kind, smoothing, alpha=alpha, weighting=True)
    numbers = {"label_smoothing": smoothing, "ld_alpha": 1.0 if alpha is None else alpha}
    assert_same(ours(objective, batch, params_of(1), **numbers), expected)
    plain = ours(objective.replace(weighting="none"), batch, params_of(1), **numbers)
    assert abs(plain[0] - expected[0]) > 1e-2 * abs(plain[0])


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(divergence, theirs):
    """Near the reference, where their exponentials stay small."""
    batch = rows(0)
    model = theirs[0]
    expected = pair_loss([model, model], batch, "sigmoid", divergence=divergence)
    assert_same(ours(Preference(kind="dpo", divergence=divergence), batch, params_of(0), beta=0.1), expected)


def test_trl_does_not_smooth_the_labels_of_dpo(theirs):
    batch = rows(0)
    plain = pair_loss(theirs, batch, "sigmoid", smoothing=0.1)
    assert_same(ours(Preference(kind="dpo"), batch, params_of(1), beta=0.1), plain)
    smoothed = ours(Preference(kind="cdpo"), batch, params_of(1), beta=0.1, label_smoothing=0.1)
    margin = ours(Preference(kind="dpo"), batch, params_of(1), beta=0.1)
    assert abs(smoothed[0] - margin[0]) > 1e-3


def test_conservative_dpo_is_its_formula():
    batch, hparams = rows(0), HParams(beta=0.3, label_smoothing=0.2)
    loss = jax.jit(functools.partial(Preference(kind="cdpo").loss, CONFIG))
    total, sums = loss(params_of(0), params_of(1), batch, hparams)
    one = loss(params_of(0), params_of(1), batch, hparams.replace(label_smoothing=0.0))[0]
    turned = {
        f"{new}{name}": batch[f"{old}{name}"]
        for new, old in (("chosen_", "rejected_"), ("rejected_", "chosen_"))
        for name in ("tokens", "mask", "segment_ids")
    }
    other = loss(params_of(0), params_of(1), turned, hparams.replace(label_smoothing=0.0))[0]
    assert float(total) == pytest.approx(0.8 * float(one) + 0.2 * float(other), rel=2e-6)
    assert np.isfinite(float(sums["margin"]))


def concatenated(batch, label_pad=-100):
    """A batch as TRL's trainers without a reference collate it."""
    made = {}
    for side in ("chosen", "rejected"):
        tokens, mask = batch[f"{side}_tokens"], batch[f"{side}_mask"]
        made[f"{side}_input_ids"] = torch.tensor(tokens).long()
        made[f"{side}_attention_mask"] = torch.tensor(batch[f"{side}_segment_ids"]).long()
        made[f"{side}_labels"] = torch.tensor(np.where(mask > 0, tokens, label_pad)).long()
    return made


@pytest.mark.parametrize(("kind", "smoothing"), [("simpo", 0.0), ("simpo", 0.1), ("sigmoid", 0.1)])
def test_cpo_and_simpo(kind, smoothing, theirs):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    model, batch = theirs[0], rows(0)
    nll = 0.0 if kind == "simpo" else 1.0
    me = trainer(
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        beta=2.0,
        loss_type=kind,
        simpo_gamma=0.5,
        label_smoothing=smoothing,
        cpo_alpha=nll,
        alpha=0.0,
        aux_loss_coef=0.0,
    )
    me.concatenated_inputs = CPOTrainer.concatenated_inputs
    for name in ("concatenated_forward", "cpo_loss"):
        setattr(me, name, functools.partial(getattr(CPOTrainer, name), me))
    me.get_batch_logps = CPOTrainer.get_batch_logps
    loss, _ = CPOTrainer.get_batch_loss_metrics(me, model, concatenated(batch))
    objective = Preference(kind="simpo" if kind == "simpo" else "cpo")
    found = ours(objective, batch, beta=2.0, simpo_gamma=0.5, label_smoothing=smoothing, nll_weight=nll)
    assert_same(found, loss_and_norm(loss, model))


def test_orpo(theirs):
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    model, batch = theirs[0], rows(0)
    me = trainer(is_encoder_decoder=False, padding_value=0, pad_token_id=0, beta=0.2, aux_loss_coef=0.0)
    me.concatenated_inputs = ORPOTrainer.concatenated_inputs
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(me, name, functools.partial(getattr(ORPOTrainer, name), me))
    me.get_batch_logps = ORPOTrainer.get_batch_logps
    loss, _ = ORPOTrainer.get_batch_loss_metrics(me, model, concatenated(batch))
    expected = loss_and_norm(loss, model)
    assert_same(ours(Preference(kind="orpo"), batch, beta=0.2), expected)
    plain = {name: values for name, values in batch.items() if "segment" not in name}
    assert_same(ours(Preference(kind="orpo"), plain, beta=0.2), expected)


def test_kto(theirs):
    from trl.trainer.kto_trainer import KTOTrainer

    model, reference = theirs
    model.train()
    batch = rows(0, ("", "mismatched_")) | {"labels": np.array([1, 0, 1, 1], np.int32)}
    me = trainer(
        model=model,
        ref_model=reference,
        precompute_ref_logps=False,
        calculate_KL=True,
        loss_type="kto",
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.5,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    me._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, me)
    inputs = {"label": torch.tensor(batch["labels"]).bool()}
    for theirs_prefix, side in (("", ""), ("KL_", "mismatched_")):
        inputs[f"{theirs_prefix}input_ids"] = as_torch(batch, "tokens", [side])
        inputs[f"{theirs_prefix}attention_mask"] = as_torch(batch, "segment_ids", [side])
        inputs[f"{theirs_prefix}completion_mask"] = as_torch(batch, "mask", [side])
    expected = loss_and_norm(KTOTrainer._compute_loss(me, model, inputs, False), model)
    assert_same(ours(Rated(), batch, params_of(1), beta=0.1, undesirable_weight=1.5), expected)


@pytest.mark.parametrize(("margin", "center"), [(False, 0.0), (False, 0.01), (True, 0.0)])
def test_reward(margin, center, tmp_path):
    from transformers import AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import RewardTrainer

    config = CONFIG.replace(head="scalar")
    params, batch = params_of(0, config), rows(0)
    language = CONFIG.replace(tie_embeddings=True)
    save_hf(language, {name: leaf for name, leaf in params.items() if name != "head"}, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, attn_implementation="eager")
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(params["head"]["weight"].T))
    model.train()
    for side in ("chosen_", "rejected_"):  # TRL looks for the first padding id: no real token may have it
        assert (batch[f"{side}tokens"] > 0).sum() == batch[f"{side}segment_ids"].sum()
    inputs = {"input_ids": as_torch(batch, "tokens"), "attention_mask": as_torch(batch, "segment_ids")}
    if margin:
        batch["margins"] = np.linspace(0, 1, ROWS).astype(np.float32)
        inputs["margin"] = torch.tensor(batch["margins"])
    me = trainer(model=model, args=types.SimpleNamespace(center_rewards_coefficient=center or None))
    expected = loss_and_norm(RewardTrainer.compute_loss(me, model, inputs), model)

    def total(params):
        return Reward(margins=margin).loss(config, params, None, batch, HParams(center_weight=center))[0]

    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    norm = sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(grads)) ** 0.5
    assert_same((float(loss), norm), expected)


@pytest.mark.parametrize("kind", ["completion", "all", "packed"])
def test_supervised_fine_tuning(kind, theirs):
    """On completions alone, on all tokens, and with two documents in a row as TRL flattens them, by position ids."""
    model, batch = theirs[0], rows(0, ("",))
    tokens, real = batch["tokens"], batch["segment_ids"]
    segments, positions = real, np.broadcast_to(np.arange(SEQ), tokens.shape)
    if kind == "packed":
        segments = np.where(np.arange(SEQ) < 10, 1, 2) * np.ones_like(tokens)
        positions = np.broadcast_to(np.concatenate([np.arange(10), np.arange(SEQ - 10)]), tokens.shape)
    wanted = batch["mask"] if kind == "completion" else (segments > 0).astype(np.float32)
    # A target counts if it is of the same document as the token before it.
    targets, ahead = np.roll(tokens, -1, axis=1), np.roll(segments, -1, axis=1)
    mask = np.roll(wanted, -1, axis=1) * (ahead == segments) * (np.arange(SEQ) < SEQ - 1)
    ours_batch = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "loss_mask": mask.astype(np.float32),
    }
    labels = torch.tensor(np.where(mask > 0, targets, -100)).long()
    inputs = {"input_ids": torch.tensor(tokens).long(), "shift_labels": labels}
    if kind == "packed":
        inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
        inputs["position_ids"] = torch.tensor(positions.reshape(1, -1)).long()
    else:
        inputs["attention_mask"] = torch.tensor(real).long()
    model.train()
    loss = -model(**inputs, fused_lm_head=True).log_probs.sum() / (labels != -100).sum()
    assert_same(ours(Instruction(), ours_batch), loss_and_norm(loss, model))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_twenty_steps_follow_theirs(method, examples, tmp_path):
    """From one folder in its order: AdamW at a constant rate, clipping at 1."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_trainer import add_fused_lm_head

    config = CONFIG.replace(vocab_size=320)
    save_hf(config, params_of(0, config), tmp_path / "start")
    start = weights(tmp_path / "start")
    folder = examples("chat" if method == "sft" else "preference")
    if method == "sft":
        objective, rows_of = Instruction(packed=False), Conversations
    else:
        params = params_of(0, config)
        objective, rows_of = Preference(reference=keep_reference(folder, config, params, sha256=start.sha256)), PairRows
    train_config = TrainConfig(batch_size=4, seq_len=32, schedule="constant", order="sequential")
    hparams = HParams(learning_rate=1e-4, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=1.0)
    recipe = Recipe(config, train_config, hparams, data=folder, steps=20, objective=objective, start=start)
    train(recipe, run=tmp_path / "run", shell=RunOptions(evaluate_tokens=64))
    found = [line["loss"] for line in read_metrics(tmp_path / "run")]

    model, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "start", attn_implementation="eager", dtype=torch.float32)
        for _ in range(2)
    )
    for one in (model, reference):
        add_fused_lm_head(one, outputs=("entropy", "is_top1", "mean_logits", "label_mask"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    data = rows_of(TokenShards(folder, "train"), 32)
    expected = []
    for step in range(20):
        batch = data.take(np.arange(4 * step, 4 * step + 4) % len(data))
        if method == "sft":
            ids = torch.tensor(batch["tokens"]).long()
            inputs = {
                "input_ids": ids,
                "attention_mask": torch.tensor(batch["segment_ids"]).long(),
                "shift_labels": torch.tensor(np.where(batch["loss_mask"] > 0, batch["targets"], -100)).long(),
            }
            out = model(**inputs, fused_lm_head=True)
            loss = -out.log_probs.sum() / (inputs["shift_labels"] != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            value = loss.item()
        else:
            value, _ = pair_loss([model, reference], batch, "sigmoid")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        expected.append(value)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[0] != found[4]
