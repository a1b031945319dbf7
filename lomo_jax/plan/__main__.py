"""Plans the memory of a run of `train.py` on a GPU that need not be there.

    python -m lomo_jax.plan --config configs/llama7b.py --gpu rtx3090

compiles the step that the run would repeat, exactly, and prints what XLA planned for it. Fields of
the config are set as for train.py, --config.NAME=VALUE. Neither text nor checkpoint need be there:
without model.path the model is of config.model.architecture. An error is one line.
"""

import functools
import os
import sys
from collections.abc import Sequence

import jax
from absl import flags
from rich.console import Console

from lomo_jax.plan import gpus
from lomo_jax.training.config import parse


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    try:
        _plan(argv)
    except (ValueError, OSError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(argv: Sequence[str]) -> None:
    values = flags.FlagValues()
    names = ", ".join(gpus.GPUS)
    define_bool = functools.partial(flags.DEFINE_bool, default=False, flag_values=values)
    gpu_name = flags.DEFINE_string("gpu", None, f"what to plan for: {names}", flag_values=values)
    devices = flags.DEFINE_integer("devices", 1, "how many of it", flag_values=values)
    plot = flags.DEFINE_string("plot", None, "a picture to draw", flag_values=values)
    json = define_bool("json", help="print the plan as one JSON object, and nothing else")
    suggest = define_bool("suggest", help="plan what would lower the memory, too")
    measure = define_bool("measure", help="run the step on that GPU, which has to be here")
    config = parse(argv, values, for_plan=True)
    if gpu_name.value is None:
        raise ValueError(f"--gpu: missing; name one of {names}")
    if json.value and (suggest.value or measure.value):
        raise ValueError("--json prints the plan alone: leave out --suggest and --measure")
    gpu = gpus.find(gpu_name.value)

    # A plan needs no device, and a GPU that is there may be busy.
    if not measure.value:
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(gpus.MEMORY_FRACTION))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lomo_jax.plan import report, runs  # slow to import: a typo is told before

    compiled = runs.compile_run(config, gpu, devices.value)
    plan, title = compiled.plan, str(values["config"].value)
    if plot.value is not None:
        report.plot(plot.value, title, plan)
    if json.value:
        print(report.to_json(plan))
        return
    console = Console(highlight=False, soft_wrap=True)
    report.show(console, title, plan, gpu.usable_gib)
    report.show_buffers(console, "the largest arguments", compiled.given()[:8])
    report.show_buffers(console, "the largest temporaries", compiled.made()[:8])
    if suggest.value:
        with console.status("compiling what would lower it"):
            variants = [
                (change, runs.compile_run(changed, gpu, devices.value).plan)
                for change, changed in runs.knobs(config, plan)
            ]
        report.show_suggestions(console, plan, variants)
    if measure.value:
        report.show_measured(console, plan, runs.measure(config, gpu))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
