"""Training on eight devices by several meshes. Arguments: model, steps, meshes. Prints JSON: see `main`."""

import functools
import json
import re
import sys

import jax
import numpy as np

from model import Experts, ModelConfig
from model.sharding import batch_shardings, make_mesh, parse_mesh, replicated, shardings
from train import HParams, TrainConfig, init_state, train_step
from train.config import stack_hparams
from train.lanes.build import compile_program

DENSE = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=8, num_kv_heads=8, d_ff=64, max_seq_len=16)
EXPERTS = Experts(count=8, top_k=2, d_ff=32)
MODELS = {
    "dense": DENSE,
    "experts": DENSE.replace(experts=EXPERTS),
    "capacity": DENSE.replace(experts=EXPERTS.replace(dispatch="capacity", capacity_factor=1.0)),
}
TRAIN = TrainConfig(batch_size=8, seq_len=16, norms=False)
HPARAMS = HParams(learning_rate=1e-2, total_steps=100)
_GROUPS = (
    r"(?:replica_groups|source_target_pairs)=(?:\{((?:\{[\d,]+\},?)*)\}|\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)"
)


def batches(steps):
    """Rows that count on from a random token: soon learnt."""
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = (random.integers(0, 64, (8, 1)) + np.arange(17)) % 64
        yield {"tokens": rows[:, :-1].astype(np.int32), "targets": rows[:, 1:].astype(np.int32)}


def train_on(config, state, mesh, steps):
    """(losses, share of the state's bytes that the first device holds) of training from `state` on."""
    of_state = shardings(mesh, state)
    step = jax.jit(
        functools.partial(train_step, config, TRAIN),
        in_shardings=(of_state, batch_shardings(mesh, next(batches(1))), replicated(mesh)),
        out_shardings=(of_state, replicated(mesh)),
    )
    losses = []
    with jax.set_mesh(mesh):
        state = jax.device_put(state, of_state)  # from the host's arrays it would be compiled twice
        for batch in batches(steps):
            state, metrics = step(state, batch, HPARAMS)
            losses.append(metrics["loss"])
    leaves = jax.tree.leaves(state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return [float(loss) for loss in losses], held / sum(leaf.nbytes for leaf in leaves)


def train_lanes(mesh, steps):
    """(losses of six lanes, groups of devices that their step makes talk) of a program of eight lanes."""
    program = compile_program(DENSE, TRAIN, 8, mesh)
    own = [HPARAMS.replace(learning_rate=2e-3 * (i + 1), seed=i) for i in range(8)]
    hparams, active, losses = program.place(stack_hparams(own)), np.arange(8) < 6, []
    state = program.init(hparams)
    for batch in batches(steps):
        rolled = {name: np.stack([np.roll(rows, i, axis=0) for i in range(8)]) for name, rows in batch.items()}
        lanes = program.place(rolled, batch_shardings(mesh, rolled, lanes=True))
        state, metrics = program.step(state, lanes, hparams, active)
        losses.append([np.asarray(loss).item() for loss in metrics["loss"][:6]])
    assert [int(program.take(state, lane).step) for lane in (5, 6, 7)] == [steps, 0, 0]
    return losses, groups_that_talk(program.executables.step.as_text(), mesh.size) if mesh.size > 1 else []


def groups_that_talk(text, devices):
    """The numbers of the devices of every collective in a compiled program, written {{0,1},…} or [2,4]<=[8]T(…)."""
    groups = []
    for listed, shape, dims, order in re.findall(_GROUPS, text):
        if shape:
            numbers = lambda part: [int(number) for number in part.split(",")]
            every = np.arange(devices).reshape(numbers(dims))
            groups += (every.transpose(numbers(order)) if order else every).reshape(numbers(shape)).tolist()
        else:
            groups += [[int(number) for number in group.split(",")] for group in re.findall(r"\d[\d,]*", listed)] or [
                list(range(devices))
            ]
    return groups


def main(model, steps, *meshes):
    """Print {mesh: [losses, share of the state on the first device]}; the mesh "data=1" is one device.

    With the model "lanes": {mesh: what `train_lanes` finds}.
    """
    if model == "lanes":
        print(json.dumps({mesh: train_lanes(make_mesh(parse_mesh(mesh)), int(steps)) for mesh in meshes}))
        return
    config = MODELS[model]
    state = jax.device_get(jax.jit(functools.partial(init_state, config, TRAIN, HPARAMS))())
    print(json.dumps({mesh: train_on(config, state, make_mesh(parse_mesh(mesh)), int(steps)) for mesh in meshes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
