"""Sums of bits, on one device, on several, and in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lomo_jax.training.checksums import checksums

SHAPES = [(), (6,), (4, 6), (3, 4, 6)]
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def _array(shape, dtype):
    numbers = np.random.default_rng(0).normal(size=shape) * 10
    return numbers.astype(jnp.dtype(dtype))


def _sum_of_bits(x: np.ndarray) -> int:
    words = np.frombuffer(x.tobytes(), f"uint{8 * x.dtype.itemsize}")
    return int(words.sum(dtype=np.uint64) % 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_bits(dtype):
    arrays = [_array(shape, dtype) for shape in SHAPES]
    expected = ([_sum_of_bits(x) for x in arrays], True)
    assert checksums([jnp.asarray(x) for x in arrays]) == expected
    host = [jax.device_put(x, jax.memory.Space.Host) for x in map(jnp.asarray, arrays)]
    assert checksums(host) == expected


@pytest.mark.parametrize("spec", [P(), P(None, "x"), P("x", None, None), P(None, "x", "y")])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_divided_arrays_have_the_sums_of_whole_ones(spec, kind):
    mesh = jax.make_mesh((2, 3), ("x", "y"), (kind, kind), devices=jax.devices()[:6])
    x = _array((4, 4, 6), "bfloat16")
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, NamedSharding(mesh, spec))
        assert checksums({"w": divided}) == ([_sum_of_bits(x)], True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(dtype, shape, value):
    x = np.zeros(shape, dtype)
    x[(-1,) * x.ndim] = value
    assert not checksums([jnp.asarray(x)]).finite
    assert checksums([jnp.full(shape, jnp.finfo(dtype).max, dtype)]).finite


def test_numbers_of_two_words():
    with jax.enable_x64(True):
        x = jnp.asarray([[1.5, -2e300], [3.0, 0.1]])
        assert checksums([x]).finite
        assert not checksums([x.at[1, 0].set(jnp.nan)]).finite
        assert checksums([x]).sums != checksums([x.at[0, 1].set(2e300)]).sums


def test_a_bit_that_flips_changes_its_sum():
    x = _array((3, 4, 6), "bfloat16")
    flipped = x.view(np.uint16).copy()
    flipped[1, 2, 3] ^= 4
    before, after = (checksums([jnp.asarray(a)]) for a in (x, flipped.view(x.dtype)))
    assert before.sums != after.sums


def test_on_a_cpu_a_checkpoint_is_summed_with_little_memory():
    """An export reads a model on a machine that may have room for it once."""
    from lomo_jax.training.checksums import _of_array

    x = jax.ShapeDtypeStruct((32, 1024, 1024), jnp.bfloat16)
    memory = _of_array.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * x.size * x.dtype.itemsize
