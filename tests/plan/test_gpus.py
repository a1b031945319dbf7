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
    fields = {key: float(value) for key, value in re.findall(r"(\w+): ([\d.]+)", text)}
    assert fields["device_memory_size"] == pytest.approx(gpu.memory_gib * 2**30)
    assert fields["memory_bandwidth"] == gpu.bandwidth * 1e9
    assert fields["l2_cache_size"] == gpu.l2_mib * 2**20
    assert fields["core_count"] == gpu.cores
    major, minor = gpu.compute_capability
    assert f"cuda_compute_capability {{ major: {major} minor: {minor}" in text
    # CUDA reserves 1 KiB of shared memory per block.
    assert fields["shared_memory_per_core"] - fields["shared_memory_per_block_optin"] == 1024
    # A multiprocessor schedules warps of 32 threads.
    assert gpu.threads % 32 == 0


def test_the_accelerated_features_of_hopper_and_blackwell_are_on():
    accelerated = {name for name in NAMES if "ACCELERATED_FEATURES" in find(name).target_config()}
    assert accelerated == {"h100", "h200", "b200"}


def test_usable_memory():
    assert find("rtx3090").usable_gib == pytest.approx(22.08)


def test_all_gpus_differ():
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
def test_a_gpu_is_found_by_its_device_kind(name):
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
def test_peak_flops_of_devices(device_kind, tflops):
    assert peak_flops(device_kind) == tflops * 1e12


@pytest.mark.parametrize("device_kind", ["cpu", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_the_peak_of_an_unknown_device_is_none(device_kind):
    assert peak_flops(device_kind) is None
