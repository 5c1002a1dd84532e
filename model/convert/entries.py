"""Entries of a config.json: how one or a few keys become fields of ModelConfig, and back."""

import dataclasses
from typing import Any, Protocol

from model.config import ModelConfig
from model.errors import InputError

Raw = dict[str, Any]
"""Content of a config.json."""
MAX_COUNT = 100_000
"""Upper limit on layers and on everything else that is counted one by one, so that a bad number cannot fill memory."""


class Entry(Protocol):
    """One part of the configuration, read from a config.json and written to it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of a config.json that the entry reads or writes."""

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return fields of ModelConfig from a config.json in which missing keys of each `Field` have their defaults.

        Raises InputError for features that isoflop does not have.
        """

    def write(self, config: ModelConfig) -> Raw:
        """Return keys of a config.json, which may lack features of the config: the caller reads them to find out."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of ModelConfig that is one key. default: of the Transformers class, for files without the key."""

    field: str
    key: str
    default: Any
    old_key: str | None = None  # in older files

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its older name."""
        return (self.key,) if self.old_key is None else (self.key, self.old_key)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return the value unchanged; null remains None, from which ModelConfig derives some fields."""
        return {self.field: raw[self.key]}

    def write(self, config: ModelConfig) -> Raw:
        """Return the value unchanged."""
        return {self.key: getattr(config, self.field)}


class Constant:
    """Fields of ModelConfig that are the same for all models of the family."""

    keys = ()

    def __init__(self, **values: Any):
        self.values = values

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return the values."""
        return self.values

    def write(self, config: ModelConfig) -> Raw:
        """Return no keys: the model_type implies the values."""
        return {}


class WriteOnly:
    """Keys that are written for Transformers and not read."""

    def __init__(self, **values: Any):
        self.values, self.keys = values, tuple(values)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return no fields."""
        return {}

    def write(self, config: ModelConfig) -> Raw:
        """Return the values."""
        return self.values


class OneOf:
    """A key with few supported values; the first is the default of a missing key."""

    def __init__(self, key: str, *allowed: Any):
        self.key, self.allowed, self.keys = key, allowed, (key,)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return no fields. Raises InputError for another value."""
        value = raw.get(self.key, self.allowed[0])
        if value not in self.allowed:
            wanted = " or ".join(repr(choice) for choice in self.allowed)
            raise InputError(f"{self.key}={value!r} is not supported; isoflop reads {wanted}")
        return {}

    def write(self, config: ModelConfig) -> Raw:
        """Return the default."""
        return {self.key: self.allowed[0]}


_ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu_squared",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: Any, key: str) -> str:
    """Return the value of ModelConfig.activation for a name in Transformers. Raises InputError for unknown ones."""
    if name not in _ACTIVATIONS:
        raise InputError(f"{key}={name!r} is not supported; isoflop knows {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(activation: str) -> str:
    """Return the first name in Transformers of an activation function. Raises InputError if there is none."""
    for name, known in _ACTIVATIONS.items():
        if known == activation:
            return name
    raise InputError(
        f"activation={activation!r} has no name in Hugging Face's configs; model/convert/entries.py lists those that do"
    )


@dataclasses.dataclass(frozen=True)
class Activation:
    """The activation function.

    preferred: other keys, which are read before `key`. renamed: (name in the file, name of the function that the family
    applies for it).
    """

    key: str
    default: str
    preferred: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and the preferred ones."""
        return (self.key, *self.preferred)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return `activation`."""
        given = [raw[key] for key in self.preferred if raw.get(key)]
        return {"activation": self._activation(given[0] if given else raw.get(self.key, self.default))}

    def write(self, config: ModelConfig) -> Raw:
        """Return the name under all keys."""
        is_default = self._activation(self.default) == config.activation
        name = self.default if is_default else activation_name(config.activation)
        return dict.fromkeys(self.keys, name)

    def _activation(self, name: Any) -> str:
        return activation(dict(self.renamed).get(name, name), self.key)


@dataclasses.dataclass(frozen=True)
class EndTokens:
    """Ids of the tokens that end a text, without those outside the vocabulary."""

    default: int | None
    keys = ("eos_token_id",)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return `eos_token_ids` from one id, a list or null."""
        value = raw.get("eos_token_id", self.default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in ids):
            raise InputError(f"eos_token_id={value!r} must be a whole number, a list of them or null")
        return {"eos_token_ids": tuple(token for token in ids if 0 <= token < raw.get("vocab_size", token + 1))}

    def write(self, config: ModelConfig) -> Raw:
        """Return one id as a number, several as a list."""
        ids = list(config.eos_token_ids)
        return {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}


class Heads:
    """Heads by class of Transformers; a file without `architectures` has the first class."""

    keys = ("architectures", "num_labels", "id2label", "label2id")

    def __init__(self, classes: dict[str, dict[str, Any]]):
        self.classes = classes  # class name → fields of ModelConfig

    def read(self, raw: Raw) -> dict[str, Any]:
        """Return the fields of the class, for a classifier with `num_labels`."""
        names = raw.get("architectures") or [next(iter(self.classes))]
        if names[0] not in self.classes:
            raise InputError(f"architectures={names!r} is not supported; isoflop reads {', '.join(self.classes)}")
        values = self.classes[names[0]]
        if values["head"] != "classifier":
            return values
        return {**values, "num_labels": raw.get("num_labels") or len(raw.get("id2label") or (0, 1))}

    def write(self, config: ModelConfig) -> Raw:
        """Return the class, for a classifier with its labels."""
        name = next((name for name, values in self.classes.items() if values["head"] == config.head), None)
        if name is None:
            return {"architectures": [next(iter(self.classes))]}
        labels: Raw = {}
        if config.head == "classifier":
            names = [f"LABEL_{index}" for index in range(config.num_labels)]
            labels = {"id2label": {str(i): name for i, name in enumerate(names)}}
            labels["label2id"] = {name: i for i, name in enumerate(names)}
        return {"architectures": [name], **labels}


def decoder_heads(prefix: str, language_model: str = "ForCausalLM") -> Heads:
    """Return the heads of a decoder, e.g. LlamaForCausalLM."""
    return Heads(
        {
            f"{prefix}{language_model}": {"head": "language-model"},
            f"{prefix}ForSequenceClassification": {"head": "classifier"},
            f"{prefix}Model": {"head": "none"},
        }
    )


def decoder_shape(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, length: int) -> tuple[Entry, ...]:
    """Return the entries that Llama and later decoders share, with the defaults of a Transformers class."""
    return (
        Field("vocab_size", "vocab_size", vocab),
        Field("d_model", "hidden_size", d_model),
        Field("d_ff", "intermediate_size", d_ff),
        Field("num_layers", "num_hidden_layers", layers),
        Field("num_heads", "num_attention_heads", heads),
        Field("max_seq_len", "max_position_embeddings", length),
        Constant(position="rotary", norm="rmsnorm", gated=True),
        WriteOnly(bos_token_id=None, pad_token_id=None),
    )


ATTENTION_BIASES = (
    Field("attention_bias", "attention_bias", False),
    Field("attention_output_bias", "attention_bias", False),
)
