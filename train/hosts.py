"""Coordinate the processes of one run; a single process never communicates.

Every process runs the same program, so each function here must be called by all of them in the same order. Process 0
is the writer: it alone writes logs and records and decides about files. The others get its results through `agree`.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from model.errors import InputError, check_at_least_one, check_whole


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the processes of one run; call this before anything else of JAX.

    coordinator: host:port of process 0. Arguments that are None are found by JAX, which knows Slurm, Open MPI and TPU
    pods. Raises InputError if one is missing and cannot be found, or if they contradict each other.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError(
            f"coordinator={coordinator!r} names no port; write it as HOST:PORT, the same for all processes"
        )
    if num_processes is not None:
        check_at_least_one(num_processes=num_processes)
    if process_id is not None:
        last = math.inf if num_processes is None else num_processes - 1
        check_whole("process_id", process_id, 0, last, hint="processes are counted from 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by CPUs only
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise InputError(
            f"the processes of this run cannot be found ({error}); give the coordinator as HOST:PORT, the number of "
            "processes and the number of this one, or start them by Slurm or mpirun"
        ) from None


def is_writer() -> bool:
    """Return whether this process writes logs and records: process 0 does."""
    return jax.process_index() == 0


def agree(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` in process 0 and return its value in all processes; also a barrier for them.

    With several processes the value is sent as JSON, so a tuple becomes a list. An exception is raised in all of them
    with the same text: an InputError as such, an OSError with its errno, and any other, outside process 0, as a
    RuntimeError.
    """
    if jax.process_count() == 1:
        return function(*args)
    message, failure = b"", None
    if is_writer():
        try:
            message = json.dumps({"value": function(*args)}).encode()
        except Exception as error:  # raised below, after the others have been told
            failure, message = error, json.dumps(_described(error)).encode()
    answer = json.loads(_broadcast(message))
    if failure is not None:
        raise failure
    if "value" not in answer:
        raise _remade(answer)
    return answer["value"]


def _broadcast(message: bytes) -> bytes:
    """Return process 0's bytes. The length is sent first; then the bytes, padded so that few programs are compiled.

    Example: messages of up to 256 bytes are sent as 256 bytes, one of 300 bytes as 512.
    """
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(message), np.int32)))
    next_power_of_two = 1 << (length - 1).bit_length()
    padded = np.zeros(max(256, next_power_of_two), np.uint8)
    if is_writer():
        padded[:length] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)[:length].tobytes()


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError) and error.errno is not None:
        filename = None if error.filename is None else str(error.filename)
        return {"kind": "OSError", "arguments": [error.errno, error.strerror, filename]}
    return {"kind": "InputError" if isinstance(error, InputError) else "RuntimeError", "arguments": [str(error)]}


def _remade(answer: dict[str, Any]) -> Exception:
    kinds = {"OSError": OSError, "InputError": InputError, "RuntimeError": RuntimeError}
    return kinds[answer["kind"]](*answer["arguments"])
