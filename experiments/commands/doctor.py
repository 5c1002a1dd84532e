"""Implement `isoflop doctor`: what this machine and installation provide and lack."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.commands.options import JsonFile
from experiments.words import bytes_in_words, counted

ENABLES = {
    "study": "isoflop study, data prepare sotu",
    "parquet": "data prepare FILE.parquet, tables in Parquet",
    "hub": "data prepare hf:OWNER/NAME",
    "eval": "lm-evaluation-harness on our models (python -m experiments.evaluate.harness)",
    "serve": "isoflop serve, chat, bench serve",
    "wandb": "train --wandb PROJECT",
    "search": "sweep run --sampler gp or cmaes, fANOVA in sweep report",
    "cuda": "one or more NVIDIA GPUs",
    "cluster": "sweep run --launcher slurm, --storage postgresql+psycopg://…",
    "dashboard": "optuna-dashboard sqlite:///SWEEP/ledger.db",
    "peers": "bench decode, train and evaluate with --against, in this Python",
    "test": "make test",
}
"""What each extra of pyproject.toml is for; its packages are read from the installation."""
SIDE = 1024  # side of the square matrices that are multiplied as a check
Found = tuple[dict[str, Any], str]
"""For the document, and as text."""


def doctor(*, json: JsonFile = None) -> None:
    """Report versions, memory, devices and whether they compute, the compile cache, optional packages.

    Missing or broken parts are reported; the exit code is 0 all the same.

    Example: isoflop doctor --json doctor.json

    Args:
        json: Also write all of it to this file.
    """
    from experiments.commands.options import console, write_document

    looks = {"host": _host, "devices": _devices, "check": _check, "compile_cache": _compile_cache}
    looks |= {"settings": _settings}
    packages, found = _packages(), {name: _or_error(look) for name, look in looks.items()}
    versions = {"python": sys.version.split()[0]} | packages.pop("")
    parts: dict[str, Any] = {"versions": versions} | {name: part for name, (part, _) in found.items()}
    extras = {name: {"enables": ENABLES.get(name, ""), "packages": held} for name, held in packages.items()}
    write_document(json, parts | {"extras": extras})
    lines = ["versions: " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in versions.items())]
    lines += [f"{name.replace('_', ' ')}: {words}" for name, (_, words) in found.items()]
    lines += [f"extra {name} ({ENABLES.get(name, '')}): {_state(name, held)}" for name, held in packages.items()]
    for line in lines:
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def _or_error(look: Callable[[], Found]) -> Found:
    """Return the function's result, or its error as text: an installation may be broken anywhere."""
    try:
        return look()
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        return {"error": words}, words


def _packages() -> dict[str, dict[str, str | None]]:
    """Return by extra ("": what isoflop always needs) each package with its version, None if it is not installed."""
    import re
    from importlib.metadata import PackageNotFoundError, requires, version

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    found: dict[str, dict[str, str | None]] = {"": {name: version_of(name) for name in ("isoflop", "jaxlib")}}
    for requirement in (requires("isoflop") or []) if found[""]["isoflop"] else []:
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        found.setdefault(extra[1] if extra else "", {})[name] = version_of(name)
    return found


def _state(extra: str, packages: dict[str, str | None]) -> str:
    missing = [name for name, version in packages.items() if version is None]
    return f"missing {', '.join(missing)}; pip install 'isoflop[{extra}]'" if missing else "installed"


def _host() -> Found:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    cores = os.cpu_count()
    words = f"{cores} cores, {bytes_in_words(free)} of {bytes_in_words(total)} of memory free"
    return {"cores": cores, "memory_bytes": total, "memory_bytes_free": free}, words


def _devices() -> Found:
    import jax

    from train.run import describe_device

    device = describe_device()
    limits = [(local.memory_stats() or {}).get("bytes_limit") for local in jax.local_devices()]
    memory = "".join(f", {words} of memory each" for words in {bytes_in_words(limit) for limit in limits if limit})
    return device | {"memory_bytes": limits}, f"{device['count']} × {device['kind']} ({device['platform']}){memory}"


def _check() -> Found:
    """Compile and run a matrix product with a known result."""
    import time

    import jax
    import jax.numpy as jnp

    ones = jnp.ones((SIDE, SIDE), jnp.float32)
    start = time.perf_counter()
    product = jax.jit(jnp.matmul).lower(ones, ones).compile()
    compiled = time.perf_counter()
    right = bool((product(ones, ones) == SIDE).all())
    again = time.perf_counter()
    product(ones, ones).block_until_ready()
    seconds = time.perf_counter() - again
    words = (
        f"a product of {SIDE} × {SIDE} float32 is {'right' if right else 'WRONG'}; compiled in "
        f"{compiled - start:.2f} s, run in {seconds:.4f} s ({2 * SIDE**3 / seconds:.3g} FLOP/s)"
    )
    return {"right": right, "compile_seconds": compiled - start, "seconds": seconds}, words


def _settings() -> Found:
    from model.ambient import PINNED

    given = {f"JAX_{name.upper()}" for name in (*PINNED, "transfer_guard")} & os.environ.keys()
    ignored = {name: os.environ[name] for name in sorted(given)}
    if not ignored:
        return {"ignored": {}}, "no environment variable sets what JAX computes"
    words = ", ".join(f"{name}={value}" for name, value in ignored.items())
    return {"ignored": ignored}, f"{words}: runs and commands ignore this and compute by JAX's defaults"


def _compile_cache() -> Found:
    import jax

    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not folder:
        return {"folder": None}, "off: every process compiles again"
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    words = (
        f"{folder}, {counted(len(sizes), 'file')}, {bytes_in_words(sum(sizes))}; to clear "
        f"it: rm -r {shlex.quote(folder)}"
    )
    return {"folder": folder, "files": len(sizes), "bytes": sum(sizes)}, words
