"""Weak scaling on paper: the bytes that a step sends, one sequence of 1024 tokens on each GPU.

    JAX_PLATFORMS=cpu python benchmarks/wire.py [--model=llama65b] [--overlap] [--json]

Needs `pip install 'lomo_jax[train,cuda]'`, but no GPU. Nothing is run or measured: XLA compiles the
step of `train.py` for RTX 3090s, with AdaLomo and nothing in host memory, and the collectives are
counted in the program that it makes. `--overlap` turns XLA's latency-hiding scheduler on.

Counted is what a ring needs. Of n GPUs with S bytes each, every one sends S (n - 1) in an
all-gather, S (n - 1) / n in a reduce-scatter or an all-to-all, 2 S (n - 1) / n in an all-reduce.
A ring visits one machine of 8 GPUs after the other, and passes the network once for each. "Hidden"
is the part of the bytes with a matrix product between the start of the collective and its end.
"""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lomo_jax import Offload
from lomo_jax.plan import gpus
from lomo_jax.plan.runs import Compiled, compile_run
from lomo_jax.training import MeshConfig
from lomo_jax.training.config import parse

CONFIGS = Path(__file__).parents[1] / "configs"
LENGTH = 1024
MACHINE = 8  # GPUs
# (data, fsdp). The MLP of LLaMA-7B, 11008, is not divided by 512.
MESHES = {
    "llama7b": [(1, 1), (1, 8), (1, 64), (8, 8), (8, 64)],
    "llama65b": [(1, 1), (1, 8), (1, 64), (8, 8), (1, 512), (8, 64)],
}
# What a device sends, for each byte that it puts in, among n.
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
UNKNOWN = {"conditional", "collective-broadcast", "ragged-all-to-all", "send", "recv"}

# Of XLA's text: `%name = SHAPE opcode(operands)`, where SHAPE may be a tuple; an array in a SHAPE;
# a matrix product; and the computations that an instruction runs.
_COMPUTATION = re.compile(r"^(ENTRY )?(%\S+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)")
_ARRAY = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")
_PRODUCT = re.compile(r'gemm_fusion"|custom_call_target="__cu(?:blas|dnn)')
_CALLED = re.compile(r"(?:calls|to_apply|body)=(%[\w.-]+)")


class Collective(NamedTuple):
    """Devices that exchange data."""

    kind: str
    sent: float  # bytes that a device sends, each time
    leaves: float  # bytes that a machine sends to others, each time
    times: int  # in a step
    in_layer: bool
    hides: bool  # a matrix product stands between its start and its end


Instruction = tuple[str, str, list[str], str]  # value, opcode, operands, line


def collectives(text: str, num_layers: int) -> Iterator[Collective]:
    """Yields those of a compiled step; a loop over layers is known by its length, `num_layers`."""
    entry, computations, sizes = _read(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1

    def walk(name: str, times: int, in_layer: bool, hides: bool) -> Iterator[Collective]:
        for place, (_, opcode, operands, line) in enumerate(computations[name]):
            kind = opcode.removesuffix("-start")
            if kind in UNKNOWN:
                raise ValueError(f"{kind}: its bytes are not known")
            hides_too = hides or (kind != opcode and _hides(computations[name][place:]))
            if kind in SENT:
                put_in = sum(sizes[operand] for operand in operands)
                sent, leaves = _bytes(kind, put_in, line, devices)
                yield Collective(kind, sent, leaves, times, in_layer, hides_too)
            # An -update or -done names the computation of its -start again.
            elif not kind.endswith(("-update", "-done")):
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if kind == "while" and known is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()[:80]}")
                trips = int(known[1]) if known else 1
                is_layers = known is not None and trips == num_layers
                for called in _CALLED.findall(line):
                    yield from walk(called, times * trips, in_layer or is_layers, hides_too)

    return walk(entry, 1, False, False)


def _hides(instructions: list[Instruction]) -> bool:
    """Returns whether a product comes before what uses the first of these instructions."""
    for _, _, operands, line in instructions[1:]:
        if instructions[0][0] in operands or _PRODUCT.search(line):
            return instructions[0][0] not in operands
    return False


def _read(text: str) -> tuple[str, dict[str, list[Instruction]], dict[str, int]]:
    """Returns the name of the entry, the computations, and the bytes of every value."""
    name = entry = ""
    computations: dict[str, list[Instruction]] = {}
    sizes = {}
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            name = computation[2]
            computations[name] = []
            entry = name if computation[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            value, shape, opcode, operands = instruction.groups()
            sizes[value] = sum(
                math.prod(_numbers(dims)) * math.ceil(int(bits or 8) / 8)
                for bits, dims in _ARRAY.findall(shape)
            )
            names = re.findall(r"%[\w.-]+", operands)
            computations[name].append((value, opcode, names, line))
    return entry, computations, sizes


def _bytes(kind: str, put_in: int, line: str, devices: int) -> tuple[float, float]:
    """Returns what a device sends, and what a machine sends to others."""
    if kind == "collective-permute":
        pairs = np.array(re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[1]), int)
        return put_in, put_in * _leave(*pairs.T)
    group_GxN = groups(line.split("replica_groups=")[1], devices)
    sent = put_in * SENT[kind](group_GxN.shape[1])
    # A ring sends to the next; in an all-to-all each of the others gets its share.
    shifts = range(1, group_GxN.shape[1]) if kind == "all-to-all" else [1]
    ways = np.mean([_leave(group_GxN, np.roll(group_GxN, -s, axis=1)) for s in shifts or [0]])
    return sent, sent * float(ways)


def _leave(sources: np.ndarray, targets: np.ndarray) -> int:
    """Returns how many of these links lead from the first machine to others."""
    return int(np.sum((sources // MACHINE == 0) & (targets // MACHINE != 0)))


def groups(text: str, devices: int) -> np.ndarray:
    """Returns the groups of devices that an instruction connects, int [groups, devices of one].

    XLA writes `{{0,1},{2,3}}`; `{}` for one group of all; `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`,
    the groups' shape in front; or `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`, the axes
    along which a group extends.
    """
    if mesh := re.match(r"mesh\[([^]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along = re.findall(r"'(\w+)'", mesh[3])
        if ":" in mesh[3]:
            raise ValueError(f"a group along a part of an axis: {mesh[0]}")
        ids = _iota(mesh[2] or f"[{devices}]").reshape(list(sizes.values()))
        ids = np.moveaxis(ids, [list(sizes).index(a) for a in along], range(-len(along), 0))
        return ids.reshape(-1, math.prod(sizes[a] for a in along))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if text.startswith("{}"):
        return np.arange(devices)[None]
    raise ValueError(f"unknown groups of devices: {text[:80]}")


def _iota(text: str) -> np.ndarray:
    """Reads `[2,3]T(1,0)`: 0, 1, 2, ... in this shape, transposed."""
    shape, *order = (_numbers(part) for part in re.findall(r"[\d,]*\d", text)[:2])
    return np.arange(math.prod(shape)).reshape(shape).transpose(*order).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def count(run: Compiled, num_layers: int) -> dict[str, Any]:
    """Returns the memory of a run, GiB, and what it sends, bytes."""
    layer, step = dict.fromkeys(SENT, 0.0), dict.fromkeys(SENT, 0.0)
    hides = leaves = 0.0
    for found in collectives(run.executable.as_text() or "", num_layers):
        sent = found.times * found.sent
        step[found.kind] += sent
        layer[found.kind] += sent / num_layers if found.in_layer else 0
        hides += sent if found.hides else 0
        leaves += found.times * found.leaves
    sent = {"layer": layer, "step": step, "machine": leaves}
    share = hides / (sum(step.values()) or 1)
    return {"memory_gib": run.plan.total_gib, **sent, "hidden": share}


def rows(model: str, *, overlap: bool) -> Iterator[dict[str, Any]]:
    """Yields what `count` finds for each mesh, fused and not, or why it cannot be compiled."""
    options = {"xla_gpu_enable_latency_hiding_scheduler": True} if overlap else None
    base = parse(["wire", "--config", str(CONFIGS / f"{model}.py")], for_plan=True)
    for (data, fsdp), fused in ((mesh, fused) for mesh in MESHES[model] for fused in (True, False)):
        shape = {"batch_size": data * fsdp, "sequence_length": LENGTH}
        config = dataclasses.replace(
            base, fused=fused, mesh=MeshConfig(data, fsdp), offload=Offload(), **shape
        )
        row = {"model": model, "data": data, "fsdp": fsdp, "fused": fused}
        try:
            run = compile_run(config, gpus.find("rtx3090"), data * fsdp, options)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            yield row | {"error": str(error).splitlines()[0]}
        else:
            yield row | count(run, config.model.architecture.num_layers)


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the table, in GiB of memory and GB sent."""
    mesh = f"{row['data']} x {row['fsdp']}"
    head = [row["model"], mesh, "fused" if row["fused"] else "reference"]
    if "error" in row:
        return [*head, f"does not compile: {row['error']}"]
    *three, exchanged, permuted = row["step"].values()
    three += [exchanged + permuted, sum(row["step"].values()), row["machine"]]
    layer = [f"{sent / 1e9:.3f}" for sent in list(row["layer"].values())[:3]]
    step = [f"{sent / 1e9:.1f}" for sent in three]
    return [*head, f"{row['memory_gib']:.1f}", *layer, *step, f"{row['hidden']:.0%}"]


def main() -> None:
    """Prints the table, in Markdown, or a JSON object a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MESHES, help="one of them only")
    parser.add_argument("--overlap", action="store_true", help="XLA's latency-hiding scheduler")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    arguments = parser.parse_args()
    show = json.dumps if arguments.json else lambda row: f"| {' | '.join(cells(row))} |"
    if not arguments.json:
        print(f"XLA of jaxlib {metadata.version('jaxlib')}, RTX 3090: planned, not measured; GB")
        titles = "model | data x fsdp | step | GiB | layer: gather | scatter | reduce"
        titles += " | step: gather | scatter | reduce | other | all | a machine | hidden"
        print("|", titles, "|\n|" + "---|" * (titles.count("|") + 1))
    for model in [arguments.model] if arguments.model else MESHES:
        for row in rows(model, overlap=arguments.overlap):
            print(show(row), flush=True)


if __name__ == "__main__":
    main()
