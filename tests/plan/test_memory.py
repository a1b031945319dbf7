"""What is read from a compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lomo_jax
from lomo_jax.plan import buffers, read_memory

L, B, D = 6, 32, 64


def loss(params, batch):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jnp.mean(jax.lax.scan(layer, batch, params["w"])[0] ** 2)


@pytest.fixture(scope="module")
def compiled():
    """A compiled step, its parameters and its state."""
    step = lomo_jax.fused_step(loss, lomo_jax.adalomo(1e-3))
    params = {"w": jax.ShapeDtypeStruct((L, D, D), jnp.float32)}
    batch = jax.ShapeDtypeStruct((B, D), jnp.float32)
    state = jax.eval_shape(step.init, params, batch)
    return (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile(),
        params,
        state,
    )


@pytest.mark.parametrize(("usable_gib", "fits"), [(None, None), (1.0, True), (1e-6, False)])
def test_the_parts_add_up(compiled, usable_gib, fits):
    inputs = L * B * D * 4
    plan = read_memory(
        *compiled, gpu="x", layer_inputs=inputs, device_gib=2.0, usable_gib=usable_gib
    )
    assert plan.weights_gib * 2**30 == L * D * D * 4
    assert plan.state_gib * 2**30 == L * (2 * D + 1) * 4  # row, column and count
    assert plan.layer_inputs_gib * 2**30 == inputs
    assert plan.host_gib == 0
    parts = plan.weights_gib + plan.state_gib + plan.layer_inputs_gib + plan.temporaries_gib
    assert parts == pytest.approx(plan.total_gib)
    stats = compiled[0].memory_analysis()
    assert plan.total_gib * 2**30 >= stats.argument_size_in_bytes + stats.temp_size_in_bytes
    assert (plan.fits, plan.device_gib) == (fits, 2.0)


def test_a_cpu_has_one_memory(compiled):
    offload = lomo_jax.Offload(params=True, activations=True, state=True)
    assert read_memory(*compiled, gpu="x", offload=offload) == read_memory(*compiled, gpu="x")


def test_arguments_are_named_by_their_paths():
    tree = {"a": {"b": np.zeros((2, 3), np.float16)}}
    assert buffers.arguments(tree, on_host=True) == [
        buffers.Buffer("a/b", "float16[2,3]", 12, on_host=True)
    ]


def test_temporaries_are_named_by_operation_and_the_layer_inputs_are_found():
    text = """\
%fused (p: bf16[4,4]) -> bf16[9,9] {
  ROOT %inside = bf16[9,9]{1,0} add(%p, %p), metadata={op_name="jit(f)/inside"}
}

ENTRY %main (p: bf16[4,4]) -> (bf16[4,4]) {
  %p = bf16[4,4]{1,0} parameter(0)
  %a = bf16[9,9]{1,0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/mul"}
  %b = (f32[7]{0}, pred[]) custom-call(%p), metadata={op_name="jit(f)/dot_general"}
  %c = f32[7]{0} get-tuple-element(%b), index=0
  %d = bf16[2,3,5,7]{3,2,1,0:S(5)} broadcast(%p), dimensions={}
  %e = bf16[4,4]{1,0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %f = bf16[4,4]{1,0} copy(%p)
}
"""

    class Executable:
        def as_text(self):
            return text

    arguments = [jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)]
    assert buffers.temporaries(Executable(), arguments, 2 * 3 * 5 * 7 * 2) == [  # pyright: ignore
        buffers.Buffer("mul", "bfloat16[9,9]", 162, on_host=False),
        buffers.Buffer("dot_general", "float32[7]", 28, on_host=False),
        buffers.Buffer("dot_general", "bool[]", 1, on_host=False),
        buffers.Buffer("layer inputs", "bfloat16[2,3,5,7]", 420, on_host=True),
        buffers.Buffer("copy", "bfloat16[4,4]", 32, on_host=False),
    ]
