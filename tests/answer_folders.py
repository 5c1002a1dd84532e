"""Write folders of answers as `isoflop eval --out` does, of models with known abilities."""

import hashlib
import json
from pathlib import Path

import numpy as np


def write_folder(out: Path, abilities: dict, tasks: dict, *, seed: int = 0, domains: tuple = (), results=True) -> Path:
    """Write answers of models to tasks.

    abilities: model → a number for all tasks, or task → number; one unit is a standard deviation of the questions.
    tasks: name → {"questions", "choices", "clusters", "protocol", "named", "shared"}; named: the task of the file, by
    default its name here; shared: how far models agree on which questions are hard. domains: of a text task "prose",
    none if empty.
    """
    rows = []
    for model, ability in abilities.items():
        for number, (task, shape) in enumerate(tasks.items()):
            level = ability.get(task, 0.0) if isinstance(ability, dict) else ability
            lines = list(_choices(model, level, task, np.random.default_rng((seed, number)), **shape))
            rows.append(_write(out, model, task, "acc", lines, shape, 1 / shape.get("choices", 4)))
        if domains:
            level = ability.get("prose", 0.0) if isinstance(ability, dict) else ability
            rows.append(
                _write(out, model, "prose", "bits_per_byte", list(_texts(model, level, domains, seed)), {}, None)
            )
    if results:
        (out / "results.json").write_text(json.dumps({"schema_version": 1, "results": rows}))
    return out


def _own(model: str, task: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{model}/{task}".encode()).digest()[:8], "big"))


def _choices(model, level, task, random, questions=300, choices=4, clusters=0, shared=0.7, temperature=1.0, **_):
    own = _own(model, task)
    hardness, gold = random.normal(size=questions), random.integers(0, choices, questions)
    noise = np.sqrt(1 - shared**2)
    for i in range(questions):
        margin = 1.5 * (level - shared * hardness[i] + noise * own.normal())
        logits = own.normal(size=choices) * 0.6
        logits[gold[i]] += margin
        logprobs = (logits / temperature - 20).tolist()
        right = float(int(np.argmax(logprobs)) == gold[i])
        yield {
            "id": f"{task}/{i}", "cluster": f"subject {i % clusters}" if clusters else "",
            "prompt_sha256": hashlib.sha256(f"{task}{i}".encode()).hexdigest(), "gold": [int(gold[i])],
            "logprobs": logprobs, "tokens": [4] * choices, "bytes": [16] * choices, "characters": [16] * choices,
            "greedy": [False] * choices, "unconditional": None, "boundary_differs": False,
            "metrics": {"acc": right, "acc_norm": right, "bits_per_byte": -logprobs[gold[i]] / 16 / np.log(2)},
        }  # fmt: skip


def _texts(model, level, domains, seed):
    own = _own(model, "prose")
    for number, domain in enumerate(domains):
        random = np.random.default_rng((seed, 99, number))
        for i in range(40):
            size = int(random.lognormal(7, 0.6))
            bits = 1.0 + 0.15 * number + 0.1 * random.normal() - 0.05 * level + 0.01 * own.normal()
            yield {
                "id": f"{domain}/{i}", "cluster": domain, "nats": bits * size * np.log(2), "tokens": size // 4,
                "bytes": size, "metrics": {"bits_per_byte": bits},
            }  # fmt: skip


def _write(out, model, task, metric, lines, shape, chance):
    digest = hashlib.sha256(model.encode()).hexdigest()
    name, protocol = shape.get("named", task), shape.get("protocol", "isoflop")
    header = {
        "schema_version": 1, "model": model, "model_hash": digest, "task": name, "protocol": protocol,
        "shots": shape.get("shots", 0), "metric": metric, "chance": chance, "questions": len(lines),
        "task_hash": hashlib.sha256(task.encode()).hexdigest(), "settings": {},
    }  # fmt: skip
    file = out / f"{model}-{digest[:8]}" / f"{name}.{protocol}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    scored = [line["metrics"][metric] for line in lines]
    shown = {
        field: value for field, value in header.items() if field not in ("schema_version", "task_hash", "settings")
    }
    return shown | {
        "metrics": {metric: {"value": float(np.mean(scored))}}, "boundary_differs": 0,
        "seconds": 0.004 * len(lines) * (1 + len(model) % 3), "compiles": 2,
    }  # fmt: skip
