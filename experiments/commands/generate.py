"""`isoflop generate`: text from a trained model."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from experiments.commands.options import JsonFile
from model.errors import InputError

if TYPE_CHECKING:
    from infer import Completion
    from model.tokenizer import Tokenizer


def generate(
    model: tyro.conf.Positional[Path],
    *,
    prompt: tuple[str, ...],
    chat: bool = False,
    system: str | None = None,
    tokenizer: Path | None = None,
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
    json: JsonFile = None,
) -> None:
    """Continue prompts with a trained model, or with --chat answer them.

    Example: isoflop generate runs/first --prompt "The people of" "We" --temperature 0.7

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file.
        prompt: One or more texts to continue.
        chat: Each prompt is a message to a chat model, put into its own chat format.
        system: The system message of a chat.
        tokenizer: The model's tokenizer (a file, or a folder such as the data's), where none stands beside it.
        max_new_tokens: Most tokens to add to each prompt.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability; 1 keeps all.
        min_p: Keep tokens at least this times as probable as the likeliest; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens seen before; 1 changes nothing.
        presence_penalty: Subtract this from the logits of tokens in the output.
        frequency_penalty: Subtract this for every time a token occurs in the output.
        stop: End before any of these texts.
        n: Answers per prompt.
        logprobs: Write the log-probabilities of so many likeliest tokens into the JSON, too.
        seed: Of the sampling.
        weights: Precision in which the weights are read.
        cache: Precision of the cache; by default that of the computation.
        stream: Print the text while it is made; of a single prompt.
        json: Also write texts, tokens and log-probabilities to this file.
    """
    import jax

    from experiments.commands.options import write_document
    from experiments.models import open_model
    from infer import Sampling, prepare
    from infer import stream as run_generation

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop_strings=stop,
        n=n,
        logprobs=logprobs,
    )
    if stream and len(prompt) * n > 1:
        raise InputError("--stream prints one text as it is made: give one --prompt, and no --n")
    opened = open_model(model, tokenizer)
    words = opened.need_tokenizer()
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        texts = [words.apply_chat_template([*before, {"role": "user", "content": text}]) for text in prompt]
        prompts = [words.encode(text, special=True) for text in texts]
    else:
        around = opened.config.stack == "encoder-decoder" or words.bos_id is not None
        prompts = [words.encode(text, add_special_tokens=around) or list(words.eos_ids) for text in prompt]
    rows: list[Completion] = []
    written = _begin(prompt[0], chat) if stream else ""
    for rows in run_generation(
        opened.config,
        prepare(opened.config, opened.params, weights),
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        key=jax.random.key(seed),
        tokenizer=words,
        cache_dtype=cache,
    ):
        if stream:
            written = _go_on(rows[0], words, written)
    answers = [words.decode(row.tokens) for row in rows]
    questions = [text for text in prompt for _ in range(n)]
    if stream:
        print("\n")
    else:
        for question, answer in zip(questions, answers, strict=True):
            print(f"{question}\n→ {answer.strip()}\n" if chat else f"{question}{answer}\n")
    completions = [
        {
            "prompt": question,
            "text": answer,
            "tokens": row.tokens,
            "logprobs": row.logprobs,
            "finish_reason": row.finish_reason,
            **({"top_logprobs": row.top_logprobs} if logprobs else {}),
        }
        for question, answer, row in zip(questions, answers, rows, strict=True)
    ]
    write_document(json, {"completions": completions})


def _begin(prompt: str, chat: bool) -> str:
    print(f"{prompt}\n→ " if chat else prompt, end="", flush=True)
    return ""


def _go_on(row: "Completion", words: "Tokenizer", written: str) -> str:
    """Print what is new, except what a coming token or a stop string may still change; what has been printed."""
    text = words.decode(row.tokens)
    if row.finish_reason is None:
        held = max((len(stop) - 1 for stop in row.sampling.stop_strings), default=0)
        text = text.rstrip("\ufffd")  # bytes of a character whose rest is to come
        text = text[: len(text) - held]
    if text.startswith(written):
        print(text[len(written) :], end="", flush=True)
        return text
    return written
