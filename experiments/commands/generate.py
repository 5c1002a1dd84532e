"""`isoflop generate`: text from a trained run."""

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from experiments.commands.options import JsonFile
from model.errors import InputError

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer


def generate(
    run: tyro.conf.Positional[Path],
    *,
    prompt: tuple[str, ...],
    data: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Continue prompts with a trained model.

    Example: isoflop generate runs/first --prompt "The people of" "We" --temperature 0.7

    Args:
        run: A run directory.
        prompt: One or more texts to continue.
        data: The data folder with the tokenizer; by default the one that the run was trained on.
        max_new_tokens: Most tokens to add to each prompt.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability; 1 keeps all.
        seed: Of the sampling.
        json: Also write texts, tokens and log-probabilities to this file.
    """
    import jax

    from experiments.commands.options import write_document
    from infer import Sampling, prepare
    from infer import generate as run_generation
    from train import load_run

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokenizer = find_tokenizer(run, data)
    config, params = load_run(run)
    prompts = [tokenizer.encode(text) or list(tokenizer.eos_ids) for text in prompt]
    result = run_generation(
        config, prepare(config, params), prompts, sampling, max_new_tokens=max_new_tokens, key=jax.random.key(seed)
    )
    texts = [tokenizer.decode(tokens) for tokens in result.tokens]
    for before, after in zip(prompt, texts, strict=True):
        print(f"{before}{after}\n")
    rows = zip(prompt, texts, result.tokens, result.logprobs, result.finish_reason, strict=True)
    names = ("prompt", "text", "tokens", "logprobs", "finish_reason")
    write_document(json, {"completions": [dict(zip(names, row, strict=True)) for row in rows]})


def find_tokenizer(run: Path, data: Path | None) -> "Tokenizer":
    """The tokenizer of `data`, or of the folder that the run remembers."""
    from model.tokenizer import load_tokenizer
    from train.run import read_record

    folder = data or Path(read_record(run).get("data") or "")
    if data is None and not folder.is_dir():
        raise InputError(f"the data folder of {run}, {folder}, is gone; give its tokenizer with --data")
    return load_tokenizer(folder)
