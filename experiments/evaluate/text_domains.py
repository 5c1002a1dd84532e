"""Measure perplexity and bits per byte of texts by domain, each token predicted once after the longest context."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.evaluate.choice import check_finite
from experiments.evaluate.tasks.prompts import Prompt
from infer import score
from model import Execution, ModelConfig, Params
from model.errors import InputError
from model.tokenizer import Tokenizer
from train.task_sets import bits_per_byte


def answer_texts(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 16,
    execution: Execution = Execution(),
) -> list[dict[str, Any]]:
    """Return a row per text, in order: nats, tokens and bytes, as in an answers file.

    A text longer than the model's context is read in windows (`rolling_windows`); its first token follows the begin
    token, or without one the end token. Raises InputError if the tokenizer has neither, for an encoder-decoder, and for
    a text without tokens.
    """
    if config.stack == "encoder-decoder":
        raise InputError("an encoder-decoder predicts no text from its beginning; evaluate a decoder on texts")
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise InputError(
            f"the tokenizer {tokenizer.path} has no token that begins or ends a text; name one in its files"
        )
    encoded = tokenizer.encode_batch([prompt.question.query for prompt in prompts])
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"the text {prompt.question.id!r} has no tokens; leave it out")
    windows = [rolling_windows(ids, start, config.max_seq_len) for ids in encoded]
    scores = score(
        config,
        params,
        [window for of_text in windows for window in of_text],
        batch_size=batch_size,
        execution=execution,
    )
    rows, done = [], 0
    for prompt, ids, of_text in zip(prompts, encoded, windows, strict=True):
        check_finite(scores.logprobs[done : done + len(of_text)], prompt.question.id)
        nats = -float(scores.logprobs[done : done + len(of_text)].sum())
        done += len(of_text)
        size = len(prompt.question.query.encode())
        rows.append(
            {
                "id": prompt.question.id,
                "cluster": prompt.question.cluster,
                "prompt_sha256": prompt.sha256,
                "nats": nats,
                "tokens": len(ids),
                "bytes": size,
                "metrics": {"bits_per_byte": bits_per_byte(-nats, size)},
            }
        )
    return rows


def rolling_windows(ids: Sequence[int], start: int, max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """Return (context, predicted ids) pairs that predict each id once, as lm-evaluation-harness does.

    The first window predicts as many ids as fit; each later one predicts the next ones after the last id before them;
    the last window is filled at its beginning with ids that were predicted already. Example: 5 ids and max_seq_len=3
    give ([start], ids[:3]) and (ids[1:3], ids[3:]).
    """
    ids = list(ids)
    windows = [([start], ids[:max_seq_len])] if ids else []
    done = max_seq_len
    while done < len(ids):
        end = min(done + max_seq_len, len(ids))
        windows.append((ids[max(end - max_seq_len - 1, 0) : done], ids[done:end]))
        done = end
    return windows


def by_domain(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {domain: {"bits_per_byte", "perplexity", "tokens", "bytes", "texts"}}: ratios of sums over its texts."""
    domains: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        domains.setdefault(row["cluster"], []).append(row)
    found = {}
    for domain, members in domains.items():
        nats, tokens, size = (sum(row[name] for row in members) for name in ("nats", "tokens", "bytes"))
        found[domain] = {
            "bits_per_byte": bits_per_byte(-nats, size),
            "perplexity": math.exp(nats / tokens),
            "tokens": tokens,
            "bytes": size,
            "texts": len(members),
        }
    return found
