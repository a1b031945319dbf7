import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import TIED as TIED_SMALL

from lomo_jax import models
from lomo_jax.models import layers, rope

CONFIG = models.DecoderConfig(
    vocab_size=61,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,  # not width / num_heads, nor a power of two
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
ROPE_SCALED = dataclasses.replace(
    CONFIG,
    rope_scaling=models.RopeScaling("llama3", factor=8.0, original_max_length=16),
)


@functools.cache
def build(config=CONFIG):
    """Returns a model with weights so large that every part affects the logits."""
    graphdef, params = models.abstract(config)
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.2, x.shape)), params)
    )


# Without LLVM's optimisations, which take most of the time of a small test.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def logits_of(model, *arguments):
    return model(*arguments)


def tokens_of(batch, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_shapes_and_dtypes(config, dtype):
    graphdef, params = models.abstract(config, dtype)

    def outputs(params, tokens_BxT):
        model = nnx.merge(graphdef, params)
        return model.hidden(tokens_BxT), model.head(), model(tokens_BxT)

    x_BxTxD, head_DxV, logits_BxTxV = jax.eval_shape(outputs, params, tokens_of(2, 7))
    assert (x_BxTxD.shape, x_BxTxD.dtype) == ((2, 7, 32), dtype)
    assert (head_DxV.shape, head_DxV.dtype) == ((32, 61), dtype)
    assert (logits_BxTxV.shape, logits_BxTxV.dtype) == ((2, 7, 61), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_low_precision_model_is_close_to_the_float32_one(dtype):
    rounded = jax.tree.map(lambda x: x.astype(dtype), build())
    logits = logits_of(build(), tokens_of(2, 7))
    error = logits_of(rounded, tokens_of(2, 7)) - logits
    relative = jnp.linalg.norm(error) / jnp.linalg.norm(logits)
    # The weights are rounded, and about a dozen results in each of three layers.
    assert 0 < relative < 6 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("config", [CONFIG, TIED, ROPE_SCALED])
def test_a_token_changes_only_its_own_and_later_logits(config):
    model = build(config)
    tokens_BxT = tokens_of(1, 9)
    before = logits_of(model, tokens_BxT)
    after = logits_of(model, tokens_BxT.at[0, 5].add(1))
    chex.assert_trees_all_equal(after[:, :5], before[:, :5])
    assert (jnp.abs(after - before)[0, 5:].max(axis=-1) > 1e-3).all()


def test_documents_in_a_packed_row_do_not_attend_to_each_other():
    model = build()
    one, two = tokens_of(1, 5, seed=1), tokens_of(1, 4, seed=2)
    padding = jnp.zeros((1, 2), jnp.int32)
    logits = logits_of(
        model,
        jnp.concatenate([one, two, padding], axis=1),
        jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]),
        jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]),
    )
    chex.assert_trees_all_close(logits[:, :5], logits_of(model, one), atol=1e-5)
    chex.assert_trees_all_close(logits[:, 5:9], logits_of(model, two), atol=1e-5)
    assert jnp.isfinite(logits).all()
    together = logits_of(model, jnp.concatenate([one, two], axis=1))
    assert jnp.abs(together[:, 5:] - logits_of(model, two)).max() > 1e-2


def test_only_relative_positions_matter():
    model = build()
    tokens_BxT = tokens_of(1, 8)
    positions_BxT = jnp.arange(8)[None]
    chex.assert_trees_all_equal(
        logits_of(model, tokens_BxT, positions_BxT), logits_of(model, tokens_BxT)
    )
    chex.assert_trees_all_close(
        logits_of(model, tokens_BxT, positions_BxT + 17), logits_of(model, tokens_BxT), atol=2e-5
    )
    assert (
        jnp.abs(
            logits_of(model, tokens_BxT, positions_BxT * 2) - logits_of(model, tokens_BxT)
        ).max()
        > 1e-2
    )


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    full = nnx.clone(build())
    for projection in (full.layers.attention.k, full.layers.attention.v):
        heads_LxDxKxh = projection.kernel[...].reshape(
            CONFIG.num_layers, CONFIG.width, CONFIG.num_kv_heads, CONFIG.head_dim
        )
        heads_LxDxHxh = jnp.repeat(heads_LxDxKxh, 2, axis=2)
        projection.kernel.set_value(heads_LxDxHxh.reshape(CONFIG.num_layers, CONFIG.width, -1))
    chex.assert_trees_all_close(
        logits_of(full, tokens_of(2, 6)), logits_of(build(), tokens_of(2, 6)), atol=1e-5
    )


def test_tied_embeddings_are_one_parameter():
    model = build(TIED)
    assert "output" not in nnx.state(model)
    chex.assert_trees_all_equal(model.head(), model.embedding[...].T)


def test_stacked_parameters_are_scanned_unchanged():
    graphdef, params = models.abstract(CONFIG)
    jaxpr = jax.make_jaxpr(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens_of(1, 4)).jaxpr
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    slices = dict(zip(scan.invars, scan.params["jaxpr"].in_avals, strict=True))
    stacks = [v for v in jaxpr.invars if v.aval.ndim and v.aval.shape[0] == CONFIG.num_layers]
    assert len(stacks) == len(jax.tree.leaves(params["layers"])) == 9
    for stack in stacks:
        assert slices[stack].shape == stack.aval.shape[1:]


def test_plain_gradients_store_one_input_per_layer():
    def residual_bytes(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graphdef, params = models.abstract(config)

        def residuals(params):
            model = nnx.merge(graphdef, params)
            return jax.vjp(lambda m: m.hidden(tokens_of(2, 16)), model)[1]

        return bytes_of(jax.eval_shape(residuals, params)) - bytes_of(params)

    def bytes_of(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    layer_input_bytes = 2 * 16 * CONFIG.width * 4
    assert residual_bytes(6) - residual_bytes(2) == 4 * layer_input_bytes


def test_init_matches_abstract_and_depends_on_the_seed():
    abstract_graphdef, abstract_params = models.abstract(TIED_SMALL, jnp.bfloat16)
    graphdef, params = models.init(TIED_SMALL, 0, jnp.bfloat16)
    assert graphdef == abstract_graphdef
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params)
    chex.assert_trees_all_equal(params, models.init(TIED_SMALL, 0, jnp.bfloat16)[1])

    def up(seed):
        kernel = nnx.merge(*models.init(TIED_SMALL, seed, jnp.bfloat16)).layers.mlp.up.kernel
        return np.asarray(kernel[...], np.float32)

    assert np.std(up(0)) == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(up(0)[:, 0, 0])) == TIED_SMALL.num_layers
    assert (up(1) != up(0)).mean() > 0.9


def test_rotary_frequencies():
    config = dataclasses.replace(CONFIG, head_dim=8, rope_theta=10_000.0)
    frequencies, _ = rope.frequencies(config, 16)
    np.testing.assert_allclose(frequencies, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequencies.dtype == np.float32


def test_scaled_rotary_frequencies():
    """Divides frequencies below 1 turn in 400 tokens by the factor; leaves those above 4 turns."""
    scaling = models.RopeScaling("llama3", factor=8.0, original_max_length=400)
    config = dataclasses.replace(CONFIG, head_dim=8, rope_theta=160_000.0, rope_scaling=scaling)
    # Unscaled 1, 0.05, 0.0025 and 0.000125 radians per token: 64, 3.18, 0.16 and 0.008 turns.
    share = (400 * 0.05 / (2 * np.pi) - 1) / 3
    between = share * 0.05 + (1 - share) * 0.05 / 8
    np.testing.assert_allclose(
        rope.frequencies(config, 16)[0], [1.0, between, 0.0025 / 8, 0.000125 / 8], rtol=1e-6
    )


def test_rms_norm_near_its_epsilon():
    """The epsilon is added to the mean square, and matters when both are of similar size."""
    config = dataclasses.replace(CONFIG, norm_eps=1e-4)
    norm = layers.Norm(4, config, param_dtype=jnp.float32)
    norm.scale.set_value(jnp.array([1.0, 2.0, 3.0, 4.0]))
    x_BxTxD = np.array([[[0.01, -0.01, 0.02, 0.0]]], np.float32)
    mean_square = (1 + 1 + 4) * 1e-4 / 4
    expected = x_BxTxD / np.sqrt(mean_square + 1e-4) * [1, 2, 3, 4]
    np.testing.assert_allclose(norm(jnp.asarray(x_BxTxD)), expected, rtol=1e-5)
