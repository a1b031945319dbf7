"""Bytes of memory that the update of LLaMA-7B reads and writes on a GPU, from XLA's program for it.

    JAX_PLATFORMS=cpu python benchmarks/traffic.py [GPU]

Needs `lomo_jax[cuda]` and no GPU; nothing is run. Each kernel of the update counts what it is given
and what it returns, as if no cache helped. The share is that of a step of 4096 tokens whose
products reach 45 % of the GPU's peak, with the update at the full bandwidth of its memory: a plan,
not a measurement.
"""

import math
import re
import sys
from collections.abc import Iterator

from planned import compile_row, find
from rows import ROWS, SIZES

from lomo_jax.flops import flops_per_token, peak_flops
from lomo_jax.models import LlamaConfig

SIZE, UTILISATION = SIZES["7b"], 0.45
_BYTES = {"pred": 1, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "f32": 4, "c64": 8}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
_NO_KERNEL = ("get-tuple-element", "bitcast", "tuple", "parameter", "constant", "while")


def kernels(hlo: str) -> Iterator[tuple[str, int]]:
    """Yields what each kernel of the update is called, and its bytes in a step."""
    types: dict[str, str] = {}
    is_kernel = in_loop = False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            is_kernel = not line.startswith(("%fused", "%wrapped", "%gemm", "%triton"))
            in_loop = not line.startswith("ENTRY")
        match = _INSTRUCTION.match(line)
        if match is None or not is_kernel:
            continue
        name, shape, opcode, operands = match.groups()
        types[name] = shape
        if "/update/" not in line or opcode in _NO_KERNEL:
            continue
        given = [types.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands)]
        # A stack that gets a layer is not read but where it is a layer's turn.
        moved = [shape, *(other for other in given if other != shape)]
        layers = SIZE.num_layers if in_loop else 1
        yield name, layers * sum(size(other, layers) for other in moved)


def size(shape: str, layers: int) -> int:
    """Returns the bytes of arrays; of one that stacks layers, those of a layer."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        lengths = [int(n) for n in dims.split(",") if n]
        stacked = layers > 1 and len(lengths) > 1 and lengths[0] == layers
        total += _BYTES.get(dtype, 0) * math.prod(lengths[1:] if stacked else lengths)
    return total


def main(name: str = "h100") -> None:
    """Prints the table, in Markdown."""
    gpu, config = find(name), LlamaConfig(**SIZE.architecture())
    peak = peak_flops(gpu.title)
    if peak is None:
        raise SystemExit(
            f"error: the peak of {gpu.title} is not known; add it to lomo_jax/flops.py"
        )
    products = SIZE.tokens * flops_per_token(config, SIZE.length) / (UTILISATION * peak)
    print(f"LLaMA-7B, {SIZE.tokens} tokens, {gpu.title}, planned")
    print("| update | bytes a parameter | ms | share of a step |")
    print("|---|---|---|---|")
    for row in ROWS:
        if row.kind != "fused" or row.options:
            continue
        hlo = compile_row(row, SIZE, gpu).as_text() or ""
        moved = sum(count for _, count in kernels(hlo))
        seconds = moved / (gpu.bandwidth * 1e9)
        each = moved / 6.738e9
        share = seconds / (seconds + products)
        print(f"| {row.optimizer} | {each:.1f} | {1e3 * seconds:.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
