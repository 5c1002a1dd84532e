"""Branch and cool: from one trunk at a constant rate, cool-downs at chosen steps, each a run of its own.

The trunk's compute is spent once, however many branches it has (Hägele et al. 2024, "Scaling Laws and Compute-Optimal
Training Beyond Fixed Training Durations"): one model size gives losses at several numbers of tokens.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import ModelConfig
from model.errors import InputError
from train.checkpoint import Checkpoints
from train.config import HParams, TrainConfig
from train.data.folders import Data, data_of
from train.hosts import agree
from train.run import read_record


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a run leaves another one. trunk: its folder; run_id: its name; step: updates that both share."""

    trunk: Path
    run_id: str
    step: int

    def check(self) -> None:
        """Raise InputError where the trunk has no checkpoint of that step."""
        there = agree(Checkpoints(self.trunk, read_only=True).steps)
        if self.step not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise InputError(f"{self.trunk} has no checkpoint of step {self.step}; the steps there are: {steps}")

    @property
    def identity(self) -> dict[str, Any]:
        """What it adds to the identity of a run."""
        return {"run_id": self.run_id, "step": self.step}


@dataclasses.dataclass(frozen=True)
class Cooldown:
    """A branch ready to be trained: what `train.train` takes, but for the folder."""

    config: ModelConfig
    train_config: TrainConfig
    hparams: HParams
    data: str | dict[str, str]
    branch: Branch
    steps: int


def cooldown(
    trunk: str | Path,
    step: int,
    decay_steps: int,
    final_fraction: float = 0.0,
    data: str | Path | Mapping[str, str | Path] | None = None,
) -> Cooldown:
    """The run that leaves `trunk` after `step` updates and cools down linearly to `final_fraction` of the peak.

    Up to that step it is the trunk, bit by bit; its data go on where the trunk's do. data: where those lie now; None:
    where they were. Raises InputError where the trunk's rate is not yet, or no longer, at its peak at that step, and
    where the data are not those of the trunk.
    """
    record = read_record(trunk)
    identity = record["identity"]
    train_config = TrainConfig.from_dict(identity["train_config"])
    hparams = HParams(**record["hparams"])
    if decay_steps < 1:
        raise InputError(f"decay_steps={decay_steps} must be at least 1")
    if train_config.phases or train_config.schedule not in ("constant", "wsd"):
        kind = "a plan of phases" if train_config.phases else f"schedule={train_config.schedule!r}"
        raise InputError(f"{trunk} has {kind}; a trunk needs schedule=constant or wsd")
    total = int(hparams.total_steps)
    warmup = int(hparams.warmup_steps) or round(float(hparams.warmup_fraction) * total)
    own_decay = int(hparams.decay_steps) or round(float(hparams.decay_fraction) * total)
    end = None if train_config.schedule == "constant" else total - own_decay
    if step < warmup or (end is not None and step > end):
        until = "" if end is None else f" and {end}, where its own cool-down begins"
        raise InputError(f"{trunk} cannot be left at step {step}: take one between {warmup}, the end of warm-up{until}")
    opened = Data.open(data_of(trunk, record) if data is None else data)
    if opened.hash != identity["data"]:
        raise InputError(f"{opened.place} holds other data than {trunk} was trained on; give those with --data")
    return Cooldown(
        config=ModelConfig.from_dict(identity["config"]),
        train_config=train_config.replace(schedule="wsd"),
        hparams=hparams.replace(
            total_steps=step + decay_steps,
            decay_steps=decay_steps,
            warmup_steps=warmup,
            warmup_fraction=0.0,
            final_fraction=final_fraction,
        ),
        data=opened.place,
        branch=Branch(Path(trunk).resolve(), record["run_id"], step),
        steps=step + decay_steps,
    )
