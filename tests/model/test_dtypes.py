"""A dtype means the same as a name, a NumPy or JAX dtype and a scalar type, and an unknown one lists the known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import Engine, generate, init_cache, prepare
from model import ModelConfig, accounting
from model.convert import load_gguf, load_hf
from model.dtypes import dtype_name
from model.errors import InputError
from train.peak import peak_flops_per_second

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=16, max_seq_len=16)
SPELLINGS = {
    "float32": ("float32", np.float32, np.dtype("float32"), jnp.float32, jnp.dtype("float32"), np.dtype(">f4")),
    "bfloat16": ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), jnp.zeros((), jnp.bfloat16).dtype),
    "int8": ("int8", np.int8, np.dtype("int8"), jnp.int8),
}
EVERY = [(name, spelling) for name, spellings in SPELLINGS.items() for spelling in spellings]


@pytest.mark.parametrize(("name", "spelling"), EVERY)
def test_every_spelling_means_the_name(name, spelling):
    assert dtype_name(spelling, SPELLINGS) == name
    layout = lambda dtype: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init_cache(CONFIG, 2, 4, dtype))
    assert layout(spelling) == layout(name)
    # 1 layer, 2 · 2 · 8 features and for int8 2 · 2 float32 scales of each of 10 tokens
    expected = 10 * {"float32": 32 * 4, "bfloat16": 32 * 2, "int8": 32 + 4 * 4}[name]
    assert accounting.kv_cache_bytes(CONFIG, 1, 10, spelling) == expected
    assert accounting.serving_bytes(CONFIG, 1, 10, spelling)["cache"] == expected
    if name != "int8":
        config = CONFIG.replace(compute_dtype=spelling)
        assert config.compute_dtype == name
        assert hash(config) == hash(CONFIG.replace(compute_dtype=name))
        assert config == ModelConfig.from_dict(config.to_dict())


def test_models_are_prepared_run_and_loaded_with_any_spelling(random_params, tmp_path):
    params = random_params(CONFIG)
    kinds = lambda tree: [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    for name, dtype in (("float32", jnp.float32), ("bfloat16", np.dtype(jnp.bfloat16)), ("int8", jnp.int8)):
        assert kinds(prepare(CONFIG, params, dtype)) == kinds(prepare(CONFIG, params, name))
    assert kinds(prepare(CONFIG, params, "int8-dynamic")) == kinds(prepare(CONFIG, params, "int8"))
    run = lambda dtype: generate(CONFIG, params, [[1, 2, 3]], max_new_tokens=3, cache_dtype=dtype).tokens
    assert run(jnp.int8) == run("int8")
    engine = Engine(CONFIG, params, slots=1, capacity=16, cache_dtype=np.int8)
    assert engine.submit([1, 2, 3], max_new_tokens=3) is not None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: init_cache(CONFIG, 1, 4, jnp.float16),
            "unknown cache dtype 'float16'; .* 'float32', 'bfloat16', 'int8'",
        ),
        (lambda: init_cache(CONFIG, 1, 4, ""), "unknown cache dtype ''; supported are 'float32', 'bfloat16', 'int8'"),
        (lambda: accounting.kv_cache_bytes(CONFIG, 1, 4, np.int32), "unknown cache dtype 'int32'; supported are"),
        (lambda: accounting.parameter_bytes(CONFIG, "half"), "unknown dtype 'half'; supported are 'float32'"),
        (lambda: prepare(CONFIG, {}, jnp.float16), "unknown weight type 'float16'; .* 'int8-dynamic', 'int4'"),
        (lambda: Engine(CONFIG, {}, cache_dtype="int9"), "unknown cache dtype 'int9'; supported are"),
        (lambda: CONFIG.replace(compute_dtype=np.float64), "unknown compute_dtype 'float64'; .* 'float32', 'bfloat16'"),
        (lambda: CONFIG.replace(compute_dtype=None), "unknown compute_dtype None; supported are 'float32', 'bfloat16'"),
        (lambda: load_hf("nowhere", dtype=float), "unknown dtype 'float64'; supported are 'float32', 'bfloat16'"),
        (lambda: load_gguf("nowhere", dtype=[1]), r"unknown dtype '\[1\]'; supported are 'float32', 'bfloat16'"),
        (lambda: peak_flops_per_second("float8"), "unknown dtype 'float8'; supported are 'float32', 'bfloat16'"),
    ],
)
def test_an_unknown_dtype_lists_the_known(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
