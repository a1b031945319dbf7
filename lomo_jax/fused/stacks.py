"""Rewrites the program of a loss so that its layer scans consume parameters themselves.

People do things to a stack of layers before they scan it: they cast it, mask it, transpose it,
merge an adapter. Where that keeps the layers apart it moves into the scan, and the scan then reads
layer i of each parameter where it is. The gradient of layer i reaches the parameter in the loop.

The rewriting goes from the last scan of the program to the first:

* A loop that indexes a stack with its counter becomes a scan over the stack.
* Operations between a parameter and the scan move into the scan.
* Scans of the same layers that do not depend on each other become one scan.
* A sum over the layers of a stack, such as a penalty or a norm, moves into the scan of the stack.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, layer_axis
from lomo_jax.fused.arrays import Place
from lomo_jax.fused.flags import scatter, select, zip_not
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


def inline_calls(loss: Loss, inputs: Sequence[jex.Var]) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Replaces calls by their bodies. Of checkpoints, only those that a layer scan needs.

    Args:
      loss: whose jaxpr it is.
      inputs: the variables that replace the inputs of the jaxpr.

    Returns:
      Equations, and the atoms that are the results.
    """
    everything, _ = jaxprs.inline(loss.closed, inputs, jaxprs.is_call)
    moved = moved_equations(everything, loss)

    def is_needed(jaxpr) -> bool:
        return any(
            is_needed(jaxprs.called_jaxpr(eqn)) if jaxprs.is_call(eqn) else id(eqn.params) in moved
            for eqn in jaxprs.open_jaxpr(jaxpr).eqns
        )

    return jaxprs.inline(
        loss.closed,
        inputs,
        lambda eqn: (
            jaxprs.is_call(eqn)
            and (not jaxprs.is_checkpoint(eqn) or is_needed(jaxprs.called_jaxpr(eqn)))
        ),
    )


def scan_parameters(
    program: Sequence[Operation], results: Sequence[Atom], roots: Sequence[Atom], loss: Loss
) -> list[Operation]:
    """Rewrites a program so that its layer scans consume parameters.

    Args:
      program: equations.
      results: the results of the program.
      roots: those that have a cotangent.
      loss: the inputs of the program.

    Returns:
      The new program, in which each layer scan is a `Scan`.
    """
    context = _Context.of(program, loss)
    rewritten: list[Operation] = []
    for operation in reversed(jaxprs.live(program, results)):
        new = None
        if not isinstance(operation, Scan) and jaxprs.is_scan(operation):
            new = _pull_into(context.read_scan(operation), context)
        rewritten += [operation] if new is None else new[::-1]
    program = jaxprs.live(rewritten[::-1], results)
    program = _merge(program, roots, loss)
    return jaxprs.live(jaxprs.sort(_sum_inside(program, loss)), results)


def moved_equations(program: Sequence[jex.JaxprEqn], loss: Loss) -> set[int]:
    """Returns the `id` of the params of each layer scan, and of what moves into one."""
    context = _Context.of(program, loss)
    found = set()
    for eqn in filter(jaxprs.is_scan, program):
        scan = context.read_scan(eqn)
        if reaching := _reaching(scan, context):
            prelude = _Prelude(context)
            for layers in select(scan.layers, reaching):
                prelude.add(layers)
            found |= {id(eqn.params), *(id(moved.params) for moved in prelude.moved)}
    return found


class Source(NamedTuple):
    """Layers that a scan reads, or computes in front of its body."""

    scan: Operation
    layers: Layers
    producer: Operation | None  # None for an input of the loss


def scan_sources(program: Sequence[Operation], loss: Loss) -> list[Source]:
    """Follows what each scan reads back to operations that cannot run on one layer alone.

    Args:
      program: the result of `scan_parameters`.
      loss: the inputs of the program.
    """
    context = _Context.of(program, loss)
    found = []
    for operation in program:
        if not (isinstance(operation, Scan) or jaxprs.is_scan(operation)):
            continue
        scan = operation if isinstance(operation, Scan) else jaxprs.read_scan(operation)
        prelude = _Prelude(context)
        for layers in scan.layers:
            prelude.add(layers)
        for layers, _ in prelude.sources.values():
            is_literal = isinstance(layers.of, jex.Literal)
            producer = None if is_literal else context.producers.get(layers.of)
            found.append(Source(operation, layers, producer))
    return found


class _Context(NamedTuple):
    """What is known about the variables of a program."""

    loss: Loss
    program: Sequence[Operation]
    producers: Mapping[Any, Operation]
    labels: Mapping[jex.Var, int]

    @classmethod
    def of(cls, program: Sequence[Operation], loss: Loss) -> "_Context":
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


class _Prelude:
    """The operations that compute one layer of some values from one layer of their sources.

    Every value keeps its layer axis, with the size of one layer.
    """

    def __init__(self, context: _Context):
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


def _reaching(scan: Scan, context: _Context) -> list[bool]:
    """Returns which of the xs of a scan are computed layer by layer from a parameter.

    Returns:
      A flag for each x; an empty list if there is none.
    """
    flags = [_reaches(layers, scan, context) for layers in scan.layers]
    return flags if any(flags) else []


def _reaches(layers: Layers, scan: Scan, context: _Context) -> bool:
    if not scan.length or not context.depends_on_params(layers.of):
        return False
    prelude = _Prelude(context)
    prelude.add(layers)
    params = [s for s, _ in prelude.sources.values() if context.is_param(s.of)]
    # Positions of a sequence may be scanned too, with an embedding of each added: only a stack of
    # matrices is told apart from it.
    if context.depends_on_batch(layers.of):
        params = [source for source in params if _rank(source.of) > 2]
    # A group of layers is scanned inside. Otherwise it may be rows of one matrix.
    is_group = any(source.place.size > 1 for source in params)
    return bool(params) and (not is_group or _scans_x(scan, layers))


def _scans_x(scan: Scan, layers: Layers) -> bool:
    """Returns whether the body of a scan has a layer scan over the x that `layers` are."""
    if not jaxprs.has_scan(scan.body):
        return False
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(scan.body).invars]
    x = inputs[len(inputs) - len(scan.layers) + [s.key for s in scan.layers].index(layers.key)]
    inner = Loss(scan.body, [x], {x: 0}, [v for v in inputs if v is not x])
    operations, results = inline_calls(inner, inputs)
    operations = scan_parameters(operations, results, results, inner)
    return any(
        isinstance(operation, Scan) and any(s.of is x for s in operation.layers)
        for operation in operations
    )


def _rank(atom: Atom) -> int:
    return sum(size > 1 for size in jaxprs.shape(atom))


def _pull_into(scan: Scan, context: _Context) -> list[Operation] | None:
    """Moves the operations between parameters and a scan into the scan.

    Returns:
      Equations that compute the other inputs of the scan, and the scan; None if no parameter is
      scanned.
    """
    reaching = _reaching(scan, context)
    if not reaching:
        return None
    direct = [layers for layers in scan.layers if context.is_param(layers.of)]
    if direct == select(scan.layers, reaching) and len({x.key for x in direct}) == len(direct):
        return [scan]
    prelude = _Prelude(context)
    reached = select(scan.layers, reaching)
    values = [prelude.add(layers) for layers in reached]
    others = select(scan.layers, zip_not(reaching))
    before: list[Operation] = []
    sources = []
    for layers, _ in prelude.sources.values():
        if not context.is_param(layers.of):
            eqns, layers = _move_to_front(layers, scan.length)
            before += eqns
        sources.append(layers)
    compute = prelude.function(scan.body, values)

    def body(*args):
        args = _split(args, [scan.consts, prelude.shared, scan.carry, others, sources])
        consts, shared, carry, other_xs, source_xs = args
        pulled = compute(source_xs, shared)
        pulled = [jax.lax.squeeze(x, [y.place.axis]) for x, y in zip(pulled, reached, strict=True)]
        xs = scatter(reaching, pulled, reaching)
        xs = scatter(xs, other_xs, zip_not(reaching))
        return jex.jaxpr_as_fun(scan.body)(*consts, *carry, *xs)

    consts = [*scan.consts, *prelude.shared]
    return [
        *before,
        jaxprs.with_body(scan._replace(consts=consts, layers=[*others, *sources]), body),
    ]


def _split(items: Sequence[Any], like: Iterable[Collection[Any]]) -> list[Sequence[Any]]:
    """Splits a sequence into parts as long as those of `like`."""
    ends = [0, *itertools.accumulate(map(len, like))]
    return [items[a:b] for a, b in itertools.pairwise(ends)]


def _move_to_front(layers: Layers, length: int) -> tuple[list[jex.JaxprEqn], Layers]:
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


def _merge(program: Sequence[Operation], roots: Sequence[Atom], loss: Loss) -> list[Operation]:
    """Makes one scan of those that scan the same layers and do not depend on each other."""
    program = list(program)
    pairs = itertools.combinations(_active_scans(program, roots), 2)
    for a, b in pairs:
        keys = {x.key for x in a.layers if loss.is_trainable(x.of)}
        alike = (a.length, a.reverse) == (b.length, b.reverse)
        if alike and not keys.isdisjoint(x.key for x in b.layers) and not follows(b, a, program):
            program = [op for op in program if op is not a and op is not b]
            program = jaxprs.sort([*program, _merged(a, b)])
            return _merge(program, roots, loss)
    return program


def _merged(a: Scan, b: Scan) -> Scan:
    layers = {x.key: x for x in [*a.layers, *b.layers]}
    parts = [a.consts, b.consts, a.carry, b.carry, layers]

    def body(*args):
        a_consts, b_consts, a_carry, b_carry, xs = _split(args, parts)
        by_key = dict(zip(layers, xs, strict=True))
        outputs = [
            jex.jaxpr_as_fun(scan.body)(*consts, *carry, *(by_key[x.key] for x in scan.layers))
            for scan, consts, carry in ((a, a_consts, a_carry), (b, b_consts, b_carry))
        ]
        (a_out, a_ys), (b_out, b_ys) = (
            _split(x, [scan.carry, scan.ys]) for scan, x in zip((a, b), outputs, strict=True)
        )
        return [*a_out, *b_out, *a_ys, *b_ys]

    merged = a._replace(
        consts=[*a.consts, *b.consts],
        carry=[*a.carry, *b.carry],
        layers=list(layers.values()),
        carry_out=[*a.carry_out, *b.carry_out],
        ys=[*a.ys, *b.ys],
    )
    return jaxprs.with_body(merged, body)


def follows(b: Any, a: Any, program: Iterable[Operation]) -> bool:
    """Returns whether operation `b` needs a result of operation `a`, which is earlier."""
    reached = set(a.outvars)
    for operation in program:
        if not reached.isdisjoint(jaxprs.variables(operation.invars)):
            if operation is b:
                return True
            reached.update(operation.outvars)
    return False


def _active_scans(program: Sequence[Operation], roots: Sequence[Atom]) -> list[Scan]:
    active = active_variables(program, roots)
    return [
        operation
        for operation in program
        if isinstance(operation, Scan) and not active.isdisjoint(operation.outvars)
    ]


def active_variables(program: Sequence[Operation], roots: Iterable[Atom]) -> set[jex.Var]:
    """Returns the variables that may have a cotangent: the derivative of `roots` reaches them."""
    active = set(filter(jaxprs.is_float, jaxprs.variables(roots)))
    for operation in reversed(program):
        if not stops(operation) and not active.isdisjoint(operation.outvars):
            active.update(filter(jaxprs.is_float, jaxprs.variables(operation.invars)))
    return active


def stops(operation: Operation) -> bool:
    """Returns whether the derivative of an operation is zero."""
    return not isinstance(operation, Scan) and operation.primitive.name == "stop_gradient"


class _Part(NamedTuple):
    """A part of a reduction over the layers of a stack: those that one scan reads."""

    eqn: jex.JaxprEqn
    layers: Layers  # the first one of them, in the operand
    result: jex.Var  # [L, ...], reduced over all axes but that of the layers


def _sum_inside(program: Sequence[Operation], loss: Loss) -> list[Operation]:
    """Moves reductions over the layers of a scanned stack into the scan."""
    context = _Context.of(program, loss)
    scans = [operation for operation in program if isinstance(operation, Scan)]
    parts: dict[int, list[_Part]] = {}
    reductions: dict[int, list[Operation]] = {}
    for eqn in program:
        if isinstance(eqn, Scan) or eqn.primitive.name not in layer_axis.REDUCTIONS:
            continue
        for axis in eqn.params["axes"]:
            found = _scans_of(eqn, axis, scans, context)
            if found:
                results = [jex.Var(_stack_type(eqn.outvars[0], scan.length)) for scan, _ in found]
                for (scan, layers), result in zip(found, results, strict=True):
                    parts.setdefault(id(scan), []).append(_Part(eqn, layers, result))
                reductions[id(eqn)] = _reduce(eqn, results)
                break
    new: list[Operation] = []
    for operation in program:
        if isinstance(operation, Scan) and id(operation) in parts:
            new += _with_reductions(operation, parts[id(operation)], context)
        else:
            new += reductions.get(id(operation), [operation])
    return new


def _scans_of(
    eqn: jex.JaxprEqn, axis: int, scans: Sequence[Scan], context: _Context
) -> list[tuple[Scan, Layers]]:
    """Finds the scans that read the layers that a reduction is computed from.

    Returns:
      Scans, each with the first layer that it reads; none unless they read all layers.
    """
    operand, start = eqn.invars[0], 0
    found: list[tuple[Scan, Layers]] = []
    while start < jaxprs.shape(operand)[axis]:
        layers = Layers(operand, Place(axis, start))
        prelude = _Prelude(context)
        prelude.add(layers)
        sources = [source for source, _ in prelude.sources.values()]
        keys = {source.key for source in sources if context.is_param(source.of)}
        if not any(context.loss.is_trainable(source.of) for source in sources):
            return []
        others = [*prelude.shared, *(s.of for s in sources if s.key not in keys)]
        earlier = jaxprs.live(context.program, others)
        scan = next(
            (
                scan
                for scan in scans
                if keys.issubset(x.key for x in scan.layers)
                and all(scan is not operation for operation in earlier)
                and not follows(scan, eqn, context.program)
            ),
            None,
        )
        if scan is None:
            return []
        found.append((scan, layers))
        start += scan.length
    return found


def _reduce(eqn: jex.JaxprEqn, results: Sequence[jex.Var]) -> list[Operation]:
    """Returns the equations that reduce the results of layers to the result of `eqn`."""
    join = lambda *parts: jnp.concatenate(parts)  # noqa: E731
    eqns: list[Operation] = []
    atoms: list[Atom] = list(results)
    if len(results) > 1:
        closed = jax.make_jaxpr(join)(*(v.aval for v in results))
        joined, atoms = jaxprs.inline(closed, results, jaxprs.is_call)
        eqns += joined
    return [*eqns, eqn.replace(invars=atoms, params=eqn.params | {"axes": (0,)})]


def _with_reductions(scan: Scan, reductions: Sequence[_Part], context: _Context) -> list[Operation]:
    """Returns a scan that also reduces each layer, after equations that compute its inputs."""
    prelude = _Prelude(context)
    outputs = []
    for eqn, first, _ in reductions:
        value, of_layer = prelude.add(first), jex.Var(eqn.outvars[0].aval)
        prelude.eqns.append(eqn.replace(invars=[value], outvars=[of_layer]))
        outputs.append(of_layer)
    before: list[Operation] = []
    layers = {x.key: x for x in scan.layers}
    for source, _ in prelude.sources.values():
        if source.key not in layers:
            eqns, layers[source.key] = _move_to_front(source, scan.length)
            before += eqns
    compute = prelude.function(scan.body, outputs)
    parts = [scan.consts, prelude.shared, scan.carry, layers]

    def body(*args):
        consts, shared, carry, xs = _split(args, parts)
        by_key = dict(zip(layers, xs, strict=True))
        own = [by_key[x.key] for x in scan.layers]
        results = jex.jaxpr_as_fun(scan.body)(*consts, *carry, *own)
        return [*results, *compute([by_key[key] for key in prelude.sources], shared)]

    new = scan._replace(
        consts=[*scan.consts, *prelude.shared],
        layers=list(layers.values()),
        ys=[*scan.ys, *(part.result for part in reductions)],
    )
    return [*before, jaxprs.with_body(new, body)]


def _stack_type(var: jex.Var, length: int) -> Any:
    """Returns the type of `length` values of the type of a variable."""
    stack = lambda x: jnp.broadcast_to(x, (length, *x.shape))  # noqa: E731
    return jaxprs.open_jaxpr(jax.make_jaxpr(stack)(var.aval)).outvars[0].aval
