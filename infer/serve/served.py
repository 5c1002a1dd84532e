"""Models that are served: each with a name, its weights for decode, its tokenizer, and an engine in a thread."""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.engine import Engine
from infer.serve.errors import ApiError
from infer.service import Service
from model import ModelConfig, Params
from model.errors import InputError
from model.store import Model, open_model
from model.tokenizer import Tokenizer
from model.tokenizer.token_bytes import token_bytes

if TYPE_CHECKING:
    from infer.grammar import Grammars
    from infer.serve.behaviour import Behaviour
    from infer.serve.metrics import Distribution
    from infer.serve.reading import Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is served.

    params: prepared for decode. service: None for an encoder, which only embeds. capacity: most tokens of a prompt and
    its continuation together. created: seconds since 1970. weights: their precision. behaviour: its system prompt and
    filters.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    service: Service | None
    capacity: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    weights: str = "float32"
    behaviour: "Behaviour | None" = None

    @classmethod
    def create(
        cls,
        name: str,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 8,
        capacity: int = 4096,
        weights: str = "float32",
        most_waiting: int = 64,
        behaviour: "Behaviour | None" = None,
        **options: Any,
    ) -> "Served":
        """Prepare parameters for decode and allocate the engine; options: others of `Engine`."""
        from infer import prepare

        prepared = prepare(config, params, weights)
        capacity = min(capacity, config.max_seq_len)
        service = None
        if config.head == "language-model" and config.stack != "encoder":
            engine = Engine(config, prepared, slots=slots, capacity=capacity, tokenizer=tokenizer, **options)
            service = Service(engine, most_waiting=most_waiting)
        return cls(
            name=name,
            config=config,
            params=prepared,
            tokenizer=tokenizer,
            service=service,
            capacity=capacity,
            weights=weights,
            behaviour=behaviour,
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token of the tokenizer; the first access takes up to a second. [] without a tokenizer."""
        return [] if self.tokenizer is None else token_bytes(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> "Grammars":
        """The compiler of constraints; the first access takes up to a second. Needs a tokenizer."""
        from infer.grammar import Grammars

        tokenizer = self.need_tokenizer("response_format")
        return Grammars(tokenizer, self.config.vocab_size, self.end_ids or None)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, by the config and the tokenizer."""
        ids = [*self.config.eos_token_ids, *(self.tokenizer.eos_ids if self.tokenizer else ())]
        return tuple(token for token in dict.fromkeys(ids) if token < self.config.vocab_size)

    @functools.cached_property
    def reading(self) -> "Reading":
        """What embeds and scores texts between the engine's steps."""
        from infer.serve.reading import Reading

        return Reading(self.config, self.params, self.capacity, self.service)

    @functools.cached_property
    def distributions(self) -> "list[Distribution]":
        """How long this model's requests took, and how many tokens they had."""
        from infer.serve.metrics import distributions

        return distributions()

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of responses: what may change the text of a seed."""
        slots = 0 if self.service is None else self.service.engine.slots
        return f"isoflop-{self.weights}-{slots}x{self.capacity}"

    @property
    def shows_tokens(self) -> bool:
        """False if filters of output may take out what the tokens and their log-probabilities would show."""
        return self.behaviour is None or not self.behaviour.outputs

    def need_service(self) -> Service:
        """Return the engine's service. Raises ApiError for an encoder."""
        if self.service is None:
            raise ApiError(
                400,
                f"the model {self.name!r} is an encoder, which does not generate text; use /v1/embeddings",
                param="model",
                code="model_not_supported",
            )
        return self.service

    def need_tokenizer(self, param: str) -> Tokenizer:
        """Return the tokenizer. Raises ApiError if the model has none. param: the field that needs it."""
        if self.tokenizer is None:
            raise ApiError(
                400,
                f"the model {self.name!r} has no tokenizer, so {param} cannot be text; send ids of tokens to"
                " /v1/completions, or start the server with --tokenizer",
                param=param,
            )
        return self.tokenizer


class Registry:
    """The models of a server by name; the first is the default. Use it as a context manager: their engines run in it.

    Raises InputError if two models have one name, or if there is none.
    """

    def __init__(self, models: Iterable[Served]):
        models = list(models)
        check_names([one.name for one in models])
        self._models = {one.name: one for one in models}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str | None) -> Served:
        """Return the model of this name, the first one for None. Raises ApiError 404 if there is none."""
        if name is None:
            return next(iter(self))
        if name not in self._models:
            raise ApiError(
                404,
                f"there is no model {name!r}; served are {', '.join(map(repr, self._models))}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def __enter__(self) -> "Registry":
        for one in self:
            if one.service is not None:
                one.service.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self:
            if one.service is not None:
                one.service.close()
            if "reading" in vars(one):
                one.reading.close()


def check_names(names: Sequence[str]) -> None:
    """Raise InputError if two models have one name, or if there is none."""
    if not names:
        raise InputError("there is no model to serve; give at least one")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InputError(f"two models have the name {name!r}; name one of them with NAME=PATH")


_ADAPTER = "adapter_config.json"  # PEFT's
_GIVEN = re.compile(r"(?P<name>[\w.@:-]+)=(?P<path>.+)")


def name_and_path(given: str) -> tuple[str, Path]:
    """Split NAME=PATH; for a path alone, the name is that of its folder, or of its file without the suffix."""
    match = None if Path(given).exists() else _GIVEN.fullmatch(given)
    if match is not None:
        return match["name"], Path(match["path"])
    path = Path(given)
    resolved = path.resolve()
    return resolved.stem if resolved.suffix == ".gguf" else resolved.name, path


def open_served(
    given: str,
    *,
    tokenizer: str | Path | None = None,
    chat_template: str | Path | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> Served:
    """Open a model that is given as PATH or NAME=PATH; options: those of `Served.create`.

    tokenizer, base: see `model.store.open_model`. A PEFT adapter is attached to its base, by default the one that it
    names. chat_template: a name or a file in place of the tokenizer's own. Raises InputError if nothing can be opened.
    """
    name, path = name_and_path(given)
    is_adapter = (path / _ADAPTER).is_file()
    opened = _open_adapter(path, tokenizer, base) if is_adapter else open_model(path, tokenizer, base)
    words = opened.tokenizer
    if chat_template is not None:
        if words is None:
            raise InputError(f"{path} has no tokenizer, so it has no use for a chat template; give --tokenizer")
        from model.tokenizer.templates import read_template

        words = words.with_chat_template(read_template(chat_template))
    return Served.create(name, opened.config, opened.params, words, **options)


def _open_adapter(path: Path, tokenizer: str | Path | None, base: str | Path | None) -> Model:
    from model.adapters import attach, mask_and_scale
    from model.convert import load_peft

    if base is None:
        base = _base_of(path)
    opened = open_model(base, tokenizer)
    adapter, tree = load_peft(path, opened.config)
    return opened._replace(params=attach(opened.params, tree, *mask_and_scale(adapter)))


def _base_of(path: Path) -> Path:
    """Return the folder that an adapter names as its base."""
    try:
        named = json.loads((path / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        found = next(one for one in (Path(named), path / named) if one.exists())
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"the base of the adapter {path} is not at the place that it names; give --base") from error
    return found
