"""Early stopping as laws: who survives, what it costs, and that a decision depends on nothing but the ledger."""

import dataclasses
import math
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow, RunAll
from experiments.sweep.search.evolve import Population
from experiments.sweep.search.policies import Halving, Hyperband, hash_fraction, make_policy, play, tokens_used
from experiments.sweep.trial import Trial
from model import Execution, InputError, presets
from train import HParams, Recipe, TrainConfig

STEPS, TOKENS = 81, 8 * 16
SHAPE, HPARAMS = TrainConfig(batch_size=8, seq_len=16), HParams(total_steps=STEPS)
BASE = Recipe(presets.get("tiny"), SHAPE, HPARAMS, steps=STEPS)


def trial(seed=0, recipe=BASE, **point) -> Trial:
    hparams = recipe.hparams.replace(**{n: v for n, v in point.items() if n in HParams.NAMES}, seed=seed)
    return Trial(recipe.replace(hparams=hparams), {**point, "seed": seed})


def grid(count, seeds=1, start=0):
    rates = [round(1e-3 * (1 + number), 6) for number in range(start, start + count)]
    return [trial(seed, learning_rate=rate) for rate in rates for seed in range(seeds)]


def falling(one: Trial, step: int) -> float:
    """Curves that never cross: the rate of 0.013 is best at every step."""
    return 2 + abs(math.log(one.point["learning_rate"] / 0.013)) + 10 / step


def ends(rows):
    return Counter((row.state, row.steps_done) for row in rows)


def halving(**settings) -> Halving:
    return Halving(STEPS * TOKENS, **settings)


@pytest.mark.parametrize(("points", "seeds"), [(27, 1), (27, 3), (25, 2), (4, 1), (1, 1)])
def test_a_rung_keeps_exactly_the_share_rounded_up_and_the_winner_is_among_them(points, seeds):
    rows = play(halving(), grid(points, seeds), falling)
    first = math.ceil(points / 3)
    last = math.ceil(first / 3)
    expected = Counter({("finished", 81): last * seeds})
    expected[("pruned", 27)] += (first - last) * seeds
    expected[("pruned", 9)] += (points - first) * seeds
    assert ends(rows) == +expected
    best = min(rows, key=lambda row: falling(row.trial, STEPS)).trial.point
    assert next(row for row in rows if row.trial.point == best).state == "finished"


def test_the_tokens_of_halving_are_what_the_rungs_say():
    used = sum(map(tokens_used, play(halving(), grid(27), falling)))
    assert used == TOKENS * (27 * 9 + 9 * 18 + 3 * 54)
    assert used < 0.27 * 27 * STEPS * TOKENS
    assert sum(map(tokens_used, play(RunAll(), grid(27), falling))) == 27 * STEPS * TOKENS


def test_a_decision_depends_on_no_order_of_the_rows_and_is_taken_again_after_a_crash_in_between():
    rows = [LedgerRow(i, one, "planned", {9: falling(one, 9)}, None, {}) for i, one in enumerate(grid(27, 2))]
    decision = halving().decide(rows)
    assert len(decision.ready) == 18
    assert len(decision.prune) == 36
    shuffled = random.Random(0).sample(rows, len(rows))
    again = halving().decide([dataclasses.replace(row, number=-i) for i, row in enumerate(shuffled)])
    assert (again.ready, set(again.prune)) == (decision.ready, set(decision.prune))
    done = set(decision.prune[:7])  # the worker died while it pruned
    half = [dataclasses.replace(row, state="pruned") if row.trial.id in done else row for row in rows]
    assert halving().decide(half).ready == decision.ready
    assert set(halving().decide(half).prune) == set(decision.prune) - done


def test_replicates_stand_and_fall_by_their_mean():
    noisy = {(0.001, 0): 1.0, (0.001, 1): 4.0, (0.002, 0): 2.0, (0.002, 1): 2.0, (0.003, 0): 1.5, (0.003, 1): 3.0}
    rows = play(halving(), grid(3, 2), lambda one, step: noisy[one.point["learning_rate"], one.point["seed"]])
    assert {row.trial.point["learning_rate"] for row in rows if row.state == "finished"} == {0.002}
    assert ends(rows) == {("pruned", 9): 4, ("finished", 81): 2}


def test_the_synchronous_rung_waits_for_all_and_the_asynchronous_one_for_none():
    rows = [LedgerRow(i, one, "planned", {9: falling(one, 9)}, None, {}) for i, one in enumerate(grid(6))]
    late = dataclasses.replace(rows[0], rungs={}, state="running")
    waiting = halving().decide([late, *rows[1:]])
    assert not waiting.ready
    assert not waiting.prune
    going = halving(waits=False).decide([late, *rows[1:]])
    assert set(going.ready.values()) == {27}
    assert len(going.ready) == 2
    assert len(going.prune) == 3


def test_what_diverged_or_failed_ranks_last_and_holds_nobody_up():
    lost = lambda one, step: None if one.point["learning_rate"] < 0.02 else falling(one, step)
    rows = play(halving(), grid(27), lost)  # the winner's region diverges
    assert ends(rows)["diverged", 0] == 19
    assert ends(rows)["finished", 81] == 3
    # A point that loses one of its seeds is behind every point that lost none.
    lost = lambda one, step: None if one.point == {"learning_rate": 0.013, "seed": 1} else falling(one, step)
    rows = play(halving(), grid(27, 2), lost)
    assert ends(rows)["diverged", 0] == 1
    assert all(row.state == "pruned" for row in rows if row.trial.point == {"learning_rate": 0.013, "seed": 0})


def _with_seed(rows, seed):
    return [trial(seed, learning_rate=row.trial.point["learning_rate"]) for row in rows]


def test_points_of_an_extended_sweep_are_ranked_among_all_that_were_there_and_the_pruned_stay_pruned():
    rows = play(halving(), grid(9, start=18), falling)  # rates 0.019 … 0.027
    before = {row.trial.id: row.state for row in rows}
    added = grid(9, start=9)  # rates 0.010 … 0.018, with the winner
    policy = halving()
    rows += [LedgerRow(9 + i, one, "planned", {}, None, {}) for i, one in enumerate(added)]
    assert policy.decide(rows).ready == {one.id: 9 for one in added}
    rows[9:] = [dataclasses.replace(row, rungs={9: falling(row.trial, 9)}) for row in rows[9:]]
    decision = policy.decide(rows)
    assert len(decision.ready) == 6  # 18 / 3, all of them new ones
    assert not set(decision.prune) & set(before)
    one_seed_more = [LedgerRow(20 + i, one, "planned", {}, None, {}) for i, one in enumerate(_with_seed(rows[:9], 5))]
    decision = policy.decide([*rows[:9], *one_seed_more])
    survivors = {one.trial.id for one, row in zip(one_seed_more, rows, strict=False) if row.state == "finished"}
    assert set(decision.ready) == survivors
    assert len(decision.prune) == 9 - len(survivors)


def test_batches_of_different_size_meet_at_the_same_tokens():
    shape = lambda size: TrainConfig(batch_size=size, seq_len=16)
    sizes = {size: Recipe(BASE.model, shape(size), steps=648 // size) for size in (4, 8, 24)}
    policy = Halving(648 * 16)
    rungs = {size: policy.rungs(trial(recipe=recipe, batch_size=size)) for size, recipe in sizes.items()}
    assert rungs == {4: (18, 54, 162), 8: (9, 27, 81), 24: (3, 9, 27)}


def test_different_horizons_are_refused_unless_the_rate_does_not_know_them():
    longer = BASE.replace(steps=2 * STEPS)
    with pytest.raises(InputError, match="schedule=cosine cannot be compared"):
        play(halving(), [trial(), trial(recipe=longer, learning_rate=0.1)], falling)
    constant = TrainConfig(batch_size=8, seq_len=16, schedule="constant")
    steady = [BASE.replace(train=constant, steps=steps) for steps in (STEPS, 2 * STEPS)]
    both = [trial(recipe=one, learning_rate=rate) for one, rate in zip(steady, (0.01, 0.02), strict=True)]
    assert [halving().rungs(one) for one in both] == [(9, 27, 81), (9, 27, 81, 162)]
    play(halving(), both, falling)
    with pytest.raises(InputError, match="give --steps"):
        play(Halving(0), both, falling)


def test_brackets_of_hyperband_follow_from_the_point_and_have_its_shares():
    policy = Hyperband(STEPS * TOKENS)
    trials = grid(2000, 1)
    shares = Counter(map(policy.bracket, trials))
    weights = [9 / 3, 3 / 2, 1]
    for bracket, weight in enumerate(weights):
        assert shares[bracket] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)
    few = grid(60, 2)
    rows = play(policy, few, falling)
    assert all(policy.bracket(trial(1, learning_rate=one.point["learning_rate"])) == policy.bracket(one) for one in few)
    assert {policy.rungs(one) for one in few} == {(9, 27, 81), (27, 81), (81,)}
    spent = sum(map(tokens_used, rows)) / (len(few) * STEPS * TOKENS)
    assert 0.25 < spent < 0.6
    assert all(row.state == "finished" for row in rows if policy.bracket(row.trial) == 2)


def members(count, **point):
    return [trial(seed, learning_rate=1e-3 * (1 + seed), weight_decay=0.1, **point) for seed in range(count)]


def by_rate(one: Trial, step: int) -> float:
    return abs(math.log(one.point["learning_rate"] / 3e-3)) + 1 / step


def test_a_population_keeps_its_size_and_its_rates_gather_where_the_loss_is_low():
    policy = Population(interval_fraction=0.1, quantile=0.2, seed=3)
    rows = play(policy, members(10), by_rate)
    finished = [row for row in rows if row.state == "finished"]
    assert len(finished) == 10
    assert len(rows) == 10 + 2 * len(policy.generations(STEPS))
    distances = lambda rows: [abs(math.log(row.trial.point["learning_rate"] / 3e-3)) for row in rows]
    typical = lambda rows: statistics.median(distances(rows))  # of any seed; whether all gather is up to it
    assert typical(finished) < 0.3 < 0.7 < typical(rows[:10])
    born = {row.trial.id: row for row in rows}
    for row in rows:
        if row.trial.parent:
            parent, step = row.trial.parent
            assert step in policy.generations(STEPS)
            assert step in policy.rungs(born[parent].trial)
            assert min(policy.rungs(row.trial)) > step
    # Every update of the ten lanes is trained once.
    assert sum(map(tokens_used, rows)) == 10 * STEPS * TOKENS


def test_a_generation_is_decided_again_as_it_was_whatever_of_it_is_in_the_ledger():
    policy = Population(seed=1)
    rows = [LedgerRow(i, one, "planned", {8: by_rate(one, 8)}, None, {}) for i, one in enumerate(members(20))]
    decision = policy.decide(rows)
    assert len(decision.prune) == len(decision.add) == 4
    assert not decision.ready
    assert policy.decide(rows[::-1]).add == decision.add
    executed = [dataclasses.replace(row, trial=row.trial.under(Execution(remat="full"))) for row in rows]
    assert [child.id for child in policy.decide(executed).add] == [child.id for child in decision.add]
    pruned = [dataclasses.replace(row, state="pruned") if row.trial.id in decision.prune else row for row in rows]
    assert policy.decide(pruned).add == decision.add
    some = [*pruned, *(LedgerRow(30 + i, one, "planned", {}, None, {}) for i, one in enumerate(decision.add[:3]))]
    assert policy.decide(some).add == decision.add[3:]
    whole = [*some, LedgerRow(33, decision.add[3], "planned", {}, None, {})]
    after = policy.decide(whole)
    assert not after.add
    assert not after.prune
    assert set(after.ready.values()) == {16}
    assert len(after.ready) == 20
    newcomer = LedgerRow(40, trial(77, learning_rate=0.5, weight_decay=0.1), "planned", {}, None, {})
    late = policy.decide([*whole, newcomer])
    assert late.ready == after.ready | {newcomer.trial.id: 8}
    arrived = dataclasses.replace(newcomer, rungs={8: 9.0})
    assert policy.decide([*whole, arrived]).ready == after.ready | {newcomer.trial.id: 16}


def test_a_child_differs_from_its_parent_in_the_swept_traced_fields_alone():
    wide = BASE.replace(model=BASE.model.replace(num_layers=BASE.model.num_layers + 1))
    both = [*members(5), *(one.replace(recipe=wide.replace(hparams=one.recipe.hparams),
                                       point=one.point | {"num_layers": 1}) for one in members(5))]  # fmt: skip
    rows = play(Population(quantile=0.4, resample=0.0, seed=2), both, by_rate)
    known = {row.trial.id: row.trial for row in rows}
    children = [row.trial for row in rows if row.trial.parent]
    assert {child.cohort for child in children} == {one.cohort for one in both}
    for child in children:
        parent = known[child.parent[0]]
        assert child.cohort == parent.cohort
        changed = {name for name in child.point if child.point[name] != parent.point[name]}
        assert changed == {"learning_rate", "weight_decay", "seed"}
        assert child.point["learning_rate"] / parent.point["learning_rate"] == pytest.approx(0.8, rel=1e-4) or (
            child.point["learning_rate"] / parent.point["learning_rate"] == pytest.approx(1.25, rel=1e-4)
        )
        same = child.recipe.hparams.replace(**{name: parent.point[name] for name in changed})
        assert same == parent.recipe.hparams


def test_lost_members_are_replaced_and_a_lost_population_ends():
    lost = lambda one, step: None if one.point["learning_rate"] > 5e-3 and step == 16 else by_rate(one, step)
    rows = play(Population(seed=1), members(10), lost)
    assert sum(row.state == "finished" for row in rows) == 10
    assert {row.state for row in play(Population(), members(3), lambda one, step: None)} == {"diverged"}


def test_policies_are_made_by_name_and_refuse_what_they_do_not_know():
    sweep = Sweep(Path("s"), Trial(BASE), Path("d"), policy="halving", policy_settings={"eta": 2})
    assert make_policy(sweep) == Halving(STEPS * TOKENS, 2)
    assert make_policy(dataclasses.replace(sweep, sampler="tpe", trials=5)) == Halving(STEPS * TOKENS, 2, waits=False)
    assert isinstance(make_policy(Sweep(Path("s"), Trial(BASE), Path("d"))), RunAll)
    for changes, words in (
        ({"policy": "halfing"}, "did you mean 'halving'"),
        ({"policy_settings": {"etta": 2}}, "did you mean 'eta'"),
        ({"policy_settings": {"eta": 1}}, "eta=1 must be a number above 1"),
        ({"policy": "hyperband", "policy_settings": {"min_fraction": 2}}, "min_fraction=2 must be"),
        (
            {"policy": "population", "policy_settings": {"quantile": 0}},
            "quantile=0 must be a number above 0 and at most 0.5",
        ),
        ({"policy": "all"}, "has no settings; eta=2"),
        ({"policy": "population", "policy_settings": {}, "sampler": "tpe"}, "leave the sampler out"),
    ):
        with pytest.raises(InputError, match=words):
            make_policy(dataclasses.replace(sweep, **changes))


def test_a_point_has_one_name_for_all_its_seeds():
    assert trial(1, learning_rate=0.1).point_key == trial(2, learning_rate=0.1).point_key
    assert 0 <= hash_fraction("x") < 1
