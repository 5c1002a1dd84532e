"""Define the `isoflop` command: a tree of typed functions, and the meaning of its exit codes.

0: success. 1: a failure. 2: a wrong call or input, explained in one sentence. 130: stopped by Ctrl-C. A command imports
what it needs when it runs: help and wrong calls do not wait for JAX.
"""

import errno
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from experiments.commands import chat, compare, data, doctor, evaluate, generate, report, serve, study, train, tune
from experiments.commands.bench import compare as bench_compare
from experiments.commands.bench import decode
from experiments.commands.bench import evaluate as bench_evaluate
from experiments.commands.bench import score as bench_score
from experiments.commands.bench import serve as bench_serve
from experiments.commands.bench import train as bench_train
from experiments.commands.models import compress, convert, coordcheck, merge, show
from experiments.commands.repeated import each_once
from experiments.commands.scaling import downstream, fit, predict
from experiments.commands.scaling import plan as scaling_plan
from experiments.commands.scaling import report as scaling_report
from experiments.commands.scaling import run as scaling_run
from experiments.commands.sweep import plan as sweep_plan
from experiments.commands.sweep import replay
from experiments.commands.sweep import report as sweep_report
from experiments.commands.sweep import run as sweep_run
from experiments.process import keep_memory, open_standard_streams, use_compile_cache

Tree = dict[str, "Callable[..., None] | tuple[str, Tree]"]


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print the script with which a shell completes commands and flags at the tab key.

    Example: isoflop completion bash > ~/.local/share/bash-completion/completions/isoflop

    fish reads ~/.config/fish/completions/isoflop.fish, zsh a file _isoflop in a folder of $fpath. For this shell alone:
    source <(isoflop completion bash)

    Args:
        shell: bash, zsh or fish.
    """
    tyro.cli(_parser(COMMANDS), prog="isoflop", args=["--tyro-write-completion", shell, "-"], config=CONFIG)


COMMANDS: Tree = {
    "study": study.study,
    "data": ("Make and look into data folders.", {"prepare": data.prepare, "inspect": data.inspect}),
    "train": train.train,
    "tune": tune.tune,
    "report": report.report,
    "cool": train.cool,
    "generate": generate.generate,
    "chat": chat.chat,
    "serve": serve.serve,
    "eval": evaluate.evaluate,
    "compare": compare.compare,
    "sweep": (
        "Train many settings in as few programs as there are shapes.",
        {
            "plan": sweep_plan.plan,
            "run": sweep_run.run,
            "resume": sweep_run.resume,
            "status": sweep_run.status,
            "worker": sweep_run.worker,
            "report": sweep_report.report,
            "replay": replay.replay,
        },
    ),
    "scaling": (
        "Plan, train, fit and use scaling laws.",
        {
            "plan": scaling_plan.plan,
            "run": scaling_run.run,
            "fit": fit.fit,
            "predict": predict.predict,
            "downstream": downstream.downstream,
            "report": scaling_report.report,
        },
    ),
    "bench": (
        "Measure this machine on a model.",
        {
            "decode": decode.decode,
            "score": bench_score.score,
            "evaluate": bench_evaluate.evaluate,
            "train": bench_train.train,
            "serve": bench_serve.serve,
            "compare": bench_compare.compare,
        },
    ),
    "model": (
        "Look at architectures, convert weights, check how they scale.",
        {
            "list": show.list_presets,
            "show": show.show,
            "convert": convert.convert,
            "merge": merge.merge,
            "compress": compress.compress,
            "coordcheck": coordcheck.coordcheck,
            "transfer": coordcheck.transfer,
        },
    ),
    "doctor": doctor.doctor,
    "completion": completion,
}


def _pinned(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with JAX's settings as in `model.ambient`; help and completion do not wait for JAX."""
    if command is completion:
        return command

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from model.ambient import pinned

        with pinned():
            command(*arguments, **options)

    return run


def main() -> None:
    """Run the `isoflop` command."""
    open_standard_streams()
    stderr = sys.stderr
    try:
        _run()
    finally:
        sys.stderr = stderr
        try:
            stderr.flush()
        except OSError:  # its reader has closed: flushing the rest would change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())


def _run() -> None:
    handler = logging.lastResort  # a handler that looks up sys.stderr for each message: it changes below
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler] if handler else None)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every step there; failures are raised
    use_compile_cache()
    keep_memory()
    program, called, arguments = find(sys.argv[1:])
    try:
        if isinstance(called, tuple):
            tyro.cli(_parser(called[1]), prog=program, description=called[0], args=arguments, config=CONFIG)
        else:
            run = _pinned(_prepared(called))
            tyro.cli(run, prog=program, args=each_once(called, arguments), config=CONFIG)
    except KeyboardInterrupt:
        _stop("isoflop: stopped; what was finished is saved, the same command continues from there", 130)
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from model.errors import InputError
        from train.files import is_full, refusal

        if isinstance(error, InputError):
            _stop(f"isoflop: {error}", 2)
        from experiments.sweep.run import UnfinishedError

        if isinstance(error, UnfinishedError):
            _stop(f"isoflop: {error}", 1)
        if is_full(error):
            _stop(f"isoflop: {_what_is_full(error)}; make room and run the same command again", 1)
        if not isinstance(error, OSError) or error.filename is None:
            raise
        _stop(f"isoflop: {refusal(error)}", 1 if error.errno in _FAILURES else 2)


_FAILURES = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)  # a disk error; others come from the chosen path


def _prepared(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap the command: check first that the output files it writes at its end are writable.

    Messages on stderr can neither stop nor block it.
    """

    @functools.wraps(command)
    def prepared(*arguments: Any, **options: Any) -> None:
        from train.files import check_writable
        from train.progress import patient

        sys.stderr = patient(sys.stderr)
        for name in ("json", "plot", "report"):
            if isinstance(options.get(name), Path):
                check_writable(options[name])
        command(*arguments, **options)

    return prepared


_DESCRIPTION = """Language-model research in JAX: sweeps, scaling laws, decode throughput.

Start with `isoflop study`: a whole scaling-law study on real text in minutes. Every command has --help with an example.
"""


# Help is shorter: no flag that leaves another one off, no {None} among values, positional arguments by their names.
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)


_COLUMNS = ("params", "tokens", "loss", "flops", "unique-tokens", "active-params", "keep-repeated")
FORMER_FLAGS: dict[str, dict[str, str]] = {
    "isoflop sweep plan": {"--eval-tokens": "--evaluate-tokens"},
    "isoflop sweep run": {"--eval-tokens": "--evaluate-tokens"},
    "isoflop eval": {"--max-tokens": "--evaluate-tokens"},
    "isoflop model compress": {"--max-tokens": "--evaluate-tokens", "--report": "--json"},
    "isoflop scaling fit": {f"--{name}": f"--columns.{name}" for name in _COLUMNS},
}
"""By command: flags of former releases that scripts still use, and their names now, one in all commands."""


def find(arguments: Sequence[str]) -> "tuple[str, Callable[..., None] | tuple[str, Tree], list[str]]":
    """Return (name of the command or group that the first words give, the command or group, the remaining words)."""
    called: Callable[..., None] | tuple[str, Tree] = (_DESCRIPTION, COMMANDS)
    words, left = ["isoflop"], list(arguments)
    while isinstance(called, tuple) and left and left[0] in called[1]:
        called = called[1][left[0]]
        words.append(left.pop(0))
    program = " ".join(words)
    return program, called, [_present_name(word, FORMER_FLAGS.get(program, {})) for word in left]


def _present_name(word: str, renamed: dict[str, str]) -> str:
    """Replace a flag's former name by its present one, keeping a value joined by =; other words are unchanged."""
    flag, equals, value = word.partition("=")
    return renamed.get(flag.replace("_", "-"), flag) + equals + value if flag.startswith("--") else word


def _parser(tree: Tree) -> Any:
    """Return the parser of a group: each command with the first sentence of its description."""
    commands = []
    for name, entry in tree.items():
        if isinstance(entry, tuple):
            description, constructor = entry[0], _parser(entry[1])
        else:
            description, constructor = (inspect.getdoc(entry) or "").partition("\n\n")[0], _pinned(entry)
        subcommand = tyro.conf.subcommand(
            name=name, constructor=constructor, description=description, prefix_name=False
        )
        commands.append(Annotated[Any, subcommand])
    return Union[tuple(commands)]  # noqa: UP007 – made of a list


def _what_is_full(error: Exception) -> str:
    known = {errno.EDQUOT: "the quota of the disk is used up", errno.EFBIG: "a file would exceed the limit (ulimit -f)"}
    file = getattr(error, "filename", None)
    where = f" at {file}" if file else ""
    return known.get(getattr(error, "errno", None) or 0, "no space left on the disk") + where


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
