"""Settings of JAX that change numbers, or what a program may do, by the process or its environment variables.

A run is a function of its configuration, seed and data alone. So what makes or reads runs, and every command, has these
settings at JAX's own defaults, whatever JAX_DEFAULT_PRNG_IMPL, JAX_ENABLE_X64 and the like say. Pure functions such as
`apply`, `train_step` and `generate` obey the caller's. Options of compilers (XLA_FLAGS, JAX_OPTIMIZATION_LEVEL) and the
choice of devices stay the caller's everywhere: they change no number but by rounding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

PINNED: dict[str, Any] = {
    # which random numbers a seed gives
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "random_seed_offset": 0,
    "high_dynamic_range_gumbel": False,
    "accurate_erf_inv": False,
    # in which precision numbers are computed
    "enable_x64": False,
    "default_matmul_precision": None,
    "allow_f16_reductions": True,
    "softmax_custom_jvp": False,
    # what is an error, and whether anything is compiled
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
    """Have the settings of PINNED at those values in a `with` block, or in a function that this decorates.

    They are as before afterwards, also where an exception ends the block. A thread that is started inside has the
    process's settings: what computes there needs a block of its own.
    """
    with contextlib.ExitStack() as stack:
        for name in changed():
            # JAX has context managers, which are a thread's own, of most settings; the others are the process's.
            own = getattr(jax, name, None)
            stack.enter_context(_globally(name, PINNED[name]) if own is None else own(PINNED[name]))
        yield


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Let JAX promote dtypes and broadcast ranks in the block, or in a function that this decorates, as by default.

    A caller forbids it to find slips in their own arithmetic; ours, Flax's and Optax's rely on it. No number changes.
    """
    with contextlib.ExitStack() as stack:
        for name in {"numpy_dtype_promotion", "numpy_rank_promotion"} & changed().keys():
            stack.enter_context(getattr(jax, name)(PINNED[name]))
        yield


def changed() -> dict[str, Any]:
    """Return the settings of PINNED that are not at those values now; one that this version of JAX lacks is not."""
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
