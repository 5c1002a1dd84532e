"""Write rows of the chitchat-dataset (PyPI, MIT licence) to fine-tune on: conversations, and pairs by their ratings.

    pip install --no-deps chitchat-dataset==0.9.0
    python experiments/scripts/chitchat_rows.py chats.jsonl rated-pairs.jsonl

The first speaker is the user, the second the assistant; messages that one of them wrote in a row are one turn. A pair
holds a conversation that was rated 7 or more throughout and one that was rated 3 or less throughout, each conversation
in one pair.
"""

import importlib.resources
import json
import random
import sys
from pathlib import Path
from typing import Any

SYSTEM = "A friendly talk between two strangers."


def turns(conversation: dict[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a conversation as turns of user and assistant, in turn."""
    made: list[dict[str, str]] = []
    speakers: list[str] = []
    for group in conversation["messages"]:
        for message in group:
            if message["sender"] not in speakers:
                speakers.append(message["sender"])
            role = "user" if message["sender"] == speakers[0] else "assistant"
            text = message["text"].strip()
            if made and made[-1]["role"] == role:
                made[-1]["content"] += "\n" + text
            else:
                made.append({"role": role, "content": text})
    return made


def main(chats: Path, pairs: Path) -> None:
    """Write both files."""
    content = (importlib.resources.files("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8")
    conversations = list(json.loads(content).values())
    with chats.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            file.write(json.dumps({"messages": turns(conversation)}) + "\n")
    good, bad = [], []
    for conversation in conversations:
        ratings = (conversation.get("ratings") or {}).values()
        if len(turns(conversation)) < 2 or not ratings:
            continue
        if min(ratings) >= 7:
            good.append(turns(conversation))
        elif max(ratings) <= 3:
            bad.append(turns(conversation))
    random.Random(0).shuffle(good)
    system = {"role": "system", "content": SYSTEM}
    with pairs.open("w", encoding="utf-8") as file:
        for chosen, rejected in zip(good, bad, strict=False):
            file.write(json.dumps({"chosen": [system, *chosen], "rejected": [system, *rejected]}) + "\n")
    print(
        f"{len(conversations)} conversations, {min(len(good), len(bad))} pairs of {len(good)} good and {len(bad)} bad"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
