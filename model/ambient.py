"""Global settings of JAX, from the process or its environment variables, that change numbers or raise errors.

A run is a function of its configuration, seed and data alone. Functions that write or read runs, and every command,
therefore set these to JAX's defaults, overriding JAX_DEFAULT_PRNG_IMPL, JAX_ENABLE_X64 and so on. Pure functions such
as `apply`, `train_step` and `generate` use the caller's settings. Compiler options (XLA_FLAGS, JAX_OPTIMIZATION_LEVEL)
and the choice of devices are never changed: they affect numbers only by rounding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

PINNED: dict[str, Any] = {
    # random numbers of a seed
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "random_seed_offset": 0,
    "high_dynamic_range_gumbel": False,
    "accurate_erf_inv": False,
    # precision
    "enable_x64": False,
    "default_matmul_precision": None,
    "allow_f16_reductions": True,
    "softmax_custom_jvp": False,
    # errors and compilation
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "legacy_prng_key": "allow",
    "debug_key_reuse": False,
    "debug_nans": False,  # a run counts a step that is not finite, and goes on
    "debug_infs": False,
    "disable_jit": False,
    "transfer_guard_host_to_device": "allow",
    "transfer_guard_device_to_device": "allow",
    "transfer_guard_device_to_host": "allow",
}


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Set the settings of PINNED in a `with` block or a decorated function, and restore them afterwards.

    A thread that is started inside has the process's settings and needs a block of its own.
    """
    with contextlib.ExitStack() as stack:
        for name in changed():
            # For most settings JAX has a context manager, which is local to the thread; the others are global.
            thread_local = getattr(jax, name, None)
            value = PINNED[name]
            stack.enter_context(_globally(name, value) if thread_local is None else thread_local(value))
        yield


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Allow dtype and rank promotion, JAX's default, in a `with` block or a decorated function.

    A caller may forbid promotion to find mistakes in their own code; this library, Flax and Optax rely on it. No number
    changes.
    """
    with contextlib.ExitStack() as stack:
        for name in {"numpy_dtype_promotion", "numpy_rank_promotion"} & changed().keys():
            stack.enter_context(getattr(jax, name)(PINNED[name]))
        yield


def changed() -> dict[str, Any]:
    """Return {setting: its value now} for the settings of PINNED that differ and that this version of JAX has."""
    now = {name: getattr(jax.config, f"jax_{name}", None) for name in PINNED}
    return {name: value for name, value in now.items() if value not in (PINNED[name], None)}  # None: as JAX has it


@contextlib.contextmanager
def _globally(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, f"jax_{name}")
    jax.config.update(f"jax_{name}", value)
    try:
        yield
    finally:
        jax.config.update(f"jax_{name}", before)
