"""Kernels in 8 and 4 bits: their values, and models that have them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import before_release, llama_loss, normal, quick_jit, tiny_llama

import lomo_jax
from lomo_jax import lora, models, quantize, sharding
from lomo_jax.errors import UserError
from lomo_jax.fused import arrays

TOKENS_BxT = np.random.default_rng(0).integers(0, 48, (8, 12), dtype=np.int32)
SHAPE = tiny_llama(width=64, mlp_width=128, num_layers=2, head_dim=16)


def test_int8_by_hand():
    w_OxI = jnp.array([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 1.99, 0.01]])
    matrix = quantize.quantize("int8", w_OxI)
    assert matrix.absmax.tolist() == [1.0, 0.0, 2.0]
    # 127 / 2 = 63.5 rounds to the even 64; 126.365 and 0.635 to the nearest.
    assert matrix.codes.tolist() == [[127, -64, 32, 0], [0, 0, 0, 0], [-127, 64, 126, 1]]
    found = quantize.dequantize(matrix, jnp.float32)
    chex.assert_trees_all_close(found, np.array(matrix.codes) * [[1 / 127], [0], [2 / 127]])


def test_nf4_by_hand():
    """One block whose weights are the code book itself, times its largest magnitude."""
    w_1x64 = jnp.tile(jnp.asarray(quantize.NF4_CODE), 4)[None] * 3
    matrix = quantize.quantize("nf4", w_1x64)
    assert matrix.codes.dtype == jnp.uint8
    # The first of two weights is in the high bits: 0x01, 0x23, ...
    assert matrix.codes.tolist() == [4 * [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]]
    # The only scale is the mean of the scales: what is left is zero.
    assert (matrix.absmax_offset, matrix.absmax_scale.tolist()) == (3.0, [0.0])
    chex.assert_trees_all_equal(quantize.dequantize(matrix, jnp.float32), w_1x64)


def test_the_scales_of_nf4_by_hand():
    """Scales 1, 2, 3 and 6, less their mean 3, are -2, -1, 0 and 3: -2/3, -1/3, 0 and 1 of 3."""
    w_4x64 = jnp.array([1.0, 2.0, 3.0, 6.0])[:, None] * jnp.tile(jnp.asarray(quantize.NF4_CODE), 4)
    matrix = quantize.quantize("nf4", w_4x64)
    assert (matrix.absmax_offset, matrix.absmax_scale.tolist()) == (3.0, [3.0])
    # The largest decade, 0.1 to 1, has 64 values in the middle of steps of 0.9 / 64.
    middle = [0.1 + 0.9 / 64 * (np.floor((x - 0.1) / (0.9 / 64)) + 0.5) for x in (2 / 3, 1 / 3)]
    expected = np.array([3 - 3 * middle[0], 3 - 3 * middle[1], 3, 6])
    found = quantize.dequantize(matrix, jnp.float32)
    chex.assert_trees_all_close(found[:, -1], expected.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.2)])
def test_size_and_error(kind, bits):
    w_OxI = normal(0, 256, 512)
    matrix = quantize.quantize(kind, w_OxI)
    stored = sum(x.nbytes for x in matrix.named().values())
    assert stored <= w_OxI.size * bits / 8
    error = quantize.dequantize(matrix, jnp.float32) - w_OxI
    relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(w_OxI))
    # A uniform code of 255 steps over 6 sigma, and QLoRA's figure for four bits.
    assert relative < {"int8": 0.01, "nf4": 0.1}[kind]


def quantized_model(kind, dtype=jnp.float32, seed=0):
    model = models.Decoder(SHAPE, param_dtype=dtype, rngs=nnx.Rngs(seed))
    quantize.quantize_kernels(model, kind)
    return model


@pytest.mark.parametrize("kind", [before_release("int8"), "nf4"])
def test_a_model_computes_with_the_dequantised_kernels(kind):
    model = quantized_model(kind)
    plain = models.Decoder(SHAPE, rngs=nnx.Rngs(0))
    for block, names in {"attention": "qkvo", "mlp": ("gate", "up", "down")}.items():
        for name in names:
            linear = getattr(getattr(plain.layers, block), name)
            w_LxOxI = jnp.swapaxes(linear.kernel[...], 1, 2)
            rounded = [
                quantize.dequantize(quantize.quantize(kind, w_OxI), jnp.float32).T
                for w_OxI in w_LxOxI
            ]
            linear.kernel[...] = jnp.stack(rounded)
    chex.assert_trees_all_close(model(TOKENS_BxT), plain(TOKENS_BxT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "offload"),
    [
        ("nf4", True),
        *[before_release("nf4", False), before_release("int8", True)],
        before_release("int8", False),
    ],
)
def test_fused_equals_reference(kind, offload, assert_steps_agree, standard_promotion):
    model = quantized_model(kind)
    lora.add(model, lora.LoRA(2, 16, ("q", "down")), rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    last, _ = assert_steps_agree(
        llama_loss(graphdef),
        optax.adamw(1e-2),
        params,
        [jnp.asarray(TOKENS_BxT)] * 2,
        has_aux=True,
        trainable=lora.is_adapter,
        offload=lomo_jax.Offload(params=offload, activations=offload),
        tolerance=5e-4,  # Adam: a sign of a tiny gradient
    )
    chex.assert_trees_all_equal(lora.split(last[0])[1], lora.split(params)[1])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nf4", jnp.bfloat16),
        *[before_release("int8", jnp.bfloat16), before_release("nf4", jnp.float32)],
        before_release("int8", jnp.float32),
    ],
)
def test_loading_a_checkpoint_quantises_it_tensor_by_tensor(kind, dtype, tmp_path):
    graphdef, params = models.init(SHAPE, 0)
    models.save(tmp_path / "model", graphdef, params)
    quantized, loaded = models.load(tmp_path / "model", dtype, quantized=kind)
    model = nnx.merge(graphdef, params)
    quantize.quantize_kernels(model, kind)
    expected = nnx.state(model)
    assert arrays.names(loaded) == arrays.names(expected)
    for name, found, wanted in zip(
        arrays.names(loaded), jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True
    ):
        if "/codes" in name or "/absmax" in name:
            # Compiled, the mean of the scales may be rounded in another way.
            chex.assert_trees_all_close(found, wanted, rtol=1e-6)
        else:
            assert found.dtype == dtype
    logits = nnx.merge(quantized, loaded)(TOKENS_BxT)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    chex.assert_trees_all_close(logits, model(TOKENS_BxT), rtol=tolerance, atol=tolerance)
    drawn = models.init_layer_by_layer(SHAPE, 0, dtype, quantized=kind)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, loaded)
    with pytest.raises(UserError, match="a quantised model cannot be saved"):
        models.save(tmp_path / "other", quantized, loaded)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("nf4", (2, 2, 2)),
        *(before_release("nf4", (1, 8, 1)), before_release("int8", (1, 8, 1))),
        before_release("int8", (2, 2, 2)),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(kind, sizes, tmp_path):
    models.save(tmp_path / "model", *models.init(SHAPE, 0))
    graphdef, params = models.load(tmp_path / "model", quantized=kind)
    expected = nnx.merge(graphdef, params)(TOKENS_BxT)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        _, sharded = models.load(tmp_path / "model", mesh=mesh, quantized=kind)
        codes = sharded["layers"]["mlp"]["up"]["kernel"]["codes"][...]
        assert codes.addressable_shards[0].data.shape[1] == 128 // (sizes[1] * sizes[2])
        found = quick_jit(lambda params: nnx.merge(graphdef, params)(TOKENS_BxT))(sharded)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_kernel_is_dequantised_whole(standard_promotion):
    """The program has the kernel of one layer, and none of all layers."""
    model = quantized_model("nf4", jnp.bfloat16)
    lora.add(model, lora.LoRA(2, 16), rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    step = lomo_jax.fused_step(
        llama_loss(graphdef), optax.sgd(0.1), has_aux=True, trainable=lora.is_adapter
    )
    state = step.init(params, TOKENS_BxT)
    text = quick_jit(step).lower(params, state, TOKENS_BxT).compile().as_text()
    for dtype in ("f32", "bf16"):
        assert f"{dtype}[2,64,128]" not in text
        assert f"{dtype}[2,128,64]" not in text


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"^layers/attention/k has 32 inputs, not a multiple of 64"):
        quantize.quantize_kernels(models.Decoder(tiny_llama(), rngs=nnx.Rngs(0)), "nf4")
    model = quantized_model("int8")
    lora.add(model, lora.LoRA(2, 16), rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="quantised: merge the adapters into the original model"):
        lora.merge(*nnx.split(model))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="quantisation 'int4' is not one of none, int8, nf4"):
        models.abstract(tiny_llama(), quantized="int4")
