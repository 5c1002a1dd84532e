"""Scores over meshes of eight devices, or of two processes, beside those of one. Prints {case: largest error} as JSON.

Arguments, for processes: the coordinator and the number of this one of two, see `train.hosts`.
"""

import json
import sys

import jax
import numpy as np

from infer import prepare, score
from model import Execution, ModelConfig, init
from model.sharding import make_mesh, shardings
from train.hosts import initialize

CONFIG = ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=4, d_ff=64, max_seq_len=128)


def requests():
    """Requests of two questions after one stem, each with several answers, and of rows without a common prefix."""
    random = np.random.default_rng(0)

    def draw(length):
        return random.integers(0, 32, length).tolist()

    stem = draw(66)
    contexts = [[*stem, *draw(30)] for _ in range(2)]
    return [(context, draw(3)) for context in contexts for _ in range(4)] + [(draw(9), draw(7)) for _ in range(3)]


def over(**axes):
    return Execution(mesh=axes)


def over_devices(params, pairs):
    """Score over meshes of data and tensor, with plain and prepared parameters, placed by `score` or before it."""
    mesh = make_mesh({"data": 4, "tensor": 2})
    return {
        "data": score(CONFIG, params, pairs, execution=over(data=8)),
        "data-tensor": score(CONFIG, params, pairs, execution=over(data=2, tensor=4)),
        "apart": score(CONFIG, params, pairs, share_prefixes=False, execution=over(data=4, tensor=2)),
        "prepared": score(CONFIG, prepare(CONFIG, params), pairs, execution=over(data=4, tensor=2)),
        "placed": score(CONFIG, jax.device_put(params, shardings(mesh, params)), pairs),
    }


def over_processes(params, pairs):
    """Score over a mesh of two processes."""
    return {"processes": score(CONFIG, params, pairs, top_k=1, execution=over(data=2))}


def main():
    """Print the errors as JSON: over processes with arguments, else over meshes."""
    if len(sys.argv) > 1:
        initialize(sys.argv[1], 2, int(sys.argv[2]))
    params, pairs = jax.device_get(init(CONFIG, jax.random.key(0))), requests()
    one = score(CONFIG, params, pairs)
    found = (over_processes if len(sys.argv) > 1 else over_devices)(params, pairs)

    def error(scores):
        return max(np.abs(np.subtract(*pair)).max() for pair in zip(scores.tokens, one.tokens, strict=True))

    print(json.dumps({name: float(error(scores)) for name, scores in found.items()}))


if __name__ == "__main__":
    main()
