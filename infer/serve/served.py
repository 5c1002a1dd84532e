"""Models that are served: each with a name, its weights for decode, its tokenizer, and an engine in a thread."""

import dataclasses
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infer.engine import Engine
from infer.serve.errors import ApiError
from infer.service import Service
from model import ModelConfig, Params
from model.errors import InputError
from model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is served.

    params: prepared for decode. service: None for an encoder, which only embeds. capacity: most tokens of a prompt and
    its continuation together. created: seconds since 1970. weights: their precision.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    service: Service | None
    capacity: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    weights: str = "float32"

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
        )

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of responses: what may change the text of a seed."""
        slots = 0 if self.service is None else self.service.engine.slots
        return f"isoflop-{self.weights}-{slots}x{self.capacity}"

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
        self._models: dict[str, Served] = {}
        for one in models:
            if one.name in self._models:
                raise InputError(f"two models have the name {one.name!r}; name one of them with NAME=PATH")
            self._models[one.name] = one
        if not self._models:
            raise InputError("there is no model to serve; give at least one")

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
    base: str | Path | None = None,
    slots: int = 8,
    capacity: int = 4096,
    weights: str = "float32",
    most_waiting: int = 64,
    **options: Any,
) -> Served:
    """Open a model that is given as PATH or NAME=PATH; for tokenizer and base see `model.store.open_model`.

    Raises InputError if there is none, or if it neither generates text nor embeds it.
    """
    from model.store import open_model

    name, path = name_and_path(given)
    opened = open_model(path, tokenizer, base)
    return Served.create(
        name,
        opened.config,
        opened.params,
        opened.tokenizer,
        slots=slots,
        capacity=capacity,
        weights=weights,
        most_waiting=most_waiting,
        **options,
    )
