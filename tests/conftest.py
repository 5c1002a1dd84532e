"""What all tests share."""

import functools
import os

# Tests compile far more than they run: unoptimised programs without fusions compile six times faster.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest

import model


@pytest.fixture(scope="session")
def random_params():
    """(config, seed=0) → float32 parameters where no bias is zero, no scale is one and no table is small.

    A term that starts as nothing cannot be tested. No program is compiled for them.
    """

    def draw(path, leaf, random):
        noise = random.normal(size=leaf.shape)
        match path[-1].key:
            case "scale":
                value = 1 + 0.3 * noise
            case "bias":
                value = 0.3 * noise
            case "weight":
                value = noise / leaf.shape[-2] ** 0.5
            case _:
                value = 0.5 * noise
        return value.astype(np.float32)

    @functools.cache
    def make(config, seed=0):
        shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
        random = np.random.default_rng(seed)
        return jax.tree_util.tree_map_with_path(lambda path, leaf: draw(path, leaf, random), shapes)

    return make
