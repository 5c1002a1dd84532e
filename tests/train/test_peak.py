"""The table of peaks: every device once, found as JAX and as people name it."""

import pytest

from model.errors import InputError
from train.peak import PEAKS, device_named, known_peak


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v4", 275),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_what_jax_calls_a_device_finds_its_peak(kind, tera):
    assert known_peak(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "TPU v50"])
def test_a_device_that_only_begins_alike_is_not_taken_for_it(kind):
    assert known_peak(kind) is None


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "h100"),
        ("H100 SXM", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("RTX 4090", "rtx-4090"),
        ("v5e", "tpu-v5e"),
        ("TPU v5p", "tpu-v5p"),
        ("MI300X", "mi300x"),
        ("B200", "b200"),
        ("l40s", "l40s"),
    ],
)
def test_people_write_devices_in_many_ways(written, name):
    assert device_named(written) == name


def test_an_unknown_device_is_told_all_that_are_known():
    with pytest.raises(InputError) as caught:
        device_named("H900")
    assert all(name in str(caught.value) for name in PEAKS)
