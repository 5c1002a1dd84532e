"""How one or a few keys of a config.json become fields of ModelConfig, and back. A family is a list of these."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from model.config import ModelConfig
from model.errors import InputError

Raw = dict[str, Any]
"""A config.json."""
MOST = 100_000
"""No model has more layers, or more of anything that is counted one by one: a broken number must not fill memory."""


class Entry(Protocol):
    """Both directions of a part of the configuration."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of a config.json, those that it only writes among them."""

    def read(self, raw: Raw) -> dict[str, Any]:
        """Fields of ModelConfig; `raw` has the defaults of all `Field`s in it.

        Raises InputError where the file asks for what isoflop does not have.
        """

    def write(self, config: ModelConfig) -> Raw:
        """Keys of config.json. Whether they say all that the config says, the caller finds out by reading them."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One of our fields that is one of their keys; `default` is their class's value where the key is missing."""

    ours: str
    theirs: str
    default: Any
    spelling: str | None = None  # of the same key in older files

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and its older spelling."""
        return (self.theirs,) if self.spelling is None else (self.theirs, self.spelling)

    def read(self, raw: Raw) -> dict[str, Any]:
        """The value as it is; null stays null, which derives those of our fields that can be derived."""
        return {self.ours: raw[self.theirs]}

    def write(self, config: ModelConfig) -> Raw:
        """The value as it is."""
        return {self.theirs: getattr(config, self.ours)}


class Always:
    """Our fields that every model of the family has alike."""

    keys = ()

    def __init__(self, **values: Any):
        self.values = values

    def read(self, raw: Raw) -> dict[str, Any]:
        """The same for every file."""
        return self.values

    def write(self, config: ModelConfig) -> Raw:
        """Nothing: the family says it."""
        return {}


class Written:
    """Keys that are written for Transformers' sake and not read."""

    def __init__(self, **values: Any):
        self.values, self.keys = values, tuple(values)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Nothing."""
        return {}

    def write(self, config: ModelConfig) -> Raw:
        """The same for every model."""
        return self.values


class Only:
    """One of their keys of which only some values are supported; the first is what a missing key means."""

    def __init__(self, theirs: str, *allowed: Any):
        self.theirs, self.allowed, self.keys = theirs, allowed, (theirs,)

    def read(self, raw: Raw) -> dict[str, Any]:
        """Nothing, or InputError naming key and value."""
        value = raw.get(self.theirs, self.allowed[0])
        if value not in self.allowed:
            wanted = " or ".join(repr(choice) for choice in self.allowed)
            raise InputError(f"{self.theirs}={value!r} is not supported; isoflop reads {wanted}")
        return {}

    def write(self, config: ModelConfig) -> Raw:
        """The value that a missing key would mean."""
        return {self.theirs: self.allowed[0]}


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
    """Our name of their activation function."""
    if name not in _ACTIVATIONS:
        raise InputError(f"{key}={name!r} is not supported; isoflop knows {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """The first of their names of our activation function. Raises InputError where they have none."""
    theirs = next((theirs for theirs, name in _ACTIVATIONS.items() if name == ours), None)
    if theirs is None:
        raise InputError(
            f"activation={ours!r} has no name in Hugging Face's configs; model/convert/fields.py lists them"
        )
    return theirs


@dataclasses.dataclass(frozen=True)
class Activation:
    """The activation function.

    spellings: further keys, of which the first that is given counts before `theirs`. instead: names that this family
    takes for another function.
    """

    theirs: str
    default: str
    spellings: tuple[str, ...] = ()
    instead: tuple[tuple[str, str], ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All spellings."""
        return (self.theirs, *self.spellings)

    def read(self, raw: Raw) -> dict[str, Any]:
        """`activation`."""
        given = [raw[key] for key in self.spellings if raw.get(key)]
        return {"activation": self._ours(given[0] if given else raw.get(self.theirs, self.default))}

    def write(self, config: ModelConfig) -> Raw:
        """Under every spelling."""
        usual = self._ours(self.default) == config.activation
        name = self.default if usual else activation_name(config.activation)
        return dict.fromkeys((self.theirs, *self.spellings), name)

    def _ours(self, name: Any) -> str:
        return activation(dict(self.instead).get(name, name), self.theirs)


@dataclasses.dataclass(frozen=True)
class Stops:
    """The tokens that end a text; those outside the vocabulary can never come and are left out."""

    default: int | None
    keys = ("eos_token_id",)

    def read(self, raw: Raw) -> dict[str, Any]:
        """One id, several, or none."""
        value = raw.get("eos_token_id", self.default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in ids):
            raise InputError(f"eos_token_id={value!r} must be a whole number, several, or null")
        return {"eos_token_ids": tuple(token for token in ids if 0 <= token < raw.get("vocab_size", token + 1))}

    def write(self, config: ModelConfig) -> Raw:
        """A number where there is one."""
        ids = list(config.eos_token_ids)
        return {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}


class Heads:
    """Which class of Transformers has which head; the first class is meant where `architectures` is missing."""

    keys = ("architectures", "num_labels", "id2label", "label2id")

    def __init__(self, classes: dict[str, dict[str, Any]]):
        self.classes = classes  # their class name → our fields

    def read(self, raw: Raw) -> dict[str, Any]:
        """The head and what goes with it."""
        names = raw.get("architectures") or [next(iter(self.classes))]
        if names[0] not in self.classes:
            raise InputError(f"architectures={names!r} is not supported; isoflop reads {', '.join(self.classes)}")
        values = self.classes[names[0]]
        if values["head"] != "classifier":
            return values
        return {**values, "num_labels": raw.get("num_labels") or len(raw.get("id2label") or (0, 1))}

    def write(self, config: ModelConfig) -> Raw:
        """The class, and the labels of a classifier."""
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
    """The classes of a decoder, e.g. LlamaForCausalLM."""
    return Heads(
        {
            f"{prefix}{language_model}": {"head": "language-model"},
            f"{prefix}ForSequenceClassification": {"head": "classifier"},
            f"{prefix}Model": {"head": "none"},
        }
    )


def decoder_shape(vocab: int, d_model: int, d_ff: int, layers: int, heads: int, length: int) -> tuple[Entry, ...]:
    """The keys that Llama and what came after it have in common, with a class's defaults."""
    return (
        Field("vocab_size", "vocab_size", vocab),
        Field("d_model", "hidden_size", d_model),
        Field("d_ff", "intermediate_size", d_ff),
        Field("num_layers", "num_hidden_layers", layers),
        Field("num_heads", "num_attention_heads", heads),
        Field("max_seq_len", "max_position_embeddings", length),
        Always(position="rotary", norm="rmsnorm", gated=True),
        Written(bos_token_id=None, pad_token_id=None),
    )


ATTENTION_BIASES = (
    Field("attention_bias", "attention_bias", False),
    Field("attention_output_bias", "attention_bias", False),
)


SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(config: ModelConfig) -> list[str]:
    """Of every layer of the decoder, in their words."""
    if config.sliding_window is None:
        return [FULL] * config.num_layers
    reaches = [config.layer_pattern[i % len(config.layer_pattern)] for i in range(config.num_layers)]
    return [SLIDING if reach == "local" else FULL for reach in reaches]


def shortest_pattern(types: list[str]) -> tuple[str, ...]:
    """The fewest layers whose repetition gives all of them, in our words."""
    period = next(n for n in range(1, len(types) + 1) if all(t == types[i % n] for i, t in enumerate(types)))
    return tuple("local" if kind == SLIDING else "global" for kind in types[:period])


@dataclasses.dataclass(frozen=True)
class Windows:
    """Sliding windows. `types`: the layers' types where the file does not list them; `listed`: whether it may."""

    default: int | None
    types: Callable[[Raw, int], list[str]] = lambda raw, layers: [SLIDING] * layers
    listed: bool = False
    switched: bool = False  # use_sliding_window, without which there is none

    @property
    def keys(self) -> tuple[str, ...]:
        """A family without a switch knows none: its window is always on."""
        switch = ("use_sliding_window", "max_window_layers") if self.switched else ()
        return ("sliding_window", "layer_types", *switch)

    def read(self, raw: Raw) -> dict[str, Any]:
        """`sliding_window` and `layer_pattern`."""
        layers, window = raw["num_hidden_layers"], raw.get("sliding_window", self.default)
        switch = raw.get("use_sliding_window")
        if switch is not None and not isinstance(switch, bool):
            raise InputError(f"use_sliding_window={switch!r} must be true or false")
        if self.switched and not switch:
            window = None
        types = raw.get("layer_types") or self.types(raw, layers)
        if len(types) != layers or set(types) - {SLIDING, FULL}:
            raise InputError(
                f"layer_types={types!r} is not supported; isoflop reads {SLIDING} and {FULL} for each layer"
            )
        if window is None or SLIDING not in types:
            return {"sliding_window": None}
        if not self.listed and FULL in types:
            raise InputError("layer_types with both kinds of attention is not supported for this model_type")
        return {"sliding_window": window, "layer_pattern": shortest_pattern(types)}

    def write(self, config: ModelConfig) -> Raw:
        """The window, and the layers' types where the family lists them."""
        raw: Raw = {"sliding_window": config.sliding_window}
        if self.switched:
            raw["use_sliding_window"] = config.sliding_window is not None
        elif raw["sliding_window"] is None and self.listed:
            raw["sliding_window"] = self.default  # Transformers wants one even where no layer uses it
        if self.listed:
            raw["layer_types"] = layer_types(config)
            raw["max_window_layers"] = (raw["layer_types"] + [SLIDING]).index(SLIDING)
        return raw
