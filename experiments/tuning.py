"""Fine-tuning methods by name, with their data, objectives and defaults."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from train import Recipe
    from train.data.manifest import Manifest
    from train.objectives import Objective

_ROUNDED_TO = 32  # tokens of a row
_LORA_TIMES = 10  # an adapter takes about ten times the rate of all parameters (Schulman et al. 2025)
_TEXT = "text"  # the name of the pre-training text in a mixture


@dataclasses.dataclass(frozen=True)
class Method:
    """kinds: accepted kinds of data folders. rate: peak learning rate when all parameters are trained."""

    kinds: tuple[str, ...]
    rate: float


def methods() -> dict[str, Method]:
    """Return the methods by name: sft, reward, and every preference loss."""
    from train.objectives.preference_losses import LOSSES

    named = {"sft": Method(("chat",), 2e-5), "reward": Method(("preference",), 1e-5)}
    named |= {kind: Method(("preference",), 1e-6) for kind in LOSSES}
    return named | {"kto": Method(("rated", "preference"), 1e-6)}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Configuration of the fine-tuning of a stored model.

    data: a folder of `isoflop data prepare --kind`. mix: a folder of pre-training text, and the share of rows that are
    drawn from it. lora: rank of an adapter; None: all parameters are trained. steps None: `epochs` over the data.
    learning_rate None: that of the method, ten times as much for an adapter. seq_len None: of the longest example.
    """

    method: str
    model: Path
    data: Path
    lora: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float | None = None
    batch_size: int = 8
    seq_len: int | None = None
    mix: tuple[Path, float] | None = None
    seed: int = 0

    def keep_reference(self) -> None:
        """Compute the reference log-probabilities that the method needs, if the data folder lacks them."""
        from model.store import open_model
        from train import weights
        from train.data import load_manifest
        from train.objectives.preference import ReferencedObjective
        from train.reference import keep_reference

        objective = self._objective(load_manifest(self.data))
        if isinstance(objective, ReferencedObjective) and objective.compares:
            config, params, _ = open_model(self.model)
            keep_reference(self.data, config, params, sha256=weights(self.model).sha256, batch_size=self.batch_size)

    def recipe(self, dtype: str) -> "Recipe":
        """Return the recipe of a run. Nothing is written; call `keep_reference` before training.

        dtype: of products and activations. Raises InputError on data of another kind or another tokenizer.
        """
        from experiments.models import is_stored, started_from
        from train import HParams, Recipe, TrainConfig
        from train.data import load_manifest
        from train.objectives.preference import ReferencedObjective
        from train.reference import reference_name

        if not is_stored(str(self.model)):
            raise InputError(f"there is no model at {self.model}; give a run, a Hugging Face folder or a GGUF file")
        method, manifest = self._method(), load_manifest(self.data)
        self._check_kind(method, manifest)
        base, start, _ = started_from(self.model, self.data)
        objective = self._objective(manifest)
        config, objective = objective.fit(base, manifest)
        seq_len = self._seq_len(manifest, base.max_seq_len) if self.seq_len is None else self.seq_len
        if isinstance(objective, ReferencedObjective) and objective.compares:
            objective = objective.replace(reference=reference_name(self.data, base, start.sha256))
        steps = self._steps(manifest.kind, seq_len) if self.steps is None else self.steps
        rate = method.rate * (1 if self.lora is None else _LORA_TIMES)
        rate = rate if self.learning_rate is None else self.learning_rate
        hparams = HParams(
            learning_rate=rate,
            warmup_steps=math.ceil(0.05 * steps),
            final_fraction=0.0,
            weight_decay=0.0,
            beta2=0.999,
            seed=self.seed,
        )
        train_config = TrainConfig(batch_size=self.batch_size, seq_len=seq_len, schedule="linear")
        data: Any = self.data
        if self.mix is not None:
            train_config, data = self._mixed(train_config, steps)
        return Recipe(
            model=config.replace(compute_dtype=dtype),
            train=train_config,
            hparams=hparams,
            data=data,
            steps=steps,
            objective=objective,
            start=start,
        )

    def _method(self) -> Method:
        known = methods()
        if self.method not in known:
            raise UnknownNameError("method", self.method, known, guess=False)
        return known[self.method]

    def _check_kind(self, method: Method, manifest: "Manifest") -> None:
        if manifest.kind not in method.kinds:
            raise InputError(
                f"{self.method} needs data of kind={' or '.join(method.kinds)}, and {self.data} is of kind="
                f"{manifest.kind}; make it with `isoflop data prepare SOURCE --kind {method.kinds[0]} --out FOLDER`"
            )
        if self.mix is not None and self.method != "sft":
            raise InputError(f"--mix is for sft; {self.method} reads answers alone")

    def _objective(self, manifest: "Manifest") -> "Objective":
        from model.adapters import Adapter
        from train.objectives import Instruction, Preference, Rated, Reward

        adapter: dict[str, Any] = {} if self.lora is None else {"adapter": Adapter(rank=self.lora, alpha=self.lora)}
        if self.method == "sft":
            return Instruction(**adapter)
        if self.method == "reward":
            return Reward(**adapter, trainable=() if self.lora is None else ("head",))
        if manifest.kind == "rated":
            return Rated(**adapter)
        return Preference(**adapter, kind=self.method)

    def _seq_len(self, manifest: "Manifest", context: int) -> int:
        """Return the length of a row that holds the longest example, rounded up to a multiple of 32."""
        needed = manifest.longest - (manifest.kind == "chat")  # a packed conversation's last token is only a target
        if needed > context:
            raise InputError(
                f"the longest example of {self.data} takes {needed} tokens of a row, and the context of {self.model} "
                f"has {context}; prepare the data again with --max-tokens {context}"
            )
        return min(context, _ROUNDED_TO * math.ceil(needed / _ROUNDED_TO))

    def _steps(self, kind: str, seq_len: int) -> int:
        """Return the number of updates in `epochs` passes over the data."""
        from train.data import PackedConversations, PairRows, RatedRows
        from train.data.shards import TokenShards

        if not self.epochs > 0:
            raise InputError(f"--epochs {self.epochs} must be above 0")
        rows: Mapping[str, Any] = {"chat": PackedConversations, "preference": PairRows, "rated": RatedRows}
        count = len(rows[kind](TokenShards(self.data, "train"), seq_len))
        return max(1, round(self.epochs * count / self.batch_size))

    def _mixed(self, train_config: Any, steps: int) -> tuple[Any, dict[str, Path]]:
        """Return the train config with a phase that draws from both sources, and the folders by name."""
        from train.phases import Phase

        assert self.mix is not None
        folder, share = self.mix
        weights = (("data", 1 - share), (_TEXT, share))
        warmup = math.ceil(0.05 * steps)
        tokens = train_config.tokens_per_step
        phases = [
            Phase("warm-up", warmup * tokens, mixture=weights, rate="linear"),
            Phase("tuning", (steps - warmup) * tokens, mixture=weights, rate="linear", final=0.0),
        ]
        return train_config.replace(phases=tuple(p for p in phases if p.tokens)), {"data": self.data, _TEXT: folder}


def read_mix(text: str) -> tuple[Path, float]:
    """Read FOLDER=SHARE. Raises InputError."""
    folder, _, share = text.rpartition("=")
    try:
        weight = float(share)
    except ValueError:
        weight = math.nan
    if not folder or not 0 < weight < 1:
        raise InputError(f"--mix {text!r} must be FOLDER=SHARE with a share between 0 and 1, such as data/text=0.1")
    return Path(folder), weight
