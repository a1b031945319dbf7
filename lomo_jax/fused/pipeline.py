"""Evaluates a layer step by step, and moves data beside the products.

A step of `order.divide` has one product of a weight. What the product of step n + 1 reads from the
host or from other devices is fetched in step n. A gradient that is a sum over devices is summed in
the step after its product, and used at the beginning of the next. A layer that is updated at the
end of a step is written to the host in the next:

    step n     product n  |  fetch for product n + 1  |  sum gradient n - 1  |  write layer n - 1
    ----------------------------------------- barrier -----------------------------------------

Within a step these depend on nothing but what passed the barrier before, so XLA's latency-hiding
scheduler runs them beside the product. The barriers keep XLA from fetching earlier: a layer holds
at most one weight more than it computes with. An update waits, at a barrier of its own, for what is
fetched beside its product. What the first steps of the next layer read is fetched in the last steps
of this one, and travels in the carry of the loop.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from lomo_jax.fused import jaxprs
from lomo_jax.fused.order import Key, Step, Steps


class Layer:
    """Reads the inputs of a layer, and uses their gradients if they have any.

    A carry is ``(stacks, rest)``: a list with a pytree for each input that has a gradient, and a
    pytree, which says which layer it is.
    """

    def read(self, carry: Any, k: int) -> jax.Array:
        """Returns input k. Called each time that a step needs it."""
        raise NotImplementedError

    def following(self, carry: Any) -> Any:
        """Returns the carry with which `read` and `read_state` return those of the next layer."""
        raise NotImplementedError

    def read_state(self, carry: Any, k: int) -> Any:
        """Returns the optimizer's state of input k."""
        raise NotImplementedError

    def use(
        self,
        carry: Any,
        ks: Sequence[int],
        grads: Sequence[jax.Array],
        params: Mapping[int, jax.Array],
        states: Mapping[int, Any],
    ) -> tuple[Any, Any]:
        """Uses the gradients of the inputs ks.

        Args:
          carry: the carry.
          ks: inputs.
          grads: their gradients.
          params: those of the inputs that have been read.
          states: those of their states that have been read.

        Returns:
          The new carry, and what `write` writes.
        """
        raise NotImplementedError

    def write(self, carry: Any, ks: Sequence[int], news: Any) -> Any:
        """Writes what `use` returned into ``stacks[k]``, for each k of `ks`; returns the carry."""
        raise NotImplementedError


def read_first(steps: Steps, layer: Layer, carry: Any) -> list[Any]:
    """Reads what has to be there before the first step."""
    return [_fetch(steps, layer, carry, key) for key in steps.first]


def evaluate(
    steps: Steps, args: Any, layer: Layer, carry: Any, first: Sequence[Any]
) -> tuple[Any, Any, list[Any]]:
    """Evaluates a layer, and uses each gradient as soon as its input is not needed any more.

    Args:
      steps: the function of the layer, divided.
      args: its other arguments.
      layer: reads its inputs, and uses their gradients.
      carry: see `Layer`.
      first: the result of `read_first` for this layer.

    Returns:
      The other results of the function, the new carry, and the result of `read_first` for the next
      layer.
    """
    state = _State(
        OrderedDict(zip(steps.args, jax.tree.leaves(args), strict=True)),
        OrderedDict(zip(steps.first, first, strict=True)),
        carry,
    )

    def value(atom: jaxprs.Atom) -> Any:
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom in state.held:
            return state.held[atom]
        k = steps.inputs.get(atom)
        return state.env[atom] if k is None else layer.read(state.carry, k)

    def use(gradients: Mapping[int, jax.Array]) -> None:
        held, ks = state.held, list(gradients)
        params = {
            k: held[v] for v, (k, gather) in steps.far.items() if v in held and gather is None
        }
        states = {k: x for k, x in held.items() if isinstance(k, int)}
        grads = list(gradients.values())
        state.carry, news = layer.use(state.carry, ks, grads, params, states)
        state.updated.append((ks, news))
        if not steps.late_writes:
            write()

    def write() -> list[int]:
        """Writes the layers that have been updated; returns which."""
        updated, state.updated = state.updated, []
        for ks, news in updated:
            state.carry = layer.write(state.carry, ks, news)
        return [k for ks, _ in updated for k in ks]

    def fetch(step: Step, needs: Sequence[Key]) -> bool:
        """Fetches what the next step needs, and what `step` reads of the next layer."""
        missing = [key for key in needs if key not in state.held]
        state.held.update((key, _fetch(steps, layer, state.carry, key)) for key in missing)
        following = layer.following(state.carry) if step.reads_next else state.carry
        state.following.update(
            (key, _fetch(steps, layer, following, key)) for key in step.reads_next
        )
        return bool(missing or step.reads_next)

    for n, step in enumerate(steps.steps):
        is_last = n + 1 == len(steps.steps)
        needs = [] if is_last else steps.steps[n + 1].needs
        if is_last:
            state.sums = [x.finish() for x in state.sums]
        summed = {x.k: x.value for x in state.sums if not x.stages}
        state.sums = [x for x in state.sums if x.stages]
        if summed:
            use(summed)
            if not is_last:
                # The small sums of an update would wait for the transfers of this step.
                state.wait([])
        state.sums = [x.advance() for x in state.sums]
        being_written = write() if steps.late_writes else []
        run = jaxprs.as_function(steps.closed, step.eqns, step.free, step.outputs)
        state.env.update(zip(step.outputs, run(*map(value, step.free)), strict=True))
        for k, late in step.sums.items():
            state.sums.append(_Sum(k, state.env.pop(late.part), late.stages))
        is_fetching = steps.waits and fetch(step, needs)
        if now := [k for k in step.ks if k not in step.sums]:
            if is_fetching:
                # Otherwise XLA may fetch beside the update, which is shorter than the product.
                state.wait(being_written)
            use({k: value(steps.grads[k]) for k in now})
        if is_last:
            write()
        if not steps.waits:
            fetch(step, needs)
        if is_last:
            break
        state.held = OrderedDict((key, state.held[key]) for key in needs)
        state.env = OrderedDict((v, state.env[v]) for v in step.carried)
        state.wait(being_written)
    others = jax.tree.unflatten(steps.tree, map(value, steps.others))
    return others, state.carry, [state.following[key] for key in steps.first]


class _Sum(NamedTuple):
    """The gradient of input k, while it is summed over devices."""

    k: int
    value: jax.Array
    stages: Sequence[Callable[[jax.Array], jax.Array]]  # those that are left

    def advance(self) -> "_Sum":
        first, *others = self.stages
        return _Sum(self.k, first(self.value), others)

    def finish(self) -> "_Sum":
        return self.advance().finish() if self.stages else self


@dataclasses.dataclass
class _State:
    """What passes the barriers."""

    env: OrderedDict[jex.Var, Any]  # what has been computed
    held: OrderedDict[Key, Any]  # what has been read
    carry: Any
    following: OrderedDict[Key, Any] = dataclasses.field(default_factory=OrderedDict)
    sums: list[_Sum] = dataclasses.field(default_factory=list)
    updated: list[tuple[list[int], Any]] = dataclasses.field(default_factory=list)  # not written

    def wait(self, being_written: Collection[int]) -> None:
        """Waits for everything but the stacks that are being written: they may arrive later."""
        stacks, rest = self.carry
        waiting = {k: x for k, x in enumerate(stacks) if k not in being_written}
        sums, news = [x.value for x in self.sums], [x for _, x in self.updated]
        self.env, self.held, self.following, sums, news, waiting, rest = (
            jax.lax.optimization_barrier(
                (self.env, self.held, self.following, sums, news, waiting, rest)
            )
        )
        self.sums = [x._replace(value=y) for x, y in zip(self.sums, sums, strict=True)]
        self.updated = [(ks, new) for (ks, _), new in zip(self.updated, news, strict=True)]
        self.carry = [waiting.get(k, x) for k, x in enumerate(stacks)], rest


def _fetch(steps: Steps, layer: Layer, carry: Any, key: Key) -> Any:
    if isinstance(key, int):
        return layer.read_state(carry, key)
    k, gather = steps.far[key]
    x = layer.read(carry, k)
    return x if gather is None else gather(x)
