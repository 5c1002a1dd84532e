"""Settings of the server that are independent of its models."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.serve.behaviour import Behaviour


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the server.

    hosts: the names by which clients may address the server, without ports; (): any name. api_keys: keys of which a
    client must send one; (): none is needed. most_body_bytes: larger bodies are refused with
    413. cors_origins: origins whose pages may call the server from a browser; (): none but the server's own.
    behaviour: whose limits hold; the models have the same one. metrics_prefix: before the names of metrics;
    "vllm:" makes dashboards of vLLM work. conversations: the SQLite file of the chat page; None: it stores nothing.
    """

    hosts: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    most_body_bytes: int = 10_000_000
    cors_origins: tuple[str, ...] = ()
    behaviour: "Behaviour | None" = None
    metrics_prefix: str = "isoflop:"
    conversations: Path | None = None
