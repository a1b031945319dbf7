"""Finds out why the layers of a stack cannot be updated one by one, and what to do about it."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from lomo_jax.fused import jaxprs, stacks
from lomo_jax.fused.flags import select
from lomo_jax.fused.jaxprs import Operation, Scan
from lomo_jax.fused.prelude import Loss
from lomo_jax.fused.stacks import Source
from lomo_jax.fused.trace import LayerScan, TracedLoss


class Reason(NamedTuple):
    """Why the layers of a stack are not updated one by one."""

    why: str
    remedy: str
    of: str = "gradient"  # or "zeros": the gradient is always zero


_IN_A_LOOP = "move the layer scan out of the loop, for example with jax.vmap or microbatches="
_ONE_STACK = "pass the layers stacked, as one parameter [L, ...]"
_IN_THE_LAYER = "do it to one layer, in the scanned function"


class Finder:
    """Finds out why the layers of a stack cannot be updated one by one."""

    def __init__(self, loss: TracedLoss, names: Sequence[str]):
        self.loss, self.names, self.program = loss, names, loss.operations
        self.active = stacks.active_variables(self.program, [loss.loss])
        self.labels = jaxprs.labels(self.program, loss.inputs.labels)
        self.sources = stacks.scan_sources(self.program, loss.inputs)
        self.updated_by_layer = {
            id(segment.scan)
            for segment in loss.program.segments
            if isinstance(segment, LayerScan) and segment.stacked
        }
        # Once: a model may have thousands of parameters and operations.
        self.uses: dict[jex.Var, list[Operation]] = collections.defaultdict(list)
        for op in self.program:
            for var in jaxprs.variables(op.invars):
                self.uses[var].append(op)
        self.calls = [op for op in self.program if self.is_active(op) and _has_bodies(op)]

    def reason(self, i: int) -> Reason | None:
        """Returns why parameter i gets a whole gradient; None if no layer loop could help."""
        var = self.loss.inputs.params[i]
        uses = self.uses.get(var, [])
        scanned = [op for op in uses if isinstance(op, Scan) and any(x is var for x in op.xs)]
        uses = [op for op in uses if self.is_active(op)]
        if not uses:
            unused = Reason(
                "it reaches the loss only through stop_gradient, if at all",
                "freeze it with trainable=",
                "zeros",
            )
            return unused if scanned else None
        scanned = [op for op in scanned if op in uses]
        if scanned:
            return self._scanned(var, scanned, uses)
        for operation in self.calls:
            reason = self._inside(i, operation)
            if reason is not None:
                return reason
        if self._is_read_by_layer(var):
            return Reason(
                "a Python loop indexes its layers", "loop over the layers with jax.lax.scan"
            )
        for source in self.sources:
            if self.is_active(source.scan) and self._depends_on_stack(source.layers.of, i):
                reason = self._through(source, var)
                if reason is not None:
                    return reason
        return None

    def is_active(self, operation: Operation) -> bool:
        return not stacks.stops(operation) and not self.active.isdisjoint(operation.outvars)

    def _scanned(
        self, var: jex.Var, scans: Sequence[Scan], uses: Sequence[Operation]
    ) -> Reason | None:
        others = [
            op
            for op in uses
            if not isinstance(op, Scan) or any(a is var for a in [*op.consts, *op.carry])
        ]
        if others:
            return Reason(
                f"it is used by {_name(others[0])} outside of its scan too",
                "do that in the scan, layer by layer, or to a parameter of its own",
            )
        places = [x for scan in scans for x in scan.layers if x.of is var]
        if len({layers.place.axis for layers in places}) > 1:
            return Reason(
                "two scans of it have different layer axes", "scan it along the same axis"
            )
        follows = any(
            jaxprs.follows(b, a, self.program) for k, a in enumerate(scans) for b in scans[k + 1 :]
        )
        if follows:
            return Reason(
                "two scans of it depend on each other",
                "concatenate the inputs of both, so that there is one scan, or give the second its "
                "own parameters",
            )
        if len(scans) > 1:
            return Reason(
                "two scans of it read other layers or in another order",
                "let both read the same layers in the same order",
            )
        first, last = places[0].place.start, places[0].place.start + scans[0].length
        return Reason(
            f"its scan reads layers {first} to {last - 1} only",
            "keep the other layers in a parameter of their own",
        )

    def _inside(self, i: int, operation: Operation) -> Reason | None:
        """Returns the reason if a scan of the layers is inside `operation`."""
        inputs = list(operation.invars)
        if isinstance(operation, Scan) or jaxprs.is_scan(operation):
            # The stacks that a loop scans itself are not among them.
            scan = operation if isinstance(operation, Scan) else jaxprs.read_scan(operation)
            inputs = [*scan.consts, *scan.carry, *[None] * len(scan.xs)]
            inner = [scan.body]
        else:
            inner = _bodies(operation)
        flags = [a is not None and self._depends_on_stack(a, i) for a in inputs]
        if not any(flags):
            return None
        where = _name(operation)
        if any(_has_layer_scan(body, flags) for body in inner):
            if isinstance(operation, Scan) or operation.primitive.name in ("scan", "while"):
                return Reason(
                    f"its layer scan is inside another loop, {where}, and this needs accumulation "
                    "over the outer loop",
                    _IN_A_LOOP,
                )
            return Reason(f"its layer scan is inside {where}", "move the layer scan out of it")
        var = self.loss.inputs.params[i]
        is_loop = not isinstance(operation, Scan) and jaxprs.is_scan(operation)
        if is_loop and len(jaxprs.shape(var)) > 2 and any(a is var for a in inputs):
            k = [a is var for a in inputs].index(True)
            body = inner[0]
            users = jaxprs.users(body, jaxprs.open_jaxpr(body).invars[k])
            if users and all(eqn.primitive.name in ("dynamic_slice", "gather") for eqn in users):
                return Reason(
                    "a loop indexes its layers in an order that is not that of the loop's counter",
                    "store the layers in the order in which they are used, and scan over them",
                )
        return None

    def _depends_on_stack(self, atom: Any, i: int) -> bool:
        """Returns whether a value is computed from parameter i, and not from the batch."""
        label = jaxprs.label(atom, self.labels)
        return bool(label >> i & 1) and not label & self.loss.inputs.of_batch

    def _is_read_by_layer(self, var: jex.Var) -> bool:
        """Returns whether all uses of a stack read single layers of it, at known places."""
        if len(jaxprs.shape(var)) < 3 and self.loss.stacked:
            return False
        axes: set[int] = set()
        reads, pending = 0, [var]
        while pending:
            top = pending.pop()
            for op in self.uses.get(top, []):
                if isinstance(op, Scan):
                    return False
                if op.primitive.name in ("slice", "dynamic_slice", "gather"):
                    sizes = op.params.get("slice_sizes")
                    if sizes is None:
                        start, limit = op.params["start_indices"], op.params["limit_indices"]
                        sizes = [b - a for a, b in zip(start, limit, strict=True)]
                    whole = jaxprs.shape(top)
                    cut = [d for d, size in enumerate(sizes) if size != whole[d]]
                    if len(cut) != 1 or sizes[cut[0]] != 1:
                        return False
                    axes.add(cut[0])
                    reads += 1
                elif len(op.invars) == 1 and jaxprs.shape(op.outvars[0]) == jaxprs.shape(var):
                    pending.append(op.outvars[0])  # such as a cast
                else:
                    return False
        return reads > 1 and len(axes) == 1

    def _through(self, source: Source, var: jex.Var) -> Reason | None:
        """Returns the reason if the operation before a scan mixes layers, or is not known."""
        operation = source.producer
        if operation is None:
            return None
        name = None if isinstance(operation, Scan) else operation.primitive.name
        if name in ("stack", "concatenate") and not isinstance(operation, Scan):
            axis = operation.params["axis" if name == "stack" else "dimension"]
            if axis == source.layers.place.axis:
                sizes = [jaxprs.shape(a)[axis] for a in operation.invars if name == "concatenate"]
                if set(sizes) <= {1}:
                    return Reason("it is one of a list of layers that the loss stacks", _ONE_STACK)
                return Reason(
                    "the loss concatenates stacks along their layer axis",
                    "scan one after the other, or pass them as one stack",
                )
        if len(jaxprs.shape(var)) == 2:  # chunks of a matrix are no layers
            return None
        if name in ("reshape", "transpose"):
            return Reason(
                f"it reaches its scan through `{name}`, which changes the layer axis",
                "keep the parameter in the shape that the scan reads, [L, ...]",
            )
        return Reason(
            f"it reaches its scan through {_name(operation)}, which mixes the layers or is not "
            "known to keep them apart",
            _IN_THE_LAYER,
        )

    def random_values(self) -> Iterator[tuple[list[int], float]]:
        """Finds random numbers as large as a stack, drawn for all layers of a scan at once.

        Yields:
          The parameters that the scan updates layer by layer, and the MiB of random values.
        """
        for operation in self.program:
            if id(operation) not in self.updated_by_layer or not isinstance(operation, Scan):
                continue
            own = [i for x in operation.xs if (i := self.loss.inputs.index(x)) is not None]
            smallest = min(math.prod(jaxprs.shape(self.loss.inputs.params[i])) for i in own)
            atoms = list(
                jaxprs.variables(
                    source.layers.of
                    for source in self.sources
                    if source.scan is operation
                    and source.producer is not None
                    and _is_number_or_flag(source.layers.of)
                    and math.prod(jaxprs.shape(source.layers.of)) >= smallest
                    and not jaxprs.label(source.layers.of, self.labels) & self.loss.inputs.of_params
                )
            )
            if any(map(_is_random, jaxprs.live(self.program, atoms))):
                yield own, sum(map(jaxprs.mib, atoms))


def _has_layer_scan(closed: Any, flags: Sequence[bool]) -> bool:
    """Returns whether a jaxpr scans the layers of a stack.

    Args:
      closed: a jaxpr.
      flags: which inputs are stacks; the last ones, if there are more inputs than flags.
    """
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    flags = flags[len(flags) - len(inputs) :]
    if len(flags) != len(inputs) or not any(flags):
        return False
    eqns, _ = jaxprs.inline(closed, inputs, jaxprs.is_call)
    params = select(inputs, flags)
    batch = [v for v, flag in zip(inputs, flags, strict=True) if not flag]
    loss = Loss(closed, params, {v: k for k, v in enumerate(params)}, batch)
    if stacks.moved_equations(eqns, loss):
        return True
    labels = jaxprs.labels(eqns, loss.labels)

    def is_stack(atom: Any) -> bool:
        label = jaxprs.label(atom, labels)
        return bool(label) and not label & loss.of_batch

    return any(
        _has_layer_scan(body, list(map(is_stack, eqn.invars)))
        for eqn in eqns
        for body in _bodies(eqn)
    )


def _bodies(eqn: jex.JaxprEqn) -> list[Any]:
    """Returns the jaxprs inside an equation; not those for one device, which see no whole stack."""
    return [] if eqn.primitive.name == "shard_map" else jaxprs.bodies(eqn)


def _has_bodies(operation: Operation) -> bool:
    if isinstance(operation, Scan):
        return True
    return jaxprs.is_scan(operation) or bool(_bodies(operation))


def _is_number_or_flag(atom: Any) -> bool:
    """Returns whether a value may be weights or a mask; random keys are integers."""
    return jaxprs.is_float(atom) or jaxprs.dtype(atom) == np.bool_


def _is_random(operation: Operation) -> bool:
    if isinstance(operation, Scan):
        return False
    return operation.primitive.name.startswith(("random_", "threefry", "rng_"))


def _name(operation: Operation | None) -> str:
    """Names an operation, and the function that it calls."""
    if operation is None or isinstance(operation, Scan):
        return "`scan`"
    name = operation.primitive.name
    if name.startswith("custom_"):
        body = jaxprs.bodies(operation)[:1]
        info = getattr(jaxprs.open_jaxpr(body[0]), "debug_info", None) if body else None
        called = getattr(info, "func_name", "")
        if called and "<" not in called:
            return f"`{name}` ({called})"
    return f"`{name}`"
