"""Implement `isoflop generate`: text from a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.commands.options import BasePath, JsonFile

if TYPE_CHECKING:
    from infer import Completion
    from model import ModelConfig, Params


def generate(
    model: tyro.conf.Positional[Path],
    *,
    prompt: tuple[str, ...],
    chat: bool = False,
    system: str | None = None,
    tokenizer: Path | None = None,
    base: BasePath = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: tuple[str, ...] = (),
    n: int = 1,
    logprobs: int = 0,
    seed: int = 0,
    weights: Literal["float32", "bfloat16", "int8", "int8-dynamic", "int4"] = "float32",
    cache: Literal["float32", "bfloat16", "int8"] | None = None,
    stream: bool = False,
    draft: Path | None = None,
    lookup: int = 0,
    tokens_ahead: int = 4,
    beams: int = 0,
    length_penalty: float = 1.0,
    json: JsonFile = None,
) -> None:
    """Continue prompts with a trained model, or with --chat answer them.

    Example: isoflop generate runs/first --prompt "The people of" "We" --temperature 0.7

    Example: isoflop generate model.gguf --chat --prompt "Why is the sky blue?" --stream --weights int8

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file.
        prompt: One or more texts to continue.
        chat: Format each prompt as a message with the model's chat template.
        system: The system message of a chat.
        tokenizer: The model's tokenizer (a file, or a folder such as the data's), if the model's folder has none.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        max_new_tokens: Most tokens to add to each prompt.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability; 1 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most likely one; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens seen before; 1 changes nothing.
        presence_penalty: Subtract this from the logits of tokens in the output.
        frequency_penalty: Subtract this for every time a token occurs in the output.
        stop: End before any of these texts.
        n: Answers per prompt.
        logprobs: Also write the log-probabilities of this many most likely tokens into the JSON.
        seed: Of the sampling.
        weights: Precision in which the weights are read.
        cache: Precision of the cache; by default that of the computation.
        stream: Print the text as it is generated; for a single prompt.
        draft: A smaller model with the same vocabulary that proposes tokens; the distribution of the text is unchanged.
        lookup: Without a draft, propose the tokens that followed the latest earlier occurrence of the last LOOKUP
            tokens; 0: off.
        tokens_ahead: With --draft or --lookup, most tokens proposed at a time.
        beams: Beam search of this width instead of sampling; --n of the texts that it finds.
        length_penalty: With --beams, scores are divided by length to this power.
        json: Also write texts, tokens and log-probabilities to this file.
    """
    import jax

    from experiments.commands.options import say_unused, write_document
    from experiments.models import need_tokenizer
    from experiments.words import say
    from infer import Sampling, prepare
    from infer import stream as run_generation
    from model.errors import InputError
    from model.store import open_model

    drawn: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    sampling = Sampling(**drawn, stop_strings=stop, n=n, logprobs=logprobs)
    if stream and (len(prompt) * n > 1 or beams or lookup or draft is not None):
        raise InputError(
            "--stream prints one text as it is made: give one --prompt, and no --n, --beams, --draft, --lookup"
        )
    if beams and (stop or logprobs or lookup or draft is not None):
        raise InputError("--beams goes without --stop, --logprobs, --lookup and --draft: it does not sample")
    if draft is not None and lookup:
        raise InputError("--draft and --lookup are two ways to propose tokens; give one of them")
    if beams:
        say_unused("with --beams, which does not sample", generate, **drawn, seed=seed)
    else:
        say_unused("without --beams", generate, length_penalty=length_penalty)
    if draft is None and not lookup:
        say_unused("without --draft or --lookup", generate, tokens_ahead=tokens_ahead)
    if not chat:
        say_unused("without --chat", generate, system=system)
    opened = open_model(model, tokenizer, base)
    words = need_tokenizer(opened.tokenizer, model)
    if top_k > opened.config.vocab_size:
        say(f"--top-k {top_k:,} is more than the vocabulary of {opened.config.vocab_size:,}; all of it is kept")
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        texts = [words.apply_chat_template([*before, {"role": "user", "content": text}]) for text in prompt]
        prompts = [words.encode(text, special=True) for text in texts]
    else:
        around = opened.config.stack == "encoder-decoder" or words.bos_id is not None
        prompts = [words.encode(text, add_special_tokens=around) or list(words.eos_ids) for text in prompt]
    params = prepare(opened.config, opened.params, weights)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "cache_dtype": cache}
    common["tokenizer"] = words
    drawing = common | {"key": jax.random.key(seed)}
    completions: list[dict[str, Any]]
    questions = [text for text in prompt for _ in range(n)]
    if beams:
        from infer import beam_search

        found = beam_search(opened.config, params, prompts, beams=beams, n=n, length_penalty=length_penalty, **common)
        questions = [text for text, tokens in zip(prompt, found.tokens, strict=True) for _ in tokens]
        names: tuple[str, ...] = ("tokens", "logprobs", "finish_reason", "text", "score")
        fields = (found.tokens, found.logprobs, found.finish_reason, found.text or [], found.scores)
        completions = [
            dict(zip(names, row, strict=True))
            for of_prompt in zip(*fields, strict=True)
            for row in zip(*of_prompt, strict=True)
        ]
    elif draft is not None or lookup:
        from infer import generate_speculative

        proposer = None if draft is None else _prepared(draft, weights)
        made = generate_speculative(
            opened.config,
            params,
            prompts,
            sampling,
            draft=proposer,
            lookup=lookup,
            tokens_ahead=tokens_ahead,
            **drawing,
        )
        names = ("tokens", "logprobs", "finish_reason", "text", "top_logprobs", "drafted", "accepted")
        columns = [getattr(made, name) for name in names]
        completions = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    else:
        rows: list[Completion] = []
        written = ""
        if stream:
            print(f"{prompt[0]}\n→ " if chat else prompt[0], end="", flush=True)
        for rows in run_generation(opened.config, params, prompts, sampling, **drawing):
            if stream:
                text = rows[0].text or ""
                print(text[len(written) :], end="", flush=True)
                written = text
        kept = ("tokens", "logprobs", "finish_reason", "text", "top_logprobs")
        completions = [{name: getattr(row, name) for name in kept} for row in rows]
    if stream:
        print("\n")
    for question, row in zip(questions, completions, strict=True):
        answer = row["text"]
        if not stream:
            print(f"{question}\n→ {answer.strip()}\n" if chat else f"{question}{answer}\n")
        if not logprobs:
            row.pop("top_logprobs", None)
        row["prompt"] = question
    if draft is not None or lookup:
        drafted, accepted = (sum(row[name] for row in completions) for name in ("drafted", "accepted"))
        print(f"{accepted} of {drafted} proposed tokens were taken")
    write_document(json, {"completions": completions})


def _prepared(path: Path, weights: Any) -> "tuple[ModelConfig, Params]":
    from infer import prepare
    from model.store import open_parameters

    config, params = open_parameters(path)
    return config, prepare(config, params, weights)
