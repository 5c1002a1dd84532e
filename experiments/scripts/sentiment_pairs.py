"""Sample pairs of answers of a model and order them by a written rule: the one with the more positive words is chosen.

    pip install --no-deps vaderSentiment==3.3.2
    python experiments/scripts/sentiment_pairs.py runs/sft chats.jsonl pairs.jsonl 400

Prompts are the first user turns of different conversations, those of more than 128 tokens left out: a batch is as wide
as its longest prompt. The rule is VADER's compound score (Hutto and Gilbert 2014); a prompt whose two answers have the
same score gives no pair.
"""

import json
import sys
from pathlib import Path

import jax

from infer import Sampling, generate, prepare
from model.progress import progress_bar
from model.store import open_model

BATCH, TOKENS, LONGEST = 32, 32, 128


def prompts(chats: Path, count: int) -> list[str]:
    """Return the first user turns of so many conversations, no two alike."""
    found: dict[str, None] = {}
    with chats.open(encoding="utf-8") as file:
        for line in file:
            first = json.loads(line)["messages"][0]
            if first["role"] == "user" and first["content"].strip():
                found.setdefault(first["content"])
            if len(found) == count:
                break
    return list(found)


def main(model: Path, chats: Path, out: Path, count: int) -> None:
    """Write the pairs."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    config, params, tokenizer = open_model(model)
    assert tokenizer is not None, f"{model} has no tokenizer"
    params, rule = prepare(config, params), SentimentIntensityAnalyzer()
    questions = prompts(chats, count)
    turns = [[{"role": "user", "content": text}] for text in questions]
    ids = [tokenizer.encode(tokenizer.apply_chat_template(turn), special=True) for turn in turns]
    short = [number for number, tokens in enumerate(ids) if len(tokens) <= LONGEST]
    turns, ids = [turns[number] for number in short], [ids[number] for number in short]
    written = 0
    with out.open("w", encoding="utf-8") as file, progress_bar("sampling", len(ids)) as advance:
        for begin in range(0, len(ids), BATCH):
            batch = ids[begin : begin + BATCH]
            sampling = Sampling(temperature=1.0, n=2, stop_ids=tuple(tokenizer.eos_ids))
            key = jax.random.key(begin)
            result = generate(config, params, batch, sampling, max_new_tokens=TOKENS, key=key)
            answers = [tokenizer.decode(tokens).strip() for tokens in result.tokens]
            for number, turn in enumerate(turns[begin : begin + BATCH]):
                two = answers[2 * number : 2 * number + 2]
                scores = [rule.polarity_scores(answer)["compound"] for answer in two]
                if not all(two) or scores[0] == scores[1]:
                    continue
                chosen, rejected = two if scores[0] > scores[1] else two[::-1]
                row = {"prompt": turn}
                row |= {
                    name: [{"role": "assistant", "content": text}]
                    for name, text in (("chosen", chosen), ("rejected", rejected))
                }
                file.write(json.dumps(row) + "\n")
                written += 1
            advance(len(batch))
    print(f"{written} pairs of {len(ids)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
