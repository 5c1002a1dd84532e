"""Read own tasks: a TOML file with a JSONL file of questions, a JSONL file alone, ready requests, IFEval, texts."""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate.scorers.registry import scorer
from experiments.evaluate.tasks.olmes import task_of_requests
from experiments.evaluate.tasks.package import read_lines
from experiments.evaluate.tasks.task import Question, Task
from model.errors import InputError, UnknownNameError

Row = tuple[int, Mapping[str, Any]]
"""The number of a line, and its object."""

_SUFFIXES = (".toml", ".jsonl", ".jsonl.gz")
_TASK_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "protocol": str,
    "kind": str,
    "metric": str,
    "chance": (int, float),
    "shots": int,
    "fixed_shots": bool,
    "shots_of_cluster": bool,
    "description": str,
    "delimiter": str,
    "chat_delimiter": str,
    "separator": str,
    "unconditional": str,
    "boundary": str,
    "truncate": bool,
    "stop": list,
    "max_new_tokens": int,
    "scorer": str,
}
_QUESTION_FIELDS = ("id", "query", "choices", "gold", "queries", "answers", "cluster", "shot")
_EXAMPLES = dict.fromkeys(_QUESTION_FIELDS, '"{name}"') | {
    "choices": '"options"',
    "answers": '"answers"',
    "queries": '["{first}", "{second}"]',
    "gold": '"answer"',
}
_FIELDS = (*_TASK_FIELDS, "questions", "pool", *_QUESTION_FIELDS)


def is_file_of_task(name: str) -> bool:
    """Return whether a name on the command line is a file or a folder with a task."""
    path = Path(name)
    return path.is_dir() or (path.is_file() and path.name.endswith(_SUFFIXES))


def read_task(path: Path) -> Task:
    """Return the task of a TOML file, of a JSONL file with questions, ready requests or texts, or of a text folder.

    Raises InputError that names the file, and the line for a wrong row.
    """
    if path.is_dir():
        return _task_of_folder(path)
    if path.suffix == ".toml":
        return _task_of_toml(path)
    rows = read_rows(path)
    first = rows[0][1]
    name = path.name.split(".")[0]
    if "request_type" in first:
        found = first.get("task_name")
        return task_of_requests([row for _, row in rows], str(found or name).replace(":", "-"), "requests", str(path))
    if "instruction_id_list" in first:
        return _instructions(path, name, rows)
    if "text" in first:
        return Task(name, "text", "text", _texts(path, rows), "bits_per_byte", source={"file": str(path)})
    return _task(path, name, rows, {}, ())


def _instructions(path: Path, name: str, rows: Sequence[Row]) -> Task:
    """Return the task of IFEval's file, which is `input_data.jsonl` of google-research/instruction_following_eval."""
    questions = []
    for line, row in rows:
        if not isinstance(row.get("prompt"), str):
            raise InputError(f"{path}, line {line} has no field 'prompt' with a text")
        questions.append(Question(str(row.get("key", line)), row["prompt"], extra=row))
    return Task(
        name=name,
        protocol="ifeval",
        kind="generation",
        questions=tuple(questions),
        metric="prompt_strict",
        max_new_tokens=1280,
        scorer="ifeval",
        source={"file": str(path)},
    )


def read_rows(path: Path) -> list[Row]:
    """Return the objects of a JSONL file, with the numbers of their lines from 1; empty lines are left out."""
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {number} should be an object such as {{"query": …, "choices": […]}}')
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path} has no rows; give it one JSON object per line")
    return rows


def _task_of_toml(path: Path) -> Task:
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the TOML file of a task: {error}") from None
    for name, value in fields.items():
        if name not in _FIELDS:
            raise InputError(f"{path}: {UnknownNameError('field', name, _FIELDS)}")
        kind = _TASK_FIELDS.get(name)
        if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            word = {str: "a text", bool: "true or false", int: "a whole number", list: "a list of texts"}
            raise InputError(f"{path}: {name}={value!r} should be {word.get(kind, 'a number')}")  # type: ignore[arg-type]
    if not all(isinstance(text, str) for text in fields.get("stop", ())):
        raise InputError(f"{path}: stop={fields['stop']!r} should be a list of texts")
    for name in _QUESTION_FIELDS:
        value, many = fields.get(name, ""), name in ("choices", "answers", "queries")
        if not isinstance(value, str) and not (many and isinstance(value, list)):
            what = "the name of a field, or a list of templates" if many else "a text"
            raise InputError(f"{path}: {name}={value!r:.40} should be {what}, such as {_EXAMPLES[name]}")
    if "questions" not in fields:
        raise InputError(f'{path} lacks questions; name a JSONL file beside it, such as questions = "questions.jsonl"')
    rows = read_rows(_beside(path, "questions", fields["questions"]))
    pool = read_rows(_beside(path, "pool", fields["pool"])) if "pool" in fields else ()
    return _task(path, fields.get("name", path.stem), rows, fields, pool)


def _beside(path: Path, name: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise InputError(f"{path}: {name}={value!r:.40} should be the name of a JSONL file beside it")
    file = path.parent / value
    if not file.is_file():
        raise InputError(f"{path}: {name} names {file}, which does not exist")
    return file


def _task(path: Path, name: str, rows: Sequence[Row], fields: Mapping[str, Any], pool: Sequence[Row]) -> Task:
    """Return the task of these rows; fields of the TOML file say how a question is made from a row."""
    templates = {field: fields[field] for field in _QUESTION_FIELDS if field in fields}
    file = path.parent / fields["questions"] if "questions" in fields else path
    kind = fields.get("kind")
    of_rows = tuple(_question(file, row, templates) for row in rows) if kind != "text" else ()
    questions = of_rows or _texts(file, rows)
    kind = kind or ("choice" if questions[0].choices else "generation")
    metric = {"choice": "acc_norm", "text": "bits_per_byte"}.get(kind, "")
    if kind == "generation":
        metric = scorer(fields.get("scorer", Task.scorer)).metrics[0]
    if kind == "choice" and all(len(question.choices) == 1 for question in questions):
        metric = "bits_per_byte"
    given: dict[str, Any] = {field: fields[field] for field in _TASK_FIELDS if field in fields}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    from_pool = tuple(_question(path.parent / fields["pool"], row, templates) for row in pool)
    settings: dict[str, Any] = {"name": name, "protocol": "own", "kind": kind, "metric": metric} | given
    return Task(**settings, questions=questions, pool=from_pool, source={"file": str(path)})


def _question(file: Path, row: Row, templates: Mapping[str, Any]) -> Question:
    """Return the question of a row, whose fields have the names of `Question` where no template is given."""
    line, values = row
    where = f"{file}, line {line}"

    def fill(template: str) -> str:
        try:
            return template.format_map({key: str(value) for key, value in values.items()})
        except KeyError as error:
            raise InputError(f"{where} has no field {error}, which the task's template names") from None
        except (ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"the template {template!r:.60} cannot be filled in ({error}); write a field as {{name}}, and a brace "
                "as {{ or }}"
            ) from None

    def text(name: str, default: str | None = None) -> str | None:
        if name in templates:
            return fill(templates[name])
        value = values.get(name, default)
        return None if value is None else str(value)

    query = text("query")
    choices = _list(where, "choices", templates, values, fill)
    answers = _list(where, "answers", templates, values, fill)
    queries = _list(where, "queries", templates, values, fill)
    if query is None and not queries:
        raise InputError(f"{where} has no field 'query'; give it, or a template such as query = \"{{question}}\"")
    if not choices and not answers:
        raise InputError(f"{where} has neither 'choices' nor 'answers'; give one of them")
    return Question(
        id=text("id", str(line)) or str(line),
        query=query if query is not None else queries[0],
        choices=choices,
        gold=_gold(where, templates, values, choices) if choices else (),
        queries=queries,
        answers=answers,
        cluster=text("cluster", "") or "",
        shot=text("shot"),
        extra={name: value for name, value in values.items() if name not in _QUESTION_FIELDS},
    )


def _list(
    where: str, name: str, templates: Mapping[str, Any], row: Mapping[str, Any], fill: Callable[[str], str]
) -> tuple[str, ...]:
    """Return a list of texts: a list of templates filled in, or the row's field that the template names."""
    template = templates.get(name, name)
    if isinstance(template, list):
        return tuple(fill(str(one)) for one in template)
    if template not in row:
        if name in templates:
            raise InputError(f"{where} has no field {template!r}, which {name} names")
        return ()
    value = row[template]
    if name == "answers" and isinstance(value, str | int | float):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str | int | float) for one in value):
        raise InputError(f"{where}: {template}={value!r:.60} should be a list of texts")
    return tuple(str(one) for one in value)


def _gold(where: str, templates: Mapping[str, Any], row: Mapping[str, Any], choices: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the correct choices, which a row gives as an index, indices, or the text of a choice."""
    name = templates.get("gold", "gold")
    if name not in row:
        if len(choices) == 1:
            return (0,)
        raise InputError(f"{where} has no field {name!r} for the correct choice; give its index, from 0, or its text")
    value = row[name]
    if isinstance(value, str) and value in choices:
        return (choices.index(value),)
    several = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in several):
        raise InputError(
            f"{where}: {name}={value!r:.60} should be the index of the correct choice, from 0, or its text"
        )
    return tuple(several)


def _texts(file: Path, rows: Sequence[Row]) -> tuple[Question, ...]:
    """Return a question per text of a JSONL file; its domain is the field `domain`, else the file's name."""
    questions = []
    for line, row in rows:
        if not isinstance(row.get("text"), str):
            raise InputError(f"{file}, line {line} has no field 'text' with a text")
        domain = str(row.get("domain", file.name.split(".")[0]))
        questions.append(Question(str(row.get("id", line)), row["text"], cluster=domain))
    return tuple(questions)


def _task_of_folder(folder: Path) -> Task:
    """Return the texts of a folder: each subfolder is a domain, and each text file directly in it."""
    questions = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and path.suffix in (".txt", ".md") and not inside.name.startswith("."):
            domain = inside.parts[0] if len(inside.parts) > 1 else inside.stem
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
            if text:
                questions.append(Question(str(inside), text, cluster=domain))
    if not questions:
        raise InputError(f"{folder} has no text: give it .txt or .md files, in a subfolder for each domain")
    return Task(folder.resolve().name, "text", "text", tuple(questions), "bits_per_byte", source={"file": str(folder)})
