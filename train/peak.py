"""Look up or measure a device's peak FLOP/s: the denominator of MFU (PaLM, appendix B)."""

import functools
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError


class Peak(NamedTuple):
    """Peak of a device. flops_per_second: dense bfloat16 products; kinds: how JAX's `device_kind` begins."""

    flops_per_second: float
    kinds: tuple[str, ...]


# From the vendors' data sheets, where numbers for sparse matrices are halved; for consumer cards, whose sheets have no
# number, from NVIDIA's white papers on their architectures (bfloat16 with float32 accumulation); for TPUs from Google
# Cloud's pages on each version.
PEAKS = {
    "a10": Peak(125e12, ("NVIDIA A10",)),
    "a10g": Peak(70e12, ("NVIDIA A10G",)),
    "a40": Peak(149.7e12, ("NVIDIA A40",)),
    "a100": Peak(312e12, ("NVIDIA A100",)),
    "a6000": Peak(154.8e12, ("NVIDIA RTX A6000",)),
    "b200": Peak(2250e12, ("NVIDIA B200",)),
    "gb200": Peak(2500e12, ("NVIDIA GB200",)),
    "gh200": Peak(989e12, ("NVIDIA GH200",)),
    "h100": Peak(989e12, ("NVIDIA H100",)),  # SXM
    "h100-nvl": Peak(835e12, ("NVIDIA H100 NVL",)),
    "h100-pcie": Peak(756e12, ("NVIDIA H100 PCIe",)),
    "h200": Peak(989e12, ("NVIDIA H200",)),
    "l4": Peak(121e12, ("NVIDIA L4",)),
    "l40": Peak(181e12, ("NVIDIA L40",)),
    "l40s": Peak(362e12, ("NVIDIA L40S",)),
    "mi250x": Peak(191.5e12, ("AMD Instinct MI250X",)),  # of one of its two dies, which is a device here
    "mi300a": Peak(981e12, ("AMD Instinct MI300A",)),
    "mi300x": Peak(1307e12, ("AMD Instinct MI300X",)),
    "mi325x": Peak(1307e12, ("AMD Instinct MI325X",)),
    "rtx-3090": Peak(71e12, ("NVIDIA GeForce RTX 3090",)),
    "rtx-4090": Peak(165.2e12, ("NVIDIA GeForce RTX 4090",)),
    "rtx-5090": Peak(209.5e12, ("NVIDIA GeForce RTX 5090",)),
    "rtx-6000-ada": Peak(364e12, ("NVIDIA RTX 6000 Ada Generation",)),
    "t4": Peak(65e12, ("Tesla T4", "NVIDIA T4")),  # float16; it has no bfloat16
    "v100": Peak(125e12, ("Tesla V100", "NVIDIA V100")),  # float16; it has no bfloat16
    "tpu-v2": Peak(22.5e12, ("TPU v2",)),  # per core, which is a device here, as of v3
    "tpu-v3": Peak(61.5e12, ("TPU v3",)),
    "tpu-v4": Peak(275e12, ("TPU v4",)),
    "tpu-v5e": Peak(197e12, ("TPU v5 lite", "TPU v5e")),
    "tpu-v5p": Peak(459e12, ("TPU v5", "TPU v5p")),
    "tpu-v6e": Peak(918e12, ("TPU v6 lite", "TPU v6e")),
}
_BESIDES = re.compile(r"nvidia|amd|google|cloud|geforce|instinct|tesla|tpu|sxm\d?|\d+gb|hbm\d?e?|[^a-z0-9]")


def device_named(name: str) -> str:
    """Return the key of PEAKS for a device as people write it: "H100", "NVIDIA A100-SXM4-80GB", "TPU v5e", "RTX 4090".

    Raises InputError, with all known devices, if there is none.
    """
    for key in PEAKS:
        if _plain_name(key) == _plain_name(name):
            return key
    raise InputError(f"the peak of a device {name!r} is not known; known are {', '.join(PEAKS)}")


def _plain_name(text: str) -> str:
    return _BESIDES.sub("", text.lower())


def peak_flops_per_second(dtype: DTypeLike) -> float:
    """Return the FLOP/s of one device: the table's for bfloat16 on a known device, else a measurement."""
    dtype = dtype_name(dtype, FLOATS)
    known = known_peak(jax.devices()[0].device_kind)
    return known if dtype == "bfloat16" and known is not None else measured_peak(dtype)


def known_peak(kind: str) -> float | None:
    """Return the table's FLOP/s for a `device_kind`: those of the longest name in the table that it begins with.

    Example: "NVIDIA H100 PCIe" begins with "NVIDIA H100" and "NVIDIA H100 PCIe"; the second one counts. Names match as
    whole words: "NVIDIA A100" does not match "NVIDIA A10".
    """
    if "Laptop" in kind:
        return None
    fitting = {}
    for peak in PEAKS.values():
        for name in peak.kinds:
            if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", kind):
                fitting[name] = peak.flops_per_second
    return fitting[max(fitting, key=len)] if fitting else None


@functools.lru_cache(maxsize=4)
def measured_peak(dtype: str) -> float:
    """Return the FLOP/s of the fastest of several square matrix products, large enough to keep the device busy."""
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
