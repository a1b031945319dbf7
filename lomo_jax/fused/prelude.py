"""Finds the operations that compute one layer of a value from one layer of its sources."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, layer_axis
from lomo_jax.fused.arrays import Place
from lomo_jax.fused.indexed import scan_indexed
from lomo_jax.fused.jaxprs import Atom, Layers, Operation, Scan

# Operations that change no value. A stack's own sharding makes a constraint on it redundant.
_IDENTITIES = ("copy", "copy_p", "sharding_constraint")


class Loss(NamedTuple):
    """The inputs of a loss."""

    closed: Any  # jaxpr
    params: Sequence[jex.Var]
    trainable: Mapping[jex.Var, int]  # the parameters to train, and their indices
    batch: Sequence[jex.Var]

    def variable(self, i: int) -> jex.Var:
        """Returns the variable of a trainable parameter."""
        return next(v for v, index in self.trainable.items() if index == i)

    def index(self, atom: Atom) -> int | None:
        """Returns the index of a trainable parameter; None for another atom."""
        return self.trainable.get(atom) if isinstance(atom, jex.Var) else None

    def is_trainable(self, atom: Atom) -> bool:
        return self.index(atom) is not None

    @property
    def labels(self) -> dict[jex.Var, int]:
        """One bit for each parameter, and one for the batch, see `jaxprs.dependence`."""
        labels = {v: 1 << i for i, v in enumerate(self.params)}
        return labels | dict.fromkeys(self.batch, self.of_batch)

    @property
    def of_batch(self) -> int:
        return 1 << len(self.params)

    @property
    def of_params(self) -> int:
        return self.of_batch - 1


class Context(NamedTuple):
    """What is known about the variables of a program."""

    loss: Loss
    program: Sequence[Operation]
    producers: Mapping[Any, Operation]
    labels: Mapping[jex.Var, int]

    @classmethod
    def of(cls, program: Sequence[Operation], loss: Loss) -> "Context":
        producers = {v: operation for operation in program for v in operation.outvars}
        return cls(loss, program, producers, jaxprs.labels(program, loss.labels))

    def depends_on_params(self, atom: Atom) -> bool:
        return bool(jaxprs.label(atom, self.labels) & self.loss.of_params)

    def depends_on_batch(self, atom: Atom) -> bool:
        return bool(jaxprs.label(atom, self.labels) & self.loss.of_batch)

    def read_scan(self, eqn: jex.JaxprEqn) -> Scan:
        scan = jaxprs.read_scan(eqn)
        return scan_indexed(scan, list(map(self.depends_on_params, scan.consts)), self.producers)

    def is_param(self, atom: Atom) -> bool:
        return isinstance(atom, jex.Var) and any(atom is v for v in self.loss.params)


class Prelude:
    """The operations that compute one layer of some values from one layer of their sources.

    Every value keeps its layer axis, with the size of one layer.
    """

    def __init__(self, context: Context):
        self.context = context
        self.sources: dict[tuple[int, Place], tuple[Layers, jex.Var]] = {}
        self.shared: dict[jex.Var, None] = {}  # values that every layer needs whole
        self.eqns: list[jex.JaxprEqn] = []
        self.moved: list[jex.JaxprEqn] = []  # the equations of the program that `eqns` are made of
        self._env: dict[tuple[int, Place], jex.Var] = {}

    def add(self, layers: Layers) -> jex.Var:
        """Returns the variable of one layer, after adding the operations that compute it."""
        pending = [layers]  # not recursion: a chain of operations may be longer than Python's stack
        while pending:
            layers_ = pending[-1]
            eqn, operands = self._origin(layers_)
            needed = self._operands(eqn, operands, layers_.place) if eqn is not None else []
            missing = [x for x in needed if isinstance(x, Layers) and x.key not in self._env]
            if layers_.key in self._env:
                pending.pop()
            elif missing:
                pending.append(missing[0])
            else:
                self._env[layers_.key] = self._add(layers_, eqn, needed)
        return self._env[layers.key]

    def _operands(
        self, eqn: jex.JaxprEqn, operands: layer_axis.Operands, place: Place
    ) -> list[Layers | Atom]:
        """Returns what one layer of an operation is computed from: layers, and shared values."""
        return [
            atom
            if operand is None
            else Layers(
                atom,
                Place(
                    operand.axis,
                    place.start * operand.scale + operand.start,
                    place.size * operand.scale,
                ),
            )
            for atom, operand in zip(eqn.invars, operands, strict=True)
        ]

    def _add(
        self, layers: Layers, eqn: jex.JaxprEqn | None, operands: Sequence[Layers | Atom]
    ) -> jex.Var:
        """Adds an operation, whose operands are there, or a source."""
        if eqn is None:
            var = jex.Var(layers.of.aval)
            self.sources[layers.key] = layers, var
            return var
        self.moved.append(eqn)
        inputs: list[Atom] = []
        for operand in operands:
            if isinstance(operand, Layers):
                inputs.append(self._env[operand.key])
            else:
                self.shared.update(jaxprs.variables([operand]))
                inputs.append(operand)
        if eqn.primitive.name in _IDENTITIES:
            (var,) = jaxprs.variables(inputs)
            return var
        outputs = [jex.Var(v.aval) for v in eqn.outvars]
        params = layer_axis.for_one_layer(eqn, layers.place.axis, layers.place.size)
        self.eqns.append(eqn.replace(invars=inputs, outvars=outputs, params=params))
        return outputs[[v is layers.of for v in eqn.outvars].index(True)]

    def _origin(self, layers: Layers) -> tuple[Any, layer_axis.Operands]:
        """Returns the equation that computes the layers, and its operands; None for a source."""
        source = None, []
        if not isinstance(layers.of, jex.Var):
            return source
        eqn = self.context.producers.get(layers.of)
        if eqn is None or isinstance(eqn, Scan):
            return source
        operands = layer_axis.operands(eqn, layers.of, layers.place.axis)
        if operands is None:
            return source
        # A value without parameters may as well be computed outside, unless it is a broadcast.
        is_broadcast = eqn.primitive.name == "broadcast_in_dim" and operands[0] is None
        if not (self.context.depends_on_params(layers.of) or is_broadcast):
            return source
        return eqn, operands

    def function(self, template: Any, results: Sequence[Atom]) -> Callable[..., list[Any]]:
        """Returns the function from a layer of each source, and `shared`, to `results`.

        A layer of a source is as a scan reads it; a result keeps its layer axis.
        """
        inputs = [var for _, var in self.sources.values()]
        places = [layers.place for layers, _ in self.sources.values()]
        function = jaxprs.as_function(template, self.eqns, [*inputs, *self.shared], results)

        def run(layers, shared):
            layers = [
                x if place.size > 1 else jax.lax.expand_dims(x, [place.axis])
                for x, place in zip(layers, places, strict=True)
            ]
            return function(*layers, *shared)

        return run


def move_to_front(layers: Layers, length: int) -> tuple[list[jex.JaxprEqn], Layers]:
    """Returns equations that make the layers of a stack its axis 0, and their result."""
    axis, start, size = layers.place
    if layers.is_in_front(length):
        return [], layers

    def move(x):
        x = jax.lax.slice_in_dim(x, start, start + length * size, axis=axis)
        if size > 1:
            x = x.reshape(*x.shape[:axis], length, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    closed = jax.make_jaxpr(move)(layers.of.aval)
    eqns, results = jaxprs.inline(closed, [layers.of], jaxprs.is_call)
    return eqns, Layers(results[0])
