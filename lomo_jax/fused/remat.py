"""What the forward pass keeps of a layer beside its input, and the backward pass from it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from lomo_jax.fused import jaxprs
from lomo_jax.fused.microbatches import vjp_of

POLICIES = ("full", "attention", "none")
# Outputs of cuDNN's flash attention: the result, and the row sums that its derivative starts from.
_ATTENTION = "dot_product_attention_fwd_wrapper"


class Kept(NamedTuple):
    """A layer, divided where the forward pass ends and the backward pass starts."""

    forward: Callable[..., list[Any]]  # (*inputs) -> [*outputs, *kept]
    # (inputs, kept) -> the map from cotangents of outputs to those of inputs
    backward: Callable[[Sequence[Any], Sequence[Any]], Callable[[list[Any]], Sequence[Any]]]
    varies: list[bool]  # which of what is kept is another for each microbatch


def keep(
    body: Any,
    stacked: Sequence[int],
    remat: str | Callable[..., Any],
    varies_in: Sequence[bool],
    diff_in: Sequence[bool],
    diff_out: Sequence[bool],
) -> Kept:
    """Divides the body of a layer scan.

    Args:
      body: a closed jaxpr.
      stacked: the inputs that are parameters.
      remat: see `fused_step`; not "full".
      varies_in: which inputs are another for each microbatch.
      diff_in: the inputs to differentiate with respect to.
      diff_out: the outputs that may have a cotangent.
    """
    named: dict[Any, Any] = {"attention": _save_attention, "none": _save_all_but_gathered}
    policy = remat if callable(remat) else named[remat]
    # The passes are different loops: XLA cannot merge what is computed in both.
    function = jax.checkpoint(_uncovered(body, stacked), policy=policy, prevent_cse=False)
    rest: list[Any] = []

    def forward(*inputs):
        outputs, vjp = vjp_of(function, inputs, diff_in, diff_out)
        leaves, treedef = jax.tree.flatten(vjp)
        rest[:] = treedef, [None if _is_array(x) else x for x in leaves]
        return outputs, [x for x in leaves if _is_array(x)]

    inputs = jaxprs.open_jaxpr(body).invars
    closed, (outputs, _) = jax.make_jaxpr(forward, return_shape=True)(*(v.aval for v in inputs))
    treedef, static = rest
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    eqns, results = jaxprs.inline(closed, variables, {}, lambda eqn: False)
    results, leaf_atoms = results[: len(outputs)], results[len(outputs) :]
    # An input needs not be kept: it is at hand in the backward pass.
    at_hand = {v: k for k, v in enumerate(variables)}
    kept = [v for v in jaxprs.variables(leaf_atoms) if v not in at_hand]

    def backward(inputs, values):
        env: dict[Any, Any] = dict(zip(kept, values, strict=True)) | {
            v: inputs[k] for v, k in at_hand.items()
        }
        arrays = iter([a.val if isinstance(a, jex.Literal) else env[a] for a in leaf_atoms])
        found = [next(arrays) if x is None else x for x in static]
        return jax.tree.unflatten(treedef, found)

    labels = jaxprs.dependence(closed, list(map(int, varies_in)))[len(outputs) :]
    varies = {v: bool(label) for v, label in zip(leaf_atoms, labels, strict=True) if v in kept}
    return Kept(
        jaxprs.as_function(closed, eqns, variables, [*results, *kept]),
        backward,
        [varies[v] for v in kept],
    )


def _uncovered(body: Any, stacked: Sequence[int]) -> Callable[..., list[Any]]:
    """The body without a checkpoint around the whole layer, which `remat` takes the place of."""
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(body).invars]
    parameters = {variables[k] for k in stacked}

    def around_the_layer(eqn):
        return jaxprs.called_jaxpr(eqn) is not None and parameters.issubset(
            jaxprs.variables(eqn.invars)
        )

    eqns, results = jaxprs.inline(body, variables, {}, around_the_layer)
    return jaxprs.as_function(body, eqns, variables, results)


def _save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name == _ATTENTION or (
        primitive.name == "name" and params["name"] == "attention"
    )


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # Several devices share a weight: to keep what they gathered would be to hold the whole model.
    return primitive.name != "reshard"


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype")
