"""How many cuts a batch is taken in: as few as the device's memory holds."""

from jax.sharding import Mesh

from model import ModelConfig
from model.errors import InputError
from model.sharding import check_batch
from train.compile import compile_program
from train.config import TrainConfig
from train.hosts import agree
from train.memory import device_memory
from train.plan import Plan, Stage
from train.shell import Shell


def choose_cuts(config: ModelConfig, train_config: TrainConfig, lanes: int, mesh: Mesh, shell: Shell) -> TrainConfig:
    """The TrainConfig with `accumulate` as the shell's `microbatch` wants it.

    "auto" compiles the largest step of the run with 1, 2, 4, … cuts until XLA's own analysis says that it fits. Raises
    InputError where no number of cuts does, or `microbatch` does not divide the batch.
    """
    if shell.microbatch is None:
        return train_config
    stages = Plan.of(train_config, None if train_config.phases else 1).stages
    largest = max(stages, key=lambda stage: stage.tokens_per_step)
    if shell.microbatch != "auto":
        given = str(shell.microbatch)
        rows = int(given) if given.isdecimal() else 0
        if rows < 1 or largest.batch_size % rows:
            raise InputError(f"microbatch={given} is neither auto nor divides the batch of {largest.batch_size} rows")
        return train_config.replace(accumulate=largest.batch_size // rows)
    limit = agree(lambda: shell.memory or device_memory(mesh.local_devices[0]))
    needed = ""
    for cuts in _possible(mesh, stages):
        candidate = train_config.replace(accumulate=cuts)
        memory = compile_program(config, candidate, lanes, mesh, largest).memory
        needed = memory.describe(limit)
        if memory.fits(limit):
            return candidate
    raise InputError(f"one row at a time still needs {needed}; take a smaller model, a mesh with fsdp, or remat")


def _possible(mesh: Mesh, stages: tuple[Stage, ...]) -> list[int]:
    """Powers of two that divide every stage's batch into cuts that the mesh divides."""
    found, cuts = [], 1
    while all(stage.batch_size % cuts == 0 for stage in stages):
        try:
            for stage in stages:
                check_batch(mesh, stage.batch_size // cuts, stage.seq_len)
        except InputError:
            break
        found.append(cuts)
        cuts *= 2
    return found or [1]
