"""The command `lomo-jax plan`."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from lomo_jax.plan.__main__ import main

_CONFIG = """
from lomo_jax.models import DecoderConfig
from lomo_jax.training import Config, ModelConfig

def get_config():
    return Config(
        model=ModelConfig(architecture=DecoderConfig(4096, 1024, 2816, 6, 8, 8, 128)),
        batch_size=4,
        sequence_length=512,
        microbatches=2,
    )
"""
_KEYS = [
    "remat",
    *("weights_gib", "state_gib", "layer_inputs_gib", "temporaries_gib", "host_gib", "total_gib"),
    *("device_gib", "usable_gib", "fits", "gpu", "devices"),
    *("step_seconds", "products_seconds", "attention_seconds", "update_seconds", "other_seconds"),
    *("exposed_seconds", "transfer_seconds", "hidden_fraction", "tokens_per_second", "flops"),
    *("run_tokens", "run_hours"),
]
_LAYER_INPUTS = 6 * 4 * 512 * 1024 * 2 / 2**30
_WEIGHTS = 2 * (2 * 4096 * 1024 + 1024 + 6 * (4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024)) / 2**30

_HAS_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_cuda = pytest.mark.skipif(not _HAS_CUDA, reason="needs the extra `cuda`")


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs the command on a small model; returns (status, stdout, stderr)."""
    config = tmp_path / "config.py"
    config.write_text(_CONFIG)

    def run(*flags, gpu="rtx3090"):
        argv = ["plan", "--config", str(config), *flags]
        with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule mixes dtypes
            status = main([*argv, "--gpu", gpu] if gpu else argv)
        return status, *capsys.readouterr()

    return run


@pytest.mark.plan
@needs_cuda
def test_json_is_one_object_that_adds_up(plan):
    status, out, error = plan("--json")
    assert (status, error, out.count("\n")) == (0, "", 1)
    figures = json.loads(out)
    assert list(figures) == _KEYS
    assert figures["weights_gib"] == pytest.approx(_WEIGHTS, abs=1e-4)
    assert figures["layer_inputs_gib"] == pytest.approx(_LAYER_INPUTS, abs=1e-4)
    assert figures["host_gib"] == 0
    parts = sum(figures[key] for key in _KEYS[1:5])
    assert parts == pytest.approx(figures["total_gib"], abs=3e-4)
    assert (figures["device_gib"], figures["devices"]) == (24, 1)
    assert (figures["fits"], figures["remat"]) == (True, "full")
    assert figures["gpu"] == "NVIDIA GeForce RTX 3090"
    assert figures["tokens_per_second"] == pytest.approx(2048 / figures["step_seconds"], rel=0.01)
    assert figures["hidden_fraction"] is None
    assert figures["run_tokens"] == 1000 * 2048
    assert figures["run_hours"] == pytest.approx(figures["step_seconds"] / 3.6, rel=0.01)


@pytest.mark.plan
@needs_cuda
def test_offloaded_parts_are_in_host_memory(plan):
    flags = ("--config.offload.params=true", "--config.offload.state", "--config.optimizer=adamw")
    figures = json.loads(plan("--json", *flags)[1])
    assert figures["weights_gib"] == figures["state_gib"] == 0
    assert figures["layer_inputs_gib"] == pytest.approx(_LAYER_INPUTS, abs=1e-4)
    # The weights, and Adam's two moments in the same dtype.
    assert figures["host_gib"] == pytest.approx(3 * _WEIGHTS, rel=0.01)

    figures = json.loads(plan("--json", "--config.offload.activations=true")[1])
    assert figures["weights_gib"] > 0
    assert figures["layer_inputs_gib"] == 0
    assert figures["host_gib"] == pytest.approx(_LAYER_INPUTS, rel=0.01)


@pytest.mark.plan
@pytest.mark.exhaustive
@needs_cuda
def test_the_best_setting_is_printed_as_flags(plan):
    before = json.loads(plan("--json", "--config.offload.activations=true")[1])
    searched = ("--best", "--batch_sizes=4,8", "--config.offload.activations=true")
    status, out, error = plan(*searched)
    assert (status, error) == (0, "")
    flags = out.split("fastest that fits, modelled:\n")[1].splitlines()[0].split()
    assert {"--config.offload.activations=false", "--config.batch_size=8"} <= set(flags)
    best = json.loads(plan("--json", "--config.offload.activations=true", *flags)[1])
    assert best["fits"]
    assert best["host_gib"] == 0
    assert best["tokens_per_second"] > before["tokens_per_second"]
    assert f"{best['tokens_per_second']:,.0f}" in out


@pytest.mark.plan
@needs_cuda
def test_remat_auto_is_what_fits(plan):
    status, out, error = plan("--config.remat=auto")
    assert (status, error) == (0, "")
    assert "config.py, remat=products\n" in out


@pytest.mark.plan
@needs_cuda
def test_explicit_sizes_of_the_mesh_give_the_number_of_devices(plan):
    flags = ("--config.mesh.fsdp=2", "--config.microbatches=1")
    figures = json.loads(plan("--json", *flags)[1])
    assert figures["devices"] == 2
    assert figures["weights_gib"] == pytest.approx(_WEIGHTS / 2, rel=0.01)


@pytest.mark.plan
@needs_cuda
def test_a_small_gpu_has_too_little_memory(plan):
    flags = ("--config.model.architecture.num_layers=60", "--config.batch_size=256")
    figures = json.loads(plan("--json", *flags, gpu="rtx3060")[1])
    assert not figures["fits"]
    assert figures["total_gib"] > 0.92 * figures["device_gib"]


@pytest.mark.plan
@needs_cuda
def test_the_tables_name_buffers_and_suggestions(plan, tmp_path):
    flags = ("--config.offload.activations=true", "--config.sequence_length=256")
    status, out, error = plan("--suggest", "--plot", str(tmp_path / "plan.png"), *flags)
    assert (status, error) == (0, "")
    assert "not measured" in out
    assert re.search(r"^modelled: [\d,]+ tokens/s$", out, re.M)
    assert re.search(
        r"^modelled: [\d.]+ hours for the 1,000 steps of the run, 1.0 million", out, re.M
    )
    for label in ("weights", "optimizer state", "layer inputs", "other temporaries", "host memory"):
        assert label in out
    assert "layers/mlp/down/kernel" in out
    # The saved layer inputs are in host memory.
    assert re.search(r"layer inputs +12 +bfloat16\[6,2,2,256,1024\] +host", out)
    for change in ("offload.params=true", "microbatches=4", "batch_size=2", "sequence_length=128"):
        assert f"--config.{change}" in out
    assert "--config.microbatches=8" not in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.plan
@needs_cuda
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_the_error_says_to_set_jax_platforms():
    code = "from lomo_jax import plan; plan.make_mesh(plan.find('rtx3090'))"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    last = run.stderr.splitlines()[-1]
    assert "did not load XLA's compiler for GPUs: set JAX_PLATFORMS=cpu" in last


@pytest.mark.plan
@needs_cuda
def test_measure_needs_the_planned_gpu(plan):
    status, _, error = plan("--measure")
    assert status == 1
    assert error.startswith("error: --measure: this machine has no NVIDIA GeForce RTX 3090, JAX")


@pytest.mark.parametrize(
    ("flags", "gpu", "message"),
    [
        ([], None, "--gpu: missing; name one of t4, rtx3060,"),
        ([], "rtx309", "no GPU 'rtx309'; did you mean 'rtx3090'"),
        (["--devices=0"], "h100", "--devices: 0; set 1 or more"),
        (
            ["--devices=2", "--config.mesh.fsdp=4"],
            "h100",
            "--devices: 2, but mesh.data=1 * mesh.fsdp=4 * mesh.tensor=1 is 4; leave --devices",
        ),
        (["--config.mesh.fsdp=8"], "h100", "batch_size"),
        (["--json", "--suggest"], "h100", "--json prints only the plan"),
        (["--json", "--best"], "h100", "--json prints only the plan"),
        (["--best", "--config.fused=false"], "h100", "--best: its options are those of the fused"),
        (["--batch_sizes=4,8"], "h100", "--batch_sizes: these are for the search; set --best too"),
        (["--best", "--batch_sizes=4,0"], "h100", "--batch_sizes: '0' is not a positive number"),
        (["--best", "--batch_sizes=4,x"], "h100", "--batch_sizes: 'x' is not a positive number"),
        (["--config.stepz=2"], "h100", "stepz: no such field"),
        (["--config.model.path=nowhere"], "h100", "nowhere does not exist"),
        ([], "t4", "param_dtype: 'bfloat16'"),
        (["--config.attention=cudnn"], "t4", "attention: 'cudnn'"),
    ],
)
def test_a_mistake_gets_one_line(plan, flags, gpu, message):
    status, out, error = plan(*flags, gpu=gpu)
    assert (status, out) == (1, "")
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.skipif(_HAS_CUDA, reason="needs an interpreter without the extra `cuda`")
def test_the_error_for_a_missing_compiler_names_the_package(plan):
    status, out, error = plan()
    assert (status, out) == (1, "")
    assert error.startswith("error: XLA's compiler for NVIDIA GPUs is missing: pip install 'lomo")
    assert error.count("\n") == 1
