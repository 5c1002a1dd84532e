"""The platform that a program is traced for."""

import re
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """A kind of device.

    platform: "cpu", "gpu" or "tpu". capability: an NVIDIA GPU's compute capability, such as (9, 0); None for other
    devices, and where the device is not attached to this process. vendor: "nvidia" or "amd" of a GPU, else "".
    """

    platform: str
    capability: tuple[int, int] | None = None
    vendor: str = ""


def target(platform: str | None = None) -> Target:
    """Return what the program being traced is for; platform: of an Execution, which comes before all else.

    The mesh under which it is traced decides (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` with an abstract
    device, for machines that are not here), then `jax.default_device`, then JAX's default backend. All of them are
    part of what JAX keys its compiled programs by.
    """
    if platform is not None:
        return _target(platform, "")
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _target(abstract.platform, abstract.device_kind)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is not None and not isinstance(default, str):
        return _target(default.platform, default.device_kind)
    return _target(default or jax.default_backend(), "")


def _target(platform: str, kind: str) -> Target:
    """The target of this platform; kind: of the device as JAX names it, or "" for the default backend's own."""
    platform, vendor = {"cuda": ("gpu", "nvidia"), "rocm": ("gpu", "amd")}.get(platform, (platform, ""))
    if platform != "gpu":
        return Target(platform)
    capability = None
    for device in jax.local_devices():
        if device.platform == "gpu" and kind in ("", device.device_kind):
            kind = device.device_kind
            capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
            break
    if capability is not None:  # AMD's name an architecture instead, such as gfx942
        return Target(platform, (int(capability[1]), int(capability[2])), "nvidia")
    return Target(platform, None, vendor or ("amd" if re.match(r"amd|gfx|radeon", kind, re.IGNORECASE) else "nvidia"))
