"""Sharding: every parameter has axes, meshes divide the axes that they split, without a mesh nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import InputError, forward, presets
from model.convert.plan import shapes_of
from model.dispatch import plan_blocks, sort_choices
from model.sharding import (
    AXES,
    RULES,
    abstract_mesh,
    batch_shardings,
    check_batch,
    constrain,
    make_mesh,
    parameter_axes,
    parse_mesh,
    shardings,
    spec_for,
)

MESHES = ({}, {"fsdp": 2}, {"tensor": 4}, {"expert": 4, "tensor": 2}, dict.fromkeys(AXES, 2), {"fsdp": 3, "tensor": 5})


def stacked(path):
    return "layers" in path


def axes_of(entry):
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def test_every_parameter_has_axes_that_have_rules(variant):
    for path, shape in shapes_of(variant).items():
        axes = parameter_axes(path)
        assert len(axes) + stacked(path) == len(shape), path
        assert all(axis is None or axis in RULES for axis in axes)


def test_a_parameter_that_is_in_no_table_is_an_error():
    with pytest.raises(KeyError, match="layers/dense/new/thing"):
        spec_for(abstract_mesh({"data": 2}), ("layers", "dense", "new", "thing"), (2, 4, 4))


def test_a_mesh_divides_what_it_splits_once_and_never_layers(variant):
    for axes in MESHES:
        mesh = abstract_mesh(axes)
        for path, shape in shapes_of(variant).items():
            plain, lanes = spec_for(mesh, path, shape), spec_for(mesh, path, (30, *shape), lanes=True)
            assert tuple(lanes) == ("population" if axes.get("population") else None, *plain)
            assert not stacked(path) or plain[0] is None
            used = [axis for entry in plain for axis in axes_of(entry)]
            assert len(used) == len(set(used))
            NamedSharding(mesh, plain).shard_shape(shape)  # raises where an axis does not divide


def test_the_tables_split_what_papers_split():
    spec = lambda axes, *path: tuple(spec_for(abstract_mesh(axes), path, shapes[path]))
    config = presets.get("tiny").replace(tie_embeddings=False)
    shapes = shapes_of(config)
    block = ("layers", "dense")
    megatron = {"tensor": 2}
    assert spec(megatron, *block, "attention", "query", "weight") == (None, None, "tensor")
    assert spec(megatron, *block, "attention", "output", "weight") == (None, "tensor", None)
    assert spec(megatron, *block, "feed_forward", "up", "weight") == (None, None, "tensor")
    assert spec(megatron, *block, "feed_forward", "down", "weight") == (None, "tensor", None)
    assert spec(megatron, "head", "weight") == (None, "tensor")
    assert spec({"fsdp": 2, "tensor": 2}, "embedding", "tokens") == ("tensor", "fsdp")
    assert all(entry is None for path in shapes for entry in spec({"data": 8, "sequence": 2}, *path))


def test_fsdp_takes_another_dimension_where_the_usual_one_does_not_divide():
    mesh = abstract_mesh({"fsdp": 4, "tensor": 2})
    path = ("layers", "dense", "feed_forward", "up", "weight")
    assert tuple(spec_for(mesh, path, (2, 8, 16))) == (None, "fsdp", "tensor")
    assert tuple(spec_for(mesh, path, (2, 6, 16))) == (None, None, ("tensor", "fsdp"))
    assert tuple(spec_for(mesh, path, (2, 6, 7))) == (None, None, None)
    # A factored moment of the same name, [layers, d_model]: only fsdp, and not on the layers.
    assert tuple(spec_for(mesh, path, (64, 512))) == (None, "fsdp")


def test_shardings_of_a_tree_are_those_of_its_leaves():
    config = presets.get("tiny")
    mesh, shapes = abstract_mesh({"fsdp": 2, "tensor": 2}), shapes_of(config)
    leaf = ("layers", "dense", "attention", "query", "weight")
    tree: dict = {}
    for path, shape in shapes.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = shardings(mesh, {"params": tree, "others": (jnp.zeros(()), jnp.zeros((3, 2048)))})
    assert found["params"]["layers"]["dense"]["attention"]["query"]["weight"].spec == spec_for(mesh, leaf, shapes[leaf])
    assert [sharding.spec for sharding in found["others"]] == [PartitionSpec(), PartitionSpec(None, "fsdp")]


def test_without_a_mesh_a_program_is_the_same(random_params):
    config = presets.get("tiny").replace(num_layers=1)
    params, tokens = random_params(config), jnp.zeros((2, 4), jnp.int32)
    trace = lambda: str(jax.make_jaxpr(lambda params: forward(config, params, tokens).logits)(params))
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", None) is x
    assert "sharding_constraint" not in trace()
    with jax.set_mesh(make_mesh({"data": 1})):
        assert "sharding_constraint" not in trace()
    with jax.sharding.use_abstract_mesh(abstract_mesh({"data": 2})):
        assert "sharding_constraint" in trace()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fspd=2", "unknown mesh axis 'fspd'; did you mean 'fsdp'"),
        ("data", "not of the form data=2,fsdp=4"),
        ("data=2,data=4", "names data twice"),
        ("data=two", "data=two must be a whole number"),
        ("data=0", "data=0 must be a whole number of at least 1"),
        ("data=-1", "data=-1 must be a whole number"),
    ],
)
def test_a_wrong_mesh_is_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_mesh(text)


def test_meshes_have_all_axes():
    assert parse_mesh("data=2, fsdp=4") == {"data": 2, "fsdp": 4}
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert mesh.shape["data"] == mesh.size == jax.device_count()
    with pytest.raises(InputError, match="a mesh of 4096 devices was requested; there are"):
        make_mesh({"tensor": 4096})
    with pytest.raises(InputError, match="unknown mesh axis 'model'"):
        make_mesh({"model": 2})


def test_a_batch_that_does_not_divide_is_refused():
    mesh = abstract_mesh({"data": 2, "fsdp": 2, "sequence": 4, "tensor": 8})
    check_batch(mesh, 8, 16)
    with pytest.raises(InputError, match=r"batch_size=6 does not divide over 4 devices \(data · fsdp\)"):
        check_batch(mesh, 6, 16)
    with pytest.raises(InputError, match=r"seq_len=18 does not divide over 4 devices \(sequence\)"):
        check_batch(mesh, 8, 18)
    batch = {"tokens": jnp.zeros((8, 16)), "labels": jnp.zeros(8), "odd": jnp.zeros((8, 15))}
    of = batch_shardings(mesh, batch)
    shapes = {name: of[name].shard_shape(array.shape) for name, array in batch.items()}
    assert shapes == {"tokens": (2, 4), "labels": (2,), "odd": (2, 15)}
    lanes = batch_shardings(mesh, jnp.zeros((3, 8, 16)), lanes=True)
    assert lanes.shard_shape((3, 8, 16)) == (3, 2, 4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_blocks_of_a_part_are_of_its_own_experts(parts):
    """Every choice has a row of its own, also where all tokens choose experts of one part."""
    count, tokens, top_k, size = 8, 13, 2, 2
    random = np.random.default_rng(0)
    anywhere = np.stack([random.permutation(count)[:top_k] for _ in range(tokens)])
    for chosen in (anywhere, np.tile(np.arange(top_k), (tokens, 1))):
        real = random.random(tokens) < 0.8
        choices = sort_choices(jnp.asarray(chosen), jnp.asarray(real), count)
        plan = plan_blocks(choices, size, parts, tokens * min(top_k, count // parts), multiple=3)
        source, expert, slot = (np.asarray(part) for part in (plan.source.reshape(-1), plan.expert, plan.slot))
        placed = np.flatnonzero(np.tile(real, top_k))
        assert (source[slot[placed]] == placed).all()
        assert len(set(slot[placed])) == len(placed) == (source < tokens * top_k).sum()
        assert (expert[slot[placed] // size] == chosen.T.reshape(-1)[placed]).all()
        assert (expert.reshape(parts, -1) // (count // parts) == np.arange(parts)[:, None]).all()
        assert len(expert) % (3 * parts) == 0
