"""The algebra of spaces: how many points, which, in which order; and that what cannot be is refused."""

import itertools
from pathlib import Path

import pytest

from experiments.sweep import space as s
from experiments.sweep.space.build import load_space
from experiments.sweep.space.values import parse_axes, parse_axis
from model.errors import InputError

A, B = s.grid(a=[1, 2, 3]), s.grid(b=["x", "y"], c=True)


def keys(points):
    return [tuple(sorted(point.items())) for point in points]


def test_a_grid_is_the_product_of_its_axes_and_the_last_varies_fastest():
    assert s.grid(a=[1, 2], b=["x", "y"]).points() == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert s.grid().points() == [{}]


def test_laws_of_the_algebra():
    product, chain = s.product(A, B).points(), s.chain(A, B).points()
    assert product == [p | q for p, q in itertools.product(A.points(), B.points())]
    assert chain == A.points() + B.points()
    assert s.chain(A, A).points() == A.points(), "a point stands there once"
    assert s.product(A).points() == s.chain(A).points() == A.points()
    assert s.product(A, s.grid()).points() == A.points()
    assert s.zip(A, s.grid(d=[4, 5, 6])).points() == s.zip(a=[1, 2, 3], d=[4, 5, 6]).points()
    assert len(s.replicate(product_space := s.product(A, B), 4).points()) == 4 * len(product_space.points())
    assert s.replicate(A, [7, 9]).points()[:2] == [{"a": 1, "seed": 7}, {"a": 1, "seed": 9}]


def test_a_branch_has_only_the_axes_of_its_side():
    space = s.branch("schedule", {"cosine": s.grid(), "wsd": s.grid(decay_fraction=[0.1, 0.2])})
    assert space.points() == [
        {"schedule": "cosine"},
        {"schedule": "wsd", "decay_fraction": 0.1},
        {"schedule": "wsd", "decay_fraction": 0.2},
    ]


def test_derived_fields_follow_the_point():
    space = s.derive(s.grid(d_model=[64, 128]), lambda point: {"num_heads": point["d_model"] // 32})
    assert [point["num_heads"] for point in space.points()] == [2, 4]
    with pytest.raises(InputError, match=r"derived from d_model=64 cannot be computed \(KeyError: 'width'\)"):
        s.derive(s.grid(d_model=[64]), lambda point: {"x": point["width"]}).points()
    with pytest.raises(InputError, match="num_heads is on two sides"):
        s.product(space, s.grid(num_heads=[1])).points()


SEARCHED = s.product(
    s.grid(learning_rate=s.loguniform(1e-4, 1e-2), batch_size=8, warmup_steps=s.integers(0, 9)),
    s.branch("schedule", {"cosine": s.grid(final_fraction=[0, 0.1]), "wsd": s.grid(decay_fraction=s.uniform(0.1, 1))}),
    s.zip(d_model=[64, 128], num_heads=[2, 4]),
    s.chain(s.grid(beta2=[0.9, 0.95]), s.grid(beta2=s.uniform(0.99, 0.999))),
)


def test_a_draw_asks_for_the_axes_of_the_sides_taken_and_no_others():
    for corner in itertools.product((0.0, 0.99), repeat=3):
        asked = {}

        def suggest(name, axis, corner=corner, asked=asked):
            assert name not in asked, "an axis is asked for once"
            asked[name] = axis
            unit = {"schedule": corner[0], "which d_model|num_heads": corner[1], "which beta2": corner[2]}.get(
                name, 0.5
            )
            return axis.at(unit)

        point = SEARCHED.draw(suggest)
        assert asked.items() <= SEARCHED.axes().items()
        assert ("final_fraction" in point) == (point["schedule"] == "cosine") == ("final_fraction" in asked)
        assert point["d_model"] == 32 * point["num_heads"]
        assert point["batch_size"] == 8, "what is fixed is in the point"
        assert "batch_size" not in asked, "but not asked for"
    assert len(SEARCHED.axes()) == 9


@pytest.mark.parametrize("draw", [s.random, s.quasirandom])
def test_more_draws_begin_with_the_same_points(draw):
    few, many = draw(SEARCHED, 20, seed=3).points(), draw(SEARCHED, 60, seed=3).points()
    assert len(many) == 60
    assert many[:20] == few
    assert keys(draw(SEARCHED, 20, seed=4).points()) != keys(few)
    rates = [point["learning_rate"] for point in many]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 20 < sum(rate < 1e-3 for rate in rates) < 40, "even in the logarithm"
    assert {point["warmup_steps"] for point in many} <= set(range(10))


def test_draws_from_a_finite_space_are_distinct():
    assert sorted(keys(s.random(A, 10).points())) == sorted(keys(A.points()))


def test_quasirandom_covers_every_tenth():
    values = [point["x"] for point in s.quasirandom(s.grid(x=s.uniform(0, 1)), 32).points()]
    assert {int(16 * value) for value in values} == set(range(16))


def test_spaced_values():
    assert s.logspace(16, 128, 4).values == (16, 32, 64, 128)
    assert s.linspace(2, 8, 4).values == (2, 4, 6, 8)
    assert s.logspace(1e-4, 1e-2, 3).values == (1e-4, 1e-3, 1e-2), "not the neighbour of 0.001"
    assert all(isinstance(value, float) for value in s.linspace(0.0, 2.0, 3).values)


def test_axes_from_the_shell():
    assert parse_axis("beta2=0.9,.99") == ("beta2", s.choice(0.9, 0.99))
    assert parse_axis("schedule=cosine,wsd") == ("schedule", s.choice("cosine", "wsd"))
    assert parse_axis("norms=true,false") == ("norms", s.choice(True, False))
    assert parse_axis('layer_pattern=["local","global"],["global"]')[1].values == (["local", "global"], ["global"])
    assert parse_axis("d_ff=null,64")[1].values == (None, 64)
    for kind, form in (("logspace", "1e-4:1e-2:9"), ("linspace", "0:1:3"), ("loguniform", "1:2"), ("integers", "1:4")):
        expected = getattr(s, kind)(*map(eval, form.split(":")))
        assert parse_axis(f"x={kind}:{form}") == ("x", expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta2", "not of the form NAME=v1,v2"),
        ("x=", "the axis x has no values"),
        ("x=1,,2", "has an empty value"),
        ("x=1,2,1", "the value 1 twice"),
        ("x=logspase:1:2:3", "did you mean 'logspace'"),
        ("x=logspace:1:2", "NAME=logspace:LOW:HIGH:COUNT"),
        ("x=logspace:2:1:3", "to a larger one"),
        ("x=loguniform:0:1", "begins above 0"),
        ("x=integers:1:2.5", "whole ends"),
        ("x=linspace:1:2:1", "a count of at least 2"),
    ],
)
def test_bad_axes(text, message):
    with pytest.raises(InputError, match=message):
        parse_axes((text,))
    with pytest.raises(InputError, match="gives y twice"):
        parse_axes(("y=1", "y=2"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.grid(a=[]), "the axis a has no values"),
        (lambda: s.grid(a=[1, 1.0]), "the value 1.0 twice"),
        (lambda: s.grid(a={1, 2}), "a set, which has no order"),
        (lambda: s.product(), "product of no spaces"),
        (lambda: s.product(A, s.grid(a=[1])), "a is on two sides of a product"),
        (lambda: s.zip(A, B), "sides of equal length, not a: 3, b/c: 2"),
        (lambda: s.replicate(A, 0), "at least one seed"),
        (lambda: s.branch("a", {}), "the branch a has no values"),
        (lambda: s.branch("a", {1: A}), "a is on two sides"),
        (lambda: s.random(A, 0), "count=0 must be"),
        (lambda: s.grid(a=s.uniform(0, 1)).points(), r"linspace with a count, draw random\(space, count\)"),
        (lambda: s.product(*(s.grid(**{f"x{i}": range(100)}) for i in range(4))).points(), "100,000,000 points"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space = grid(a=[1)", "space.py, line 2: "),
        ("\nx = 1 / 0", "space.py, line 3: ZeroDivisionError"),
        ("space = grid(a=[])", "space.py, line 2: the axis a has no values"),
        ("raise SystemExit(3)", "line 2: SystemExit"),
        ("points = 3", "has no `space`"),
        ("space = 3", "has a int as its `space`"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(InputError, match=message) as caught:
        load_space("from experiments.sweep.space import grid\n" + text, Path("space.py"))
    assert len(str(caught.value).splitlines()) == 1
