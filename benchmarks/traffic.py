"""Plans the memory traffic of the update of LLaMA-7B on a GPU, from its compiled program.

    JAX_PLATFORMS=cpu python benchmarks/traffic.py [GPU]

Needs `lomo_jax[cuda]` but no GPU; nothing is run. Each kernel of the update reads its operands and
writes its result, as if no cache helped. The share is of a step of 4096 tokens whose matrix
products reach 45 % of the GPU's peak, with the update at full memory bandwidth: planned, not
measured.
"""

import sys
from collections.abc import Iterator

from jax_step import compile_row
from rows import ROWS, SIZES

from lomo_jax.flops import flops_per_token
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import Program, find, peak_flops
from lomo_jax.plan.program import VIEWS, Array

SIZE, UTILISATION = SIZES["7b"], 0.45
PARAMETERS = 6.738e9


def kernels(program: Program) -> Iterator[tuple[str, int]]:
    """Yields the name of each kernel of the update, and its bytes in a step."""
    results = {name: found.arrays for name, found in program.instructions().items()}
    for instructions, trips in program.scheduled():
        layers = SIZE.num_layers if trips else 1
        for instruction in instructions:
            if "/update/" not in instruction.op_name or instruction.opcode in VIEWS | {"constant"}:
                continue
            # A kernel that writes a layer into a stack does not read the stack.
            read = (results[name] for name in instruction.operands)
            moved = [instruction.arrays, *(a for a in read if a != instruction.arrays)]
            one = sum(layer_size(array, layers) for arrays in moved for array in arrays)
            yield instruction.name, layers * one


def layer_size(array: Array, layers: int) -> int:
    """Returns the bytes of an array, of one layer if it stacks `layers`."""
    is_stack = layers > 1 and len(array.shape) > 1 and array.shape[0] == layers
    return array.size // layers if is_stack else array.size


def main(name: str = "h100") -> None:
    """Prints the table, in Markdown."""
    gpu, config = find(name), DecoderConfig(**SIZE.architecture())
    peak = peak_flops(gpu.device_kind)
    assert peak is not None, "every GPU of the table has one"
    products = SIZE.tokens * flops_per_token(config, SIZE.length) / (UTILISATION * peak)
    print(f"LLaMA-7B, {SIZE.tokens} tokens, {gpu.device_kind}, planned")
    print("| update | bytes a parameter | ms | share of a step |")
    print("|---|---|---|---|")
    for row in ROWS:
        if row.kind != "fused" or row.options:
            continue
        program = Program.parse(compile_row(row, SIZE, gpu).as_text() or "")
        moved = sum(size for _, size in kernels(program))
        seconds = moved / (gpu.bandwidth * 1e9)
        share = seconds / (seconds + products)
        each, ms = moved / PARAMETERS, 1e3 * seconds
        print(f"| {row.optimizer} | {each:.1f} | {ms:.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
