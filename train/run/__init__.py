"""Read and write the run directory: its record, its checkpoints, its metrics."""

from typing import TYPE_CHECKING

from model.lazy import lazy

if TYPE_CHECKING:
    from train.run.folder import (
        BusyError,
        Result,
        Run,
        describe_device,
        executions,
        is_held,
        load_run,
        read_record,
        recipe_of,
        versions,
    )
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "folder": (
                "BusyError",
                "Result",
                "Run",
                "describe_device",
                "executions",
                "is_held",
                "load_run",
                "read_record",
                "recipe_of",
                "versions",
            )
        },
    )

__all__ = [
    "BusyError",
    "Result",
    "Run",
    "describe_device",
    "executions",
    "is_held",
    "load_run",
    "read_record",
    "recipe_of",
    "versions",
]
