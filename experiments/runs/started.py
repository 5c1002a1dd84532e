"""Describe what a run started from: its base, its adapter, and how much is trained and frozen."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.words import bytes_in_words
from model.errors import InputError

if TYPE_CHECKING:
    from model.adapters import Adapter


def started_from_weights(run: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe a run that started from weights, by its `run.json`; None for any other run.

    sha256, path: of the weights that it started from; the path is the recorded one, or the one found now. adapter: its
    rank and alpha, those of the run's own lane, and its targets. trainable: prefixes of what is trained. trained,
    frozen: how many parameters, and their bytes as training holds them. Only the record is read.
    """
    import jax

    from model import ModelConfig, init
    from model.runs import weights_of
    from model.weights import bytes_of, count_of
    from train import objectives

    identity = record["identity"]
    if not identity.get("weights"):
        return None
    config = ModelConfig.from_dict(identity["config"])
    objective = objectives.from_dict(identity.get("objective", objectives.LanguageModeling.NAME))
    adapter, hparams = objective.adapter, record["hparams"]
    if adapter is not None:
        rank, alpha = hparams.get("lora_rank") or adapter.rank, hparams.get("lora_alpha") or adapter.alpha
        adapter = adapter.replace(rank=int(rank), alpha=float(alpha))
        objective = objective.replace(adapter=adapter)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    trained = jax.eval_shape(functools.partial(objective.trained, config), params, jax.random.key(0))
    rest = params if adapter is not None else objective.frozen(params)  # in the form in which they are counted
    held = jax.eval_shape(objective.frozen, params)
    return {
        "sha256": identity["weights"],
        "path": weights_of(run, record),
        "adapter": None if adapter is None else _adapter(adapter, trained),
        "trainable": list(objective.trainable),
        "base_weights": objective.base_weights,
        "trained": {"parameters": count_of(trained), "bytes": bytes_of(trained)},
        "frozen": {"parameters": count_of(rest), "bytes": bytes_of(held)},
    }


def in_words(started: Mapping[str, Any]) -> str:
    """Return it as a sentence without its full stop."""
    place = f" of {started['path']}" if started["path"] else ""
    trained, frozen, adapter = started["trained"], started["frozen"], started["adapter"]
    what = "all parameters"
    if adapter is not None:
        size = f"rank {adapter['rank']}, alpha {adapter['alpha']:g}"
        what = f"a low-rank adapter ({size}) of {', '.join(adapter['targets'])}"
    elif started["trainable"]:
        what = ", ".join(started["trainable"])
    said = (
        f"started from weights {started['sha256'][:16]}…{place}; trains {what}: {trained['parameters']:,} parameters, "
        f"{bytes_in_words(trained['bytes'])}"
    )
    if not frozen["parameters"]:
        return said
    form = f" in {started['base_weights']}" if started["base_weights"] else ""
    return f"{said}; frozen{form}: {frozen['parameters']:,} parameters, {bytes_in_words(frozen['bytes'])}"


def check_target(source: Path, target: Path, *others: Path | None) -> None:
    """Raise InputError if a model written to `target` would replace weights that the run `source` is made of.

    These are its starting weights, recursively those that a run among them started from, and the `others`.
    """
    from model.runs import read_record, weights_of

    places, place = [other for other in others if other is not None], source
    while (place / "run.json").is_file() and (below := weights_of(place, read_record(place))) is not None:
        place = Path(below)
        if place in places:
            break
        places.append(place)
    if target.resolve() in (place.resolve() for place in places):
        raise InputError(f"{target} holds weights that {source} needs; give another folder")


def _adapter(adapter: "Adapter", factors: Mapping[str, Any]) -> dict[str, Any]:
    """Return its size, and those of its targets that the model has."""
    from flax import traverse_util

    there = {path[-3] for path in traverse_util.flatten_dict(factors)}  # …, target, "weight", "a"
    targets = [name for name in adapter.targets if name in there]
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": targets}
