"""Scores over meshes of eight devices, beside those of one. Prints {case: largest error} as JSON."""

import json

import jax
import numpy as np

from infer import prepare, score
from model import Execution, ModelConfig, init
from model.sharding import make_mesh, shardings

CONFIG = ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=4, d_ff=64, max_seq_len=128)


def requests():
    """Two questions after a stem with answers of their own, and rows that share nothing."""
    random = np.random.default_rng(0)
    draw = lambda length: random.integers(0, 32, length).tolist()
    stem = draw(66)
    contexts = [[*stem, *draw(30)] for _ in range(2)]
    return [(context, draw(3)) for context in contexts for _ in range(4)] + [(draw(9), draw(7)) for _ in range(3)]


def main():
    """Data and tensor, of plain and of prepared parameters, placed by `score` or before it."""
    params, pairs = jax.device_get(init(CONFIG, jax.random.key(0))), requests()
    one = score(CONFIG, params, pairs)
    mesh = make_mesh({"data": 4, "tensor": 2})
    over = lambda **axes: Execution(mesh=axes)
    found = {
        "data": score(CONFIG, params, pairs, execution=over(data=8)),
        "data-tensor": score(CONFIG, params, pairs, execution=over(data=2, tensor=4)),
        "apart": score(CONFIG, params, pairs, share_prefixes=False, execution=over(data=4, tensor=2)),
        "prepared": score(CONFIG, prepare(CONFIG, params), pairs, execution=over(data=4, tensor=2)),
        "placed": score(CONFIG, jax.device_put(params, shardings(mesh, params)), pairs),
    }
    error = lambda scores: max(np.abs(np.subtract(*pair)).max() for pair in zip(scores.tokens, one.tokens, strict=True))
    print(json.dumps({name: float(error(scores)) for name, scores in found.items()}))


if __name__ == "__main__":
    main()
