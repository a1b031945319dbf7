"""Kernels in 8 and 4 bits beside those of bitsandbytes, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from lomo_jax import quantize

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.oracle

SHAPES = [(64, 64), (96, 192), (256, 256), (48, 1024)]


def weights(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.01, 0.1, (shape[0], 1))).astype(np.float32)


def test_the_codes():
    functional = bitsandbytes.functional
    nf4 = functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(quantize.NF4_CODE, nf4)
    dynamic = functional.create_dynamic_map().numpy()
    np.testing.assert_allclose(quantize.DYNAMIC_CODE, dynamic, rtol=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_with_double_quantisation(shape):
    w_OxI = weights(shape)
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.as_tensor(w_OxI), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = quantize.quantize("nf4", jnp.asarray(w_OxI))
    np.testing.assert_array_equal(np.asarray(ours.codes).ravel(), packed.numpy().ravel())
    # The mean of the scales is summed in another order: a value near a bound may differ.
    same = np.asarray(ours.absmax).ravel() == state.absmax.numpy()
    assert same.mean() > 0.99
    np.testing.assert_allclose(ours.absmax_offset, state.offset.item(), rtol=1e-6)
    np.testing.assert_allclose(ours.absmax_scale, state.state2.absmax.numpy(), rtol=1e-5)
    expected = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    found = np.asarray(quantize.dequantize(ours, jnp.float32))
    blocks = [x.reshape(-1, 64)[same] for x in (found, expected)]
    np.testing.assert_allclose(*blocks, rtol=1e-5, atol=1e-8)
    assert 0 < np.abs(found - w_OxI).max() < 0.2 * np.abs(w_OxI).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape):
    w_OxI = weights(shape)
    w_OxI = w_OxI.astype(np.float16).astype(np.float32)  # bitsandbytes takes float16 alone
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(
        torch.as_tensor(w_OxI, dtype=torch.float16)
    )
    ours = quantize.quantize("int8", jnp.asarray(w_OxI))
    np.testing.assert_array_equal(ours.codes, codes.numpy())
    np.testing.assert_array_equal(ours.absmax, absmax.float().numpy().ravel())
