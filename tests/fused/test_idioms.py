"""Losses as people write them: fused equals plain, and the layers are walked one by one."""

import contextlib

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import before_release, quick_jit
from idioms import IDIOMS, NO_LAYERS, Sizes, layer_axes

import lomo_jax
from lomo_jax.fused import arrays
from lomo_jax.fused.trace import trace

STEPS = 3
RULES = {
    # Both take a norm of each layer: a wrong layer axis changes the result. The first is quick.
    "lars": lambda: optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.05, momentum=0.9)),
    "adalomo": lambda: lomo_jax.adalomo(0.05, weight_decay=0.1),
}


def batches_of(batch):
    """Returns a batch for each step; what is not random stays."""

    def shift(x, i):
        is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim == 3
        return x * jnp.float32(1 + 0.3 * i) + jnp.float32(0.1 * i) if is_float else x

    changed = [{k: shift(batch[k], i) for k in "xy"} for i in range(STEPS)]
    return [{**batch, **new} for new in changed]


def walked(loss, params, batch, has_aux=False, trainable=None):
    """Returns the names of the parameters that are updated layer by layer."""
    flags = arrays.trainable_flags(params, trainable)
    traced = trace(loss, params, batch, has_aux=has_aux, trainable=flags)
    return {arrays.names(params)[i] for i in traced.stacked}


def plain_steps(loss, tx, params, batches, axes, has_aux=False, trainable=None):
    """Makes steps with `jax.value_and_grad`, and with `tx` under `jax.vmap` over known layers."""
    names, (leaves, treedef) = arrays.names(params), jax.tree.flatten(params)
    trained = [trainable is None or trainable(name) for name in names]

    def over_layers(function, name, in_axes, out_axes):
        """Maps over the layer axes of a parameter (p); those of its state (s) are in front."""
        for number, axis in reversed(list(enumerate(layer_axes(axes, name)))):
            # The axes before it are mapped already.
            place = [axis - number if flag == "p" else 0 for flag in in_axes + out_axes]
            outs = tuple(place[len(in_axes) :])
            function = jax.vmap(
                function, tuple(place[: len(in_axes)]), outs[0] if len(outs) == 1 else outs
            )
        return function

    def update(grad, state, leaf):
        change, state = tx.update(grad.astype(jnp.float32), state, leaf)
        return optax.apply_updates(leaf, change), state

    def step(leaves, states, batch):
        objective = lambda leaves: loss(jax.tree.unflatten(treedef, leaves), batch)  # noqa: E731
        value, grads = jax.value_and_grad(objective, has_aux=has_aux)(leaves)
        new = [
            over_layers(update, name, "psp", "ps")(g, s, w) if flag else (w, s)
            for name, g, s, w, flag in zip(names, grads, states, leaves, trained, strict=True)
        ]
        leaves, states = zip(*new, strict=True)
        return list(leaves), list(states), value

    states = [
        over_layers(tx.init, name, "p", "s")(w) if flag else None
        for name, w, flag in zip(names, leaves, trained, strict=True)
    ]
    run, values = quick_jit(step), []
    for batch in batches:
        leaves, states, value = run(leaves, states, batch)
        values.append(value)
    return jax.tree.unflatten(treedef, leaves), values


def tolerance_of(loss, params, batch):
    """Returns a few roundings of the coarsest dtype that the loss computes with."""
    text = str(jax.make_jaxpr(loss)(params, batch))
    return 3e-2 if "bf16" in text else 2e-5


@pytest.mark.parametrize("name", IDIOMS)
def test_layers_are_walked_one_by_one(name):
    idiom = IDIOMS[name]
    loss, params, batch = idiom.make(Sizes())
    expected = {n for n in arrays.names(params) if idiom.walked(n)}
    assert expected
    assert walked(loss, params, batch, **idiom.options) == expected


@pytest.mark.parametrize("name", NO_LAYERS)
def test_what_is_no_stack_is_one_parameter(name):
    loss, params, batch = NO_LAYERS[name].make(Sizes())
    flags = arrays.trainable_flags(params, None)
    traced = trace(loss, params, batch, trainable=flags)
    assert not traced.stacked
    assert not traced.layer_axes


def fused_steps(name, tx, batches, **options):
    """Makes steps with `fused_step`; returns the last parameters, losses and aux."""
    loss, params, _ = IDIOMS[name].make(Sizes())
    step = lomo_jax.fused_step(loss, tx, **IDIOMS[name].options, **options)
    state, run, outs = step.init(params, batches[0]), quick_jit(step), []
    for batch in batches:
        params, state, out = run(params, state, batch)
        outs.append((out.loss, out.aux) if step.has_aux else out.loss)
    return params, outs


@pytest.mark.parametrize("name", IDIOMS)
def test_fused_equals_plain(name, assert_close, standard_promotion):
    loss, params, batch = IDIOMS[name].make(Sizes())
    tx, batches, tolerance = RULES["lars"](), batches_of(batch), tolerance_of(loss, params, batch)
    expected = plain_steps(loss, tx, params, batches, IDIOMS[name].axes, **IDIOMS[name].options)
    assert_close(fused_steps(name, tx, batches), expected, tolerance)
    with pytest.raises(AssertionError):  # a step that does nothing would agree too
        assert_close(expected[0], params, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NO_LAYERS, *(before_release(n) if i % 9 else n for i, n in enumerate(IDIOMS))]
)
def test_fused_equals_reference_and_plain(
    name, assert_close, assert_steps_agree, standard_promotion
):
    idiom = (IDIOMS | NO_LAYERS)[name]
    loss, params, batch = idiom.make(Sizes())
    tx, batches, options = RULES["adalomo"](), batches_of(batch), idiom.options
    tolerance = tolerance_of(loss, params, batch)
    with warning_of(name):
        (new, _), out = assert_steps_agree(
            loss, tx, params, batches, tolerance=tolerance, **options
        )
    expected, values = plain_steps(loss, tx, params, batches, idiom.axes, **options)
    assert_close(new, expected, tolerance)
    last = (out.loss, out.aux) if "has_aux" in options else out.loss
    assert_close(last, values[-1], tolerance)


def warning_of(name):
    """Returns a context that expects the warning of a loss without layers."""
    if name in NO_LAYERS:
        return pytest.warns(UserWarning, match="layer scan")
    return contextlib.nullcontext()
