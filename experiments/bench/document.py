"""Describe how the numbers of a benchmark document were measured: model, device, versions, command line."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from model import ModelConfig
from train.run import describe_device, versions

SCHEMA_VERSION = 2


def describe(config: ModelConfig, model: str, random_weights: bool) -> dict[str, Any]:
    """Return model, config hash, device and driver, versions, commit, load and command line."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": shlex.join(["isoflop", *sys.argv[1:]]),
        "model": model,
        "random_weights": random_weights,
        "config": config.to_dict(),
        "config_hash": config_hash(config),
        "device": describe_device() | {"driver": driver(), "host": _processor(), "cores": os.cpu_count()},
        "versions": versions() | {"isoflop": version("isoflop")},
        "commit": commit(),
        "load_average": os.getloadavg()[0],
    }


def config_hash(config: ModelConfig) -> str:
    """Return a short hash of every field of the config."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]


def driver() -> str:
    """Return JAX's platform version: of the accelerator's driver and runtime, if there is one."""
    return jax.devices()[0].client.platform_version.strip().replace("\n", ", ")


def commit() -> str:
    """Return `git describe` if this code is in a repository, else the package's version."""
    file = Path(__file__)
    try:
        # An installed package may be an untracked part of another project's repository.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return f"isoflop {version('isoflop')}"


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
