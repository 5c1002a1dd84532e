"""Decoding over meshes, each case beside one device. Argument: a JSON list of cases, see `main`. Prints JSON."""

import functools
import json
import sys

import jax
import numpy as np

from infer import GREEDY, decode_step, generate, init_cache, prefill, prepare
from model import Experts, ModelConfig, init
from model.adapters import Adapter, attach, init_adapter, mask_and_scale
from model.quantize import quantize_layers
from model.sharding import make_mesh, parse_mesh, shardings, under_mesh_of
from model.weights import bytes_of

DENSE = ModelConfig(vocab_size=32, d_model=64, num_layers=1, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=64)
MODELS = {
    "dense": DENSE,
    "untied": DENSE.replace(tie_embeddings=False, num_layers=2, sliding_window=4, layer_pattern=("local", "global")),
    "experts": DENSE.replace(experts=Experts(count=4, top_k=2, d_ff=32)),
    "adapted": DENSE,
    "adapted-int4": DENSE,
}
TOKENS = np.random.default_rng(1).integers(0, 32, (4, 8)).astype(np.int32)
LENGTHS = np.array([5, 2, 4, 1], np.int32)


@functools.cache
def params_of(model):
    """Parameters larger than at initialisation, so that tokens and their probabilities differ."""
    params = jax.device_get(init(MODELS[model], jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, params)
    if not model.startswith("adapted"):
        return params
    adapter = Adapter(rank=1)
    tree = jax.tree.map(lambda leaf: leaf + 0.2, init_adapter(DENSE, adapter, params, jax.random.key(1)))
    if model == "adapted-int4":
        params = quantize_layers(params, "int4")
    return jax.device_get(attach(params, tree, *mask_and_scale(adapter)))


def steps(config, params, rows, dtype):
    """Logits [steps, rows, vocab] of a prompt in two chunks and of two tokens after it, and the cache."""
    with under_mesh_of(params):
        cache = init_cache(config, rows, 8, dtype)
        empty = split_of(cache)
        made = []
        for start in (0, 3):
            inside = np.clip(LENGTHS[:rows] - start, 0, 3)
            logits, cache = prefill(config, params, TOKENS[:rows, start : start + 3], inside, cache)
            made.append(np.where((inside > 0)[:, None], logits, 0))
        for step in (6, 7):
            logits, cache = decode_step(config, params, TOKENS[:rows, step], cache)
            made.append(np.asarray(logits))
    return np.stack(made), empty, split_of(cache)


def split_of(cache):
    """{whole shape: shape on a device} of every kind of array of the layers."""
    return {str(leaf.shape): list(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(cache.layers)}


def texts(config, params, rows, dtype):
    """Tokens and their log-probabilities."""
    prompts = [row[:length].tolist() for row, length in zip(TOKENS[:rows], LENGTHS, strict=False)]
    made = generate(config, params, prompts, GREEDY, max_new_tokens=6, cache_dtype=dtype)
    return made.tokens, made.logprobs


@functools.cache
def on_one_device(model, weights, rows, dtype, whole):
    """Reference outputs of one device, and the bytes of the parameters."""
    params = params_of(model) if weights is None else prepare(MODELS[model], params_of(model), weights)
    return (texts if whole else steps)(MODELS[model], params, rows, dtype), bytes_of(params)


def beside(model, mesh, weights="float32", rows=4, cache=None, generates=False):
    """One case: {"share", "error"} and {"same"} or {"empty", "filled"}.

    weights: None for parameters as they are trained. share: of the bytes of one device's parameters that the mesh's
    first device holds. error: the largest, of logits as a share of the largest logit, or of log-probabilities. same:
    whether the tokens are; texts: how many differ.
    """
    config, params, mesh = MODELS[model], params_of(model), make_mesh(parse_mesh(mesh))
    if weights is None:
        params = jax.device_put(params, shardings(mesh, params))
    else:
        params = prepare(config, params, weights, mesh=mesh)
    one, size = on_one_device(model, weights, rows, cache, generates)
    share = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)) / size
    if generates:
        tokens, logprobs = texts(config, params, rows, cache)
        error = max(np.abs(np.subtract(*pair)).max() for pair in zip(logprobs, one[1], strict=True))
        return {"share": share, "error": float(error), "same": tokens == one[0], "texts": len({*map(tuple, tokens)})}
    logits, empty, filled = steps(config, params, rows, cache)
    error = np.abs(logits - one[0]).max() / np.abs(one[0]).max()
    return {"share": share, "error": float(error), "empty": empty, "filled": filled}


def main(cases):
    """Print the list of what `beside` finds for the keyword arguments of every case."""
    print(json.dumps([beside(**case) for case in json.loads(cases)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
