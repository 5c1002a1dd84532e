"""The laws of training hold for every objective: add one to `objective_cases.py` and they are run for it."""

import functools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import NonCallableMock

import jax
import numpy as np
import pytest

from model import Execution, Experts, InputError, apply, init
from model.adapters import Adapter
from model.sharding import make_mesh
from model.store import open_model
from train import HParams, Recipe, Shell, TrainConfig, eval_step, init_state, population, train, train_step, weights
from train.config import stack_hparams
from train.data import prepare
from train.data.manifest import Manifest
from train.data.noise import Noise
from train.lanes import build
from train.lanes.build import compiled_programs
from train.lanes.vmapped import init_lanes, step_lanes
from train.objectives import OBJECTIVES, Instruction, MaskedLanguageModeling, from_dict, get
from train.objectives.answers import AnswerObjective
from train.objectives.objective import merge
from train.recipe import Weights
from train.run.metrics import read_metrics
from train.step import gradients

SCRIPT = Path(__file__).with_name("objective_cases.py")
_MODULE = runpy.run_path(str(SCRIPT))
CASES, ENCODER, HPARAMS, REFERENCE, batch_of = (
    _MODULE[name] for name in ("CASES", "ENCODER", "HPARAMS", "REFERENCE", "batch_of")
)
STEPS = 5
UNROLLED = Execution(scan_layers=False)
QUIET = Shell(evaluate_tokens=256, evaluate_every=2, checkpoint_every=1)
each = pytest.mark.parametrize("name", CASES)
of_programs = pytest.mark.parametrize("name", [name for name in CASES if name != "masked-packed"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Short documents whose class is the word that they hold."""
    folder = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)
    words = ["river", "mountain", "harbour"]
    with (folder / "reviews.jsonl").open("w") as file:
        for number in range(120):
            word = words[number % 3]
            text = " ".join(random.choice(["the", "old", word, "by", "night"], 2 + number % 23)) + f" {word} {number}"
            file.write(json.dumps({"text": text, "label": word}) + "\n")
    prepare(folder / "reviews.jsonl", folder / "data", vocab_size=320, validation_fraction=0.2, label_field="label")
    return folder / "data"


@pytest.fixture(scope="module")
def recipe_of_case(data, labelled, examples):
    """name → the recipe of a short run."""

    def make(name):
        case = CASES[name]
        place = labelled if name == "classification" else data
        if isinstance(case.objective, (AnswerObjective, Instruction)):
            place = examples(getattr(case.objective, "KIND", "chat"))
        return Recipe(case.config, case.train, HPARAMS, data=place, steps=STEPS, objective=case.objective)

    return make


@pytest.fixture(scope="module")
def whole(recipe_of_case, tmp_path_factory):
    """name → a run without an interruption."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("whole") / name
        train(recipe_of_case(name), run=folder, shell=QUIET)
        return folder

    return run


def params_of(case):
    return jax.device_get(init(case.config, jax.random.key(3)))


@functools.cache
def gradients_of(name):
    """(parameters, batch, hyperparameters) → the gradients and metrics of the whole batch, compiled once."""
    case = CASES[name]
    return jax.jit(functools.partial(gradients, case.config, case.train, objective=case.objective))


def test_every_objective_has_a_case():
    here = {name for name, objective in OBJECTIVES.items() if objective.__module__.startswith("train.objectives.")}
    assert {case.objective.NAME for case in CASES.values()} == here


def test_the_page_shows_an_objective_in_forty_lines(monkeypatch):
    """Without smoothing it is language modelling; with all of it the loss of a uniform target."""
    monkeypatch.setattr("train.objectives.OBJECTIVES", dict(OBJECTIVES))
    text = (Path(__file__).parents[2] / "docs" / "add-an-objective.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    names = {}
    exec(code, names)
    case, batch = CASES["language-modeling"], batch_of(CASES["language-modeling"])
    params = params_of(case)
    logits = jax.jit(functools.partial(apply, case.config))(params, batch["tokens"])
    log_p, mask = np.asarray(jax.nn.log_softmax(logits)), batch["loss_mask"]
    plain = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
    for smoothing, expected in ((0.0, -plain), (1.0, -log_p.mean(-1))):
        loss = jax.jit(functools.partial(names["SmoothedLabels"](smoothing=smoothing).loss, case.config))
        total, sums = loss(params, None, batch, HPARAMS)
        np.testing.assert_allclose(total, (expected * mask).sum() / mask.sum(), rtol=1e-5)
        np.testing.assert_allclose(sums["loss"], (-plain * mask).sum() / mask.sum(), rtol=1e-5)


@each
def test_resumed_is_uninterrupted(name, recipe_of_case, whole, crash, record, tmp_path):
    with crash(3):
        train(recipe_of_case(name), run=tmp_path / "run", shell=QUIET)
    train(recipe_of_case(name), run=tmp_path / "run", shell=QUIET)
    assert record(tmp_path / "run") == record(whole(name))
    lines = read_metrics(whole(name))
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert {f"validation_{metric}" for metric in CASES[name].objective.EVALUATED} <= lines[-1].keys()
    assert ("perplexity" in lines[-1]) == CASES[name].objective.LIKELIHOOD


@pytest.mark.long
@each
def test_killed_is_uninterrupted(name, recipe_of_case, whole, record, tmp_path):
    """A process that is killed at a random moment, and the same command again."""
    program = (
        "import json, sys; from train import Recipe, Shell, train\n"
        "recipe = Recipe.from_dict(json.loads(sys.argv[1])).replace(folders=sys.argv[2])\n"
        "train(recipe, run=sys.argv[3], shell=Shell(evaluate_tokens=256, evaluate_every=2, checkpoint_every=1))"
    )
    recipe, run = recipe_of_case(name), tmp_path / "run"
    command = [sys.executable, "-c", program, json.dumps(recipe.to_dict()), recipe.folders, str(run)]
    process = subprocess.Popen(command, env=os.environ)
    while not (run / "checkpoints" / "1").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, env=os.environ).returncode == 0
    assert record(run) == record(whole(name))


@each
def test_lane_is_the_solo_run_of_one_program(name, recipe_of_case, whole, record, tmp_path):
    whole(name)
    recipe, before = recipe_of_case(name), compiled_programs()
    other = recipe.replace(hparams=HPARAMS.replace(learning_rate=3e-3, mask_rate=0.1, seed=7))
    runs = [tmp_path / "one", tmp_path / "other"]
    population([recipe, other], runs=runs, shell=QUIET)
    assert record(runs[0]) == record(whole(name))
    train(other, run=tmp_path / "alone", shell=QUIET)
    assert record(runs[1]) == record(tmp_path / "alone") != record(runs[0])
    assert compiled_programs() == before


def test_packing_changes_the_data_and_not_the_program():
    """The laws of programs below are therefore run for one of the two."""
    texts = []
    for name in ("masked", "masked-packed"):
        case = CASES[name]
        step = jax.jit(functools.partial(train_step, case.config, case.train, objective=case.objective))
        init = functools.partial(init_state, case.config, case.train, HPARAMS, objective=case.objective)
        texts.append(step.lower(jax.eval_shape(init), batch_of(case), HPARAMS).as_text())
    assert texts[0] == texts[1]


@of_programs
def test_microbatches_add_up_with_uneven_masks(name):
    case = CASES[name]
    if not case.objective.separable:
        with pytest.raises(InputError, match="compares the answers of a whole batch"):
            case.objective.check_execution(case.train, Execution(accumulate=4))
        return
    compute = functools.partial(gradients, case.config, case.train, objective=case.objective)
    in_parts = jax.jit(functools.partial(compute, execution=Execution(accumulate=4)))
    given = params_of(case), batch_of(case), HPARAMS
    whole, parts = gradients_of(name)(*given), in_parts(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), whole, parts)
    assert whole[1].keys() == {*case.objective.metric_names(case.config)}


@of_programs
def test_vmapped_lanes_are_steps_of_their_own(name):
    """Lanes with other parameters, batches and hyperparameters; one that is not active is handed on."""
    case, lanes = CASES[name], (0, 1, 2)
    hparams = [HPARAMS.replace(seed=lane, learning_rate=0.01 * (1 + lane)) for lane in lanes]
    stacked, batches = stack_hparams(hparams), [batch_of(case, lane) for lane in lanes]
    init = jax.jit(functools.partial(init_lanes, case.config, case.train, objective=case.objective))
    state = jax.device_get(init(stacked))
    step = jax.jit(functools.partial(step_lanes, case.config, case.train, objective=case.objective))
    new, metrics = step(
        state, jax.tree.map(lambda *rows: np.stack(rows), *batches), stacked, np.array([True, True, False])
    )
    for lane in (0, 1):
        own = jax.tree.map(lambda leaf, lane=lane: leaf[lane], state.params)
        grads, alone = gradients_of(name)(own, batches[lane], hparams[lane])
        norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(grads))))
        np.testing.assert_allclose(metrics["loss"][lane], alone["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][lane], norm, rtol=1e-4)
    assert new.step.tolist() == [1, 1, 0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), new, state)


@of_programs
def test_frozen_parameters_are_read_alone(name):
    """One step trains the chosen leaves as a step of all would, and no other."""
    case = CASES[name]
    objective = case.objective.replace(trainable=case.trainable)
    params, batch = params_of(case), batch_of(case)
    trainable, frozen = objective.split(params)
    assert frozen
    assert jax.tree.structure(merge(trainable, frozen)) == jax.tree.structure(params)
    before = jax.tree.map(np.copy, frozen)
    state = init_state(case.config, case.train, HPARAMS, objective=objective).replace(params=trainable)
    step = jax.jit(functools.partial(train_step, case.config, case.train, objective=objective))
    new, metrics = step(state, batch, HPARAMS.replace(clip_norm=0.0), frozen=frozen)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert jax.tree.structure(new.params) == jax.tree.structure(trainable)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, trainable)
    assert min(jax.tree.leaves(moved)) > 0
    grads, all_metrics = gradients_of(name)(params, batch, HPARAMS)
    own = jax.tree.map(lambda grad: np.square(grad).sum(), objective.split(grads)[0])
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(jax.tree.leaves(own))), rtol=1e-4)
    evaluate = jax.jit(functools.partial(eval_step, case.config, objective=objective))
    np.testing.assert_allclose(
        evaluate(trainable, batch, frozen=frozen, hparams=HPARAMS)["loss"], metrics["loss"], rtol=1e-5
    )


@of_programs
def test_flops_counted_are_those_of_the_program(name, products_of):
    """To the unit: of a step of everything, of the chosen leaves alone, and of an adapter."""
    case = CASES[name]
    lora = case.objective.replace(adapter=Adapter(rank=4))
    params = jax.eval_shape(functools.partial(init, case.config), jax.random.key(0))
    rows, seq_len = case.train.batch_size, case.train.seq_len
    spec = case.objective.batch_spec(case.config, case.train, rows, seq_len)
    batch = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), spec)
    counted = []
    for objective in (case.objective, case.objective.replace(trainable=case.trainable), lora):
        compute = functools.partial(gradients, case.config, case.train, objective=objective, execution=UNROLLED)
        trained = jax.eval_shape(functools.partial(objective.trained, case.config), params, jax.random.key(0))
        frozen = jax.eval_shape(objective.frozen, params)
        products = products_of(
            lambda *args, run=compute: run(*args[:3], frozen=args[3]), trained, batch, HPARAMS, frozen
        )
        counted.append(rows * seq_len * objective.flops_per_token(case.config, seq_len))
        assert products == pytest.approx(counted[-1], rel=1e-12)
    assert max(counted[1:]) < counted[0]


@pytest.mark.parametrize("name", ["language-modeling", "classification"])
def test_a_run_with_frozen_parameters(name, recipe_of_case, whole, crash, record, tmp_path):
    """Its checkpoints hold what it trains; resumed and as a lane it is the same run, and it opens as a whole model."""
    case, start = CASES[name], weights(whole(name))
    objective = case.objective.replace(trainable=case.trainable)
    recipe = recipe_of_case(name).replace(objective=objective, start=start)
    train(recipe, run=tmp_path / "run", shell=QUIET)
    with crash(3):
        train(recipe, run=tmp_path / "resumed", shell=QUIET)
    other = recipe.replace(hparams=HPARAMS.replace(seed=7, learning_rate=3e-3))
    population([recipe, other], runs=[tmp_path / "resumed", tmp_path / "other"], shell=QUIET)
    assert record(tmp_path / "resumed") == record(tmp_path / "run") != record(tmp_path / "other")
    about = json.loads((tmp_path / "run" / "checkpoints" / str(STEPS) / "checkpoint.json").read_text())
    saved = {leaf.removeprefix("params/") for leaf in about["leaves"] if leaf.startswith("params/")}
    assert all(leaf.startswith(case.trainable) for leaf in saved)
    before, after = open_model(whole(name)).params, open_model(tmp_path / "run").params
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        was = functools.reduce(lambda tree, key: tree[key.key], path, before)
        assert np.array_equal(was, leaf) != ("/".join(key.key for key in path) in saved)
    shutil.copytree(whole(name), tmp_path / "base")
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "run")
    moved = json.loads((tmp_path / "elsewhere" / "run" / "run.json").read_text())
    assert {"weights", "weights_beside"} <= moved.keys()
    with pytest.raises(InputError, match="holds other weights than"):
        open_model(tmp_path / "run", base=tmp_path / "other")
    assert open_model(tmp_path / "run", base=tmp_path / "base").config == recipe.model
    written = (tmp_path / "run" / "run.json").read_bytes()
    gone = recipe.replace(start=Weights(start.sha256, tmp_path / "gone"))
    with pytest.raises(InputError, match=r"there is no model at .*gone"):
        train(gone.replace(steps=STEPS + 1), run=tmp_path / "run", shell=QUIET)
    assert (tmp_path / "run" / "run.json").read_bytes() == written
    assert train(gone, run=tmp_path / "run", shell=QUIET).steps == STEPS  # nothing is left to train


def test_vmapped_lanes_hold_one_base(monkeypatch):
    """Counted in bytes: four lanes of an adapter take the base once and four adapters with their moments."""
    monkeypatch.setattr(build, "prefers_vmap", lambda: True)
    case = CASES["language-modeling"]
    objective = case.objective.replace(adapter=Adapter(rank=1, targets=["query"]))
    program = build.compile_program(case.config, case.train, 4, make_mesh({"data": 1}), objective=objective)
    sizes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    base = sizes(params_of(case))
    held = base + 4 * sizes(program.lane)
    assert held <= program.memory.state < held + base / 2, "batches and metrics are all that there is besides"


@pytest.mark.parametrize(
    "name",
    [
        "language-modeling",
        "masked",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("spans", "classification")),
    ],
)
def test_low_rank_adapters(name, recipe_of_case, whole, crash, record, tmp_path):
    """Ranks are lanes of one program over one base; a run resumes to the bit and opens as a model with its adapter."""
    case, start = CASES[name], weights(whole(name))
    base_weights = "int4" if name == "masked" else None
    objective = case.objective.replace(adapter=Adapter(rank=8, alpha=16.0), base_weights=base_weights)
    recipe = recipe_of_case(name).replace(objective=objective, start=start)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).objective == objective
    ranks = [recipe.replace(hparams=HPARAMS.replace(lora_rank=rank)) for rank in (2, 4, 8)]
    runs = [tmp_path / str(rank) for rank in (2, 4, 8)]
    before = compiled_programs()
    with crash(3):
        population(ranks, runs=runs, shell=QUIET)
    population(ranks, runs=runs, shell=QUIET)
    assert compiled_programs() == before + 1
    train(recipe, run=tmp_path / "alone", shell=QUIET)
    assert record(runs[2]) == record(tmp_path / "alone")
    if name == "language-modeling":  # an adapter's rank is no matter of the objective
        small = recipe.replace(objective=objective.replace(adapter=Adapter(rank=2, alpha=16.0)))
        train(small, run=tmp_path / "small", shell=QUIET)
        for metric in ("loss", "grad_norm", "param_norm", "update_norm"):
            values = [[line[metric] for line in read_metrics(run)] for run in (runs[0], tmp_path / "small")]
            np.testing.assert_allclose(*values, rtol=2e-5, err_msg=metric)
    about = json.loads((runs[0] / "checkpoints" / str(STEPS) / "checkpoint.json").read_text())
    saved = [leaf for leaf in about["leaves"] if leaf.startswith("params/")]
    assert {leaf.rpartition("/")[2] for leaf in saved} == {"a", "b"}
    opened = open_model(runs[0])
    assert jax.tree.structure(opened.params) == jax.tree.structure(open_model(whole(name)).params)
    validation = case.objective.validation(recipe.model, case.train, recipe.folders, 256)
    evaluate = jax.jit(functools.partial(eval_step, recipe.model, objective=case.objective))
    found = [evaluate(opened.params, batch) for batch in validation]
    weight = np.array([float(row[objective.WEIGHT]) for row in found])
    loss = np.dot(weight, [float(row["loss"]) for row in found]) / weight.sum()
    assert loss == pytest.approx(read_metrics(runs[0])[-1]["validation_loss"], rel=1e-5)


@pytest.mark.long
def test_a_run_with_an_adapter_of_experts_and_head_opens_as_it_was_trained(recipe_of_case, tmp_path):
    recipe = recipe_of_case("language-modeling")
    config = recipe.model.replace(experts=Experts(count=4, top_k=2, d_ff=12), tie_embeddings=False)
    recipe = recipe.replace(model=config, steps=2)
    train(recipe, run=tmp_path / "base", shell=QUIET)
    objective = recipe.objective.replace(adapter=Adapter(rank=4, targets=("experts", "head")))
    recipe = recipe.replace(objective=objective, start=weights(tmp_path / "base"))
    train(recipe, run=tmp_path / "run", shell=QUIET)
    opened = open_model(tmp_path / "run")
    before = open_model(tmp_path / "base").params
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), opened.params, before)
    assert {"/".join(key.key for key in path) for path, new in jax.tree_util.tree_leaves_with_path(changed) if new} == {
        *(f"layers/experts/feed_forward/experts/{name}" for name in ("up", "gate", "down")),
        "head/weight",
    }
    validation = objective.validation(config, recipe.train, recipe.folders, 256)
    evaluate = jax.jit(functools.partial(eval_step, config))
    found = [evaluate(opened.params, batch) for batch in validation]
    weight = np.array([float(row["loss_tokens"]) for row in found])
    loss = np.dot(weight, [float(row["loss"]) for row in found]) / weight.sum()
    assert loss == pytest.approx(read_metrics(tmp_path / "run")[-1]["validation_loss"], rel=1e-5)


@pytest.mark.long
def test_eight_devices_are_one(on_eight_devices):
    found = on_eight_devices(SCRIPT, 2, "data=1", "fsdp=2,sequence=2,tensor=2")
    for name, losses in found.items():
        for mesh in losses:
            np.testing.assert_allclose(losses[mesh], losses["data=1"], rtol=2e-5, err_msg=f"{name} on {mesh}")


@each
def test_a_recipe_names_its_objective(name, recipe_of_case):
    recipe = recipe_of_case(name)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.run_id == recipe.run_id
    assert from_dict(recipe.objective.to_dict()) == recipe.objective
    other = recipe.replace(objective=recipe.objective.replace(trainable=("head",)))
    assert other.run_id != recipe.run_id
    with pytest.raises(InputError, match="unknown objective 'maskd'"):
        get("maskd")


def test_mask_rates_are_lanes_and_validated_alike(recipe_of_case, whole):
    """The masks of validation are the same for every rate, seed and batch."""
    recipe = recipe_of_case("masked")
    batches = lambda rows: CASES["masked"].objective.validation(
        recipe.model, TrainConfig(batch_size=rows, seq_len=32), recipe.folders, 256
    )
    flat = lambda rows, key: np.concatenate([batch[key].ravel() for batch in batches(rows)])[:256]
    for key in ("tokens", "targets", "loss_mask"):
        np.testing.assert_array_equal(flat(8, key), flat(2, key))
    chosen = flat(8, "loss_mask").astype(bool)
    assert 0.08 < chosen.mean() < 0.25
    assert (flat(8, "tokens") == flat(8, "targets"))[~chosen].all()
    shown = flat(8, "tokens")[chosen]
    assert 0.6 < (shown == CASES["masked"].objective.mask_id).mean() <= 1


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.5, 0.0)])
def test_context_free_nats_are_the_entropy_of_a_target_given_what_is_shown(shares):
    """With independent tokens, only the token at the same position says anything of a target."""
    vocab = 8
    config = ENCODER.replace(vocab_size=vocab + 1, head="masked-language-model", head_bias=True)
    objective = MaskedLanguageModeling(mask_id=vocab, masked=shares[0], random=shares[1])
    frequencies = np.arange(1, vocab + 1) / np.arange(1, vocab + 1).sum()
    tokens = np.random.default_rng(0).choice(vocab, (2000, 64), p=frequencies).astype(np.int32)
    manifest = NonCallableMock(spec=Manifest, vocab_size=vocab, eos_id=-1)
    noise = Noise.of_rows(0, np.arange(2000), 64)
    batch = objective.corrupt(config, {"tokens": tokens}, noise, manifest, HParams(mask_rate=0.5))
    chosen = batch["loss_mask"] > 0
    nats = objective.context_free_nats(config, batch, manifest, np.append(frequencies, 0))[chosen].mean()
    edges = [np.arange(vocab + 2) - 0.5, np.arange(vocab + 1) - 0.5]  # a mask is shown, but is no target
    both = np.histogram2d(batch["tokens"][chosen], batch["targets"][chosen], edges)[0]
    rows = both.sum(axis=1, keepdims=True)
    entropy = -np.sum(both * np.log(np.divide(both, rows, out=np.ones_like(both), where=both > 0))) / both.sum()
    assert nats == pytest.approx(entropy, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "shell", "execution", "message"),
    [
        (
            {"trainable": ("final_norm",)},
            QUIET,
            Execution(),
            r"must come from a model; give a run, .* \(start=weights\(PATH\) of a Recipe\)",
        ),
        ({}, QUIET, Execution(loss_chunks=16), "loss_chunks=16 does not divide the 8 tokens that the decoder predicts"),
        ({}, Shell(evaluate_tokens=1), Execution(), "nothing to predict in the first 1 tokens of the validation split"),
    ],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(
    changes, shell, execution, message, recipe_of_case, tmp_path
):
    recipe = recipe_of_case("spans")
    recipe = recipe.replace(objective=recipe.objective.replace(**changes))
    with pytest.raises(InputError, match=message):
        train(recipe, run=tmp_path / "run", shell=shell, execution=execution)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "hparams", "message"),
    [
        ({"trainable": ("nowhere",)}, HPARAMS, "trainable='nowhere' names no parameter"),
        ({"adapter": Adapter(rank=17)}, HPARAMS, "Adapter.rank=17 exceeds 16"),
        ({"adapter": Adapter(rank=2)}, HPARAMS.replace(lora_rank=3), "lora_rank=3 exceeds the adapter's rank=2"),
        ({}, HPARAMS.replace(lora_alpha=3.0), "lora_alpha are for a low-rank adapter"),
    ],
)
def test_what_cannot_be_frozen_is_refused_before_a_folder_is_made(
    changes, hparams, message, recipe_of_case, whole, tmp_path
):
    recipe, start = recipe_of_case("language-modeling"), weights(whole("language-modeling"))
    recipe = recipe.replace(objective=recipe.objective.replace(**changes), hparams=hparams, start=start)
    with pytest.raises(InputError, match=message):
        train(recipe, run=tmp_path / "run", shell=QUIET)
    assert not (tmp_path / "run").exists()


def test_weights_that_round_activations_are_no_base():
    with pytest.raises(InputError, match="blocks gradients"):
        from_dict({"name": "language-modeling", "adapter": {"rank": 2}, "base_weights": "int8-dynamic"})


@pytest.mark.parametrize("values", [None, 5, [], {}, {"name": None}, {"name": ["masked"]}])
def test_what_names_no_objective_is_refused(values):
    with pytest.raises(InputError, match="must be a name or a mapping with one; the names are language-modeling"):
        from_dict(values)


@pytest.mark.parametrize("trainable", ["head", None, 5, [1]])
def test_trainable_is_a_list_of_prefixes(trainable):
    with pytest.raises(InputError, match="must be a list of prefixes"):
        from_dict({"name": "masked", "trainable": trainable})


def test_a_mask_rate_of_nothing_is_refused():
    """It would train on no token, and finish."""
    with pytest.raises(InputError, match=r"mask_rate=0 must be in \(0, 1\]"):
        HPARAMS.replace(mask_rate=0)
