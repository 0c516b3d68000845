"""Peak rates of devices."""

import types

import pytest

from kdjax.runtime import chips


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce 123", None),
    ],
)
def test_peak_of_named_devices(kind, peak):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert chips.peak_flops(device, "bfloat16") == peak


def test_measured_rate_of_a_cpu():
    assert 1e8 < chips.measure_cpu_flops(size=256) < 1e15
