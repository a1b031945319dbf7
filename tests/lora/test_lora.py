"""Adapters: what they add to a model, and that a step trains them alone or beside the base."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import before_release, llama_loss, normal, quick_jit, tiny_llama

import lomo_jax
from lomo_jax import lora, models, sharding
from lomo_jax.errors import UserError
from lomo_jax.fused import arrays

TOKENS_BxT = np.random.default_rng(0).integers(0, 48, (3, 4, 12), dtype=np.int32)


def adapted_llama(*, targets="all", rank=3, seed=0, dropout=0.0, **changes):
    """Returns a tiny LLaMA with adapters that are not zero."""
    model = models.Decoder(tiny_llama(**changes), rngs=nnx.Rngs(0))
    lora.add(model, lora.LoRA(rank, 6, targets, dropout=dropout), rngs=nnx.Rngs(1))
    graphdef, params = nnx.split(model)
    adapters, base = lora.split(params)
    leaves, treedef = jax.tree.flatten(adapters)
    leaves = [normal(seed + i, *x.shape, scale=0.1) for i, x in enumerate(leaves)]
    return graphdef, nnx.merge_state(jax.tree.unflatten(treedef, leaves), base)


class Pair(nnx.Module):
    """A model that is nobody's decoder."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(6, 6, use_bias=False, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        for layer in self.rest:
            x = jnp.tanh(layer(x))
        return self.head(x)


def test_a_new_adapter_changes_nothing():
    model, x = Pair(nnx.Rngs(0)), normal(0, 5, 4)
    before = model(x)
    lora.add(model, lora.LoRA(2, 16), rngs=nnx.Rngs(1))
    chex.assert_trees_all_equal(model(x), before)
    names = [name for name in arrays.names(nnx.state(model)) if lora.is_adapter(name)]
    of = ("first", "rest/0", "rest/1")
    assert names == [f"{name}/lora_{ab}/value" for name in of for ab in "ab"]


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_product_of_its_matrices_is_scaled(stabilized, scale):
    linear = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear)
    lora.add(model, lora.LoRA(4, 6, rank_stabilized=stabilized), rngs=nnx.Rngs(1))
    a, b, x = normal(1, 5, 4), normal(2, 4, 7), normal(3, 2, 5)
    model.layers[0].lora_a[...], model.layers[0].lora_b[...] = a, b
    expected = np.asarray(linear(x)) + scale * np.asarray(x) @ np.asarray(a) @ np.asarray(b)
    chex.assert_trees_all_close(model(x), expected, rtol=1e-5)


def test_adapters_are_stacked_with_their_layer():
    params = adapted_llama(targets=("q", "down"))[1]
    shapes = {
        name.removesuffix("/value"): x.shape
        for name, x in zip(arrays.names(params), jax.tree.leaves(params), strict=True)
        if lora.is_adapter(name)
    }
    assert shapes == {
        "layers/attention/q/lora_a": (3, 32, 3),
        "layers/attention/q/lora_b": (3, 3, 32),
        "layers/mlp/down/lora_a": (3, 40, 3),
        "layers/mlp/down/lora_b": (3, 3, 32),
    }


def test_the_first_matrix_is_uniform_as_in_peft():
    model = nnx.Sequential(nnx.Linear(400, 8, rngs=nnx.Rngs(0)))
    lora.add(model, lora.LoRA(500, 1), rngs=nnx.Rngs(1))
    a = np.asarray(model.layers[0].lora_a[...])
    assert abs(a).max() <= 1 / 20
    assert np.allclose([a.mean(), a.std()], [0, 1 / 20 / np.sqrt(3)], atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_of_a_bfloat16_model_are_float32(dtype):
    model = models.Decoder(tiny_llama(), param_dtype=dtype, rngs=nnx.Rngs(0))
    before = model.hidden(TOKENS_BxT[0])
    lora.add(model, lora.LoRA(2, 16), rngs=nnx.Rngs(1))
    after = model.hidden(TOKENS_BxT[0])
    assert after.dtype == dtype
    chex.assert_trees_all_equal(after, before)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_a_frozen_base(make_step, standard_promotion):
    graphdef, params = adapted_llama(targets="v", num_layers=2)
    step = make_step(
        llama_loss(graphdef), optax.adamw(1e-2), has_aux=True, trainable=lora.is_adapter
    )
    state = step.init(params, TOKENS_BxT[0])
    assert all(map(lora.is_adapter, state.optimizer))
    new, _, _ = quick_jit(step)(params, state, TOKENS_BxT[0])
    (adapters, base), (new_adapters, new_base) = lora.split(params), lora.split(new)
    chex.assert_trees_all_equal(new_base, base)
    assert all(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(new_adapters), strict=True)
    )


OPTIONS = {
    "plain": {},
    "microbatches": {"microbatches": 2},
    "clip_norm": {"clip_norm": 0.05},
    "offload": {"offload": lomo_jax.Offload(params=True, activations=True, state=True)},
    "remat": {"remat": "none"},
    "loss_scale": {"loss_scale": lomo_jax.DynamicLossScale()},
}
BASES = {
    "frozen": None,
    "lomo": lomo_jax.lomo(optax.linear_schedule(0.1, 0.0, 3), clip_value=0.01),
    "adalomo": lomo_jax.adalomo(optax.linear_schedule(0.01, 0.0, 3)),
}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("frozen", "plain"),
        before_release("frozen", "microbatches"),
        ("lomo", "plain"),
        *(before_release("frozen", name) for name in list(OPTIONS)[2:]),
        pytest.param("lomo", "clip_norm", marks=pytest.mark.slow),
        before_release("lomo", "microbatches"),
        pytest.param("adalomo", "offload", marks=pytest.mark.slow),
    ],
)
def test_fused_equals_reference(base, options, assert_steps_agree, standard_promotion):
    graphdef, params = adapted_llama(targets=("q", "down"), num_layers=2)
    adapters = optax.adamw(optax.linear_schedule(1e-3, 2e-3, 3))
    if BASES[base] is None:
        tx, trainable = adapters, lora.is_adapter
    else:
        tx, trainable = lora.partition(adapters, BASES[base]), None
    assert_steps_agree(
        llama_loss(graphdef),
        tx,
        params,
        list(jnp.asarray(TOKENS_BxT)),
        has_aux=True,
        trainable=trainable,
        tolerance=2e-5,
        key=(base, options if options in ("microbatches", "clip_norm", "loss_scale") else ""),
        **OPTIONS[options],
    )


def test_two_optimizers_are_those_of_two_plain_runs(standard_promotion):
    """Each half is updated as optax alone updates it from the whole gradient."""
    graphdef, params = adapted_llama(targets=("q", "down"), num_layers=2)
    loss = llama_loss(graphdef)
    adapters_tx = optax.adamw(1e-2)
    step = lomo_jax.fused_step(loss, lora.partition(adapters_tx, lomo_jax.lomo(0.1)), has_aux=True)
    new, _, _ = quick_jit(step)(params, step.init(params, TOKENS_BxT[0]), TOKENS_BxT[0])
    grads = quick_jit(jax.grad(loss, has_aux=True))(params, TOKENS_BxT[0])[0]
    (adapters, base), (d_adapters, d_base) = lora.split(params), lora.split(grads)
    updates, _ = adapters_tx.update(d_adapters, adapters_tx.init(adapters), adapters)
    found = lora.split(new)
    # Adam's first step is the sign of the gradient: a tiny gradient may differ.
    chex.assert_trees_all_close(found[0], optax.apply_updates(adapters, updates), atol=2e-4)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, base, d_base)
    chex.assert_trees_all_close(found[1], expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_frozen_base_is_never_computed():
    """The step's products: none has a kernel's shape for result."""
    graphdef, params = adapted_llama(num_kv_heads=4, mlp_width=96)

    def products(trainable):
        step = lomo_jax.fused_step(
            llama_loss(graphdef), optax.sgd(0.1), has_aux=True, trainable=trainable
        )
        text = str(jax.make_jaxpr(step)(params, step.init(params, TOKENS_BxT[0]), TOKENS_BxT[0]))
        return sum(
            "dot_general" in line and ("f32[32,96] =" in line or "f32[96,32] =" in line)
            for line in text.splitlines()
        )

    assert products(lora.is_adapter) == 0
    assert products(None) > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_equals_not_merged(dtype):
    graphdef, params = adapted_llama()
    if dtype == jnp.bfloat16:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    expected = nnx.merge(graphdef, params)(TOKENS_BxT[0])
    merged, state = lora.merge(graphdef, params)
    assert merged == models.abstract(tiny_llama(), jnp.float32)[0]
    assert not any(map(lora.is_adapter, arrays.names(state)))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
    found = nnx.merge(merged, state)(TOKENS_BxT[0])
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, "all", "the rank of an adapter is 0; it must be 1 or more"),
        (2, "q_proj", "no linear map q_proj; it has down, gate, k, o, output, q, up, v"),
        (2, ("q", "gat"), "no linear map gat; did you mean 'gate'"),
        (2, (), "no linear map to adapt"),
    ],
)
def test_mistakes_are_one_line(rank, targets, message):
    model = nnx.eval_shape(lambda: models.Decoder(tiny_llama(), rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=message) as error:
        lora.add(model, lora.LoRA(rank, 16, targets), rngs=nnx.Rngs(1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [before_release((1, 8, 1)), (2, 2, 2)])
def test_eight_devices_compute_what_one_does(sizes, standard_promotion, assert_close):
    graphdef, params = adapted_llama(targets=("q", "o", "down"), num_layers=2)
    tokens = np.tile(TOKENS_BxT[0], (2, 1))
    tx = lora.partition(optax.adamw(1e-3), lomo_jax.lomo(0.1))
    step = lomo_jax.fused_step(llama_loss(graphdef), tx, has_aux=True)
    one = quick_jit(step)(params, step.init(params, tokens), tokens)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, models.shardings(tiny_llama(num_layers=2), params, mesh))
        state = quick_jit(step.init)(sharded, tokens)
        eight = quick_jit(step)(sharded, state, tokens)
    assert_close(eight[2].loss, one[2].loss)
    for name, found, old in zip(
        arrays.names(params), jax.tree.leaves(eight[0]), jax.tree.leaves(sharded), strict=True
    ):
        assert found.sharding.is_equivalent_to(old.sharding, old.ndim), name
    new, expected = (lora.split(tree[0]) for tree in (eight, one))
    assert_close(new[1], expected[1])
    chex.assert_trees_all_close(new[0], expected[0], atol=1e-4)  # Adam: a sign of a tiny gradient


def test_dropout_is_of_the_inputs_of_adapters_alone():
    linear = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear)
    lora.add(model, lora.LoRA(64, 64, dropout=0.25), rngs=nnx.Rngs(1))
    model.layers[0].lora_a[...] = model.layers[0].lora_b[...] = jnp.eye(64)
    x = 1 + abs(normal(0, 50, 64))
    chex.assert_trees_all_close(model(x) - linear(x), x, rtol=1e-4)
    lora.set_keys(model, jax.random.key(0))
    found = np.asarray((model(x) - linear(x)) / x)
    dropped = np.isclose(found, 0, atol=1e-5)
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    chex.assert_trees_all_close(found[~dropped], np.full((~dropped).sum(), 1 / 0.75), rtol=1e-4)
    lora.set_keys(model, jax.random.key(1))
    assert not np.array_equal(model(x) - linear(x), found * x)
    assert np.array_equal(lora.merge(*nnx.split(model))[1]["layers"][0]["bias"], linear.bias[...])


def test_layers_and_linear_maps_drop_different_inputs(monkeypatch):
    graphdef, params = adapted_llama(targets=("q", "v"), dropout=0.5)
    keys = []

    def drop(self, x):
        data = jax.random.key_data(self.dropout_key)
        jax.debug.callback(lambda key: keys.append(tuple(np.asarray(key).tolist())), data)
        return x

    monkeypatch.setattr(lora.LoRALinear, "_drop", drop)
    model = nnx.merge(graphdef, params)
    model.hidden_and_balance(TOKENS_BxT[0], dropout_key=jax.random.key(0))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 3 * 2


@pytest.mark.parametrize("microbatches", [1, 2])
def test_fused_equals_reference_with_dropout(microbatches, assert_steps_agree, standard_promotion):
    """Each recomputation of a layer drops the same inputs."""
    graphdef, params = adapted_llama(targets=("q", "down"), num_layers=2, dropout=0.5)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden_and_balance(batch["tokens"], dropout_key=batch["key"])
        return jnp.mean(hidden**2)

    assert_steps_agree(
        loss,
        optax.sgd(0.1),
        params,
        [{"tokens": x, "key": jax.random.key(i)} for i, x in enumerate(jnp.asarray(TOKENS_BxT))],
        trainable=lora.is_adapter,
        tolerance=2e-5,
        microbatches=microbatches,
    )


def test_dropout_on_eight_devices_is_that_on_one(standard_promotion):
    graphdef, params = adapted_llama(dropout=0.5)
    tokens = jnp.asarray(np.tile(TOKENS_BxT[0], (2, 1)))

    def hidden(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.hidden_and_balance(tokens, dropout_key=jax.random.key(0))[0]

    expected = jax.jit(hidden)(params, tokens)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, models.shardings(tiny_llama(), params, mesh))
        found = jax.jit(hidden)(sharded, sharding.shard_batch(tokens))
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-4, atol=1e-4)
