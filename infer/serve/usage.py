"""Numbers of tokens of a request."""

from collections.abc import Sequence

from infer.serve.errors import ApiError
from infer.serve.generation import Generation
from infer.serve.types import GenerationRequest, TokenDetails, Usage


def usage_of(prompts: Sequence[Sequence[int]], completion_tokens: int, generation: Generation) -> Usage:
    """Return the numbers of tokens so far; a prompt counts once, whatever n."""
    prompt_tokens = sum(map(len, prompts))
    details = TokenDetails(generation.cached_tokens(len(prompts)))
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


def wants_usage(body: GenerationRequest) -> bool:
    """Return whether a stream ends with the numbers of tokens. Raises ApiError for options without a stream."""
    if body.stream_options is None:
        return False
    if not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    return bool(body.stream_options.include_usage)
