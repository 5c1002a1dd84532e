"""Measure the objective capacity: requests per second that a trained trial serves at the sweep's service level."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from experiments.sweep.trial import Trial
from model.errors import InputError, check_at_least_one, check_number
from model.parts import Part
from train.task_sets import ERROR

CAPACITY = "capacity"
REFINEMENTS = 5  # rates about the crossing, fewer than for one model: a sweep measures many


@dataclasses.dataclass(frozen=True)
class ServiceLevel(Part):
    """The load that every trial of a sweep is measured under, and what counts as a good request.

    limits: such as ("ttft:200", "tpot:20"), in milliseconds. share: of the requests that keep them at the capacity.
    Prompts have from half to one and a half times `decode.context` tokens, answers `output` tokens, and the engine
    `slots`. requests: the fewest at each rate.
    """

    limits: tuple[str, ...]
    share: float = 0.95
    output: int = 16
    slots: int = 8
    requests: int = 60

    def __post_init__(self) -> None:
        from experiments.bench.serve.measures import Limits

        super().__post_init__()
        if Limits.parse(self.limits) == Limits():
            raise InputError("a service level has at least one limit, such as ttft:200 or tpot:20")
        check_number("the share of good requests", self.share, above=0, below=1)
        check_at_least_one(output=self.output, slots=self.slots, requests=self.requests)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output."""
        return super().from_dict({**values, "limits": tuple(values["limits"])})

    def check(self, trial: Trial) -> None:
        """Raise InputError for a trial whose model cannot be served at this level, before it is trained."""
        from experiments.models import check_is_decoder
        from model.cache import CACHE_DTYPES
        from model.dtypes import dtype_name
        from model.quantize import KINDS

        config = trial.recipe.model
        check_is_decoder(config, f"the objective {CAPACITY}")
        dtype_name(trial.decode.weights, KINDS, "weight type")
        dtype_name(trial.decode.cache, CACHE_DTYPES, "decode.cache")
        if (most := self._most_tokens(trial)) > config.max_seq_len:
            raise InputError(
                f"requests of up to {most} tokens, 3/2 of decode.context={trial.decode.context} and {self.output} of "
                f"the answer, do not fit max_seq_len={config.max_seq_len}; give a smaller --set decode.context=…"
            )

    def _most_tokens(self, trial: Trial) -> int:
        from experiments.bench.serve.prompts import around

        return around(trial.decode.context)[1] + self.output

    def measure(self, trial: Trial, run: Path, file: Path) -> dict[str, float]:
        """Return the capacity of a trained run and its standard error, in requests per second, by the engine alone.

        The engine runs in this process, without HTTP, on the trained weights in the precision of `decode.weights`, with
        arrivals and prompts drawn by the trial's seed. file: keeps the whole measurement, and is read if it is there.
        Raises InputError if no rate holds the service level, or every one does.
        """
        from train.checksums import read_sealed, write_sealed

        if not file.exists():
            write_sealed(file, self._measured(trial, run))
        found = read_sealed(file)["capacity"]
        return {CAPACITY: found["capacity_requests_per_second"], f"{CAPACITY}{ERROR}": found["standard_error"]}

    def _measured(self, trial: Trial, run: Path) -> dict[str, Any]:
        from experiments.bench.serve.bench import bench_capacity
        from experiments.bench.serve.in_process import drive
        from experiments.bench.serve.measures import Limits
        from experiments.bench.serve.prompts import around, prompt_maker
        from infer import Engine, prepare
        from model.store import open_parameters

        config, params = open_parameters(run)
        decode = trial.decode
        engine = Engine(
            config,
            prepare(config, params, decode.weights),
            slots=self.slots,
            capacity=self._most_tokens(trial),
            cache_dtype=decode.cache,
        )
        engine.warm_up()
        capacity, rows = bench_capacity(
            lambda load: drive(engine, load),
            prompt_maker(None, config.vocab_size, around(decode.context), (self.output, self.output)),
            Limits.parse(self.limits),
            share=self.share,
            requests=self.requests,
            streams=self.slots,
            refinements=REFINEMENTS,
            seed=1000 * int(trial.recipe.hparams.seed),
        )
        rows = [{name: value for name, value in row.items() if name != "samples"} for row in rows]
        return {"level": self.to_dict(), "decode": decode.to_dict(), "capacity": capacity.to_dict(), "rates": rows}
