"""Choose the number of microbatches: as few as the device's memory allows."""

from jax.sharding import Mesh

from model import Execution, ModelConfig
from model.errors import InputError
from model.sharding import check_batch
from train.config import TrainConfig
from train.hosts import agree
from train.lanes.build import compile_program
from train.loop.memory import device_memory
from train.loop.options import RunOptions
from train.objectives import LanguageModeling, Objective
from train.plan import Plan, Stage


def choose_microbatches(
    config: ModelConfig,
    train_config: TrainConfig,
    lanes: int,
    mesh: Mesh,
    options: RunOptions,
    execution: Execution,
    objective: Objective = LanguageModeling(),
) -> Execution:
    """Return the execution with `accumulate` set as `options.microbatch` says.

    "auto" compiles the largest step of the run with the execution's own number of microbatches, then with twice and
    four times as many and so on, until it fits by XLA's own analysis. Raises InputError if no number of microbatches
    fits, or if `microbatch` does not divide the batch.
    """
    if options.microbatch is None:
        return execution
    stages = Plan.of(train_config, None if train_config.phases else 1).stages
    largest = max(stages, key=lambda stage: stage.tokens_per_step)
    if options.microbatch != "auto":
        given = str(options.microbatch)
        rows = int(given) if given.isdecimal() else 0
        if rows < 1 or largest.batch_size % rows:
            raise InputError(f"microbatch={given} is neither auto nor divides the batch of {largest.batch_size} rows")
        found = execution.replace(accumulate=largest.batch_size // rows)
        objective.check_execution(train_config, found)
        return found
    limit = agree(lambda: options.memory or device_memory(mesh.local_devices[0]))
    needed = ""
    for count in _possible(mesh, stages, execution.accumulate):
        candidate = execution.replace(accumulate=count)
        memory = compile_program(config, train_config, lanes, mesh, largest, candidate, objective).memory
        needed = memory.describe(limit)
        if memory.fits(limit):
            return candidate
    raise InputError(f"one row at a time still needs {needed}; take a smaller model, a mesh with fsdp, or remat")


def _possible(mesh: Mesh, stages: tuple[Stage, ...], least: int) -> list[int]:
    """Return `least`, 2 · `least`, … as long as they divide every stage's batch into rows that the mesh divides.

    Example: a batch of 24 rows on a mesh that splits rows over 2 devices gives 1, 2 and 4: the microbatches of 24, 12
    and 6 rows split evenly; 8 microbatches would have 3 rows.
    """
    found, count = [], least
    while all(stage.batch_size % count == 0 for stage in stages):
        try:
            for stage in stages:
                check_batch(mesh, stage.batch_size // count, stage.seq_len)
        except InputError:
            break
        found.append(count)
        count *= 2
    return found or [least]
