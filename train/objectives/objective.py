"""What a training objective is: all that the loop, checkpoints, lanes, meshes and sweeps know of a loss."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from model import Execution, ModelConfig, Params, accounting
from model.adapters import Adapter, attach, init_adapter, mask_and_scale, masked
from model.dtypes import dtype_name
from model.errors import InputError
from model.parts import Part
from model.products import ALL, Trained
from model.quantize import KINDS, quantize_layers
from train.config import HParams, TrainConfig
from train.data.manifest import Manifest
from train.data.mixture import PhasedLoader
from train.data.shards import TokenShards
from train.plan import Plan

Batch = dict[str, Any]
"""Arrays by name; the first axis of each counts rows."""
Metrics = dict[str, Float[Array, ""]]
BatchSpec = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Objective(Part, ABC):
    """A way to train: its batches, its loss, its metrics. Frozen and hashable, for it is static under jit.

    What only changes numbers inside a batch or a loss, and no shape, belongs into `HParams`, so that a sweep over it
    compiles nothing. NAME: as recipes and the command line name it. LIKELIHOOD: whether its loss is the negative
    log-likelihood of text, so that perplexity and bits per byte say something. WEIGHT: the metric that counts what the
    other metrics are means over. EVALUATED: the means that `evaluate` returns. HIGHER_IS_BETTER: those of them that
    are to grow. UNIT: of its loss.

    trainable: prefixes of parameter paths such as "head" or "layers/dense/attention"; empty: everything is trained.
    adapter: low-rank changes of the model's matrices, which are then all that is trained. base_weights: how the
    matrices under an adapter are stored (`model.quantize.KINDS`; None: as they are), "int4" as in QLoRA.
    """

    NAME: ClassVar[str]
    LIKELIHOOD: ClassVar[bool] = False
    UNIT: ClassVar[str] = "nats"
    WEIGHT: ClassVar[str] = "loss_tokens"
    EVALUATED: ClassVar[tuple[str, ...]] = ("loss",)
    HIGHER_IS_BETTER: ClassVar[tuple[str, ...]] = ("accuracy",)

    trainable: tuple[str, ...] = ()
    adapter: Adapter | None = None
    base_weights: str | None = None

    def __post_init__(self) -> None:
        prefixes = self.trainable
        if not isinstance(prefixes, (list, tuple)) or not all(isinstance(prefix, str) for prefix in prefixes):
            raise InputError(f"trainable={prefixes!r} must be a list of prefixes of parameter paths, such as ['head']")
        object.__setattr__(self, "trainable", tuple(prefixes))
        if isinstance(self.adapter, Mapping):
            object.__setattr__(self, "adapter", Adapter.from_dict(dict(self.adapter)))
        if self.trainable and self.adapter is not None:
            raise InputError(f"trainable={list(prefixes)} and an adapter both say what is trained; give one")
        if self.base_weights is not None:
            dtype_name(self.base_weights, KINDS, "base_weights")
            if self.base_weights == "int8-dynamic":
                raise InputError(
                    "base_weights='int8-dynamic' rounds activations, through which nothing learns; use int8 or int4"
                )
            if self.adapter is None:
                raise InputError(f"base_weights={self.base_weights!r} is for what lies under an adapter; give one too")
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the name; `train.objectives.from_dict` reads them back."""
        return {"name": self.NAME, **_plain(super().to_dict())}

    @property
    def identity(self) -> dict[str, Any]:
        """What a recipe's hash covers of it: the name, and the fields that are not at their defaults.

        So a field that is added later changes no id. A default must never change: it is what old ids mean.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        different = [name for name, default in defaults.items() if getattr(self, name) != default]
        values = self.to_dict()
        return {"name": self.NAME, **{name: values[name] for name in different}}

    # ---- the model and the data that it fits

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return the model with the head and the vocabulary that it is trained with, and the objective with its ids.

        config: of a model whose vocabulary is that of the data. manifest: theirs, where it is known.
        """
        del manifest
        return config, self

    def resolved(self, config: ModelConfig) -> Self:
        """Return the objective with the ids named that it takes from the end of the model's vocabulary."""
        del config
        return self

    def special_tokens(self, config: ModelConfig) -> dict[int, str]:
        """Return the names, by their ids, of tokens that it shows or predicts and that no text holds."""
        del config
        return {}

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError on a model that cannot be trained so, or not in rows of this length."""
        for seq_len in seq_lens(train_config):
            if seq_len > config.max_seq_len:
                raise InputError(
                    f"seq_len={seq_len} is longer than the model's context, max_seq_len={config.max_seq_len}"
                )

    def check_execution(self, train_config: TrainConfig, execution: Execution) -> None:
        """Raise InputError unless the execution divides every batch into its microbatches, and every row likewise."""
        train_config.check(execution)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError on data that it cannot be trained on."""
        for name, source in sources.items():
            if source.manifest.vocab_size > config.vocab_size:
                raise InputError(
                    f"the vocabulary of {name} ({source.manifest.vocab_size}) exceeds the model's "
                    f"vocab_size={config.vocab_size}"
                )

    # ---- batches

    @abstractmethod
    def batch_spec(
        self, config: ModelConfig, train_config: TrainConfig, batch_size: int, seq_len: int, *, evaluation: bool = False
    ) -> BatchSpec:
        """Return the shape and dtype of every array of a batch; evaluation: of one that the model is validated on."""

    @abstractmethod
    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return the batches of a run, each a pure function of (seed, step)."""

    @abstractmethod
    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the batches that every run on these data is validated on, whatever its seed."""

    # ---- parameters

    @property
    def freezes(self) -> bool:
        """Whether parameters of the model are read alone."""
        return bool(self.trainable) or self.adapter is not None

    def trained(self, config: ModelConfig, params: Params, key: PRNGKeyArray, hparams: HParams | None = None) -> Params:
        """Return what a training state holds of fresh or given parameters: an adapter is drawn from the key.

        hparams: give the adapter's rank; columns that it masks are zero, and stay so.
        """
        if self.adapter is not None:
            tree = init_adapter(config, self.adapter, params, key)
            return tree if hparams is None else masked(tree, mask_and_scale(self.adapter, *self._size(hparams))[0])
        return self.split(params)[0]

    def frozen(self, params: Params) -> Params:
        """Return the parameters that are read alone; {} where there are none."""
        if self.adapter is None:
            return self.split(params)[1]
        return params if self.base_weights is None else quantize_layers(params, self.base_weights)

    def merged(self, params: Params, frozen: Params | None, hparams: HParams | None = None) -> Params:
        """Return the parameters of the model from what is trained and what is not.

        hparams: give the adapter's rank and alpha, which may be traced; None: the objective's own.
        """
        if not frozen or self.adapter is None:
            return merge(params, frozen)
        size = () if hparams is None else self._size(hparams)
        return attach(frozen, params, *mask_and_scale(self.adapter, *size))

    def _size(self, hparams: HParams) -> tuple[Any, Any]:
        """The rank and the alpha that hyperparameters, which may be traced, give the adapter."""
        assert self.adapter is not None
        rank = jnp.where(hparams.lora_rank > 0, jnp.minimum(hparams.lora_rank, self.adapter.rank), self.adapter.rank)
        return rank, jnp.where(hparams.lora_alpha > 0, hparams.lora_alpha, self.adapter.alpha)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return (trainable, frozen): two trees that share no leaf and together are `params`.

        Raises InputError where a prefix of `trainable` names no parameter, and for an adapter, which is no part of the
        parameters (`trained`).
        """
        if self.adapter is not None:
            raise InputError("an adapter is no part of the parameters; take Objective.trained and Objective.frozen")
        if not self.trainable:
            return params, {}
        for prefix in self.trainable:
            if not _below(params, prefix.split("/")):
                raise InputError(f"trainable={prefix!r} names no parameter; the model has {', '.join(sorted(params))}")
        return _split(params, [tuple(prefix.split("/")) for prefix in self.trainable])

    # ---- the loss

    @abstractmethod
    def count(self, batch: Batch) -> Any:
        """Return what a loss is a mean over, such as the number of unmasked tokens, of a whole batch; any tree."""

    @abstractmethod
    def loss(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        hparams: HParams | None = None,
        key: PRNGKeyArray | None = None,
        *,
        count: Any = None,
        microbatches: int = 1,
        execution: Execution = Execution(),
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Return what one microbatch adds to `total_loss`, and to the sums that `finish` makes the metrics of.

        params: the trainable ones; frozen: the others. hparams None: an evaluation, of the loss alone. key: dropout is
        on when given. count: `count` of the whole batch (None: of this one, which is then all of it); microbatches: how
        many it has.
        """

    def finish(self, sums: dict[str, Array]) -> Metrics:
        """Return the metrics of a whole batch, those of `metric_names`, from the sums over its microbatches."""
        return sums

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the names that `finish` gives: "loss", "total_loss" and WEIGHT at least."""
        del config
        return ("loss", "total_loss", self.WEIGHT)

    def evaluate(
        self,
        config: ModelConfig,
        params: Params,
        frozen: Params | None,
        batch: Batch,
        *,
        hparams: HParams | None = None,
        execution: Execution = Execution(),
    ) -> Metrics:
        """Return the means over one batch that EVALUATED names, and WEIGHT, by which batches are averaged.

        hparams: as `merged` takes them.
        """
        _, sums = self.loss(config, self.merged(params, frozen, hparams), None, batch, execution=execution)
        return {name: sums[name] for name in (*self.EVALUATED, self.WEIGHT)}

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """What a validation adds to a run's record."""
        of_text = ("perplexity", "bits_per_byte") if self.LIKELIHOOD else ()
        return tuple(f"validation_{name}" for name in (*self.EVALUATED, *of_text))

    def rises(self, metric: str) -> bool:
        """Return whether a higher value of a validation metric is better."""
        return metric.removeprefix("validation_") in self.HIGHER_IS_BETTER

    # ---- accounting

    def lengths_of_row(self, seq_len: int) -> tuple[int, int | None]:
        """Return what a row of `seq_len` tokens of text becomes: the tokens of the model's row, and of its encoder's.

        None: as many. Without padding.
        """
        return seq_len, None

    @property
    def selection(self) -> Trained:
        """Return what is trained, as FLOPs are counted by."""
        if self.adapter is not None:
            return Trained.factors(self.adapter.rank, tuple(self.adapter.targets))
        return Trained(self.trainable) if self.trainable else ALL

    def training_flops_by_product(self, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Return the exact FLOPs of training per token of a row of `seq_len` tokens of text, by product.

        An adapter counts with its own rank, that of the largest lane: smaller ones are masked and cost the same.
        """
        target, source = self.lengths_of_row(seq_len)
        products = accounting.training_flops_by_product(config, target, source, self.selection)
        return {name: once * target / seq_len for name, once in products.items()}

    def flops_per_token(self, config: ModelConfig, seq_len: int, convention: accounting.Convention = "exact") -> float:
        """Return the FLOPs of training per token of a row of `seq_len` tokens of text.

        "6N": of all parameters, whichever are trained and whichever of the text's tokens pass through them. "exact":
        of the products that the gradient of what is trained needs.
        """
        if convention != "exact":
            return accounting.flops_per_token(config, seq_len, convention)
        return sum(self.training_flops_by_product(config, seq_len).values())


def merge(params: Params, frozen: Params | None) -> Params:
    """Return the tree of which `Objective.split` made the two."""
    if not frozen:
        return params
    both = {name: merge(params[name], frozen[name]) for name in params.keys() & frozen.keys()}
    merged = {**params, **frozen, **both}
    return {name: merged[name] for name in sorted(merged)}


def seq_lens(train_config: TrainConfig) -> list[int]:
    """Return the lengths of the rows of a run."""
    return sorted({train_config.seq_len, *(phase.seq_len for phase in train_config.phases if phase.seq_len)})


def special_ids(manifest: Manifest, ids: list[int], folder: Path, name: str) -> None:
    """Raise InputError where an id is a piece that the data's text may hold."""
    if all(number >= manifest.vocab_size for number in ids):
        return
    from model.tokenizer import load_tokenizer

    special = load_tokenizer(folder).special_tokens
    if taken := [number for number in ids if number < manifest.vocab_size and number not in special]:
        raise InputError(
            f"{name}: id {taken[0]} is a piece of the data's vocabulary of {manifest.vocab_size}; give the model a "
            f"vocab_size of at least {manifest.vocab_size + len(ids)} and ids after the data's"
        )


def _plain(value: Any) -> Any:
    """Lists in place of tuples, however deep, as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, (tuple, list)) else value


def _below(tree: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _split(tree: Any, prefixes: list[tuple[str, ...]]) -> tuple[Any, Any]:
    trainable, frozen = {}, {}
    for name, value in tree.items():
        rest = [prefix[1:] for prefix in prefixes if prefix[0] == name]
        if () in rest:
            trainable[name] = value
        elif rest:
            trainable[name], frozen[name] = _split(value, rest)
        else:
            frozen[name] = value
    return trainable, {name: value for name, value in frozen.items() if not (isinstance(value, dict) and not value)}
