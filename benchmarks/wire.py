"""Plans weak scaling: the bytes that GPUs send in a step, one sequence of 1024 tokens on each.

    JAX_PLATFORMS=cpu python benchmarks/wire.py [--model=llama65b] [--json]

Needs `pip install 'lomo_jax[train,cuda]'` but no GPU; nothing is run or measured. XLA compiles the
training step for RTX 3090s, with AdaLomo and nothing offloaded, and the collectives are counted in
the compiled program.

The count is for ring algorithms. Of n GPUs with S bytes each, each sends S (n - 1) in an
all-gather, S (n - 1) / n in a reduce-scatter or an all-to-all, and 2 S (n - 1) / n in an
all-reduce. A ring visits one machine of 8 GPUs after the other, and crosses the network once per
machine. "Hidden" is the share of the bytes with a matrix product between the start of the
collective and its end.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from lomo_jax import Offload
from lomo_jax.plan import Program, gpus
from lomo_jax.plan.kernels import SENT
from lomo_jax.plan.program import Instruction, replica_groups, source_target_pairs
from lomo_jax.training import MeshConfig
from lomo_jax.training.config_reader import parse
from lomo_jax.training.planning import CompiledRun, compile_run

LENGTH = 1024
MACHINE = 8  # GPUs
# (data, fsdp). 512 does not divide the width of LLaMA-7B's MLP, 11008.
MESHES = {
    "llama7b": [(1, 1), (1, 8), (1, 64), (8, 8), (8, 64)],
    "llama65b": [(1, 1), (1, 8), (1, 64), (8, 8), (1, 512), (8, 64)],
}
UNKNOWN = {"conditional", "collective-broadcast", "ragged-all-to-all", "send", "recv"}
_PRODUCT = re.compile(r'gemm_fusion"|custom_call_target="__cu(?:blas|dnn)')


class Collective(NamedTuple):
    """One collective operation."""

    kind: str
    sent: float  # bytes that a device sends, each time
    leaving: float  # bytes that a machine sends to others, each time
    times: int  # in a step
    in_layer: bool
    hidden: bool  # a matrix product runs between its start and its end


def collectives(program: Program, num_layers: int) -> Iterator[Collective]:
    """Yields the collectives of a step; a loop of `num_layers` iterations is over the layers."""
    sizes = {name: instruction.size for name, instruction in program.instructions().items()}
    for instructions, trips in program.scheduled():
        for place, instruction in enumerate(instructions):
            kind = instruction.opcode.removesuffix("-start")
            if kind in UNKNOWN:
                raise ValueError(f"{kind}: the bytes that it sends are unknown")
            if kind not in SENT:
                continue
            times = 1
            for trip_count in trips:
                if trip_count is None:
                    raise ValueError(f"{instruction.name} is in a loop of unknown length")
                times *= trip_count
            operand = sum(sizes[name] for name in instruction.operands)
            sent, leaving = _bytes(kind, operand, instruction, program.devices)
            hidden = kind != instruction.opcode and _hides(instructions[place:])
            yield Collective(kind, sent, leaving, times, num_layers in trips, hidden)


def _hides(instructions: Sequence[Instruction]) -> bool:
    """Returns whether a product comes between the first instruction and its first use."""
    first = instructions[0].name
    for instruction in instructions[1:]:
        is_use = first in instruction.operands
        if is_use or _PRODUCT.search(instruction.attributes):
            return not is_use
    return False


def _bytes(kind: str, operand: int, instruction: Instruction, devices: int) -> tuple[float, float]:
    """Returns the bytes that a device sends, and that a machine sends to others."""
    if kind == "collective-permute":
        return operand, operand * _leaving(*source_target_pairs(instruction).T)
    group_GxN = replica_groups(instruction, devices)
    sent = operand * SENT[kind](group_GxN.shape[1])
    # In a ring a device sends to the next one; in an all-to-all it sends a share to each other one.
    shifts = range(1, group_GxN.shape[1]) if kind == "all-to-all" else [1]
    links = np.mean([_leaving(group_GxN, np.roll(group_GxN, -s, axis=1)) for s in shifts or [0]])
    return sent, sent * float(links)


def _leaving(sources: np.ndarray, targets: np.ndarray) -> int:
    """Returns how many of these links lead from the first machine to others."""
    return int(np.sum((sources // MACHINE == 0) & (targets // MACHINE != 0)))


def count(run: CompiledRun, num_layers: int) -> dict[str, Any]:
    """Returns the memory of a run, GiB, and the bytes that it sends."""
    layer, step = dict.fromkeys(SENT, 0.0), dict.fromkeys(SENT, 0.0)
    hidden = leaving = 0.0
    for found in collectives(Program.parse(run.executable.as_text() or ""), num_layers):
        sent = found.times * found.sent
        step[found.kind] += sent
        layer[found.kind] += sent / num_layers if found.in_layer else 0
        hidden += sent if found.hidden else 0
        leaving += found.times * found.leaving
    sent = {"layer": layer, "step": step, "machine": leaving}
    share = hidden / (sum(step.values()) or 1)
    return {"memory_gib": run.plan.total_gib, **sent, "hidden": share}


def rows(model: str) -> Iterator[dict[str, Any]]:
    """Yields `count` of the fused and the reference step for each mesh, or a compiler error."""
    base = parse(["wire", "--config", model], for_plan=True)
    for (data, fsdp), fused in ((mesh, fused) for mesh in MESHES[model] for fused in (True, False)):
        shape = {"batch_size": data * fsdp, "sequence_length": LENGTH}
        config = dataclasses.replace(
            base, fused=fused, mesh=MeshConfig(data, fsdp), offload=Offload(), **shape
        )
        row = {"model": model, "data": data, "fsdp": fsdp, "fused": fused}
        try:
            run = compile_run(config, gpus.find("rtx3090"), data * fsdp)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            yield row | {"error": str(error).splitlines()[0]}
        else:
            yield row | count(run, config.model.architecture.num_layers)


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a table row: memory in GiB, bytes in GB."""
    mesh = f"{row['data']} x {row['fsdp']}"
    head = [row["model"], mesh, "fused" if row["fused"] else "reference"]
    if "error" in row:
        return [*head, f"does not compile: {row['error']}"]
    *main, exchanged, permuted = row["step"].values()
    main += [exchanged + permuted, sum(row["step"].values()), row["machine"]]
    layer = [f"{sent / 1e9:.3f}" for sent in list(row["layer"].values())[:3]]
    step = [f"{sent / 1e9:.1f}" for sent in main]
    return [*head, f"{row['memory_gib']:.1f}", *layer, *step, f"{row['hidden']:.0%}"]


def main() -> None:
    """Prints the table, in Markdown, or one JSON object per line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MESHES, help="only this model")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args()
    show = json.dumps if arguments.json else lambda row: f"| {' | '.join(cells(row))} |"
    if not arguments.json:
        print(f"XLA of jaxlib {metadata.version('jaxlib')}, RTX 3090: planned, not measured; GB")
        titles = "model | data x fsdp | step | GiB | layer: gather | scatter | reduce"
        titles += " | step: gather | scatter | reduce | other | all | a machine | hidden"
        print("|", titles, "|\n|" + "---|" * (titles.count("|") + 1))
    for model in [arguments.model] if arguments.model else MESHES:
        for row in rows(model):
            print(show(row), flush=True)


if __name__ == "__main__":
    main()
