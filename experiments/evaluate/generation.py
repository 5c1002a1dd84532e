"""Generate the answers of a task in batches that share what their prompts have in common."""

import dataclasses
from collections.abc import Sequence

from infer import Sampling, generate
from model import Execution, ModelConfig, Params
from model.errors import InputError
from model.progress import progress_bar
from model.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Output:
    """A generated answer. text: up to the stop string. finish_reason: "stop" or "length"."""

    text: str
    finish_reason: str


def generate_answers(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    execution: Execution = Execution(),
) -> list[Output]:
    """Return the most likely answer, token by token, to each prompt of token ids, in their order.

    A prefix that the prompts of a batch share, such as fixed shots, is read once for the batch. Equal prompts are
    answered once. Prompts stay in their order, so that the batches have similar longest prompts and need few programs;
    the last batch is filled with earlier prompts for the same reason.
    Raises InputError that names a prompt that does not fit the context together with its answer.
    """
    room = config.max_seq_len - max_new_tokens
    for number, prompt in enumerate(prompts):
        if len(prompt) > room:
            raise InputError(
                f"question {number}: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the "
                f"context of {config.max_seq_len}; take fewer shots or fewer new tokens"
            )
    greedy = Sampling(temperature=0.0, stop_strings=tuple(stop))
    keys = [tuple(prompt) for prompt in prompts]
    order, found = list(dict.fromkeys(keys)), dict[tuple[int, ...], Output]()
    starts = range(0, len(order), batch_size)
    with progress_bar("generating", len(starts)) as advance:
        for start in starts:
            first = max(0, min(start, len(order) - batch_size))
            batch = order[first : first + batch_size]
            result = generate(
                config,
                params,
                batch,
                greedy,
                max_new_tokens=max_new_tokens,
                tokenizer=tokenizer,
                execution=execution,
            )
            assert result.text is not None
            for key, text, reason in zip(batch, result.text, result.finish_reason, strict=True):
                found.setdefault(key, Output(text, reason))
            advance()
    return [found[key] for key in keys]
