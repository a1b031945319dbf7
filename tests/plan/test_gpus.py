"""The table of GPUs."""

import dataclasses
import re

import pytest

from lomo_jax.plan import GPUS, find, peak_flops

NAMES = (
    *("rtx3090", "rtx4090", "rtx5090", "a6000", "a100-40", "a100-80", "l4", "l40s", "t4"),
    *("h100", "h200", "b200", "rtx3060", "rtx4080"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_described_to_xla(name):
    gpu = find(name)
    text = gpu.target_config()
    assert f'device_description_str: "{gpu.device_kind}"' in text
    memory = re.search(r"device_memory_size: (\d+)", text)
    assert memory is not None
    assert int(memory[1]) == pytest.approx(gpu.memory_gib * 2**30)
    # A multiprocessor runs warps of 32 threads.
    assert gpu.threads % 32 == 0
    assert gpu.usable_gib < gpu.memory_gib


def test_no_two_gpus_are_the_same():
    assert len({dataclasses.astuple(gpu) for gpu in GPUS.values()}) == len(GPUS) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx309", "no GPU 'rtx309'; did you mean 'rtx3090'?"),
        ("a100", "no GPU 'a100'; did you mean 'a100-40' or 'a100-80'?"),
        ("h1000", "no GPU 'h1000'; did you mean 'h100'"),
        ("???", "no GPU '???'; known: t4, rtx3060, rtx3090,"),
    ],
)
def test_an_unknown_gpu_gets_one_line(name, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        find(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_is_found_by_the_name_of_its_driver(name):
    assert find(find(name).device_kind) is GPUS[name]


@pytest.mark.parametrize(
    ("device_kind", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("TPU v5 lite", 197.0),
        ("TPU v6 lite", 918.0),
    ],
)
def test_peaks_of_devices(device_kind, tflops):
    assert peak_flops(device_kind) == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_an_unknown_device_has_no_peak(device_kind):
    assert peak_flops(device_kind) is None
