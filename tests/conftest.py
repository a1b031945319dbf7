"""Every test runs on CPU, with several devices and with strict dtype promotion."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

import lomo_jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_traceback_in_locations_limit", 0)  # 5 % of the time of the tests

# Tracing makes many objects and next to no garbage: collecting as often as usual takes a tenth of
# the time of the tests.
gc.freeze()
gc.set_threshold(10_000)


@pytest.fixture(scope="session", autouse=True)
def _caches(request, tmp_path_factory):
    """Tests, and the processes that they start, share compiled programs and tokenised datasets."""
    # One folder for all workers of pytest-xdist: JAX's key of a program contains its path.
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "programs")
    # JAX cannot read programs for devices that are not there back from its cache.
    plans = any(item.get_closest_marker("plan") for item in request.session.items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOMO_JAX_CACHE", str(tmp_path_factory.mktemp("datasets")))
        if not plans:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", programs)
            patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            jax.config.update("jax_compilation_cache_dir", programs)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield


@pytest.fixture
def standard_promotion():
    """Lets dtypes mix, as `optax.adamw` does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def assert_close():
    """Compares leaves up to `tolerance` times the largest magnitude in the expected leaf."""

    def check(actual, expected, tolerance=1e-5):
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)

        def difference(a, e):
            a, e = np.asarray(a), np.asarray(e)
            if not jnp.issubdtype(e.dtype, jnp.inexact):
                return (a != e).astype(np.float32)
            a, e = a.astype(np.float64), e.astype(np.float64)
            relative = np.abs(a - e) / np.maximum(np.max(np.abs(e), initial=0.0), 1e-30)
            return np.where(np.isnan(a) & np.isnan(e), 0.0, relative)

        differences = jax.tree.map(difference, actual, expected)
        zeros = jax.tree.map(np.zeros_like, differences)
        chex.assert_trees_all_close(differences, zeros, rtol=0, atol=tolerance)

    return check


def run_steps(make_step, loss_fn, tx, params, batches, **options):
    """Makes a step for each batch; returns the first and last (params, state), and all outputs."""
    step = make_step(loss_fn, tx, **options)
    offload = options.get("offload") or lomo_jax.Offload()
    host, device = jax.memory.Space.Host, jax.memory.Space.Device
    # Committed to a memory like the results of a step, or the second step compiles again.
    params, batches = jax.device_put((params, batches), jax.devices()[0])
    params = jax.device_put(params, host if offload.params else device)
    first = last = (params, step.init(params, batches[0]))
    run, outs = quick_jit(step), []
    for batch in batches:
        *last, out = run(*last, batch)
        outs.append(out)
    for tree, on_host in ((last[0], offload.params), (last[1].optimizer, offload.state)):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
        assert kinds <= {"pinned_host" if on_host else "device"}
    return *jax.device_put((first, tuple(last)), device), outs


@pytest.fixture(scope="session")
def run_reference():
    """Runs `reference_step`, once for each key."""
    cache = {}

    def run(key, *args, **options):
        if key is None:
            return run_steps(lomo_jax.reference_step, *args, **options)
        if key not in cache:
            cache[key] = run_steps(lomo_jax.reference_step, *args, **options)
        return cache[key]

    return run


@pytest.fixture
def assert_steps_agree(assert_close, run_reference):
    """Makes steps with `fused_step` and with `reference_step`, and compares all their results.

    With a `key`, tests that pass the same one share the results of `reference_step`.
    """

    def check(loss_fn, tx, params, batches, *, tolerance=1e-5, key=None, **options):
        # Neither the saved residuals nor their memory may change the result.
        plain = {k: v for k, v in options.items() if k not in ("offload", "remat")}
        args = loss_fn, tx, params, batches
        first, last, outs = run_steps(lomo_jax.fused_step, *args, **options)
        expected_first, expected_last, expected_outs = run_reference(key, *args, **plain)
        chex.assert_trees_all_equal(first, expected_first)
        assert_close(outs, expected_outs, tolerance)
        assert_close(last, expected_last, tolerance)
        with pytest.raises(AssertionError):  # a step that does nothing would agree too
            assert_close(last[0], first[0], tolerance)
        return last, outs[-1]

    return check
