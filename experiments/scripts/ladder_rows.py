"""Write the downstream results of the OLMo ladder (Bhagia et al. 2024, Apache 2.0) as one table, one row per result.

    git clone https://github.com/allenai/OLMo-ladder
    python experiments/scripts/ladder_rows.py OLMo-ladder bhagia2024_ladder.csv.gz

The last five checkpoints of every run of 190M to 3B are kept, and, with held_out = 1, those of OLMo 2 7B (4T tokens)
and 13B (5T tokens). The number of questions is the smallest of which every accuracy is a whole number of right answers.
"""

import csv
import gzip
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RUNS = "src/scripts/paper/data/ladder-runs"
PARAMS = {
    "190M": 190354176,
    "370M": 371262464,
    "760M": 758220288,
    "1B": 1279395840,
    "3B": 3169537280,
    "7B": 6887575552,
    "13B": 13202396160,
}
"""Parameters without the embedding, as `MODEL_PARAMS` of the repository's src/scaling/utils.py has them."""
TARGETS = {"peteish7_eval_anneal": ("7B-4T", "7B"), "peteish13_eval_final": ("13B-5T", "13B")}
CHECKPOINTS = 5
MOST_QUESTIONS = 20_000
_BITS = re.compile(r"eval/downstream_bpb/(\w+)_rc_5shot_bpb")


def score_column(task: str, columns: Sequence[str]) -> str:
    """Return the column of a task's accuracy: of length-normalised answers where there is one."""
    names = [f"eval/downstream/{task}_rc_5shot_{metric}" for metric in ("len_norm", "acc")]
    return next(name for name in names if name in columns)


def tokens_of(row: Mapping[str, str]) -> int:
    """Return the training tokens of a checkpoint."""
    total = row.get("throughput/total_tokens")
    return round(float(total)) if total else int(row["_step"]) * int(row["batch_size_in_tokens"])


def questions_of(accuracies: Sequence[float]) -> int:
    """Return the smallest number of questions of which every float32 accuracy is a whole number of right answers."""
    for count in range(2, MOST_QUESTIONS):
        if all(abs(value * count - round(value * count)) < 1e-7 * count for value in accuracies):
            return count
    raise ValueError("no number of questions explains the accuracies")


def main(checkout: Path, out: Path) -> None:
    """Write the table."""
    files = sorted((checkout / RUNS).glob("*xC*.csv")) + [checkout / RUNS / f"{name}.csv" for name in TARGETS]
    results: dict[str, list[dict[str, str]]] = {}
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            results[file.stem] = list(csv.DictReader(lines))
    columns = list(results["190M-1xC"][0])
    tasks = [match[1] for match in map(_BITS.fullmatch, columns) if match]
    scores = {task: score_column(task, columns) for task in tasks}
    questions = {
        task: questions_of(sorted({float(row[name]) for rows in results.values() for row in rows}))
        for task, name in scores.items()
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "params", "tokens", "task", "bits_per_byte", "accuracy", "questions", "held_out"])
    runs = [(*TARGETS.get(name, (name, name.split("-")[0])), rows) for name, rows in results.items()]
    for run, size, rows in sorted(runs, key=lambda each: (PARAMS[each[1]], tokens_of(each[2][-1]), each[0])):
        held_out = int(run in {name for name, _ in TARGETS.values()})
        for task in tasks:
            for row in rows[-CHECKPOINTS:]:
                bits, score = float(row[f"eval/downstream_bpb/{task}_rc_5shot_bpb"]), float(row[scores[task]])
                cells = (f"{bits:.4f}", f"{score:.4f}", questions[task], held_out)
                writer.writerow([run, PARAMS[size], tokens_of(row), task, *cells])
    content = text.getvalue().encode()
    out.write_bytes(gzip.compress(content, 9, mtime=0) if out.suffix == ".gz" else content)
    print(f"{len(content.splitlines()) - 1:,} results of {len(runs)} runs on {len(tasks)} tasks in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
