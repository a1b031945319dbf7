"""The table of GPUs."""

import dataclasses
import re

import pytest

from lomo_jax.plan import GPUS, find

ASKED_FOR = (
    *("rtx3090", "rtx4090", "rtx5090", "a6000", "a100-40", "a100-80", "l4", "l40s", "t4"),
    *("h100", "h200", "b200", "rtx3060", "rtx4080"),
)


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_gpu_is_described_to_xla(name):
    gpu = find(name)
    text = gpu.target_config()
    assert f'device_description_str: "{gpu.title}"' in text
    memory = re.search(r"device_memory_size: (\d+)", text)
    assert memory is not None
    assert int(memory[1]) == pytest.approx(gpu.memory_gib * 2**30)
    # What a core has of everything goes into its warps of 32 threads.
    assert gpu.threads % 32 == 0
    assert gpu.usable_gib < gpu.memory_gib


def test_no_two_gpus_are_the_same():
    assert len({dataclasses.astuple(gpu) for gpu in GPUS.values()}) == len(GPUS) == len(ASKED_FOR)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx309", "no GPU 'rtx309'; did you mean rtx3090"),
        ("a100", "no GPU 'a100'; did you mean a100-40 or a100-80?"),
        ("???", "no GPU '???'; known: t4, rtx3060, rtx3090,"),
    ],
)
def test_an_unknown_gpu_gets_one_line(name, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        find(name)
