"""Branch off a base run at a constant rate: decay phases that begin at chosen steps, each a run of its own.

The base run's compute is spent once, however many branches it has (Hägele et al. 2024, "Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations"): one model size gives losses at several numbers of tokens.
"""

from collections.abc import Mapping
from pathlib import Path

from model.errors import InputError, check_at_least_one
from train.data.folders import Data, data_of
from train.recipe import Branch, Recipe
from train.run import read_record, recipe_of


def cooldown(
    trunk: str | Path,
    step: int,
    decay_steps: int,
    final_fraction: float = 0.0,
    data: str | Path | Mapping[str, str | Path] | None = None,
) -> Recipe:
    """Return the recipe of a run that branches off the base run `trunk` after `step` updates, and decays from there.

    The rate decays linearly to `final_fraction` of the peak in `decay_steps` updates. Up to `step` the branch equals
    the base run bit by bit, and its data continue where the base run's would. data: where the data are now; None: where
    they were. Raises InputError if the base run's rate is not at its peak at that step, or if the data are not its own.
    """
    record = read_record(trunk)
    recipe = recipe_of(record)
    train_config, hparams = recipe.train, recipe.hparams
    if recipe.objective.freezes:
        raise InputError(
            f"{trunk} trains only part of its parameters, and a run cannot branch off one that does; train each length "
            "as a run of its own"
        )
    check_at_least_one(decay_steps=decay_steps)
    if train_config.phases or train_config.schedule not in ("constant", "wsd"):
        kind = "a plan of phases" if train_config.phases else f"schedule={train_config.schedule!r}"
        raise InputError(f"{trunk} has {kind}; a base run needs schedule=constant or wsd")
    total = int(hparams.total_steps)
    warmup = int(hparams.warmup_steps) or round(float(hparams.warmup_fraction) * total)
    own_decay = int(hparams.decay_steps) or round(float(hparams.decay_fraction) * total)
    end = None if train_config.schedule == "constant" else total - own_decay
    if step < warmup or (end is not None and step > end):
        until = "" if end is None else f" and {end}, where its own decay phase begins"
        raise InputError(
            f"no run can branch off {trunk} at step {step}: take one between {warmup}, the end of warm-up{until}"
        )
    opened = Data.open(data_of(trunk, record) if data is None else data)
    if opened.hash != recipe.data:
        raise InputError(f"{opened.place} holds other data than {trunk} was trained on; give those with --data")
    return recipe.replace(
        train=train_config.replace(schedule="wsd"),
        hparams=hparams.replace(
            total_steps=step + decay_steps,
            decay_steps=decay_steps,
            warmup_steps=warmup,
            warmup_fraction=0.0,
            final_fraction=final_fraction,
        ),
        folders=opened.place,
        start=Branch(record["run_id"], step, Path(trunk).resolve()),
        steps=step + decay_steps,
    )
