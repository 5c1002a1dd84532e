"""A study's design and its ladder: budgets kept, two walls, shapes that are models, branches that fit their trunks."""

import json
from pathlib import Path

import pytest
import tyro

from experiments.commands.scaling.plan import plan, show_plan
from experiments.scaling.rows.conventions import FLOPS, PARAMS, count
from experiments.scaling.study import cost
from experiments.scaling.study.design import Design, Law
from experiments.scaling.study.family import ModelFamily
from experiments.scaling.study.published import LAWS
from experiments.scaling.study.rungs import expected_optimum, plan_rungs, shapes
from model import accounting
from model.errors import InputError

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
BUDGETS = tuple(1e11 * 2**i for i in range(6))
EPOCH = 4_000_000
VOCAB = 1024

DESIGNS = {
    "small": Design(budgets=BUDGETS),
    "branches": Design(budgets=BUDGETS, branches=True),
    "far apart": Design(budgets=(1e11, 1e12, 2e13), sizes=7, size_factor=1.3, optimum_exponent=0.6, held_out=2),
    "four sizes": Design(budgets=(1e15, 3e15), sizes=4, size_factor=2.0, batch_size=16),
    "grouped heads": Design(
        base="llama3-8b", budgets=(1e16, 2e16), family=ModelFamily(aspect_ratio=32, head_dim=16), batch_size=16
    ),
    "multi-query": Design(
        base="tiny", budgets=(1e14, 4e14), family=ModelFamily(head_dim=32, ff_ratio=3.0, width_multiple=32)
    ),
    "wide heads": Design(base="gemma3-1b", budgets=(1e16, 2e16), family=ModelFamily(head_dim=64, aspect_ratio=64)),
    "learned positions": Design(base="gpt2-small", budgets=(1e16, 2e16), family=ModelFamily(aspect_ratio=64)),
    "experts": Design(base="flash-moe", budgets=(1e17, 2e17), family=ModelFamily(aspect_ratio=64)),
}


@pytest.fixture(params=list(DESIGNS))
def design(request):
    return DESIGNS[request.param]


def test_every_run_costs_its_budget_to_a_step_and_every_valley_has_two_walls(design):
    rungs = plan_rungs(design, VOCAB, EPOCH)
    assert len(rungs) == len(design.budgets) * design.sizes
    assert len({rung.name for rung in rungs}) == len(rungs)
    for index, budget in enumerate(design.budgets):
        members = [rung for rung in rungs if rung.budget == index]
        assert {rung.held_out for rung in members} == {index >= len(design.budgets) - design.held_out}
        for rung in members:
            step = 6 * rung.params * rung.batch_size * rung.seq_len
            assert rung.flops_6nd == step * rung.steps
            assert abs(rung.flops_6nd - budget) <= step / 2
        sizes = sorted(rung.params for rung in members)
        optimum = expected_optimum(design, budget)
        assert len(set(sizes)) == design.sizes >= 4
        assert sizes[0] < optimum / design.size_factor**0.5
        assert sizes[-1] > optimum * design.size_factor**0.5


def test_rungs_are_models_with_their_books(design):
    base = design.base_config(VOCAB)
    for rung in plan_rungs(design, VOCAB, EPOCH)[:: design.sizes + 1]:
        config = rung.config
        assert config.num_heads % config.num_kv_heads == 0
        assert (config.num_kv_heads == 1) == (base.num_kv_heads == 1 or config.num_heads == 1) or config.num_heads < 8
        assert config.vocab_size == VOCAB
        assert config.num_layers == (
            max(1, round(config.d_model / design.family.aspect_ratio))
            if design.family.aspect_ratio
            else base.num_layers
        )
        if design.family.head_dim:
            assert config.head_dim == design.family.head_dim
        assert rung.params == accounting.parameters(config).active
        counted, row = count(config, rung.seq_len), rung.to_dict()
        assert {name: row[name] for name in PARAMS} == {name: counted[name] for name in PARAMS}
        assert {name: row[name] for name in FLOPS} == {name: counted[name] * rung.tokens for name in FLOPS}
        assert row["epochs"] == rung.tokens / EPOCH
        assert row["repeated"] == (rung.tokens > EPOCH)
        json.dumps(row)


def test_neighbouring_budgets_share_all_shapes_but_one():
    rungs = plan_rungs(Design(budgets=tuple(1e14 * 2.25**i for i in range(5))), VOCAB, EPOCH)
    assert len(shapes(rungs)) == 5 + 4


def test_branches_are_the_runs_of_the_same_study_and_fit_their_trunks():
    design = DESIGNS["branches"].replace(seeds=2)
    alone = plan_rungs(design.replace(branches=False, schedule="wsd"), VOCAB, EPOCH)
    rungs = {rung.name: rung for rung in plan_rungs(design, VOCAB, EPOCH)}
    free = {"warmup_steps": 0, "trunk": None, "leave_step": 0}
    assert [rung.to_dict() | free for rung in rungs.values()] == [rung.to_dict() | free for rung in alone]
    branches = [rung for rung in rungs.values() if rung.trunk is not None]
    assert len(branches) == 2 * (25 - len({rung.d_model for rung in rungs.values() if not rung.held_out}))
    for rung in branches:
        trunk = rungs[rung.trunk]
        assert (trunk.trunk, trunk.held_out, rung.held_out) == (None, False, False)
        assert (trunk.config, trunk.batch_size, trunk.seed) == (rung.config, rung.batch_size, rung.seed)
        assert (trunk.learning_rate, trunk.warmup_steps) == (rung.learning_rate, rung.warmup_steps)
        assert rung.warmup_steps <= rung.leave_step == rung.steps - rung.decay_steps
        assert rung.leave_step <= trunk.steps - trunk.decay_steps, "the trunk's rate is at its peak there"
    trunks = {(rung.d_model, rung.seed) for rung in rungs.values() if rung.trunk is None and not rung.held_out}
    assert len(trunks) == 2 * 8


def test_a_law_decides_rates_and_batches():
    rate = Law(0.01, {"params": 1e5, "tokens": 1e6}, {"params": -0.5, "tokens": 0.25})
    rows = Law(8.0, {"flops": 4e11}, {"flops": 0.5})
    rungs = plan_rungs(Design(budgets=BUDGETS, learning_rate=rate, batch_size=rows), VOCAB, EPOCH)
    assert [{rung.batch_size for rung in rungs if rung.budget == i} for i in (0, 2, 4)] == [{4}, {8}, {16}]
    for rung in rungs:
        tokens = rung.budget_flops / (6 * rung.params)
        assert rung.learning_rate == pytest.approx(0.01 * (rung.params / 1e5) ** -0.5 * (tokens / 1e6) ** 0.25)
    widths = plan_rungs(Design(budgets=BUDGETS), VOCAB, EPOCH)
    assert all(rung.learning_rate * rung.d_model == pytest.approx(0.02 * 32) for rung in widths)


def test_hours_are_filled_and_more_of_them_give_larger_budgets():
    seconds_of = lambda config, rows: 1e-3 + rows * 1e-4 * config.d_model
    smallest = 0.0
    for hours in (0.5, 2.0):
        design = Design(hours=hours, branches=True)
        rungs = plan_rungs(design, VOCAB, EPOCH, seconds_of, compile_seconds=3.0)
        seconds = sum(rung.seconds for rung in rungs) + 3.0 * len(shapes(rungs))
        assert 0.8 * 3600 * hours < seconds <= 3600 * hours
        assert len({rung.budget for rung in rungs}) == design.count
        assert rungs[0].budget_flops > 1.5 * smallest
        smallest = rungs[0].budget_flops
    with pytest.raises(InputError, match=r"hours=0.001 are too few"):
        plan_rungs(Design(hours=0.001), VOCAB, EPOCH, seconds_of)
    with pytest.raises(InputError, match="needs the time of a step"):
        plan_rungs(Design(hours=1.0), VOCAB, EPOCH)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose step takes a millisecond and its FLOPs at 10 GFLOP/s."""

    def measure(config, train_config, lanes, seconds, execution, objective):
        flops = train_config.tokens_per_step * accounting.flops_per_token(config, train_config.seq_len)
        return {"step_seconds": lanes * (1e-3 + flops / 1e10), "compile_seconds": 2.0}

    monkeypatch.setattr("experiments.sweep.speed.measure_step", measure)


@pytest.mark.slow
def test_what_branches_save_is_the_sum_by_hand(data, machine, capsys):
    design = Design(base="tiny", budgets=(1e10, 2.25e10, 5.0625e10), sizes=4, branches=True, seq_len=32)
    made = cost.plan_study(design, data)
    document = made.document()
    spent = sum(rung.flops_6nd * (rung.steps - rung.leave_step) / rung.steps for rung in made.rungs)
    whole = sum(rung.flops_6nd for rung in made.rungs)
    held_out = sum(rung.flops_6nd for rung in made.rungs if rung.held_out)
    saved = document["without_branches"]["saved"]
    assert document["total"]["flops_6nd"] == pytest.approx(spent)
    assert saved["flops_6nd"] == pytest.approx(1 - spent / whole)
    assert saved["flops_6nd_fitted"] == pytest.approx(1 - (spent - held_out) / (whole - held_out))
    step = lambda rung: 1e-3 + rung.flops_exact / rung.steps / 1e10
    validation = design.evaluate_tokens / (2 * 32) / 3
    seconds = sum((rung.steps - rung.leave_step + validation) * step(rung) for rung in made.rungs)
    assert document["total"]["hours"] == pytest.approx((seconds + 2.0 * len(shapes(made.rungs))) / 3600)
    kept = len(made.rungs) + sum(rung.trunk is not None for rung in made.rungs)
    state = {name: row["state_bytes"] for row in document["shapes"] for name in row["names"]}
    smallest, largest = min(state.values()), max(state.values())
    assert kept * smallest < document["total"]["checkpoint_bytes"] < kept * largest
    json.dumps(document)
    show_plan(made)
    assert "branches save" in capsys.readouterr().out


def test_the_command_plans_in_hours(data, machine, tmp_path, capsys):
    file, out = tmp_path / "design.toml", tmp_path / "plan.json"
    file.write_text('base = "tiny"\nbudgets = [1e10, 2e10]\nsizes = 4\nseq_len = 32\ncount = 3\n')
    tyro.cli(plan, args=[str(file), "--data", str(data), "--hours", "0.5", "--json", str(out)])
    document = json.loads(out.read_text())
    assert document["schema_version"] == 1
    assert 0.4 < document["total"]["hours"] <= 0.5
    assert len(document["design"]["budgets"]) == 3
    assert document["design"]["hours"] == 0.0
    assert document["without_branches"] is None
    assert "see some tokens more than once" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sotu_ladder", "sotu_branches"])
def test_committed_designs_see_their_text_once_where_they_are_fitted(name):
    design = Design.read(CONFIGS / f"{name}.toml")
    rungs = plan_rungs(design, VOCAB, 4_076_288)
    assert len({rung.budget for rung in rungs if not rung.held_out}) == 5
    assert not any(rung.repeated for rung in rungs if not rung.held_out)
    assert len({rung.config.num_layers for rung in rungs}) == 1
    assert Design.from_dict(json.loads(json.dumps(design.to_dict()))) == design
    assert design.differences(design) == ""
    other = design.replace(seeds=design.seeds + 1)
    assert design.differences(other) == f"seeds={other.seeds} there, {design.seeds} here"


def test_the_committed_designs_are_one_study():
    one, other = (Design.read(CONFIGS / f"sotu_{name}.toml") for name in ("ladder", "branches"))
    assert one.replace(branches=True, seeds=other.seeds) == other


BAD = {
    "budgets = [1e11": "cannot be read as the TOML file",
    "budgts = [1e11]": "did you mean 'budgets'",
    "sizes = 5": "needs budgets, in FLOPs, or hours",
    "budgets = [1e11]\nhours = 1.0": "give one",
    "budgets = 1e11": "must be a list of FLOPs",
    'budgets = ["1e11", 2e11]': "must be a number above 0; budgets are FLOPs",
    "budgets = [2e11, 1e11]": "must ascend",
    "budgets = [1e11, nan]": "must be a number above 0",
    "budgets = [1e11, 2e11]\nheld_out = 2": "leaves none of 2 budgets",
    "hours = -1.0": "at least 0",
    'hours = "one"': "must be a number",
    "hours = 1.0\nsizes = 3": "sizes=3 must be a number of at least 4",
    "hours = 1.0\nsizes = 4.5": "must be a whole number",
    "hours = 1.0\nsize_factor = 1.0": "at least 1.1",
    "hours = 1.0\noptimum_exponent = 1.0": "must be a number above 0 and below 1",
    'hours = 1.0\nschedule = "cosin"': "did you mean 'cosine'",
    "hours = 1.0\nbranches = 1": "must be true or false",
    "hours = 1.0\nbranches = true\ndecay_fraction = 0.0": "leaves a branch nothing",
    "hours = 1.0\nwarmup_fraction = 0.5\ndecay_fraction = 0.5": "less than 1 together",
    "hours = 1.0\nbatch_size = 2.0": "positive whole number",
    "hours = 1.0\nlearning_rate = 0": "positive number",
    "hours = 1.0\n[learning_rate]\nvalue = 1\ncentre = { width = 32 }\nexponents = {}": "Law.centre 'width'",
    "hours = 1.0\n[learning_rate]\nvalue = 0.02\ncentre = {}\nexponents = { d_model = -1 }": "both centre and exponent",
    "hours = 1.0\n[learning_rate]\nvalue = 0.02\ncentre = { d_model = 32 }": "Law lacks exponents",
    "hours = 1.0\nbranches = true\n[batch_size]\nvalue = 2\ncentre = { flops = 1e11 }\nexponents = { flops = 0.3 }": (
        "leave one base run"
    ),
    "hours = 1.0\n[family]\nhead_size = 8": "did you mean 'head_dim'",
    "hours = 1.0\n[set]\nlearning_rate = 0.1": "set.learning_rate is not free",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_input_is_one_sentence_with_the_file(text, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        Design.read(file)
    assert BAD[text] in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED = [
    (Design(budgets=(1e8, 2e8)), "too small"),
    (Design(budgets=(1e12, 2e12), batch_size=100_000), "steps of"),
    (Design(budgets=BUDGETS, family=ModelFamily(head_dim=8, width_multiple=12)), "multiple of 8, the head_dim"),
    (Design(budgets=BUDGETS, family=ModelFamily(head_dim=3)), "must be even"),
    (Design(base="stody-32", budgets=BUDGETS), "study-32"),
    (Design(budgets=BUDGETS, set={"betta2": 0.9}), "beta2"),
    (Design(budgets=BUDGETS, set={"beta2": 1.5}), "beta2=1.5"),
    (Design(base="bert-base", budgets=BUDGETS), "trains decoders on plain text, not stack='encoder'"),
    (
        Design(base="t5-small", budgets=BUDGETS, seq_len=32, set={"objective": "spans", "loss_chunks": 16}),
        "loss_chunks=16 does not divide the 8 tokens",
    ),
]


@pytest.mark.parametrize(("design", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_only_the_plan_can_refuse(design, words):
    with pytest.raises(InputError, match=words):
        plan_rungs(design, VOCAB, EPOCH)


LARGE = (1e18, 1e19, 1e20, 1e21)


@pytest.mark.parametrize(
    ("law", "params", "tokens", "flops"),
    [  # as the papers print them: table 3, table A3 twice, and Besiroglu's about 20 tokens per parameter
        ("hoffmann-1", 67e9, 1.43e12, 5.76e23),
        ("hoffmann-1", 400e6, 8.0e9, 1.92e19),
        ("hoffmann-2", 10e9, 219.5e9, 1.32e22),
        ("hoffmann-3", 1e9, 27.1e9, 1.62e20),
        ("hoffmann-3", 10e9, 410.1e9, 2.46e22),
        ("besiroglu", 67e9, 1.43e12, 5.76e23),
    ],
)
def test_published_laws_give_what_their_papers_print(law, params, tokens, flops):
    found = LAWS[law]
    tolerance = 0.15 if law == "besiroglu" else 0.05
    assert found.optimum(flops) == pytest.approx(params, rel=tolerance)
    assert flops / 6 / found.optimum(flops) == pytest.approx(tokens, rel=tolerance)
    assert found.tokens_per_parameter(flops) == pytest.approx(tokens / params, rel=2 * tolerance)


@pytest.fixture
def large(tmp_path):
    """A definition that says no more than a base and budgets that a cluster trains."""
    file = tmp_path / "large.toml"
    file.write_text(f'base = "llama3.2-1b"\nbudgets = {list(LARGE)}\n')
    return file


def test_a_large_study_is_centred_and_shaped_as_published_models_are(large):
    design = Design.read(large)
    for budget in LARGE:
        optimum = expected_optimum(design, budget)
        assert optimum == pytest.approx(LAWS["besiroglu"].optimum(budget))
        assert 20 < budget / (6 * optimum**2) < 27
    for rung in plan_rungs(design, 128_256, None):
        config = rung.config
        assert 60 <= config.d_model / config.num_layers <= 130
        assert (config.head_dim, config.num_heads * config.head_dim) == (64, config.d_model)
        assert config.num_heads % config.num_kv_heads == 0
        assert config.d_ff % 128 == 0
        assert config.d_ff / config.d_model == pytest.approx(4, rel=0.05)
        assert (rung.epochs, rung.repeated, rung.seq_len) == (None, False, 2048)
        assert 1e5 < rung.batch_size * rung.seq_len < 5e6
        assert 5e-4 < rung.learning_rate < 2e-3
        assert rung.steps > 1000


def test_what_a_definition_says_itself_stands_at_any_scale(large):
    text = large.read_text()
    large.write_text(
        text + "tokens_per_parameter = 40\nseq_len = 4096\nbatch_size = 256\n[family]\naspect_ratio = 32\n"
    )
    design = Design.read(large)
    assert (design.law, design.tokens_per_parameter, design.seq_len, design.batch_size) == ("", 40, 4096, 256)
    assert (design.family.aspect_ratio, design.family.head_dim) == (32, 64)
    rungs = plan_rungs(design, 128_256, None)
    assert {round(rung.d_model / 32) - rung.config.num_layers for rung in rungs} == {0}
    large.write_text(text + "[family]\naspect_ratio = 0\n")
    assert {rung.config.num_layers for rung in plan_rungs(Design.read(large), 128_256, None)} == {16}
    assert Design.read(large, law="hoffmann-1").law == "hoffmann-1"
    branched = Design.read(large, branches=True)
    assert isinstance(branched.batch_size, int)
    assert plan_rungs(branched, 128_256, None)


def test_a_law_takes_the_place_of_a_definitions_own_optimum(tmp_path):
    ladder = CONFIGS / "sotu_ladder.toml"
    design = Design.read(ladder, law="hoffmann-2")
    assert expected_optimum(design, 3e11) == pytest.approx(LAWS["hoffmann-2"].optimum(3e11))
    assert (design.seq_len, design.family) == (128, Design.read(ladder).family), "all else is still a laptop's"
    assert design.with_budgets((1e12, 4e12)).tokens_per_parameter == pytest.approx(
        LAWS["hoffmann-2"].tokens_per_parameter(2e12)
    )


def test_a_plan_of_a_large_study_is_a_definition_that_reads_back(large):
    from experiments.study.command_lines import _toml

    for changes in ({}, {"tokens_per_parameter": 8.0, "law": ""}):
        design = Design.read(large).replace(**changes)
        copy = large.with_name("copy.toml")
        copy.write_text(_toml(design.to_dict()))
        assert Design.read(copy) == design


def test_hours_of_other_hardware_are_exact_flops_over_what_it_does(isoflop, tmp_path):
    out = tmp_path / "plan.json"
    call = ("scaling", "plan", "--budgets", 1e21, "--json", out, "--device", "H100", "--devices", 8, "--mfu", 0.4)
    code, said, error = isoflop(*call)
    assert (code, error) == (0, "")
    document = json.loads(out.read_text())
    assert document["hardware"] == {"device": "h100", "devices": 8, "mfu": 0.4, "peak_flops_per_second": 989e12}
    assert document["tokens_per_epoch"] is None
    assert document["law"]["name"] == "besiroglu"
    (optimum,) = document["optima"]
    assert optimum["tokens"] / optimum["params"] == pytest.approx(21.6, rel=0.01)
    for rung in document["rungs"]:
        assert rung["hours"] == pytest.approx(rung["flops_exact"] / (8 * 989e12 * 0.4) / 3600, rel=1e-3)
        assert rung["held_out"] is False, "a single budget leaves none to fit otherwise"
    assert document["total"]["hours"] == pytest.approx(sum(rung["hours"] for rung in document["rungs"]))
    assert "on 8 × h100 at 40% of 989 TFLOP/s each" in said
    assert "epochs are not checked" in said
    assert "Besiroglu et al. 2024" in said


def test_hours_on_other_hardware_size_the_budgets(isoflop, tmp_path):
    out = tmp_path / "plan.json"
    assert isoflop("scaling", "plan", "--hours", 5000, "--device", "b200", "--devices", 64, "--json", out)[0] == 0
    document = json.loads(out.read_text())
    assert 4000 < document["total"]["hours"] <= 5000
    assert document["design"]["budgets"][0] > 1e20, "beyond what a laptop could be asked for"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a DESIGN.toml, or the FLOPs of each budget"),
        (("--budgets", 1e20, "--device", "h900"), "known are a10, a10g"),
        (("--budgets", 1e20, "--devices", 8), "are of a --device"),
        (("--budgets", 1e20, "--device", "h100", "--mfu", 40), "--mfu=40.0 must be a number above 0 and at most 1"),
        (("--budgets", 1e20, "--device", "h100", "--devices", 0), "--devices=0 must be a whole number of at least 1"),
        (("--budgets", 1e20, "--law", "chinchilla"), "known are hoffmann-1, hoffmann-2, hoffmann-3, besiroglu"),
        (("--budgets", 1e22, 2e22), "name the hardware that the study is for"),
        (("--hours", 1.0, "--no-probe"), "needs the time of a step"),
    ],
)
def test_a_plan_that_cannot_be_made_says_what_would_be_right(isoflop, arguments, words):
    code, _, error = isoflop("scaling", "plan", *arguments)
    assert (code, len(error.strip().splitlines())) == (2, 1)
    assert words in error
