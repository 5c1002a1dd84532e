"""Generate completions by speculative decoding, with calls of several rounds on the device."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from infer.completion import Completion, Generated, columns, detokenizer
from infer.decode import begin, grow_state, init_decode_state
from infer.generate import one_row_each, one_sampling_each
from infer.prompts import Prompt, capacity_for, check_prompts, read_prompts
from infer.sampling import Sampling
from infer.speculative.rounds import ROUNDS, SpeculationSettings, SpeculationState, speculate
from infer.text import Decoder
from model import Execution, ModelConfig, Params
from model.ambient import lenient
from model.cache import grow
from model.dtypes import DTypeLike
from model.errors import InputError, check_whole
from model.sharding import under_mesh_of

LONGEST_LOOKUP = 32


@dataclasses.dataclass(frozen=True)
class Speculated(Generated):
    """`Generated`, with the numbers of proposed and accepted tokens of every completion."""

    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of proposals that were accepted; NaN if there were none."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else float("nan")


@lenient()
def generate_speculative(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    *,
    draft: tuple[ModelConfig, Params] | None = None,
    lookup: int = 3,
    tokens_ahead: int = 4,
    max_new_tokens: int = 64,
    key: PRNGKeyArray | None = None,
    tokenizer: Decoder | None = None,
    cache_dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
) -> Speculated:
    """Generate with fewer passes of the model: from the same distribution, at temperature 0 the same tokens.

    If two logits are equal up to rounding, a pass over several tokens may rank them differently from a pass over one. A
    seed draws other tokens than in `generate`.

    draft: a smaller model with the same vocabulary, which samples proposals with each row's own settings. Without one,
    prompt look-up (Saxena 2023): the last `lookup` tokens are searched in prompt and output, and the tokens after
    their latest occurrence are proposed; a row without an occurrence gets one token per round. tokens_ahead: most
    proposals per row and round. For the other arguments see `generate`.
    Raises InputError as `generate` does, and on a draft that does not match the model.
    """
    check_prompts(config, prompts, max_new_tokens)
    samplings = one_sampling_each(sampling, len(prompts), tokenizer)
    draft_config, draft_params = (None, None) if draft is None else draft
    settings = SpeculationSettings(config, draft_config, lookup if draft is None else 0, tokens_ahead)
    _check(settings, prompts, max_new_tokens)
    with under_mesh_of(params):
        read = functools.partial(
            read_prompts,
            prompts=prompts,
            copies=[one.n for one in samplings],
            cache_dtype=cache_dtype,
            spare=tokens_ahead + 1,
            execution=execution,
        )
        logits, cache = read(config, params)
        draft_cache = None if draft is None else read(*draft)[1]
        prompts, samplings = one_row_each(config, prompts, samplings)
        decoding, first = begin(init_decode_state(config, prompts, samplings, cache, max_new_tokens, key), logits)
        zeros = jnp.zeros((2, len(prompts)), jnp.int32)
        state = SpeculationState(decoding, draft_cache, zeros[0], zeros[1])
        return _loop(settings, params, draft_params, state, first, prompts, samplings, max_new_tokens, tokenizer)


def _loop(settings, params, draft_params, state, first, prompts, samplings, max_new_tokens, tokenizer) -> Speculated:
    """Call `speculate` until all rows have ended; the device runs a call while the host reads the previous one.

    When a call is launched, the number of tokens that the previous one accepted is not known on the host. `filled` is
    an upper bound of the tokens in any row's cache: the number that is known, and ahead + 1 for every round since.
    """
    completions = [
        Completion(one, detokenizer(tokenizer, prompt, one)) for prompt, one in zip(prompts, samplings, strict=True)
    ]
    per_round = settings.ahead + 1
    filled = max(map(len, prompts))
    end = filled + max_new_tokens - 1
    in_flight = (first, filled + np.zeros(1, np.int32), state.drafted + 0, state.accepted + 0)
    while True:
        rounds, launched = 0, in_flight
        if max_new_tokens > 1:
            halt = np.array([completion.finish_reason is not None for completion in completions])
            needed = min(filled + per_round, end)
            if needed > state.decoding.cache.capacity:
                state = _grown(settings, state, needed)
            room = state.decoding.cache.capacity - filled
            rounds = ROUNDS if end - filled <= room else min(ROUNDS, room // per_round)
            state, launched = speculate(settings, params, draft_params, state, np.int32(rounds), halt)
        emitted, cache_lengths, drafted, accepted = jax.device_get(in_flight)
        for row, completion in enumerate(completions):
            completion.read(emitted, row)
        if all(completion.finish_reason for completion in completions):
            break
        filled = min(int(cache_lengths.max()) + rounds * per_round, end)
        in_flight = launched
    return Speculated(**columns(completions), drafted=drafted.tolist(), accepted=accepted.tolist())


def _grown(settings: SpeculationSettings, state: SpeculationState, length: int) -> SpeculationState:
    decoding, draft_cache = state.decoding, state.draft_cache
    decoding = grow_state(settings.config, decoding, capacity_for(settings.config, length))
    if settings.draft is not None and draft_cache.capacity < length:
        draft_cache = grow(settings.draft, draft_cache, capacity_for(settings.draft, length))
    return state.replace(decoding=decoding, draft_cache=draft_cache)


def _check(settings: SpeculationSettings, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    config, draft = settings.config, settings.draft
    check_whole("tokens_ahead", settings.ahead, 1, hint="4 is usual")
    if draft is None:
        check_whole("lookup", settings.lookup, 1, LONGEST_LOOKUP, hint="3 is usual")
        return
    if draft.stack != config.stack or draft.head != config.head:
        raise InputError(
            f"a draft with stack={draft.stack!r} and head={draft.head!r} cannot propose for a model with "
            f"stack={config.stack!r} and head={config.head!r}; give one of the same kind"
        )
    if draft.vocab_size != config.vocab_size:
        raise InputError(
            f"the draft's vocabulary of {draft.vocab_size} tokens is not the model's of {config.vocab_size}; "
            "give a draft with the model's tokenizer, or none to look tokens up in the prompt"
        )
    try:
        check_prompts(draft, prompts, max_new_tokens)
    except InputError as error:
        raise InputError(f"the draft cannot follow: {error}") from error
