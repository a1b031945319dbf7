"""What a run says of memory when there is too little of it."""

import re

import jax
import jax.numpy as jnp
import pytest

from lomo_jax import Offload
from lomo_jax.errors import OutOfMemoryError
from lomo_jax.plan import MemoryPlan
from lomo_jax.training import Config
from lomo_jax.training.memory import MemoryGuard, advice


def _ask_for_too_much():
    # 4 PiB. Compiled, so that it is XLA that refuses.
    jax.jit(lambda: jnp.zeros((2**20, 2**30), jnp.float32))().block_until_ready()


def test_a_lack_of_memory_is_one_line_that_says_what_to_do():
    plan = MemoryPlan(12.0, 0.0, 1.0, 1.2, 0.0, 14.2, 12.0, 11.0, False, "GPU", 1)
    guard = MemoryGuard(Config())
    guard.planned(plan)
    with pytest.raises(OutOfMemoryError) as caught, guard:
        _ask_for_too_much()
    message = str(caught.value)
    assert message.startswith("the device is out of memory: the step needs 14.2 GiB")
    assert re.search(r"there was no room for [\d.]+ ?\w+", message)
    assert "--config.offload.activations=true" in message
    assert "\n" not in message


def test_before_the_plan_it_says_what_it_knows():
    with (
        pytest.raises(OutOfMemoryError, match=r"^the device is out of memory: [^\n]*; try "),
        MemoryGuard(Config()),
    ):
        _ask_for_too_much()


@pytest.mark.parametrize("error", [ValueError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, MemoryGuard(Config()):
        raise error
    assert caught.value is error


def test_the_advice_is_what_the_run_does_not_do_yet():
    config = Config(
        offload=Offload(params=True, activations=True), batch_size=1, sequence_length=64
    )
    assert advice(config).startswith("try a sequence_length below 64; ")
    assert advice(Config(fused=False)).startswith("try --config.fused=true, ")
    assert "--config.remat=full" in advice(Config(remat="none"))
    assert "more microbatches than 2, a batch_size below 8," in advice(Config(microbatches=2))
