"""Interface of a training objective: everything that the loop, checkpoints, lanes, meshes and sweeps need of a loss."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from model import Execution, ModelConfig, Params, accounting
from model.adapters import Adapter, attach, divide, init_adapter, mask_and_scale, masked
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
"""Arrays by name, with rows on their first axis."""
Metrics = dict[str, Float[Array, ""]]
BatchSpec = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Objective(Part, ABC):
    """Batches, loss and metrics of a training objective. Frozen and hashable, since it is static under jit.

    Settings that change numbers inside a batch or a loss, and no shape, belong in `HParams`, so that a sweep over them
    compiles one program. NAME: its name in recipes and on the command line. LIKELIHOOD: the loss is the negative
    log-likelihood of text, so that perplexity and bits per byte are defined. WEIGHT: the metric that counts the tokens
    or rows of the means. EVALUATED: the means that `evaluate` returns. HIGHER_IS_BETTER: metrics to maximise. UNIT:
    unit of the loss. FRESH: top-level names of parameters that are drawn if the model that training starts from does
    not have them, such as "head".

    trainable: prefixes of parameter paths such as "head" or "layers/dense/attention"; empty: all parameters, or with an
    adapter none. adapter: low-rank adapter of matrices that are not trained themselves; beside it only `trainable` is.
    base_weights: storage of the matrices under an adapter (`model.quantize.KINDS`; None: unchanged), for example "int4"
    as in QLoRA.
    """

    NAME: ClassVar[str]
    LIKELIHOOD: ClassVar[bool] = False
    UNIT: ClassVar[str] = "nats"
    WEIGHT: ClassVar[str] = "loss_tokens"
    EVALUATED: ClassVar[tuple[str, ...]] = ("loss",)
    HIGHER_IS_BETTER: ClassVar[tuple[str, ...]] = ("accuracy",)
    FRESH: ClassVar[tuple[str, ...]] = ()

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
        if self.base_weights is not None:
            dtype_name(self.base_weights, KINDS, "base_weights")
            if self.base_weights == "int8-dynamic":
                raise InputError(
                    "base_weights='int8-dynamic' rounds activations, which blocks gradients; use int8 or int4"
                )
            if self.adapter is None:
                raise InputError(f"base_weights={self.base_weights!r} needs an adapter; give one, or no base_weights")
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the name included; `train.objectives.from_dict` reads them."""
        return {"name": self.NAME, **_plain(super().to_dict())}

    @property
    def identity(self) -> dict[str, Any]:
        """Values that enter a recipe's hash: the name, and the fields that are not at their defaults.

        A field that is added later therefore changes no run id. Defaults must never change, since old ids rely on them.
        """
        values = self.to_dict()
        changed = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return {"name": self.NAME, **{name: values[name] for name in changed}}

    # ---- model and data

    def fit(self, config: ModelConfig, manifest: Manifest | None = None) -> tuple[ModelConfig, Self]:
        """Return the model with the head and vocabulary that the objective needs, and the objective with its token ids.

        config: a model with the vocabulary of the data. manifest: of the data; None: unknown.
        """
        del manifest
        return config, self

    def resolved(self, config: ModelConfig) -> Self:
        """Return the objective with explicit ids for the special tokens at the end of the model's vocabulary."""
        del config
        return self

    def special_tokens(self, config: ModelConfig) -> dict[int, str]:
        """Return {id: name} of the special tokens that the objective adds to the text's."""
        del config
        return {}

    def check(self, config: ModelConfig, train_config: TrainConfig) -> None:
        """Raise InputError for a model that the objective cannot train, or a context shorter than the rows."""
        for seq_len in seq_lens(train_config):
            if seq_len > config.max_seq_len:
                raise InputError(
                    f"seq_len={seq_len} is longer than the model's context, max_seq_len={config.max_seq_len}"
                )

    def check_execution(self, train_config: TrainConfig, execution: Execution) -> None:
        """Raise InputError unless microbatches divide every batch, and loss_chunks every row."""
        train_config.check(execution)

    def check_data(self, config: ModelConfig, sources: Mapping[str, TokenShards]) -> None:
        """Raise InputError for data that the model or the objective does not fit."""
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
        """Return the shape and dtype of every array of a batch; evaluation: of a validation batch."""

    @abstractmethod
    def source(
        self,
        config: ModelConfig,
        train_config: TrainConfig,
        hparams: HParams,
        sources: Mapping[str, TokenShards],
        plan: Plan,
    ) -> PhasedLoader:
        """Return a loader of the run's batches, each a pure function of (seed, step)."""

    @abstractmethod
    def validation(
        self, config: ModelConfig, train_config: TrainConfig, folder: str | Path, max_tokens: int | None
    ) -> list[Batch]:
        """Return the validation batches, which are the same for every run on these data, whatever its seed."""

    # ---- parameters

    @property
    def separable(self) -> bool:
        """Return whether the losses of microbatches add up to the loss of their batch."""
        return True

    @property
    def freezes(self) -> bool:
        """True if some parameters of the model are not trained."""
        return bool(self.trainable) or self.adapter is not None

    def trained(self, config: ModelConfig, params: Params, key: PRNGKeyArray, hparams: HParams | None = None) -> Params:
        """Return the trained parameters: those of `split`, and an adapter initialised with the key.

        hparams: set the adapter's rank; columns beyond it are zero and remain zero. Raises InputError if `trainable`
        covers a matrix that the adapter changes.
        """
        whole = self.split(params)[0]
        if self.adapter is None:
            return whole
        tree = init_adapter(config, self.adapter, params, key)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree):
            names = [key.key for key in path[:-1]]
            if _has_path(whole, names):
                raise InputError(
                    f"trainable={list(self.trainable)} covers {'/'.join(names)}, which the adapter changes; leave it "
                    "out of objective.adapter.targets, or of trainable"
                )
        if hparams is not None:
            tree = masked(tree, mask_and_scale(self.adapter, *self._size(hparams))[0])
        return merge(tree, whole)

    def frozen(self, params: Params) -> Params:
        """Return the parameters that are not trained, {} if there are none."""
        rest = self.split(params)[1]
        return rest if self.base_weights is None else quantize_layers(rest, self.base_weights)

    def merged(self, params: Params, frozen: Params | None, hparams: HParams | None = None) -> Params:
        """Return the model's parameters from the trained and the frozen ones.

        hparams: set the adapter's rank and alpha, which may be traced; None: those of the objective.
        """
        if not frozen or self.adapter is None:
            return merge(params, frozen)
        factors, whole = divide(params)
        size = () if hparams is None else self._size(hparams)
        return attach(merge(whole, frozen), factors, *mask_and_scale(self.adapter, *size))

    def _size(self, hparams: HParams) -> tuple[Any, Any]:
        """Return the adapter's rank and alpha, from hyperparameters that may be traced."""
        assert self.adapter is not None
        rank = jnp.where(hparams.lora_rank > 0, jnp.minimum(hparams.lora_rank, self.adapter.rank), self.adapter.rank)
        return rank, jnp.where(hparams.lora_alpha > 0, hparams.lora_alpha, self.adapter.alpha)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return (trainable, frozen): two trees that partition the leaves of the model's parameters.

        An adapter is not among them (see `trained`): without prefixes, nothing of the model is trained beside it.
        Raises InputError if a prefix of `trainable` matches no parameter.
        """
        if not self.trainable:
            return (params, {}) if self.adapter is None else ({}, params)
        for prefix in self.trainable:
            if not _has_path(params, prefix.split("/")):
                raise InputError(f"trainable={prefix!r} names no parameter; the model has {', '.join(sorted(params))}")
        return _split(params, [tuple(prefix.split("/")) for prefix in self.trainable])

    # ---- the loss

    @abstractmethod
    def count(self, batch: Batch) -> Any:
        """Return the denominator of the loss of a whole batch, such as its number of unmasked tokens; any pytree."""

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
        """Return the contribution of one microbatch to `total_loss`, and to the sums from which `finish` gets metrics.

        params: trainable parameters; frozen: the others. hparams: None in evaluation, without auxiliary losses. key:
        turns dropout on. count: `count` of the whole batch; None: of this batch, which is then the whole one.
        microbatches: number of microbatches of the whole batch.
        """

    def finish(self, sums: dict[str, Array]) -> Metrics:
        """Return the metrics of a whole batch, named by `metric_names`, from the sums over its microbatches."""
        return sums

    def metric_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the names of the metrics that `finish` returns: at least "loss", "total_loss" and WEIGHT."""
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
        """Return the means EVALUATED of one batch, and WEIGHT, the weight of the batch in an average over batches.

        hparams: see `merged`.
        """
        _, sums = self.loss(config, self.merged(params, frozen, hparams), None, batch, execution=execution)
        return {name: sums[name] for name in (*self.EVALUATED, self.WEIGHT)}

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of the metrics that a validation adds to a run's record."""
        of_text = ("perplexity", "bits_per_byte") if self.LIKELIHOOD else ()
        return tuple(f"validation_{name}" for name in (*self.EVALUATED, *of_text))

    def rises(self, metric: str) -> bool:
        """Return whether a higher value of a validation metric is better."""
        return metric.removeprefix("validation_") in self.HIGHER_IS_BETTER

    # ---- accounting

    def lengths_of_row(self, seq_len: int) -> tuple[int, int | None]:
        """Return the tokens, without padding, that a row of `seq_len` tokens of text gives the model and its encoder.

        None: the encoder's row is as long as the model's.
        """
        return seq_len, None

    @property
    def selection(self) -> Trained:
        """The trained parameters, as FLOP accounting takes them."""
        if self.adapter is not None:
            return Trained(self.trainable, self.adapter.rank, tuple(self.adapter.targets))
        return Trained(self.trainable) if self.trainable else ALL

    def training_flops_by_product(self, config: ModelConfig, seq_len: int) -> dict[str, float]:
        """Return the exact training FLOPs per token of text in rows of `seq_len` tokens, by matrix product.

        An adapter counts with its full rank: lanes of a smaller rank are masked and cost the same.
        """
        target, source = self.lengths_of_row(seq_len)
        products = accounting.training_flops_by_product(config, target, source, self.selection)
        # The accounting counts per token of the model's row, of which there are `target` for `seq_len` tokens of text.
        return {name: flops * target / seq_len for name, flops in products.items()}

    def flops_per_token(self, config: ModelConfig, seq_len: int, convention: accounting.Convention = "exact") -> float:
        """Return the training FLOPs per token of text in rows of `seq_len` tokens.

        "6N" counts all parameters, trained or not, for every token of text. "exact" counts the matrix products of the
        forward pass and those that the gradient of the trained parameters needs.
        """
        if convention != "exact":
            return accounting.flops_per_token(config, seq_len, convention)
        return sum(self.training_flops_by_product(config, seq_len).values())


def merge(params: Params, frozen: Params | None) -> Params:
    """Merge the two trees that `Objective.split` returns."""
    if not frozen:
        return params
    both = {name: merge(params[name], frozen[name]) for name in params.keys() & frozen.keys()}
    merged = {**params, **frozen, **both}
    return {name: merged[name] for name in sorted(merged)}


def seq_lens(train_config: TrainConfig) -> list[int]:
    """Return the distinct row lengths of a run, in ascending order."""
    return sorted({train_config.seq_len, *(phase.seq_len for phase in train_config.phases if phase.seq_len)})


def special_ids(manifest: Manifest, ids: list[int], folder: Path, name: str) -> None:
    """Raise InputError if an id is in the data's vocabulary and not a special token of its tokenizer."""
    if all(number >= manifest.vocab_size for number in ids):
        return
    from model.tokenizer import load_tokenizer

    special = load_tokenizer(folder).special_tokens
    if taken := [number for number in ids if number < manifest.vocab_size and number not in special]:
        raise InputError(
            f"{name}: id {taken[0]} is a text token of the data's vocabulary of {manifest.vocab_size}; give the model "
            f"a vocab_size of at least {manifest.vocab_size + len(ids)} and ids after the data's"
        )


def _plain(value: Any) -> Any:
    """Replace tuples by lists, at any depth, as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _has_path(tree: Any, path: list[str]) -> bool:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _split(tree: Any, prefixes: list[tuple[str, ...]]) -> tuple[Any, Any]:
    """Split a tree: ("head",) makes that whole branch trainable, ("layers", "mlp") a branch inside "layers"."""
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
