"""Memory of losses as people write them: one layer's gradient, and no copy of a stack.

As XLA plans it for a CPU, and for a GPU that is not present. Of what a loss computes from the batch
alone, a mask for example, all layers may exist.
"""

import re

import jax
import pytest
from helpers import before_release, quick_jit
from idioms import IDIOMS, Sizes, layer_axes

import lomo_jax
from lomo_jax.fused import arrays
from lomo_jax.plan import gpus, make_mesh

SMALL = Sizes(L=4, B=2, T=16, D=128, F=384)
LARGE = SMALL._replace(L=12)
LAYER = 2 * 4 * SMALL.D * SMALL.F  # bytes
LAYER_INPUT = 4 * SMALL.B * SMALL.T * SMALL.D

# Those whose stacks are not [L, D, F] and [L, F, D] are left out, and those with other stacks that
# the loss itself makes.
KINDS = {
    "cast_to_bfloat16": 1,  # inputs saved of a layer, of each scan
    "cast_and_mask_and_transpose": 1,
    "constant_mask": 1,
    "mask_of_the_batch": 1,
    "magnitude_pruning": 1,
    "weight_normalisation": 1,
    "straight_through": 1,
    "cast_in_a_checkpoint": 1,
    "map_over_layers_first": 1,
    "lora_merged": 1,
    "one_leaf_stopped": 1,
    "axis_1": 1,
    "last_axis": 1,
    "axis_1_cast": 1,
    "axis_1_indexed": 1,
    "linen_axis_1_boxed": 1,
    "fori_loop": 1,
    "fori_loop_with_take": 1,
    "fori_loop_of_a_cast_stack": 1,
    "scan_over_arange": 1,
    "two_ranges": 1,
    "three_ranges": 1,
    "two_calls": 2,
    "two_calls_of_a_cast_stack": 2,
    "target_of_the_same_weights": 1,
    "penalty": 1,
    "penalty_and_norm": 1,
    "distance_from_the_start": 1,
    "groups": 1,
    "groups_of_a_cast_stack": 1,
}
QUICK = (
    "cast_to_bfloat16",
    "constant_mask",
    "lora_merged",
    "axis_1_cast",
    "fori_loop",
    "two_ranges",
    "two_calls",
    "penalty_and_norm",
)


def compiled(make_step, name, sizes, sharding=None):
    loss, params, batch = IDIOMS[name].make(sizes)
    step = make_step(loss, lomo_jax.adalomo(1e-2), **IDIOMS[name].options)
    params, batch = jax.eval_shape(lambda *x: x, params, batch)
    state = jax.eval_shape(step.init, params, batch)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, state, batch)
    )
    return quick_jit(step, donate_argnums=(0, 1)).lower(*arguments).compile(), params


def temporaries(executable):
    return executable.memory_analysis().temp_size_in_bytes


def copies_of_stacks(executable, params, axes):
    """Returns the instructions that copy, transpose or convert a whole stack of matrices."""
    shapes = {
        ",".join(map(str, shape))
        for name, leaf in zip(arrays.names(params), jax.tree.leaves(params), strict=True)
        if leaf.ndim == 3
        for axis in layer_axes(axes, name)
        for shape in {leaf.shape, (leaf.shape[axis], *leaf.shape[:axis], *leaf.shape[axis + 1 :])}
    }
    found = rf"= \w+\[({'|'.join(shapes)})\]\S* (copy|copy-start|transpose|convert)\("
    return [line for line in executable.as_text().splitlines() if re.search(found, line)]


@pytest.mark.parametrize("name", [n if n in QUICK else before_release(n) for n in KINDS])
def test_temporaries_grow_with_depth_by_the_layer_inputs_only(name):
    temps = []
    for sizes in (SMALL, LARGE):
        executable, params = compiled(lomo_jax.fused_step, name, sizes)
        assert copies_of_stacks(executable, params, IDIOMS[name].axes) == []
        memory = executable.memory_analysis()
        trained = sum(
            leaf.size * leaf.dtype.itemsize
            for n, leaf in zip(arrays.names(params), jax.tree.leaves(params), strict=True)
            if "trainable" not in IDIOMS[name].options or IDIOMS[name].options["trainable"](n)
        )
        assert memory.alias_size_in_bytes > 0.99 * trained  # updated in place
        temps.append(temporaries(executable))
    few, many = temps
    inputs = KINDS[name] * LAYER_INPUT
    growth = (many - few) / (LARGE.L - SMALL.L)
    assert growth < 1.05 * inputs + 0.02 * LAYER
    assert few < SMALL.L * 1.5 * inputs + 8 * LAYER


@pytest.mark.plan
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive if i % 2 else ()) for i, n in enumerate(QUICK)],
)
def test_a_gpu_holds_one_layer_too(name, standard_promotion):
    pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `cuda`")
    device = make_mesh(gpus.find("rtx3090")).devices.item()
    sharding = jax.sharding.SingleDeviceSharding(device)
    small = Sizes(L=4, B=2, T=256, D=512, F=1536)
    inputs, layer = KINDS[name] * 4 * small.B * small.T * small.D, 2 * 4 * small.D * small.F
    temps = []
    for sizes in (small, small._replace(L=12)):
        executable, params = compiled(lomo_jax.fused_step, name, sizes, sharding)
        assert copies_of_stacks(executable, params, IDIOMS[name].axes) == []
        temps.append(temporaries(executable))
    few, many = temps
    # XLA packs buffers into one heap, and how well depends on their sizes.
    assert (many - few) / 8 < 1.2 * inputs
    # A gradient for each call of the layers.
    assert few < small.L * inputs + (2.5 + KINDS[name]) * layer


@pytest.mark.parametrize("name", ["axis_1_cast", "penalty_and_norm"])
def test_the_reference_grows_with_the_parameters(name):
    few, many = (
        temporaries(compiled(lomo_jax.reference_step, name, sizes)[0]) for sizes in (SMALL, LARGE)
    )
    assert many - few > (LARGE.L - SMALL.L) * LAYER
