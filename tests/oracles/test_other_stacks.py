"""Stacks of layers as other libraries make them, unmodified: results and memory of both steps."""

import functools
import importlib.machinery
import sys
import types
import unittest.mock
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen import partitioning
from helpers import normal, quick_jit

import lomo_jax
from lomo_jax.fused import arrays
from lomo_jax.fused.trace import trace

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    # Of JAX and Flax, for code that was written for earlier versions.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, B, T, V = 3, 2, 8, 32


class Case(NamedTuple):
    """A loss of another project."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any  # arrays [B, ...]; later batches have the same rows in another order
    stack: Any  # the part of `params` that is layers
    tx: optax.GradientTransformation = optax.adamw(1e-2, eps=1e-3)


CASES: dict[str, Callable[[int, int], Case]] = {}


def case(make):
    """Registers a function (number of layers, width) -> Case."""
    CASES[make.__name__] = make
    return make


def load(
    install: str, *modules: str, without: Mapping[str, Any] = types.MappingProxyType({})
) -> list[Any]:
    """Imports modules of another project, or skips the test.

    Args:
      install: the packages to install, for the reason of the skip.
      modules: their names.
      without: what to import instead of packages that the modules import and do not use here.
    """
    missing = {name: stub for name, stub in without.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        with warnings.catch_warnings(action="ignore"):
            reason = f"needs others' models: pip install --no-deps {install}"
            return [pytest.importorskip(module, reason=reason) for module in modules]
    finally:
        for name in missing:
            del sys.modules[name]


def stub(name):
    spec = importlib.machinery.ModuleSpec(name, None)
    return name, unittest.mock.MagicMock(__path__=[], __spec__=spec)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, T)), jnp.int32)


def random(shapes, scale=0.2):
    """Returns random arrays: initializers of other projects take seconds to compile."""
    leaves, treedef = jax.tree.flatten(shapes)
    arrays = [normal(i, *x.shape, scale=scale) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, arrays)


def next_token_loss(logits_BxTxV, tokens_BxT):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_BxTxV[:, :-1], tokens_BxT[:, 1:]
    )
    return losses.mean()


@case
def maxtext(layers, width):
    """MaxText 0.1.0: its decoder and its loss with the defaults of base.yml, layer axis 1.

    Smaller than there, and in float32 to be compared. It imports Google's services on import.
    """
    package, pyconfig, utils, models, losses = load(
        "maxtext==0.1.0 aqtp==0.9.0 omegaconf==2.4.0 qwix==0.1.8",
        "MaxText",
        "MaxText.pyconfig",
        "MaxText.maxtext_utils",
        "MaxText.layers.models",
        "MaxText.max_utils",
        without=dict(map(stub, ("tensorflow", "pathwaysutils", "google.cloud.storage"))),
    )
    changes = {
        "run_name": "test",
        "hardware": "cpu",
        "enable_checkpointing": False,
        "skip_jax_distributed_system": True,
        "attention": "dot_product",
        "dtype": "float32",
        "per_device_batch_size": B,
        "max_target_length": T,
        "max_prefill_predict_length": T // 2,
        "vocab_size": V,
        "base_num_decoder_layers": layers,
        "base_emb_dim": width,
        "base_mlp_dim": 2 * width,
        "base_num_query_heads": 2,
        "base_num_kv_heads": 2,
        "head_dim": width // 2,
    }
    base = Path(package.__file__).parent / "configs/base.yml"
    config = pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in changes.items())])
    devices = utils.create_device_mesh(config, jax.devices()[:1])
    mesh = jax.sharding.Mesh(devices, config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=None)

    run = functools.partial(model.apply, enable_dropout=False)
    batch = tokens()
    segments, positions = jnp.ones_like(batch), jnp.broadcast_to(jnp.arange(T), batch.shape)

    def loss_fn(params, tokens_BxT):
        logits_BxTxV = run({"params": params}, tokens_BxT, positions, decoder_segment_ids=segments)
        targets_BxTxV = jax.nn.one_hot(jnp.roll(tokens_BxT, -1, 1), V)
        return losses.cross_entropy_with_logits(logits_BxTxV, targets_BxTxV, 0.0)[0].mean()

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    init = functools.partial(model.init, enable_dropout=False)
    shapes = jax.eval_shape(init, keys, batch, positions, decoder_segment_ids=segments)
    params = random(shapes["params"])
    return Case(loss_fn, params, batch, params["decoder"]["layers"])


class Block(nn.Module):
    """A layer as in T5X: every parameter with the names of its logical axes."""

    width: int

    @nn.compact
    def __call__(self, x_BxTxD, _):
        def dense(name, x, width, axes):
            init = nn.initializers.lecun_normal()
            w = partitioning.param_with_axes(name, init, (x.shape[-1], width), axes=axes)
            return x @ w

        h = nn.LayerNorm(use_bias=False, use_scale=False)(x_BxTxD)
        h = jnp.tanh(dense("wi", h, 2 * self.width, ("embed", "mlp")))
        return x_BxTxD + dense("wo", h, self.width, ("mlp", "embed")), None


class T5X(nn.Module):
    """A decoder that scans its layers as T5X does, with scan_axis=1."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens_BxT):
        embed = nn.Embed(V, self.width)
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
        block = partitioning.remat(Block, prevent_cse=False, policy=policy)
        run = partitioning.scan_with_axes(
            block,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            axis_name="layers",
        )
        x_BxTxD, _ = run(self.width, name="layers")(embed(tokens_BxT), None)
        return embed.attend(x_BxTxD)


@case
def t5x_style(layers, width):
    """T5X is not on PyPI: a model of our own in its way, with `flax.linen.partitioning`."""
    model = T5X(layers, width)

    def loss_fn(params, tokens_BxT):
        return next_token_loss(model.apply({"params": params}, tokens_BxT), tokens_BxT)

    params = random(jax.eval_shape(model.init, jax.random.key(0), tokens())["params"])
    return Case(loss_fn, params, tokens(), params["layers"])


def in_haliax(checkpointing):
    def make(layers, width):
        """Haliax 1.4: `Stacked` of linear layers with named axes."""
        packages = "haliax==1.4.dev453 jmp==0.0.4 aqtp==0.9.0 equinox==0.13.8"
        hax, hnn, eqx = load(packages, "haliax", "haliax.nn", "equinox")
        In, Batch = hax.Axis("in", width), hax.Axis("batch", B)
        Layers = hax.Axis("layers", layers)

        class Block(eqx.Module):
            linear: hnn.Linear

            @staticmethod
            def init(key):
                return Block(hnn.Linear.init(In, In.alias("out"), key=key, out_first=False))

            def __call__(self, x):
                return x + hax.tanh(self.linear(x).rename({"out": "in"}))

        with warnings.catch_warnings(action="ignore"):
            build = hnn.Stacked.init(Layers, Block, gradient_checkpointing=checkpointing)
            model = build(jax.random.split(jax.random.key(0), layers))
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_fn(params, batch):
            with warnings.catch_warnings(action="ignore"):
                model = eqx.combine(params, static)
                y = model.fold(hax.named(batch["x"], (Batch, In)))
            return jnp.mean((y.array - batch["y"]) ** 2)

        batch = {"x": normal(1, B, width, scale=1.0), "y": normal(2, B, width, scale=1.0)}
        return Case(loss_fn, params, batch, params)

    return make


CASES["haliax"] = in_haliax(False)
CASES["haliax_checkpointed"] = in_haliax(True)
CASES["haliax_nested"] = in_haliax("nested")


@case
def haiku(layers, width):
    """dm-haiku 0.0.17: `hk.layer_stack`, with an input for each layer."""
    (hk,) = load("dm-haiku==0.0.17 jmp==0.0.4", "haiku")

    def with_outputs(x):
        def layer(x, scale):
            h = hk.Linear(width)(jnp.tanh(hk.Linear(2 * width)(x)))
            return x + scale * h, jnp.mean(h)

        scales = jnp.linspace(0.5, 1.0, layers)
        return hk.layer_stack(layers, with_per_layer_inputs=True)(layer)(x, scales)[0]

    model = hk.without_apply_rng(hk.transform(with_outputs))
    return supervised(model.apply, model.init, width)


def supervised(apply, init, width):
    """A loss of a model whose parameters are all layers."""
    batch = {"x": normal(1, B, T, width, scale=1.0), "y": normal(2, B, T, width, scale=1.0)}

    def loss_fn(params, batch):
        return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)

    params = random(jax.eval_shape(init, jax.random.key(0), batch["x"]))
    return Case(loss_fn, params, batch, params)


@case
def alphafold(layers, width):
    """AlphaFold 2.3.2: its Evoformer in its `layer_stack`, as `EmbeddingsAndEvoformer` runs it."""
    packages = "alphafold-colabfold==2.3.27 colabfold-kernels==0.9.0 dm-haiku==0.0.17 jmp==0.0.4"
    # Its constants need one function of `tree`.
    tree = types.ModuleType("tree")
    tree.map_structure = jax.tree.map
    hk, config, modules, layer_stack, prng = load(
        packages,
        "haiku",
        *(f"alphafold.model.{m}" for m in ("config", "modules", "layer_stack", "prng")),
        without={"tree": tree},
    )
    settings = config.model_config("model_1").model
    settings.global_config.update(deterministic=True)

    def forward(msa, pair):
        layer = modules.EvoformerIteration(
            settings.embeddings_and_evoformer.evoformer, settings.global_config, is_extra_msa=False
        )
        masks = {"msa": jnp.ones(msa.shape[:2]), "pair": jnp.ones(pair.shape[:2])}

        def evoformer_fn(x):
            act, safe_key = x
            safe_key, safe_subkey = safe_key.split()
            output = layer(activations=act, masks=masks, is_training=True, safe_key=safe_subkey)
            return output, safe_key

        stack = layer_stack.layer_stack(layers)(hk.remat(evoformer_fn))
        key = prng.SafeKey(jax.random.key(0))
        return stack(({"msa": msa, "pair": pair}, key))[0]

    model = hk.without_apply_rng(hk.transform(forward))
    batch = {"msa": normal(1, B, 4, T, width), "pair": normal(2, B, T, T, width)}

    def loss_fn(params, batch):
        out = jax.vmap(model.apply, (None, 0, 0))(params, batch["msa"], batch["pair"])
        return jnp.mean(out["msa"] ** 2) + jnp.mean(out["pair"] ** 2)

    one = jax.tree.map(lambda x: x[0], batch)
    params = random(jax.eval_shape(model.init, jax.random.key(0), one["msa"], one["pair"]))
    # The gradient of some biases is zero: an adaptive rule would amplify its rounding errors.
    return Case(loss_fn, params, batch, params, lomo_jax.lomo(0.1))


def temporaries(make_step, case):
    """Returns the bytes that XLA plans for a step on CPU, apart from parameters and state."""
    step = make_step(case.loss_fn, lomo_jax.adalomo(1e-3))
    params, batch = jax.eval_shape(lambda: (case.params, case.batch))
    state = jax.eval_shape(step.init, params, batch)
    compiled = quick_jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if n == "alphafold" else []) for n in CASES],
)
def test_steps_agree(name, standard_promotion, assert_steps_agree):
    found = CASES[name](4, 16)
    trainable = arrays.trainable_flags(found.params, None)
    walked = trace(found.loss_fn, found.params, found.batch, trainable=trainable).stacked
    leaves, stack = jax.tree.leaves(found.params), jax.tree.leaves(found.stack)
    assert {i for i, leaf in enumerate(leaves) if any(leaf is x for x in stack)} == walked
    rows = [np.roll(np.arange(B), i) for i in range(STEPS)]
    batches = [jax.tree.map(lambda x, row=row: x[row], found.batch) for row in rows]
    assert_steps_agree(found.loss_fn, found.tx, found.params, batches)


@pytest.mark.parametrize("name", CASES)
def test_temporaries(name, standard_promotion):
    """The fused step plans half of the plain step's memory, or a third of the parameters'."""
    found = CASES[name](16, 96)
    fused, plain = (temporaries(s, found) for s in (lomo_jax.fused_step, lomo_jax.reference_step))
    size = sum(4 * x.size for x in jax.tree.leaves(found.params))
    print(
        f"{name}: {fused / 2**20:.2f} MiB, plain {plain / 2**20:.2f}, parameters {size / 2**20:.2f}"
    )
    assert fused <= max(0.5 * plain, 0.3 * size)
