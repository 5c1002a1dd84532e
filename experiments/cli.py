"""The `isoflop` command: a tree of typed functions, and what its exit codes mean.

0: success. 2: a wrong call or input, said in one sentence. 1: a failure. 130: stopped by Ctrl-C.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from experiments.allocator import keep_memory
from experiments.commands import data, evaluate, generate, report, study, train
from experiments.commands.bench import compare, decode
from experiments.commands.bench import train as bench_train
from experiments.commands.models import compress, convert, coordcheck, show
from experiments.commands.scaling import fit, predict
from experiments.commands.scaling import plan as scaling_plan
from experiments.commands.scaling import report as scaling_report
from experiments.commands.scaling import run as scaling_run
from experiments.commands.sweep import plan as sweep_plan
from experiments.commands.sweep import replay
from experiments.commands.sweep import report as sweep_report
from experiments.commands.sweep import run as sweep_run
from model.errors import InputError

Tree = dict[str, "Callable[..., None] | tuple[str, Tree]"]

COMMANDS: Tree = {
    "study": study.study,
    "data": ("Make and look into data folders.", {"prepare": data.prepare, "inspect": data.inspect}),
    "train": train.train,
    "report": report.report,
    "cool": train.cool,
    "generate": generate.generate,
    "eval": evaluate.evaluate,
    "sweep": (
        "Train many settings side by side.",
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
            "report": scaling_report.report,
        },
    ),
    "bench": (
        "Measure this machine on a model.",
        {"decode": decode.decode, "train": bench_train.train, "compare": compare.compare},
    ),
    "model": (
        "Look at architectures, convert weights, check how they scale.",
        {
            "list": show.list_presets,
            "show": show.show,
            "convert": convert.convert,
            "compress": compress.compress,
            "coordcheck": coordcheck.coordcheck,
            "transfer": coordcheck.transfer,
        },
    ),
}


def main() -> None:
    """Entry point of the `isoflop` command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports its every step there; what fails is raised
    _use_compile_cache()
    keep_memory()
    try:
        tyro.cli(_parser(COMMANDS), prog="isoflop", description=_DESCRIPTION)
    except InputError as error:
        _stop(f"isoflop: {error}", 2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _stop(f"isoflop: no space left on the disk{_where(error)}; free some and run the same command again", 2)
    except KeyboardInterrupt:
        _stop("isoflop: stopped; what was finished is saved, the same command goes on from there", 130)
    except Exception as error:
        # Orbax and TensorStore wrap the operating system's error in their own.
        if "No space left on device" not in str(error):
            raise
        _stop("isoflop: no space left on the disk; free some and run the same command again", 2)


_DESCRIPTION = """Language-model research in JAX: sweeps, scaling laws, decode throughput.

Start with `isoflop study`: a whole scaling-law study on real text in minutes. Every command has --help with an example.
"""


def _parser(tree: Tree) -> Any:
    commands = []
    for name, entry in tree.items():
        if isinstance(entry, tuple):
            description, below = entry
            subcommand = tyro.conf.subcommand(
                name=name, constructor=_parser(below), description=description, prefix_name=False
            )
        else:
            subcommand = tyro.conf.subcommand(name=name, constructor=entry, prefix_name=False)
        commands.append(Annotated[Any, subcommand])
    return Union[tuple(commands)]  # noqa: UP007 – made of a list


def _use_compile_cache() -> None:
    """Keep compiled programs across processes; JAX_COMPILATION_CACHE_DIR names another place for them."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set by now, it would come too late
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "isoflop" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _where(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
