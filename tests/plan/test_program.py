"""Parsing compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lomo_jax.plan.program import Program, replica_groups, source_target_pairs

L, B, D = 6, 32, 64


def scan(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w), x

    x, inputs = jax.lax.scan(layer, x, w)
    return jnp.sum(x**2) + inputs.sum(), x


def nested(x):
    def inner(x, _):
        return jnp.sin(x), None

    def outer(x, _):
        return jax.lax.scan(inner, jnp.cos(x), length=4)[0], None

    return jax.lax.scan(outer, x, length=3)[0]


def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jnp.sinh(x), x)


def branch(which, x):
    return jax.lax.cond(which, lambda x: jnp.sort(jnp.sin(x)), lambda x: jnp.cumsum(x), x)


PROGRAMS = {
    "scan": (scan, (L, D, D), (B, D)),
    "gradient of a scan": (jax.grad(lambda w, x: scan(w, x)[0]), (L, D, D), (B, D)),
    "nested": (nested, (D,)),
    "until": (until, (D,)),
}


@functools.cache
def text(name):
    function, *shapes = PROGRAMS[name]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def scheduled(program):
    """Returns every scheduled instruction with the trip counts of its loops."""
    return [(i, trips) for instructions, trips in program.scheduled() for i in instructions]


def trips_of(name, operation):
    found = scheduled(Program.parse(text(name)))
    return {trips for i, trips in found if i.op_name.rsplit("/", 1)[-1] == operation}


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_instructions_are_parsed(name):
    program = Program.parse(text(name))
    instructions = [line for line in text(name).splitlines() if line.startswith("  ")]
    assert len(program.instructions()) == len(instructions)
    for computation in program.computations.values():
        defined = set()
        for instruction in computation:
            assert set(instruction.operands) <= defined
            defined.add(instruction.name)
            assert set(instruction.subroutines) <= set(program.computations)


def test_arguments_and_results_of_a_program():
    program = Program.parse(text("scan"))
    entry = program.computations[program.entry]
    arguments = {i.op_name: i for i in entry if i.opcode == "parameter"}
    assert [str(arguments[name].arrays[0]) for name in "wx"] == [
        "float32[6,64,64]",
        "float32[32,64]",
    ]
    assert arguments["w"].size == L * D * D * 4
    assert entry[-1].opcode == "tuple"
    assert [array.shape for array in entry[-1].arrays] == [(), (B, D)]
    assert entry[-1].size == 4 + B * D * 4
    assert not any(array.on_host for i in entry for array in i.arrays)
    assert program.devices == 1


def test_trip_counts_of_instructions_inside_loops():
    assert trips_of("scan", "tanh") == {(L,)}
    assert trips_of("scan", "integer_pow") == {()}
    assert trips_of("nested", "cos") == {(3,)}
    assert trips_of("nested", "sin") == {(3, 4)}


def test_an_unknown_trip_count_is_none():
    assert trips_of("until", "sinh") == {(None,)}


def test_instructions_inside_a_kernel_are_not_scheduled():
    program = Program.parse(text("scan"))
    names = [i.name for i, _ in scheduled(program)]
    assert len(names) == len(set(names))
    fusions = {i.name for i in program.instructions().values() if i.opcode == "fusion"}
    assert fusions
    assert fusions <= set(names)
    assert len(names) < len(program.instructions())
    computations = [instructions[0].name for instructions, _ in program.scheduled()]
    assert len(computations) == 3  # entry, loop condition and loop body


def test_both_branches_of_a_condition_are_scheduled():
    arguments = (jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((1000,), jnp.float32))
    program = Program.parse(jax.jit(branch).lower(*arguments).compile().as_text())
    (condition,) = (i for i, _ in scheduled(program) if i.opcode == "conditional")
    assert len(condition.subroutines) == 2
    scopes = {i.op_name for i, _ in scheduled(program)}
    for name in ("sin", "cumsum"):
        assert any(name in scope.split("/")[-1] for scope in scopes)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int4", "int8", "uint32", "float16", "bfloat16", "float32", "float8_e4m3fn"],
)
def test_sizes_and_names_of_dtypes(dtype):
    x = jnp.zeros((3, 5), dtype)
    program = Program.parse(jax.jit(lambda x: x.T).lower(x).compile().as_text())
    (array,) = next(i for i, _ in scheduled(program) if i.opcode == "parameter").arrays
    assert array.size == 15 * np.dtype(dtype).itemsize
    if not dtype.startswith("float8"):  # its name stays XLA's, f8e4m3fn
        assert str(array) == f"{dtype}[3,5]"


def test_collectives_of_several_devices():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding)
    text = jax.jit(lambda x: x.sum()).lower(x).compile().as_text()
    program = Program.parse(text)
    assert program.devices == 8
    (reduce,) = (i for i, _ in scheduled(program) if i.opcode.startswith("all-reduce"))
    assert reduce.size == 4
    assert "replica_groups=" in reduce.attributes
    argument = next(i for i, _ in scheduled(program) if i.opcode == "parameter")
    assert argument.arrays[0].shape == (2, 4)  # a shard


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        (("a",), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (("b",), [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (("a", "c"), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (("b", "c"), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (("a", "b", "c"), [list(range(8))]),
    ],
)
def test_the_groups_of_a_collective(axes, groups):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    everywhere = PartitionSpec(("a", "b", "c"))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, axes),
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, everywhere))
    program = Program.parse(jax.jit(total).lower(x).compile().as_text())
    (reduce,) = (i for i, _ in scheduled(program) if i.opcode.startswith("all-reduce"))
    found = replica_groups(reduce, program.devices)
    assert sorted(map(sorted, found.tolist())) == groups


@pytest.mark.parametrize("axis", range(3))
def test_the_groups_of_a_collective_that_the_partitioner_adds(axis):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b", "c"))
    x = jax.ShapeDtypeStruct((4, 4, 4), jnp.float32, sharding=sharding)
    program = Program.parse(jax.jit(lambda x: x.sum(axis)).lower(x).compile().as_text())
    (reduce,) = (i for i, _ in scheduled(program) if i.opcode.startswith("all-reduce"))
    expected = np.moveaxis(np.arange(8).reshape(2, 2, 2), axis, -1).reshape(4, 2)
    found = replica_groups(reduce, program.devices)
    assert sorted(map(sorted, found.tolist())) == expected.tolist()


def test_the_pairs_of_a_permutation():
    mesh, spec = jax.make_mesh((8,), ("x",)), PartitionSpec("x")
    ring = [(k, (k + 1) % 8) for k in range(8)]
    shift = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "x", ring), mesh=mesh, in_specs=spec, out_specs=spec
    )
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
    program = Program.parse(jax.jit(shift).lower(x).compile().as_text())
    (permute,) = (i for i, _ in scheduled(program) if "permute" in i.opcode)
    assert [tuple(pair) for pair in source_target_pairs(permute).tolist()] == ring
