"""AdaLomo: factored second moments and grouped normalisation, as an optax transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax import _validate


class Factors(NamedTuple):
    """Second moment of a matrix [..., M, N], factored into the means of its rows and columns."""

    row: jax.Array  # float32 [..., M], moving average of mean(g^2, -1)
    col: jax.Array  # float32 [..., N], moving average of mean(g^2, -2)


class AdaLomoState(NamedTuple):
    """State of `adalomo`."""

    count: jax.typing.ArrayLike  # int32 [], number of updates so far, the argument of the schedule
    # For each parameter: `Factors` for a matrix, a float32 array for a vector or a scalar.
    moments: optax.Params


def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: float = 1e-30,
    decay_rate: float = 0.8,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    clip_value: float | None = None,
    min_param_scale: float = 1e-3,
    beta: float | None = None,
) -> optax.GradientTransformation:
    r"""The update rule of AdaLomo, as the authors' code computes it.

    With :math:`g` the gradient (clipped by value), :math:`t = 1, 2, \dots` the step and
    :math:`\beta_t = 1 - t^{-0.8}`, for a matrix:

    .. math::
        r_t &= \beta_t r_{t-1} + (1 - \beta_t)\, \mathrm{mean}_{cols}(g^2 + \epsilon) \\
        c_t &= \beta_t c_{t-1} + (1 - \beta_t)\, \mathrm{mean}_{rows}(g^2 + \epsilon) \\
        u &= g \big/ \sqrt{r_t c_t^\top / \mathrm{mean}(r_t)} \\
        \hat u &= u \big/ \max(1, \mathrm{rms}(u) / d) \\
        \alpha &= \eta \max(\epsilon_2, \mathrm{rms}(\theta)) \\
        \theta &\leftarrow \theta (1 - \alpha \lambda) - \alpha \hat u

    The second moment of a vector or a scalar is not factored: with :math:`v` the moving average of
    :math:`g^2 + \epsilon`, :math:`u = g / \sqrt v` (the paper omits the root, its code has it). A
    parameter with more than two axes is a stack of matrices over its leading axes, each with its
    own factors, :math:`\mathrm{rms}(u)` and :math:`\mathrm{rms}(\theta)`.

    For vectors and matrices, without weight decay, this is Adafactor as
    ``optax.adafactor(learning_rate, min_dim_size_to_factor=1)`` computes it.

    Updates are computed and returned in float32, whatever the dtype of the gradients, so that their
    sum with the parameter is rounded once, to the parameter's dtype.

    Args:
      learning_rate: :math:`\eta`, relative to the root mean square of each parameter: a float, or
        a schedule of the number of updates so far.
      eps: :math:`\epsilon`, added to the squared gradient.
      decay_rate: the exponent in :math:`\beta_t = 1 - t^{-decay\_rate}`.
      clip_threshold: :math:`d`, the largest root mean square of an update before the learning rate.
      weight_decay: :math:`\lambda`, decoupled, multiplied by :math:`\alpha`.
      clip_value: clips each element of the gradient to [-clip_value, clip_value]; None for no
        clipping.
      min_param_scale: :math:`\epsilon_2`, replaces a smaller root mean square of a parameter.
      beta: a constant :math:`\beta_t`, as in the paper's Algorithm 1 (without bias correction);
        None: :math:`\beta_t` from `decay_rate`.

    Returns:
      An `optax.GradientTransformation` whose ``update`` needs `params`.

    Raises:
      ValueError: an argument is out of range. `init` and `update` raise it for complex parameters.

    Example:
      >>> import jax.numpy as jnp, lomo_jax
      >>> tx = lomo_jax.adalomo(0.1)
      >>> params, grads = {"w": jnp.ones((2, 3))}, {"w": jnp.full((2, 3), 1e-4)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> [round(float(u), 3) for u in updates["w"][0]]  # the scale of the gradient does not matter
      [-0.1, -0.1, -0.1]
      >>> state.moments["w"].row.shape, state.moments["w"].col.shape
      ((2,), (3,))

    References:
      Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
      <https://arxiv.org/abs/2310.10195>`_, 2023
    """
    schedule = _validate.schedule("learning_rate", learning_rate)
    _validate.number("eps", eps, low=0.0, open_low=True)
    _validate.number("decay_rate", decay_rate, low=0.0, open_low=True)
    _validate.number("clip_threshold", clip_threshold, low=0.0, open_low=True)
    _validate.number("weight_decay", weight_decay, low=0.0)
    _validate.optional_number("clip_value", clip_value, low=0.0, open_low=True)
    _validate.number("min_param_scale", min_param_scale, low=0.0)
    _validate.optional_number("beta", beta, low=0.0, high=1.0)

    def init(params: optax.Params) -> AdaLomoState:
        _validate.real("adalomo", params)

        def moment(p):
            if p.ndim < 2:
                return jnp.zeros_like(p, jnp.float32)
            # Created by an operation, so that it gets the shape and sharding of a sum.
            row, col = jax.eval_shape(lambda p: (p.sum(-1), p.sum(-2)), p)
            return Factors(jnp.zeros_like(row, jnp.float32), jnp.zeros_like(col, jnp.float32))

        return AdaLomoState(count=jnp.zeros([], jnp.int32), moments=jax.tree.map(moment, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaLomoState]:
        params = _validate.params(params)
        _validate.real("adalomo", updates)
        count = optax.safe_increment(state.count)
        lr = jnp.asarray(schedule(state.count), jnp.float32)
        beta_t = 1.0 - jnp.asarray(count, jnp.float32) ** -decay_rate if beta is None else beta

        def average(old, new):
            return beta_t * old + (1.0 - beta_t) * new

        def descend(g, moment, p):
            g, p = g.astype(jnp.float32), p.astype(jnp.float32)
            if clip_value is not None:
                g = jnp.clip(g, -clip_value, clip_value)
            g2 = jnp.square(g) + eps
            if p.ndim < 2:
                moment = average(moment, g2)
                u = g * jax.lax.rsqrt(moment)
                rms_u = _rms(u)
            else:
                col = average(moment.col, g2.mean(-2))
                g2_mean, u2_mean = _row_means(g2, jnp.square(g) / col[..., None, :])
                row = average(moment.row, g2_mean)
                moment = Factors(row=row, col=col)
                row_scale = row.mean(-1, keepdims=True) / row
                rms_u = jnp.sqrt((row_scale * u2_mean).mean(-1))[..., None, None]
                u = g * jnp.sqrt(row_scale)[..., :, None] * jax.lax.rsqrt(col)[..., None, :]
            u = u / jnp.maximum(1.0, rms_u / clip_threshold)
            lr_p = lr * jnp.maximum(min_param_scale, _rms(p))
            return _Step(-lr_p * (u + weight_decay * p), moment)

        steps = jax.tree.map(descend, updates, state.moments, params)

        def field(k):
            return jax.tree.map(lambda s: s[k], steps, is_leaf=lambda s: isinstance(s, _Step))

        return field(0), AdaLomoState(count=count, moments=field(1))

    return optax.GradientTransformation(init, update)


class _Step(NamedTuple):
    update: jax.Array
    moment: Factors | jax.Array


def _rms(x: jax.Array) -> jax.Array:
    """Returns the root mean square of each matrix [..., M, N], [..., 1, 1]; of a vector, [1]."""
    axes = tuple(range(x.ndim))[-2:]
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def _row_means(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the means over the last axis of two arrays that are computed from the gradient.

    On a GPU an update costs the time to read the gradient. As parts of a complex number the two
    means are one sum, and XLA reads the gradient once. Not on several devices: there it plans more
    memory (LLaMA-65B on eight GPUs: 18.2 instead of 17.2 GiB), and each device reads a shard only.
    """
    if jax.typeof(x).sharding.shard_shape(x.shape) != x.shape:
        return x.mean(-1), y.mean(-1)
    means = jax.lax.complex(x, y).mean(-1)
    return means.real, means.imag
