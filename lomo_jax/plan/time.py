"""The time of a compiled step, modelled from its scheduled program: nothing is run or measured.

A kernel takes as long as its FLOPs at a fraction of the GPU's peak, or as its bytes at a fraction
of the memory's bandwidth, whichever is longer, and the time to launch it. Kernels run one after the
other. Collectives, copies from the host and copies to the host are three queues beside them: the
start of a transfer joins its queue, and its end waits until it is done. A loop is a first pass, and
a second pass times the other iterations. The longest branch of a condition is taken, and a loop of
unknown length runs once.

The model leaves out: transfers that share the memory's bandwidth with kernels, or a switch or the
host's memory with other GPUs; caches; clocks below boost; the time between steps.
"""

from __future__ import annotations

import collections
import dataclasses

import jax

from lomo_jax.plan.gpus import GPU
from lomo_jax.plan.kernels import Reader, is_free
from lomo_jax.plan.program import Instruction, Program

# Assumed for all GPUs alike, as fractions of a data sheet's figure. No GPU was measured for them.
#
# Products: the best shape reaches 0.80 on an H100 and 0.86 on an A100 (Bekman, "Maximum achievable
# matmul FLOPS", github.com/stas00/ml-engineering); a step has others.
PRODUCTS = 0.7
# FlashAttention-2 (arXiv 2307.08691) reports 0.50 to 0.73 on an A100; masks and short rows cost.
ATTENTION = 0.45
BANDWIDTH = 0.8  # of memory: reductions and transposed reads beside plain copies
# Of a link. PCIe 4.0: 25 GB/s, and NCCL itself reckons with 24 (github.com/NVIDIA/nccl-tests/
# issues/307). NVLink of an H100: 0.84 (github.com/NVIDIA/nccl/issues/1264).
LINK = 0.8
LAUNCH = 2e-6  # seconds between two kernels, which is also what the smallest takes
LATENCY = {"collectives": 20e-6, "from host": 10e-6, "to host": 10e-6}  # seconds

# What a step spends its time on: label and field of `TimePlan`. They add up to the step.
SHARES = {
    "matrix products": "products_seconds",
    "attention": "attention_seconds",
    "update": "update_seconds",
    "other kernels": "other_seconds",
    "exposed transfers": "exposed_seconds",
}


@dataclasses.dataclass(frozen=True)
class TimePlan:
    """The time of one step, modelled and not measured, in seconds."""

    step_seconds: float  # the sum of the next five
    products_seconds: float  # matrix products, with what is fused into them
    attention_seconds: float  # kernels of flash attention or in a scope named `attention`
    update_seconds: float  # kernels of the optimizer
    other_seconds: float  # all other kernels
    exposed_seconds: float  # transfers while no kernel runs
    transfer_seconds: float  # transfers between devices, from the host and to it
    hidden_fraction: float | None  # of `transfer_seconds`; None without transfers
    tokens_per_second: float  # of all devices together
    flops: float  # of products and flash attention on each device, recomputation included


def read_time(compiled: jax.stages.Compiled, gpu: GPU, *, tokens: int) -> TimePlan:
    """Models the time of a step on a GPU.

    Args:
      compiled: the compiled step.
      gpu: the kind of GPU that it is compiled for.
      tokens: number of tokens of the whole batch.
    """
    program = Program.parse(compiled.as_text() or "")
    clock = _Clock(Reader(program), gpu)
    clock.run(program.entry)
    spent, flops = clock.spent, clock.flops
    transfers = spent["transfers"]
    return TimePlan(
        step_seconds=clock.now,
        products_seconds=spent["products"],
        attention_seconds=spent["attention"],
        update_seconds=spent["update"],
        other_seconds=spent["other"],
        exposed_seconds=spent["exposed"],
        transfer_seconds=transfers,
        hidden_fraction=max(0.0, 1 - spent["exposed"] / transfers) if transfers else None,
        tokens_per_second=tokens / clock.now,
        flops=flops,
    )


class _Clock:
    """Runs a program on paper."""

    def __init__(self, reader: Reader, gpu: GPU) -> None:
        self._reader, self._gpu = reader, gpu
        self.now = 0.0  # seconds, like all times here
        self.flops = 0.0
        self.spent = collections.defaultdict[str, float](float)
        self._free = dict.fromkeys(LATENCY, 0.0)  # when a queue has done all that is in it
        self._ends: dict[str, float] = {}  # of the transfers under way, by their start's name

    def run(self, computation: str) -> None:
        """Runs the instructions of a computation."""
        for instruction in self._reader.program.computations[computation]:
            opcode = instruction.opcode
            if opcode == "while":
                self._loop(instruction)
            elif opcode == "conditional":
                self.run(max(instruction.subroutines, key=self._time_alone))
            elif opcode == "call":
                self.run(instruction.subroutines[0])
            elif opcode.endswith("-done"):
                self._wait(self._ends.pop(instruction.operands[0], 0.0))
            elif not is_free(instruction):
                self._start(instruction)

    def _time_alone(self, computation: str) -> float:
        clock = _Clock(self._reader, self._gpu)
        clock.run(computation)
        return clock.now

    def _loop(self, loop: Instruction) -> None:
        # XLA does not evaluate the condition of a loop whose trip count it knows.
        _, body = loop.subroutines
        trips = 1 if loop.trip_count is None else loop.trip_count
        for _ in range(min(trips, 1)):
            self.run(body)
        if trips < 2:
            return
        now, spent, flops = self.now, dict(self.spent), self.flops
        self.run(body)
        others = trips - 2
        passed = others * (self.now - now)
        self.now += passed
        self._free = {queue: end + passed for queue, end in self._free.items()}
        self.flops += others * (self.flops - flops)
        for what, seconds in self.spent.items():
            self.spent[what] += others * (seconds - spent[what])

    def _wait(self, end: float) -> None:
        self.spent["exposed"] += max(0.0, end - self.now)
        self.now = max(self.now, end)

    def _start(self, instruction: Instruction) -> None:
        """Starts a transfer, or runs a kernel to its end."""
        queue, seconds = self._transfer(instruction)
        if queue is None:
            self._run_kernel(instruction)
            return
        self.spent["transfers"] += seconds
        end = self._free[queue] = max(self.now, self._free[queue]) + seconds
        if instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes:
            self._ends[instruction.name] = end
        else:
            self._wait(end)

    def _transfer(self, instruction: Instruction) -> tuple[str | None, float]:
        """Returns the queue of a transfer and its seconds; the queue of a kernel is None."""
        if instruction.opcode == "async-start":
            (wrapped,) = instruction.subroutines
            instruction = self._reader.program.computations[wrapped][-1]
        gpu, traffic = self._gpu, self._reader.traffic(instruction)
        if (sent := self._reader.sent(instruction)) is not None:
            queue, size, bandwidth = "collectives", sent, gpu.link
        elif traffic.from_host or traffic.to_host:
            queue = "from host" if traffic.from_host else "to host"
            size, bandwidth = traffic.from_host + traffic.to_host, gpu.pcie
        else:
            return None, 0.0
        return queue, size / (LINK * bandwidth * 1e9) + LATENCY[queue]

    def _run_kernel(self, instruction: Instruction) -> None:
        computing, kind, scope = 0.0, "other", self._reader.scope(instruction)
        for product in self._reader.products(instruction):
            peak = self._gpu.product_flops(product.dtype, exact=product.exact)
            computing += product.flops / (peak * (ATTENTION if product.is_attention else PRODUCTS))
            kind = "attention" if product.is_attention else "products"
            self.flops += product.flops
        if "/attention/" in scope:
            kind = "attention"
        elif kind == "other" and "/update/" in scope:
            kind = "update"
        moving = self._reader.traffic(instruction).device / (BANDWIDTH * self._gpu.bandwidth * 1e9)
        seconds = max(computing, moving) + LAUNCH
        self.spent[kind] += seconds
        self.now += seconds
