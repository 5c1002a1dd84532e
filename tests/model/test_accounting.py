"""The books agree with the world: published parameter counts, XLA's own count of FLOPs, the bytes of real arrays."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from model import ModelConfig, accounting, apply, init, init_cache, presets

PLAIN = ModelConfig(
    vocab_size=1024,
    d_model=128,
    num_layers=2,
    num_heads=4,
    max_seq_len=256,
    position="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated=False,
    use_bias=True,
    scan_layers=False,
)
GATED = ModelConfig(
    vocab_size=1024, d_model=192, num_layers=2, num_heads=6, num_kv_heads=2, max_seq_len=256, scan_layers=False
)


def test_gpt2_small_has_the_published_count():
    """124,439,808: the parameters of OpenAI's 124M model and of Hugging Face's `openai-community/gpt2`."""
    books = accounting.parameters(presets.get("gpt2-small"))
    assert books.total == 124_439_808
    assert books.embedding == (50_257 + 1024) * 768
    assert books.non_embedding == books.active - books.embedding == 85_056_000


@pytest.mark.parametrize("config", [PLAIN, GATED, GATED.replace(tie_embeddings=False, use_bias=True)])
def test_groups_add_up_to_the_arrays(config):
    books = accounting.parameters(config)
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    assert books.total == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert books.total == sum(books.by_group.values()) == books.embedding + books.non_embedding
    assert accounting.parameter_bytes(config, "bfloat16") == 2 * books.total


def test_an_untied_head_is_no_embedding():
    tied, untied = (accounting.parameters(GATED.replace(tie_embeddings=flag)) for flag in (True, False))
    assert untied.embedding == tied.embedding
    assert untied.non_embedding - tied.non_embedding == GATED.vocab_size * GATED.d_model


def test_counting_makes_no_array():
    """A model of 10¹⁵ parameters is counted at once; its arrays would fill a data centre."""
    huge = ModelConfig(vocab_size=10**6, d_model=2**18, num_layers=1200, num_heads=2**11)
    before = {id(array) for array in jax.live_arrays()}
    assert accounting.parameters(huge).total > 9e14
    assert all(array.size < 1000 for array in jax.live_arrays() if id(array) not in before)


def test_6n_is_six_times_the_parameters():
    count = accounting.parameters(GATED).total
    assert accounting.flops_per_token(GATED, 128, "6N") == 6 * count
    assert accounting.flops_per_token(GATED, 128, "6N", training=False) == 2 * count
    with pytest.raises(ValueError, match="exact"):
        accounting.flops_per_token(GATED, 128, "8N")


def test_exact_approaches_6n_where_attention_and_tables_are_small():
    """Kaplan et al. 2020, section 2.1: what 6N leaves out is attention, about seq_len / (6 d_model) of it."""
    wide = ModelConfig(vocab_size=64, d_model=4096, num_layers=8, num_heads=32)
    ratio = accounting.flops_per_token(wide, 32, "exact") / accounting.flops_per_token(wide, 32, "6N")
    assert abs(ratio - 1) < 0.005


ELEMENTWISE = {"add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "square", "select_n"}
ELEMENTWISE |= {"eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not", "convert_element_type"}


def equations_in(jaxpr):
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        if not inner:
            yield equation
        for program in inner:
            yield from equations_in(program)


def flops_in(jaxpr):
    """(products, elementwise work) of a traced program without loops.

    Products: 2 · output elements · contracted length. Elementwise: one per output element, reductions one per input
    element; transcendental functions are not counted, as XLA books them apart.
    """
    products = elementwise = 0
    for equation in equations_in(jaxpr):
        name, made = equation.primitive.name, equation.outvars[0].aval
        given = equation.invars[0].aval if equation.invars else None
        assert name not in ("scan", "while"), "a loop's body would count once"
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            products += 2 * made.size * math.prod(given.shape[axis] for axis in contracted)
        elif name.startswith("reduce_"):
            elementwise += given.size
        elif name == "integer_pow":
            elementwise += (equation.params["y"] - 1) * made.size
        elif name in ELEMENTWISE:
            elementwise += made.size
    return products, elementwise


@functools.cache
def programs(config, batch, seq):
    """(forward, training) as functions of parameters and tokens, and abstract arguments for them."""
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    forward = functools.partial(apply, config)

    def loss(params, tokens):
        logits = forward(params, tokens)
        target = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target)

    return {False: forward, True: jax.value_and_grad(loss)}, (params, tokens)


CASES = [(PLAIN, 2, 128), (PLAIN, 1, 256), (GATED, 2, 128), (GATED, 1, 256)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("config", "batch", "seq"), CASES)
def test_exact_counts_every_product(config, batch, seq, training):
    """To the unit: the products in the program that JAX traces are those in the books."""
    functions, arguments = programs(config, batch, seq)
    products, _ = flops_in(jax.make_jaxpr(functions[training])(*arguments).jaxpr)
    assert products == batch * seq * accounting.flops_per_token(config, seq, "exact", training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("config", "batch", "seq", "excess"), [(PLAIN, 2, 128, 0.025), (GATED, 1, 256, 0.02)])
def test_xla_counts_the_products_and_the_elementwise_work(config, batch, seq, excess, training):
    """XLA's own count of the compiled program is a little above `exact`: by softmax, norms, activations and residuals.

    That share falls with the width: products grow with its square. With it counted in, half a per cent is left, for
    what XLA folds away or computes twice inside fusions.
    """
    functions, arguments = programs(config, batch, seq)
    measured = jax.jit(functions[training]).lower(*arguments).compile().cost_analysis()["flops"]
    ours = batch * seq * accounting.flops_per_token(config, seq, "exact", training)
    _, elementwise = flops_in(jax.make_jaxpr(functions[training])(*arguments).jaxpr)
    assert 0 < measured / ours - 1 < excess
    assert abs(measured / (ours + elementwise) - 1) < 0.005


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_kv_cache_bytes_are_those_of_the_arrays(dtype):
    config = GATED.replace(compute_dtype="bfloat16")
    cache = init_cache(config, batch=3, capacity=20, dtype=dtype)
    assert accounting.kv_cache_bytes(config, 3, 20, dtype) == sum(x.nbytes for x in jax.tree.leaves(cache.layers))
