"""Fit a conversation into a model's window: the oldest turns are left out of the prompt."""

from collections.abc import Sequence
from typing import NamedTuple

from infer.serve.errors import ApiError
from infer.serve.prompts import chat_prompt
from infer.serve.served import Served
from infer.serve.types import ChatRequest


class Turn(NamedTuple):
    """A message of a conversation. id: None for one that is not stored yet."""

    id: int | None
    role: str
    content: str


class Fitted(NamedTuple):
    """A prompt that fits. dropped: ids of the messages that are left out; room: tokens left for the answer."""

    prompt: list[int]
    dropped: list[int]
    room: int


async def fit(served: Served, system: str, turns: Sequence[Turn], max_tokens: int | None, again: bool) -> Fitted:
    """Return the prompt of the newest turns that leave room for an answer.

    A turn is a message of the user with the answers to it; whole ones are left out, never the last. system: "" for
    none; it is always there. max_tokens: of the answer, None for what fits; turns are left out until a quarter of the
    window is free for it, or max_tokens if that is less. again: the last message, an answer, is continued. Raises
    ApiError if the last turn fills the window, or for a model without a chat template.
    """
    body = ChatRequest(messages=[], add_generation_prompt=not again, continue_final_message=again)
    before = [{"role": "system", "content": system}] if system else []
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"] or [0]
    reserved = min(served.capacity // 4, served.capacity if max_tokens is None else max(1, max_tokens))

    async def prompt_from(start: int) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns[start:]]
        return await chat_prompt(body, served, [*before, *messages])

    start, prompt = 0, await prompt_from(0)
    if len(prompt) + reserved > served.capacity:
        low, high = 1, len(starts) - 1  # places in `starts`: the first that fits is between them, or none does
        while low < high:
            middle = (low + high) // 2
            if len(await prompt_from(starts[middle])) + reserved <= served.capacity:
                high = middle
            else:
                low = middle + 1
        start = starts[high]
        prompt = await prompt_from(start)
        if len(prompt) >= served.capacity:
            parts = "the last message and the system prompt have" if system else "the last message has"
            what = "the answer and its question have" if again else parts
            raise ApiError(
                400,
                f"{what} {len(prompt)} tokens, which leave no room for an answer in the window of {served.name!r}, "
                f"{served.capacity} tokens; {'ask something new' if again else 'shorten the message'}",
                code="context_length_exceeded",
            )
    dropped = [turn.id for turn in turns[:start] if turn.id is not None]
    room = served.capacity - len(prompt)
    return Fitted(prompt, dropped, room if max_tokens is None else min(room, max_tokens))
