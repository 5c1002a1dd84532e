"""The kind of device that a program is traced for."""

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
    """Return the kind of device that the program being traced is for.

    It is given by `platform` (an Execution's), or by the mesh of the trace (`jax.set_mesh`, or for other machines
    `jax.sharding.use_abstract_mesh` with an abstract device), or by `jax.default_device`, or by JAX's default backend.
    All of these are part of JAX's keys for compiled programs.
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
    """Return the target of a platform; kind: JAX's `device_kind`, or "" for a device of the default backend."""
    platform, vendor = {"cuda": ("gpu", "nvidia"), "rocm": ("gpu", "amd")}.get(platform, (platform, ""))
    if platform != "gpu":
        return Target(platform)
    capability = None
    for device in jax.local_devices():
        if device.platform == "gpu" and kind in ("", device.device_kind):
            kind = device.device_kind
            capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
            break
    if capability is not None:  # for AMD GPUs it is an architecture such as gfx942, which does not match
        return Target(platform, (int(capability[1]), int(capability[2])), "nvidia")
    if not vendor:
        vendor = "amd" if re.match(r"amd|gfx|radeon", kind, re.IGNORECASE) else "nvidia"
    return Target(platform, None, vendor)
