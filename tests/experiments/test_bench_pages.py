"""All ways to keep a cache give the same attention, step after step."""

import jax.numpy as jnp
import numpy as np

from experiments.bench.decode.pages import Shapes, contenders, measure

SHAPES = Shapes(layers=2, slots=3, heads=4, kv_heads=2, head_dim=8, capacity=32, page=8)


def test_all_ways_give_the_same():
    x = jnp.array(np.random.default_rng(1).normal(size=(3, 4, 1, 8)).astype(np.float32))
    outputs = {}
    for name, (step, caches) in contenders(SHAPES).items():
        new = x
        for length in (7, 8, 9):  # over the end of a page
            new, caches = step(caches, new, jnp.array([3, length, 20 + length], jnp.int32))
        outputs[name] = np.array(new)
    for output in outputs.values():
        np.testing.assert_allclose(output, outputs["rows"], atol=1e-6)
    other, _ = contenders(SHAPES, seed=1)["rows"][0](
        contenders(SHAPES, seed=1)["rows"][1], x, jnp.full(3, 9, jnp.int32)
    )
    assert np.abs(other - outputs["rows"]).max() > 1e-2


def test_the_document_has_every_fill():
    document = measure(SHAPES, fills=(8, 20), rounds=2, steps=2)
    for filled in (8, 20):
        figures = document["filled"][filled]
        assert all(figures[f"{name}_ms"] > 0 for name in ("rows", "rows_by_page", "pages_gathered", "pages_by_page"))
        assert figures["pages_by_page_over_rows_lowest"] <= figures["pages_by_page_over_rows"]
