"""Explains a step: which gradients exist together, and which stacks get a whole one, and why."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from lomo_jax.fused import jaxprs, stacks
from lomo_jax.fused.flags import select
from lomo_jax.fused.jaxprs import Operation, Scan
from lomo_jax.fused.stacks import Source
from lomo_jax.fused.trace import DenseSegment, LayerScan, TracedLoss

# `init` warns if whole stacks are a larger part of all trainable bytes.
_SMALL = 0.05


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the loss: a layer scan, or the operations before, between or after layer scans.

    The gradients of a piece exist together.
    """

    layers: int | None  # of a layer scan; None for a dense piece
    walked: tuple[str, ...]  # parameters that are updated layer by layer
    layer_mib: float  # the gradient of one layer of them
    whole: tuple[str, ...]  # parameters that are updated after this piece
    whole_mib: float  # their gradients
    held: tuple[
        str, ...
    ]  # parameters with a part of their gradient: an earlier piece uses them too
    held_mib: float  # their gradients so far

    @property
    def gradient_mib(self) -> float:
        """The gradients that exist together in this piece."""
        return self.layer_mib + self.whole_mib + self.held_mib


@dataclasses.dataclass(frozen=True)
class WholeStack:
    """Something as large as a stack that exists for all layers at once."""

    parameters: tuple[str, ...]
    mib: float
    # "gradient"; "zeros" for a gradient that is always zero; "value" for something else that is
    # computed before the layer scan.
    of: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        if self.of == "gradient":
            fact = f"{_list(self.parameters)}: the whole gradient, {self.mib:.3g} MiB, exists"
            return f"{fact} at once: {self.reason}; {self.remedy}"
        if self.of == "zeros":
            return f"{_list(self.parameters)}: its gradient is zero: {self.reason}; {self.remedy}"
        return (
            f"{self.mib:.3g} MiB are computed for all layers at once before the scan of "
            f"{_list(self.parameters)}, as a whole gradient would be: {self.reason}; {self.remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The gradients of a step, from `Step.explain`. Printed, it is a table.

    A gradient is counted in the dtype of its parameter, and in float32 where several parts of it
    are added: from pieces, layers or microbatches.
    """

    pieces: tuple[Piece, ...]  # in the order of the forward pass
    whole_stacks: tuple[WholeStack, ...]  # what a layer loop could have spared
    trainable_mib: float  # all trainable parameters

    @property
    def gradient_mib(self) -> float:
        """The most MiB of gradient that exist together."""
        return max((piece.gradient_mib for piece in self.pieces), default=0.0)

    def __str__(self) -> str:
        rows = [("piece", "gradient", "parameters")]
        for piece in self.pieces:
            title = "dense" if piece.layers is None else f"scan of {piece.layers} layers"
            parts = [
                (piece.layer_mib, piece.walked, "one layer of "),
                (piece.whole_mib, piece.whole, ""),
                (piece.held_mib, piece.held, "still, for an earlier piece: "),
            ]
            for mib, names, label in parts:
                if names:
                    rows.append((title, f"{mib:.3g} MiB", label + ", ".join(names)))
                    title = ""
        first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
        lines = []
        for title, mib, names in rows:
            start = f"{title:<{first}}  {mib:>{second}}  "
            lines += textwrap.wrap(
                names,
                100,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
            )
        lines.append(
            f"At most {self.gradient_mib:.3g} MiB of gradient exist together; the trainable "
            f"parameters are {self.trainable_mib:.3g} MiB."
        )
        for whole in self.whole_stacks:
            lines += textwrap.wrap(str(whole), 100, subsequent_indent="  ", break_long_words=False)
        return "\n".join(lines)

    @property
    def warning(self) -> str | None:
        """What `init` warns about: large `whole_stacks`; None if there is nothing to say."""
        # XLA need not store zeros.
        stored = [x for x in self.whole_stacks if x.of != "zeros"]
        large = [x for x in stored if x.mib > _SMALL * self.trainable_mib]
        return "\n".join(map(str, large)) or None


def explain(
    loss: TracedLoss, names: Sequence[str], trainable: Iterable[int], microbatches: int
) -> Explanation:
    """Explains the gradients of a loss.

    Args:
      loss: traced with one microbatch.
      names: of the leaves of the parameters.
      trainable: indices of the parameters to train.
      microbatches: their number.
    """
    trainable = list(trainable)
    return Explanation(
        pieces=tuple(_pieces(loss, names, microbatches)),
        whole_stacks=tuple(_whole_stacks(loss, names, trainable)),
        trainable_mib=sum(_mib(loss.inputs.params[i]) for i in trainable),
    )


def _pieces(loss: TracedLoss, names: Sequence[str], microbatches: int) -> Iterator[Piece]:
    parts: dict[int, list[int]] = collections.defaultdict(list)  # pieces that add to a gradient
    added: dict[int, int] = {}  # the last piece in which layers add to a gradient
    complete = {i: k for k, segment in enumerate(loss.program.segments) for i in segment.dense}
    for k, segment in enumerate(loss.program.segments):
        inputs, shared = _inputs(segment)
        for i in complete:
            if loss.inputs.params[i] in inputs:
                parts[i].append(k)
                if loss.inputs.params[i] in shared:
                    added[i] = k

    def mib(indices: Iterable[int], k: int) -> float:
        total = 0.0
        for i in indices:
            summed = microbatches > 1 or sum(part >= k for part in parts[i]) > 1
            total += _mib(loss.inputs.params[i], wide=summed or added.get(i, -1) >= k)
        return total

    def names_of(indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(names[i] for i in indices)

    for k, segment in enumerate(loss.program.segments):
        held = [i for i, first in complete.items() if first < k <= max(parts[i], default=first)]
        if not (segment.stacked or segment.dense or held):
            continue
        walked = [stack.index for stack in segment.stacked]
        layers = None
        if isinstance(segment, LayerScan):
            layers = segment.scan.length * max((_inner_layers(loss, i) for i in walked), default=1)
        yield Piece(
            layers,
            names_of(walked),
            sum(
                _mib(loss.inputs.params[i], microbatches > 1) / _num_layers(loss, i) for i in walked
            ),
            names_of(segment.dense),
            mib(segment.dense, k),
            names_of(held),
            mib(held, k),
        )


def _inputs(segment: DenseSegment | LayerScan) -> tuple[set[Any], set[Any]]:
    """Returns the inputs of a segment, and those of them that all layers share."""
    if isinstance(segment, DenseSegment):
        return set(segment.inputs), set()
    shared = set(jaxprs.variables(segment.scan.consts))
    return shared | set(jaxprs.variables(segment.scan.invars)), shared


def _num_layers(loss: TracedLoss, i: int) -> int:
    axes = np.atleast_1d(loss.layer_axes[i])
    return int(np.prod([jaxprs.shape(loss.inputs.params[i])[axis] for axis in axes]))


def _inner_layers(loss: TracedLoss, i: int) -> int:
    """Returns the number of layers in each group, of a stack of groups of layers."""
    axes = np.atleast_1d(loss.layer_axes[i])
    return int(np.prod([jaxprs.shape(loss.inputs.params[i])[axis] for axis in axes[1:]]))


def _mib(atom: Any, wide: bool = False) -> float:
    itemsize = jaxprs.dtype(atom).itemsize
    return _size(atom) * (max(itemsize, 4) if wide else itemsize) / 2**20


def _size(atom: Any) -> int:
    return int(np.prod(jaxprs.shape(atom)))


def _list(names: Sequence[str], most: int = 6) -> str:
    """Names parameters in a sentence."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


class _Reason(NamedTuple):
    why: str
    remedy: str
    of: str = "gradient"


_IN_A_LOOP = "move the layer scan out of the loop, for example with jax.vmap or microbatches="
_ONE_STACK = "pass the layers stacked, as one parameter [L, ...]"
_IN_THE_LAYER = "do it to one layer, in the scanned function"


def _whole_stacks(
    loss: TracedLoss, names: Sequence[str], trainable: Sequence[int]
) -> Iterator[WholeStack]:
    finder = _Finder(loss, names)
    found: dict[_Reason, list[int]] = {}
    for i in trainable:
        reason = None if i in loss.stacked else finder.reason(i)
        if reason is not None:
            found.setdefault(reason, []).append(i)
    for reason, indices in found.items():
        mib = sum(_mib(loss.inputs.params[i]) for i in indices)
        parameters = tuple(names[i] for i in indices)
        yield WholeStack(parameters, mib, reason.of, reason.why, reason.remedy)
    if all(reason.of == "zeros" for reason in found) and not loss.stacked and len(trainable) > 1:
        yield _NoLayerScan(
            tuple(names[i] for i in trainable),
            sum(_mib(loss.inputs.params[i]) for i in trainable),
            "gradient",
            "no trainable parameter is in a layer scan",
            "run the layers in jax.lax.scan over stacked parameters",
        )
    yield from finder.values(_SMALL * sum(_mib(loss.inputs.params[i]) for i in trainable))


class _NoLayerScan(WholeStack):
    def __str__(self) -> str:
        return (
            f"{self.reason}: the gradients of all {self.mib:.3g} MiB of parameters may exist at "
            f"once; {self.remedy}"
        )


class _Finder:
    """Finds out why a stack is not walked layer by layer."""

    def __init__(self, loss: TracedLoss, names: Sequence[str]):
        self.loss, self.names, self.program = loss, names, loss.operations
        self.active = stacks.active_variables(self.program, [loss.loss])
        self.labels = jaxprs.labels(self.program, loss.inputs.labels)
        self.sources = stacks.scan_sources(self.program, loss.inputs)
        self.walked = {
            id(segment.scan)
            for segment in loss.program.segments
            if isinstance(segment, LayerScan) and segment.stacked
        }

    def reason(self, i: int) -> _Reason | None:
        """Returns why parameter i gets a whole gradient; None if no layer loop could help."""
        var = self.loss.inputs.params[i]
        uses = [op for op in self.program if any(a is var for a in op.invars)]
        scanned = [op for op in uses if isinstance(op, Scan) and any(x is var for x in op.xs)]
        uses = [op for op in uses if self.is_active(op)]
        if not uses:
            unused = _Reason(
                "it reaches the loss only through stop_gradient, if at all",
                "freeze it with trainable=",
                "zeros",
            )
            return unused if scanned else None
        scanned = [op for op in scanned if op in uses]
        if scanned:
            return self._scanned(var, scanned, uses)
        for operation in self.program:
            if self.is_active(operation):
                reason = self._inside(i, operation)
                if reason is not None:
                    return reason
        if self._is_read_by_layer(var):
            return _Reason(
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
    ) -> _Reason | None:
        others = [
            op
            for op in uses
            if not isinstance(op, Scan) or any(a is var for a in [*op.consts, *op.carry])
        ]
        if others:
            return _Reason(
                f"it is used by {_name(others[0])} outside of its scan too",
                "do that in the scan, layer by layer, or to a parameter of its own",
            )
        places = [x for scan in scans for x in scan.layers if x.of is var]
        if len({layers.place.axis for layers in places}) > 1:
            return _Reason(
                "two scans of it have different layer axes", "scan it along the same axis"
            )
        follows = any(
            stacks.follows(b, a, self.program) for k, a in enumerate(scans) for b in scans[k + 1 :]
        )
        if follows:
            return _Reason(
                "two scans of it depend on each other",
                "concatenate the inputs of both, so that there is one scan, or give the second its "
                "own parameters",
            )
        if len(scans) > 1:
            return _Reason(
                "two scans of it read other layers or in another order",
                "let both read the same layers in the same order",
            )
        first, last = places[0].place.start, places[0].place.start + scans[0].length
        return _Reason(
            f"its scan reads layers {first} to {last - 1} only",
            "keep the other layers in a parameter of their own",
        )

    def _inside(self, i: int, operation: Operation) -> _Reason | None:
        """Returns the reason if a scan of the layers is inside `operation`."""
        inputs = list(operation.invars)
        if isinstance(operation, Scan) or jaxprs.is_scan(operation):
            # The stacks that a loop scans itself are not among them.
            scan = operation if isinstance(operation, Scan) else jaxprs.read_scan(operation)
            inputs = [*scan.consts, *scan.carry, *[None] * len(scan.xs)]
            inner = [scan.body]
        else:
            inner = jaxprs.bodies(operation)
        flags = [a is not None and self._depends_on_stack(a, i) for a in inputs]
        if not any(flags):
            return None
        where = _name(operation)
        if any(_has_layer_scan(body, flags) for body in inner):
            if isinstance(operation, Scan) or operation.primitive.name in ("scan", "while"):
                return _Reason(
                    f"its layer scan is inside another loop, {where}, and this needs accumulation "
                    "over the outer loop",
                    _IN_A_LOOP,
                )
            return _Reason(f"its layer scan is inside {where}", "move the layer scan out of it")
        var = self.loss.inputs.params[i]
        is_loop = not isinstance(operation, Scan) and jaxprs.is_scan(operation)
        if is_loop and len(jaxprs.shape(var)) > 2 and any(a is var for a in inputs):
            k = [a is var for a in inputs].index(True)
            body = inner[0]
            users = jaxprs.users(body, jaxprs.open_jaxpr(body).invars[k])
            if users and all(eqn.primitive.name in ("dynamic_slice", "gather") for eqn in users):
                return _Reason(
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
            for op in self.program:
                if not any(a is top for a in op.invars):
                    continue
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

    def _through(self, source: Source, var: jex.Var) -> _Reason | None:
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
                    return _Reason("it is one of a list of layers that the loss stacks", _ONE_STACK)
                return _Reason(
                    "the loss concatenates stacks along their layer axis",
                    "scan one after the other, or pass them as one stack",
                )
        if len(jaxprs.shape(var)) == 2:  # chunks of a matrix are no layers
            return None
        if name in ("reshape", "transpose"):
            return _Reason(
                f"it reaches its scan through `{name}`, which changes the layer axis",
                "keep the parameter in the shape that the scan reads, [L, ...]",
            )
        return _Reason(
            f"it reaches its scan through {_name(operation)}, which mixes the layers or is not "
            "known to keep them apart",
            _IN_THE_LAYER,
        )

    def values(self, least: float) -> Iterator[WholeStack]:
        """Finds random values of more than `least` MiB that are drawn for all layers."""
        for operation in self.program:
            if id(operation) not in self.walked or not isinstance(operation, Scan):
                continue
            own = [i for x in operation.xs if (i := self.loss.inputs.index(x)) is not None]
            smallest = min(_size(self.loss.inputs.params[i]) for i in own)
            computed = [
                source
                for source in self.sources
                if source.scan is operation
                and source.producer is not None
                and _is_number_or_flag(source.layers.of)
                and _size(source.layers.of) >= smallest
                and _mib(source.layers.of) > least
                and not jaxprs.label(source.layers.of, self.labels) & self.loss.inputs.of_params
            ]
            if not computed:
                continue
            atoms = list(jaxprs.variables(source.layers.of for source in computed))
            needed = jaxprs.live(self.program, atoms)
            if not any(map(_is_random, needed)):
                continue
            yield WholeStack(
                tuple(self.names[i] for i in own),
                sum(map(_mib, atoms)),
                "value",
                "random numbers are drawn for all layers",
                "draw them in the scanned function, from jax.random.split(key, L) as xs",
            )


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
    loss = stacks.Loss(closed, params, {v: k for k, v in enumerate(params)}, batch)
    if stacks.moved_equations(eqns, loss):
        return True
    labels = jaxprs.labels(eqns, loss.labels)

    def is_stack(atom: Any) -> bool:
        label = jaxprs.label(atom, labels)
        return bool(label) and not label & loss.of_batch

    return any(
        _has_layer_scan(body, list(map(is_stack, eqn.invars)))
        for eqn in eqns
        for body in jaxprs.bodies(eqn)
    )


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
