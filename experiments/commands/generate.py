"""`isoflop generate`: text from a trained model."""

from pathlib import Path

import tyro

from experiments.commands.options import JsonFile


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
    seed: int = 0,
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
        seed: Of the sampling.
        json: Also write texts, tokens and log-probabilities to this file.
    """
    import jax

    from experiments.commands.options import write_document
    from experiments.models import open_model
    from infer import Sampling, prepare
    from infer import generate as run_generation

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    opened = open_model(model, tokenizer)
    words = opened.need_tokenizer()
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        texts = [words.apply_chat_template([*before, {"role": "user", "content": text}]) for text in prompt]
        prompts = [words.encode(text, special=True) for text in texts]
    else:
        around = opened.config.stack == "encoder-decoder" or words.bos_id is not None
        prompts = [words.encode(text, add_special_tokens=around) or list(words.eos_ids) for text in prompt]
    result = run_generation(
        opened.config,
        prepare(opened.config, opened.params),
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        key=jax.random.key(seed),
    )
    answers = [words.decode(tokens) for tokens in result.tokens]
    for question, answer in zip(prompt, answers, strict=True):
        print(f"{question}\n→ {answer.strip()}\n" if chat else f"{question}{answer}\n")
    rows = zip(prompt, answers, result.tokens, result.logprobs, result.finish_reason, strict=True)
    names = ("prompt", "text", "tokens", "logprobs", "finish_reason")
    write_document(json, {"completions": [dict(zip(names, row, strict=True)) for row in rows]})
