"""Unmodified models from other packages: the fused step against the reference step."""

import dataclasses
import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lomo_jax
from lomo_jax.fused import arrays
from lomo_jax.fused.trace import LayerScan, trace

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

STEPS, B, T, LAYERS = 3, 2, 10, 3
RNG = np.random.default_rng(0)


def assert_layers_are_cut(loss_fn, params, batch, stack):
    """Asserts that the trace finds one layer scan, over exactly the parameters in `stack`."""
    stack = jax.tree.leaves(stack)
    trainable = arrays.trainable_flags(params, None)
    scans = [
        (segment.scan.length, len(segment.stacked))
        for segment in trace(loss_fn, params, batch, trainable=trainable).program.segments
        if isinstance(segment, LayerScan)
    ]
    assert {parameter.shape[0] for parameter in stack} == {LAYERS}
    assert scans == [(LAYERS, len(stack))]


def cross_entropy(logits_BxTxV, targets_BxT):
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, targets_BxT).mean()


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(0.0, scale, shape), jnp.float32)


def progressions(vocabulary):
    """Returns batches of arithmetic progressions of tokens, [STEPS, B, T]."""
    start, stride = RNG.integers(0, vocabulary, (STEPS, B, 1)), RNG.integers(1, 4, (STEPS, B, 1))
    return jnp.asarray((start + stride * np.arange(T)) % vocabulary)


def importer(*packages):
    """Returns an import function that skips the test if the packages are missing."""
    install = " ".join(["pip install --no-deps jaxtyping==0.3.11 wadler-lindig==0.1.8", *packages])
    return functools.partial(pytest.importorskip, reason=f"needs others' models: {install}")


@pytest.fixture
def gemma_vision(monkeypatch):
    """Gemma's vision encoder. The package imports TensorFlow for one type annotation."""
    load = importer(
        "--ignore-requires-python gemma==4.0.1 kauldron==1.4.2 clu==0.0.12 einops==0.8.2",
        "immutabledict==4.3.1 lark==1.3.1 typeguard==4.6.0",
    )
    with monkeypatch.context() as patch:
        if importlib.util.find_spec("tensorflow") is None:
            tensorflow = types.ModuleType("tensorflow")
            tensorflow.Tensor = type("Tensor", (), {})
            patch.setitem(sys.modules, "tensorflow", tensorflow)
        load("kauldron.modules")
        return load("gemma.gm.nn.gemma4.vision._encoder")


def test_gemma_in_linen(gemma_vision, standard_promotion, assert_steps_agree):
    """Package gemma 4.0.1: the vision encoder of Gemma 4, Flax linen, its layers in `nn.scan`."""
    width, patch, side = 16, 2, 4
    model = gemma_vision.VisionEncoder(
        d_model=width,
        num_layers=LAYERS,
        num_heads=2,
        ffw_hidden=32,
        patch_size=patch,
        output_length=side,
        pos_emb_shape_yx=(2 * side, 2),
        standardize_embeddings=True,
    )
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(side**2, 2)
    positions = jnp.asarray(np.tile(grid, (B, 1, 1)))
    pixels = (STEPS, B, side**2, patch * patch * 3)
    images = jnp.asarray(RNG.uniform(size=pixels), jnp.float32)
    batches = list(zip(images, normal(STEPS, B, side, width), strict=True))
    # Without the model's initializers, which take seconds to compile.
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[0], positions)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, scale=0.2), shapes["params"])

    def loss_fn(params, batch):
        patches, targets = batch
        ((embeddings, _),) = model.apply({"params": params}, patches, positions)
        return jnp.mean((embeddings - targets) ** 2)

    stack = params["transformer"]["stacked_layers"]
    assert_layers_are_cut(loss_fn, params, batches[0], stack)
    assert_steps_agree(loss_fn, lomo_jax.adalomo(1e-2), params, batches)


@pytest.fixture
def timesfm_model(monkeypatch):
    """TimesFM 2.5, small. Its modules build the model of 200M parameters on import."""
    load = importer("timesfm==3.0.2 einshape==1.0")
    with monkeypatch.context() as patch:
        for later in ("timesfm_2p5_flax", "timesfm_2p5_torch"):
            patch.setitem(sys.modules, f"timesfm.timesfm_2p5.{later}", None)
        base, configs = load("timesfm.timesfm_2p5.timesfm_2p5_base"), load("timesfm.configs")
    full = base.TimesFM_2p5_200M_Definition()
    width = 16

    def block(inputs, outputs, use_bias):
        return configs.ResidualBlockConfig(inputs, width, outputs, use_bias, "swish")

    layer = dataclasses.replace(
        full.stacked_transformers.transformer, model_dims=width, hidden_dims=width, num_heads=2
    )
    small = dataclasses.replace(
        full,
        input_patch_len=4,
        output_patch_len=8,
        output_quantile_len=16,
        tokenizer=block(2 * 4, width, True),
        stacked_transformers=configs.StackedTransformersConfig(LAYERS, layer),
        output_projection_point=block(width, 8 * 10, False),
        output_projection_quantiles=block(width, 16 * 10, False),
    )
    monkeypatch.setattr(base, "TimesFM_2p5_200M_Definition", lambda: small)
    return load("timesfm.timesfm_2p5.timesfm_2p5_flax").TimesFM_2p5_200M_flax.model


def test_timesfm_in_nnx(timesfm_model, standard_promotion, assert_steps_agree):
    """Package timesfm 3.0.2: TimesFM 2.5, Flax nnx, its layers in `nnx.scan`.

    The loss uses the package's forecast. It is jitted, and scans over time for the statistics of
    the past before it scans over layers.
    """
    graphdef, params = nnx.split(timesfm_model, nnx.Param)
    past, horizon = 24, 8
    series = jnp.cumsum(normal(STEPS, B, past + 2 * horizon), axis=-1)
    batches = list(zip(series[..., :past], series[..., past:], strict=True))

    def loss_fn(params, batch):
        seen, future = batch
        model = nnx.merge(graphdef, params)
        points, spread, _ = model.decode(horizon, seen, jnp.zeros(seen.shape, bool))
        point_loss = jnp.mean((points[:, -1] - future[:, :horizon, None]) ** 2)
        return point_loss + jnp.mean((spread - future[..., None]) ** 2)

    assert_layers_are_cut(loss_fn, params, batches[0], params["stacked_xf"])
    assert_steps_agree(loss_fn, optax.adamw(1e-2), params, batches)


def test_esm2_in_equinox(assert_steps_agree):
    """Package esm2quinox 0.2.0: ESM2, Equinox, `lax.scan` over layers of `eqx.filter_vmap`."""
    load = importer("esm2quinox==0.2.0 equinox==0.13.8")
    esm2quinox, eqx = load("esm2quinox"), load("equinox")
    model = esm2quinox.ESM2(LAYERS, 16, 2, token_dropout=True, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    proteins = ["SPIDERMAN", "SPYDERM", "MASKED", "LATERAL", "HELIX", "SHEET"]
    targets = esm2quinox.tokenise(proteins, key=None).reshape(STEPS, B, -1)
    mask = esm2quinox.tokenise(["#"], key=None)[0, 1]
    masked = np.where(np.arange(targets.shape[-1]) % 4 == 2, mask, targets)
    batches = list(zip(jnp.asarray(masked), jnp.asarray(targets), strict=True))

    def loss_fn(params, batch):
        tokens, targets = batch
        return cross_entropy(jax.vmap(eqx.combine(params, static))(tokens).logits, targets)

    assert_layers_are_cut(loss_fn, params, batches[0], params.layers)
    # The gradient of a key's bias is zero: an adaptive rule would amplify its rounding errors.
    assert_steps_agree(loss_fn, lomo_jax.lomo(0.1), params, batches)


def test_flow_in_equinox(standard_promotion, assert_steps_agree):
    """Package flowjax 19.1.2: a coupling flow, Equinox; its `Scan` runs in reverse."""
    load = importer("flowjax==19.1.2 paramax==0.0.5 lineax==0.1.1 equinox==0.13.8")
    flows, paramax, eqx = load("flowjax.flows"), load("paramax"), load("equinox")
    flow = flows.coupling_flow(
        jax.random.key(0),
        base_dist=load("flowjax.distributions").Normal(jnp.zeros(4)),
        flow_layers=LAYERS,
        nn_width=16,
        invert=False,
    )
    is_constant = lambda leaf: isinstance(leaf, paramax.NonTrainable)  # noqa: E731
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_constant)

    def loss_fn(params, batch):
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(batch).mean()

    batches = list(normal(STEPS, 8, 4))
    assert_layers_are_cut(loss_fn, params, batches[0], params.bijection)
    assert_steps_agree(loss_fn, lomo_jax.adalomo(1e-2), params, batches)


def test_gemma_in_penzai(standard_promotion, assert_steps_agree):
    """Package penzai 0.2.5: Gemma with named axes, its `LayerStack` an unrolled `lax.scan`.

    Embedding and head are tied; parameters are labelled variables.
    """
    load = importer("penzai==0.2.5 ordered-set==4.1.0")
    pz = load("penzai.pz")
    llamalike = load("penzai.models.transformer.variants.llamalike_common")
    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=4,
        mlp_hidden_dim=32,
        num_decoder_blocks=LAYERS,
        vocab_size=23,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attn_logits_soft_cap=50.0,
        final_logit_softcap=30.0,
        use_layer_stack=True,
    )
    model = llamalike.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    unbound, params = pz.unbind_variables(model, freeze=True)

    def loss_fn(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = pz.bind_variables(unbound, params)(
            pz.nx.wrap(inputs).tag("batch", "seq"),
            token_positions=pz.nx.arange("seq", inputs.shape[1]),
        )
        return cross_entropy(logits.unwrap("batch", "seq", "vocabulary"), targets)

    batches = list(progressions(config.vocab_size))
    stack = [variable for variable in params if "blocks" in variable.value.named_shape]
    assert_layers_are_cut(loss_fn, params, batches[0], stack)
    assert_steps_agree(loss_fn, lomo_jax.adalomo(1e-2), params, batches)
