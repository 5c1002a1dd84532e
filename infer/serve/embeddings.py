"""/v1/embeddings: vectors of texts."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request

from infer.serve.endpoint import Endpoint
from infer.serve.errors import ApiError
from infer.serve.generation import attended
from infer.serve.prompts import ids_of
from infer.serve.served import Registry, Served
from infer.serve.settings import Settings
from infer.serve.types import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage

MOST_TEXTS = 2048  # OpenAI's


def routes(registry: Registry, settings: Settings) -> list[Endpoint]:
    """Return the endpoint of embeddings.

    An embedding is the mean of the model's final hidden states (after the final norm, before the head) over all tokens
    of the text, those that are put around it included, scaled to norm 1; of an encoder-decoder, its encoder's.
    """

    async def embed(request: Request, body: EmbeddingRequest) -> EmbeddingList:
        served = registry.get(body.model)
        _check_dimensions(body, served)
        texts = await ids_of(body.input, served, "input", body.add_special_tokens)
        _check_texts(texts, served)
        vectors = await attended(request, served.reading.embeddings(texts))
        data = [Embedding(index, _encoded(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
        tokens = sum(map(len, texts))
        return EmbeddingList(data, served.name, EmbeddingUsage(tokens, tokens))

    return [
        Endpoint(
            "POST",
            "/v1/embeddings",
            embed,
            "Embed texts.",
            request=EmbeddingRequest,
            response=EmbeddingList,
            errors=(404, 429, 503),
        )
    ]


def _check_dimensions(body: EmbeddingRequest, served: Served) -> None:
    own = served.config.d_model
    if body.dimensions not in (None, own):
        raise ApiError(
            400,
            f"dimensions={body.dimensions}: embeddings of {served.name!r} have {own} numbers, of which a part means "
            "nothing; leave it out",
            param="dimensions",
            code="unsupported_parameter",
        )


def _check_texts(texts: list[list[int]], served: Served) -> None:
    if len(texts) > MOST_TEXTS:
        raise ApiError(400, f"input has {len(texts)} texts; send at most {MOST_TEXTS} at a time", param="input")
    for number, ids in enumerate(texts):
        where = "input" if len(texts) == 1 else f"input[{number}]"
        if not ids:
            raise ApiError(400, f"{where} is empty, and no tokens have no mean; leave it out", param=where)
        if len(ids) > served.capacity:
            raise ApiError(
                400,
                f"{where} has {len(ids)} tokens, but the window of {served.name!r} is {served.capacity} tokens; send "
                "parts of it",
                param=where,
                code="context_length_exceeded",
            )
        wrong = next((token for token in ids if token >= served.config.vocab_size), None)
        if wrong is not None:
            most = served.config.vocab_size - 1
            raise ApiError(400, f"{where} has the token id {wrong}; ids are 0 to {most}", param=where)


def _encoded(vector: np.ndarray, encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
