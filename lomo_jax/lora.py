"""LoRA: small trainable matrices beside the linear maps of a model.

Dimensions: B batch, T sequence, I inputs, O outputs, R rank, L layers.

An adapter is two parameters of the linear map that it belongs to, `lora_a` and `lora_b`, stacked
like the kernel. So a step treats them like any other parameter: a scan passes them to their layer,
`trainable=is_adapter` freezes all others, and `partition` gives them an optimizer of their own.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
  Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding
from lomo_jax._linear_maps import ALL, copy_attributes, find, linear_maps, replace
from lomo_jax.errors import UserError
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import Params, match_memory, reshard_like, to_device

_ADAPTERS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The adapters of a model.

    Args:
      rank: The rank of each adapter, 1 or more.
      alpha: The output of an adapter is multiplied by ``alpha / rank``.
      targets: Names of attributes that are an `nnx.Linear`, such as ("q", "v"); "all" for every one
        except a router and the output head.
      rank_stabilized: Whether to multiply by ``alpha / sqrt(rank)`` instead (rsLoRA).
      dropout: The part of an adapter's inputs that is set to zero in training; see `set_keys`.

    Raises:
      UserError: The rank is below 1, or the dropout is not in [0, 1).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str = ALL
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of an adapter is {self.rank}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of an adapter is {self.dropout}; it must be in [0, 1)")

    @property
    def scale(self) -> float:
        """The factor of an adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoRALinear(nnx.Linear):
    """An `nnx.Linear` with an adapter, ``x @ kernel + scale * (x @ lora_a) @ lora_b``.

    Both matrices are float32 and are cast to the dtype of `x` for the product. `lora_a` is uniform
    in ``[-1, 1] / sqrt(I)`` and `lora_b` zero, as in PEFT: the map is at first that of `linear`.

    Args:
      linear: The linear map. Its kernel may have leading axes, of layers: `[..., I, O]`.
      adapter: Its rank R, scale and dropout.
      rngs: Random keys for `lora_a`.
    """

    def __init__(self, linear: nnx.Linear, adapter: LoRA, rngs: nnx.Rngs) -> None:
        copy_attributes(linear, self)
        *stack, inputs, outputs = linear.kernel.shape
        rank, self.scale, self.dropout = adapter.rank, adapter.scale, adapter.dropout
        self.dropout_key: jax.Array | None = nnx.data(None)
        self.lora_a = nnx.LoRAParam(_init_a(rngs.params(), (*stack, inputs, rank)))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, outputs), jnp.float32))

    def __call__(self, x_BxTxI: jax.Array, out_sharding: P | None = None) -> jax.Array:
        y_BxTxO = super().__call__(x_BxTxI, out_sharding=out_sharding)

        def dot(x, matrix):
            contracted = ((x.ndim - 1,), (0,)), ((), ())
            options = {"precision": self.precision, "out_sharding": out_sharding}
            return self.dot_general(x, matrix, contracted, **options)

        a_IxR = to_device(self.lora_a[...]).astype(y_BxTxO.dtype)
        b_RxO = to_device(self.lora_b[...]).astype(y_BxTxO.dtype)
        low_BxTxR = dot(self._drop(x_BxTxI.astype(y_BxTxO.dtype)), a_IxR)
        return y_BxTxO + jnp.asarray(self.scale, y_BxTxO.dtype) * dot(low_BxTxR, b_RxO)

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.dropout_key is None:
            return x
        return nnx.Dropout(self.dropout, deterministic=False)(x, rngs=self.dropout_key)

    def merged(self) -> nnx.Linear:
        """Returns the linear map without an adapter that computes the same; donates the kernel."""
        linear = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
        copy_attributes(self, linear)
        for name in (*_ADAPTERS, "scale", "dropout", "dropout_key"):
            delattr(linear, name)
        if not isinstance(self.kernel, nnx.Param):
            raise UserError("the kernels are quantised: merge the adapters into the original model")
        parts = self.kernel[...], self.lora_a[...], self.lora_b[...]
        linear.kernel = nnx.Param(_add_adapter(*parts, self.scale))
        return linear


def add(model: nnx.Module, adapters: LoRA, *, rngs: nnx.Rngs) -> None:
    """Adds adapters to linear maps of a model, in place.

    Args:
      model: Any nnx model. Its linear maps may be stacked, `[L, I, O]`, as those of a
        `models.Decoder` are: the adapters are then too.
      adapters: Their rank, scale and targets.
      rngs: Random keys.

    Raises:
      UserError: The model has no such linear map.

    Example:
      >>> import jax, lomo_jax, optax
      >>> from flax import nnx
      >>> from lomo_jax import lora
      >>> class Model(nnx.Module):
      ...     def __init__(self):
      ...         keys = jax.random.split(jax.random.key(0), 4)
      ...         self.layers = jax.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(keys)
      ...     def __call__(self, x):
      ...         return jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]
      >>> model = Model()
      >>> lora.add(model, lora.LoRA(rank=2, alpha=16), rngs=nnx.Rngs(1))
      >>> graphdef, params = nnx.split(model)
      >>> loss = lambda params, x: nnx.merge(graphdef, params)(x).mean()
      >>> step = lomo_jax.fused_step(loss, optax.adamw(5e-4), trainable=lora.is_adapter)
      >>> print(step.explain(params, jax.numpy.ones((4, 8))))
      piece                 gradient  parameters
      scan of 4 layers  0.000122 MiB  one layer of layers/lora_a/value, layers/lora_b/value
      At most 0.000122 MiB of gradient exist together; the trainable parameters are 0.000488 MiB.
    """
    for path, linear in find(model, adapters.targets):
        replace(model, path, LoRALinear(linear, adapters, rngs))


def abstract(
    graphdef: nnx.GraphDef[Any], shapes: nnx.State, adapters: LoRA
) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """Returns the structure of a model with adapters, without allocating anything.

    Args:
      graphdef: The structure of the model without them.
      shapes: A `jax.ShapeDtypeStruct` for each of its parameters.
      adapters: The adapters to add.

    Raises:
      UserError: The model has no such linear map.
    """

    def build(model: nnx.Module) -> nnx.Module:
        add(model, adapters, rngs=nnx.Rngs(0))
        return model

    return nnx.split(nnx.eval_shape(build, nnx.merge(graphdef, shapes)))


def init(shapes: nnx.State, seed: int) -> nnx.State:
    """Returns the parameters of new adapters alone.

    Args:
      shapes: A `jax.ShapeDtypeStruct` for each parameter of a model with adapters.
      seed: Random seed.
    """
    shapes, _ = split(shapes)
    leaves, names = jax.tree.leaves(shapes), arrays.names(shapes)
    key = jax.random.key(seed)
    new = [
        _init_a(jax.random.fold_in(key, i), leaf.shape)
        if "lora_a" in name
        else jnp.zeros(leaf.shape, leaf.dtype)
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), new)


def set_keys(model: nnx.Module, key: jax.Array) -> None:
    """Turns on the dropout of the adapters of a model, in place.

    Call it in the loss function, with a new key for each step; without a call, nothing is dropped.
    In a model whose layers are scanned, call it on the layer, inside the scan, with its own key.

    Args:
      model: A model, or a part of one.
      key: A random key; each adapter folds its number into it.
    """
    for number, linear in enumerate(linear_maps(model).values()):
        if isinstance(linear, LoRALinear):
            linear.dropout_key = jax.random.fold_in(key, number)


def is_adapter(name: str) -> bool:
    """Returns whether a parameter belongs to an adapter.

    Args:
      name: The parameter's name, such as "layers/attention/q/lora_a".
    """
    return name.removesuffix("/value").rpartition("/")[2] in _ADAPTERS


def partition(
    adapters: optax.GradientTransformation, base: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns an optimizer that updates the adapters and the rest by different rules.

    Args:
      adapters: Updates `lora_a` and `lora_b`.
      base: Updates all other parameters.
    """

    def labels(params: Params) -> Any:
        def label(path, _):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return "adapters" if is_adapter(name) else "base"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"adapters": adapters, "base": base}, labels)


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters of the adapters, and the others; `nnx.merge_state` is the inverse."""
    adapters, base = nnx.split_state(params, nnx.LoRAParam, ...)
    return adapters, base


def merge(graphdef: nnx.GraphDef[Any], params: nnx.State) -> tuple[nnx.GraphDef[Any], nnx.State]:
    """Returns a model without adapters that computes the same: each is added to its kernel.

    The sum is taken in float32, one layer of a stack at a time, and rounded to the kernel's dtype.

    Args:
      graphdef: The structure of the model.
      params: Its parameters, as from `nnx.split`. The kernels with adapters are donated: the merged
        ones take their memory.
    """
    model = nnx.merge(graphdef, params)
    for path, linear in linear_maps(model).items():
        if isinstance(linear, LoRALinear):
            replace(model, path, linear.merged())
    return nnx.split(model)


def _init_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)


@functools.partial(jax.jit, donate_argnums=0)
def _add_adapter(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns kernel + scale * a @ b; each may be stacked, and in host memory."""
    if kernel.ndim > 2:

        def of_layer(i, stack):
            layer, *ab = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (stack, a, b))
            new = _add_adapter(layer, *ab, scale)
            return jax.lax.dynamic_update_index_in_dim(stack, new, i, 0)

        return jax.lax.fori_loop(0, len(kernel), of_layer, kernel)
    kernel_IxO, a_IxR, b_RxO = to_device((kernel, a, b))
    a_IxR, b_RxO = (sharding.gather(x.astype(jnp.float32)) for x in (a_IxR, b_RxO))
    wide = kernel_IxO.astype(jnp.float32) + scale * reshard_like(a_IxR @ b_RxO, kernel_IxO)
    return match_memory(wide.astype(kernel.dtype), kernel)
