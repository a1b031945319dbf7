"""Finds the parameters that a loss scans over; refuses what would need a whole gradient."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax.extend.core as jex

from lomo_jax.fused import jaxprs
from lomo_jax.fused.jaxprs import Atom


class Stacks:
    """The parameters of a traced loss, and how they reach its scans.

    Every variable is labelled with the parameters that it depends on and with whether it depends on
    the batch, see `jaxprs.dependence`.
    """

    def __init__(self, names: Sequence[str], params: Sequence[jex.Var], trainable: Sequence[bool]):
        self.names, self.params = names, params
        self.index = {v: i for i, v in enumerate(params) if trainable[i]}
        self.frozen = {v: i for i, v in enumerate(params) if not trainable[i]}
        self.trainable_labels = sum(1 << i for i in self.index.values())
        self.batch_label = 1 << len(params)

    def labels(self, batch: Sequence[jex.Var]) -> dict[jex.Var, int]:
        """The labels of the inputs of the loss."""
        labels = {v: 1 << i for i, v in enumerate(self.params)}
        labels.update(dict.fromkeys(batch, self.batch_label))
        return labels

    def in_call(self, eqn: jex.JaxprEqn, labels: Mapping[jex.Var, int]) -> bool:
        """Whether `eqn` is a call, as of `jit`, with a layer scan inside."""
        called = jaxprs.called_jaxpr(eqn)
        if called is None:
            return False
        jaxpr = jaxprs.open_jaxpr(called)
        env = {v: jaxprs.label(a, labels) for v, a in zip(jaxpr.invars, eqn.invars, strict=True)}
        for inner in jaxpr.eqns:
            if self._is_layer_scan(inner, env) or self.in_call(inner, env):
                return True
            env.update(zip(inner.outvars, jaxprs.eqn_dependence(inner, env), strict=True))
        return False

    def find(
        self,
        eqns: Sequence[jex.JaxprEqn],
        loss: Atom,
        labels: Mapping[jex.Var, int],
    ) -> dict[int, dict[int, int]]:
        """Finds the layer scans.

        Returns:
          For each layer scan, by the `id` of its equation: trainable parameters by their position
          among its xs. There are none if the layers are frozen.

        Raises:
          ValueError: a parameter is used in a way that its layers cannot be updated one by one.
        """
        scans: dict[int, dict[int, int]] = {}
        producers: dict[Atom, jex.JaxprEqn] = {v: eqn for eqn in eqns for v in eqn.outvars}
        for eqn in eqns:
            found = self._scanned(eqn, labels, self.index)
            xs = jaxprs.read_scan(eqn).xs if found else []
            for position, i in found.items():
                if xs[position] is not self.params[i]:
                    self._refuse_derived(i, producers[xs[position]])
            if self._is_layer_scan(eqn, labels):
                scans[id(eqn)] = found
            else:
                self._refuse_hidden(eqn, eqn.invars)
        # What only aux and prints need takes no gradient.
        for_loss = jaxprs.live(eqns, [loss], effects=False)
        for found in scans.values():
            for i in found.values():
                self._refuse_shared(i, for_loss)
        return scans

    def _is_layer_scan(self, eqn: jex.JaxprEqn, labels: Mapping[jex.Var, int]) -> bool:
        # Frozen layers, too, are computed again from their inputs on the way back.
        return any(self._scanned(eqn, labels, group) for group in (self.index, self.frozen))

    def _scanned(
        self,
        eqn: jex.JaxprEqn,
        labels: Mapping[jex.Var, int],
        params: Mapping[jex.Var, int],
    ) -> dict[int, int]:
        """Those of `params` that a scan's xs are, or derive from without the batch, by position.

        The batch tells them from activations. Three axes, or the shape that a cast or a transpose
        leaves, tell a stack of layers from, say, an embedding that is scanned in chunks.
        """
        if not jaxprs.is_scan(eqn):
            return {}
        scan = jaxprs.read_scan(eqn)
        found = {}
        for position, x in enumerate(scan.xs):
            label = jaxprs.label(x, labels)
            if not scan.length or label & self.batch_label:
                continue
            for v, i in params.items():
                shape, x_shape = jaxprs.shape(v), jaxprs.shape(x)
                rearranged = scan.length in shape and sorted(shape) == sorted(x_shape)
                if label >> i & 1 and (x is v or len(shape) > 2 or rearranged):
                    found[position] = i
        return found

    def _refuse_derived(self, i: int, producer: jex.JaxprEqn) -> NoReturn:
        op = producer.primitive.name
        raise ValueError(
            f"parameter {self.names[i]} reaches the layer scan through `{op}` of the whole "
            "stack: scan the parameter itself, layers on axis 0, and apply the operation to one "
            "layer inside the scanned function"
        )

    def _refuse_shared(self, i: int, eqns: Sequence[jex.JaxprEqn]) -> None:
        users = [eqn.primitive.name for eqn in eqns for a in eqn.invars if a is self.params[i]]
        if len(users) > 1:
            users.remove("scan")
            raise ValueError(
                f"parameter {self.names[i]} is scanned over its layers and also used by "
                f"`{users[0]}`, so the gradients of all layers would have to be kept: give the "
                "second use a parameter of its own, or take what it needs out of the scan as ys"
            )

    def _refuse_hidden(
        self, eqn: jex.JaxprEqn, operands: Sequence[Atom | None], inside: str | None = None
    ) -> None:
        """Refuses loops over layers, in `eqn` and below it, that are no layer scans.

        Args:
          eqn: an equation of the loss, or of a jaxpr inside it.
          operands: what its operands are in the loss itself; None for what they are not.
          inside: the operation around `eqn` that cannot be cut open, if there is one.
        """
        if jaxprs.is_scan(eqn):
            scan = jaxprs.read_scan(eqn)
            stacks = [self._param(a) for a in operands]
            consts = jaxprs.open_jaxpr(scan.body).invars[: len(scan.consts)]
            for i, v in zip(stacks, consts, strict=False):
                if i is None or scan.length not in jaxprs.shape(v)[:1]:
                    continue
                # A gather from a matrix may as well look up rows, as of an embedding.
                is_matrix = len(jaxprs.shape(v)) < 3
                picks = {"dynamic_slice"} if is_matrix else {"dynamic_slice", "gather"}
                if any(
                    eqn.primitive.name in picks and eqn.params["slice_sizes"][0] == 1
                    for eqn in jaxprs.users(scan.body, v)
                ):
                    raise ValueError(
                        f"parameter {self.names[i]} is indexed by layer inside a loop: make it a "
                        "scanned input of lax.scan (xs) instead"
                    )
            for i in stacks[len(stacks) - len(scan.xs) :]:
                if inside and i is not None:
                    raise ValueError(
                        f"parameter {self.names[i]} is scanned over its layers inside `{inside}`, "
                        "which cannot be cut open: take the layer scan out of it"
                    )
        if inside is None and jaxprs.called_jaxpr(eqn) is None:
            inside = eqn.primitive.name
        for body in jaxprs.bodies(eqn):
            inner = jaxprs.open_jaxpr(body)
            if len(inner.invars) <= len(operands):
                # A branch of `cond` lacks the first operand.
                env = dict(zip(inner.invars[::-1], operands[::-1], strict=False))
                for e in inner.eqns:
                    outer = [None if isinstance(a, jex.Literal) else env.get(a) for a in e.invars]
                    self._refuse_hidden(e, outer, inside)

    def _param(self, atom: Atom | None) -> int | None:
        return self.index.get(atom) if isinstance(atom, jex.Var) else None
