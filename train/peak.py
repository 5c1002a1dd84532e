"""What a device can do at most: the denominator of MFU (PaLM, appendix B)."""

import functools
import time

import jax
import jax.numpy as jnp

from model.dtypes import FLOATS, DTypeLike, dtype_name

# Dense bfloat16 FLOP/s by JAX's `device_kind`, from the vendors' data sheets; the longest name that fits counts.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,  # per core, which is a device here
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA V100": 125e12,  # float16; it has no bfloat16
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI300X": 1307e12,
}


def peak_flops_per_second(dtype: DTypeLike) -> float:
    """FLOP/s of one device: the table's for bfloat16 on a known device, else a measurement."""
    dtype = dtype_name(dtype, FLOATS)
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAKS if kind.startswith(name)]
    if dtype == "bfloat16" and known:
        return PEAKS[max(known, key=len)]
    return measured_peak(dtype)


@functools.lru_cache(maxsize=4)
def measured_peak(dtype: str) -> float:
    """FLOP/s of the best of several square matrix products, large enough for the device to be busy."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
