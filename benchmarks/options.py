"""Measures the cost of each option of the fused step on a CPU, in time and memory.

    JAX_PLATFORMS=cpu python benchmarks/options.py

Time is the ratio to the step without the option in the same dtype: the median over rounds in which
every step runs once, so that load on the machine slows all of them alike. Memory is the temporaries
that XLA plans. The model is the one of `temporaries.py` with 8 layers, trained with AdaLomo.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from temporaries import B, T, V, loss, parameters, scanned

import lomo_jax

DEPTH, ROUNDS = 8, 15
OPTIONS = {
    "no option": {},
    "microbatches=4": {"microbatches": 4},
    "clip_norm=1.0": {"clip_norm": 1.0},
    "loss_scale=2.0**10": {"loss_scale": 2.0**10},
    "loss_scale=DynamicLossScale()": {"loss_scale": lomo_jax.DynamicLossScale()},
    'loss_scale=DynamicLossScale(skip="layers")': {
        "loss_scale": lomo_jax.DynamicLossScale(skip="layers")
    },
    'trainable=lambda name: name != "embedding"': {"trainable": lambda name: name != "embedding"},
    'trainable=lambda name: name == "head"': {"trainable": lambda name: name == "head"},
    "bfloat16, no option": {},
    'bfloat16, rounding="stochastic"': {"rounding": "stochastic"},
}


class Run:
    """A compiled step, its parameters and its state."""

    def __init__(self, dtype, options):
        step = lomo_jax.fused_step(
            lambda params, batch: loss(params, batch, scanned), lomo_jax.adalomo(1e-3), **options
        )
        keys = jax.random.split(jax.random.key(0), 2)
        shapes = parameters(scanned, DEPTH, dtype)
        self.params = jax.tree.map(
            lambda x: (0.02 * jax.random.normal(keys[0], x.shape)).astype(dtype), shapes
        )
        self.batch = jax.random.randint(keys[1], (B, T), 0, V)
        self.state = step.init(self.params, self.batch)
        self.step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self.params, self.state, self.batch)
            .compile()
        )

    def seconds(self):
        """Runs one step and returns its seconds."""
        start = time.perf_counter()
        self.params, self.state, _ = self.step(self.params, self.state, self.batch)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    def temporaries(self):
        """Returns the planned temporaries, MiB."""
        memory = self.step.memory_analysis()
        assert memory is not None, "CPUs plan their memory"
        return memory.temp_size_in_bytes / 2**20


def main():
    """Prints the table, in Markdown."""
    runs = {
        name: Run(jnp.bfloat16 if name.startswith("bfloat16") else jnp.float32, options)
        for name, options in OPTIONS.items()
    }
    times = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            seconds = run.seconds()
            if turn:  # the first round warms up
                times[name].append(seconds)
    print(f"jax {jax.__version__}, CPU; {ROUNDS} rounds")
    print("| option | time | temporaries, MiB |")
    print("|---|---|---|")
    for name, run in runs.items():
        base = times["bfloat16, no option" if name.startswith("bfloat16") else "no option"]
        ratio = statistics.median(a / b for a, b in zip(times[name], base, strict=True))
        print(f"| `{name}` | {ratio:.2f} | {run.temporaries():.0f} |", flush=True)


if __name__ == "__main__":
    main()
