"""Every test runs on CPU, with several devices and with strict dtype promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lomo_jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """Lets dtypes mix: for code of others that does so, such as `optax.adamw`."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def quick_jit(function):
    """`jax.jit` without LLVM's optimisations, which take most of the time of a small test."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def assert_close():
    """Leaves equal to `tolerance` times the largest magnitude of the expected leaf."""

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


@pytest.fixture
def assert_steps_agree(assert_close):
    """Makes steps with fused_step and with reference_step and compares all that they return."""

    def check(loss_fn, tx, params, batches, *, tolerance=1e-5, **options):
        fused = lomo_jax.fused_step(loss_fn, tx, **options)
        # What is kept, and where, must not change the result.
        plain = {k: v for k, v in options.items() if k not in ("offload", "remat")}
        reference = lomo_jax.reference_step(loss_fn, tx, **plain)
        run_fused, run_reference = quick_jit(fused), quick_jit(reference)
        offload = options.get("offload") or lomo_jax.Offload()
        host, device = jax.memory.Space.Host, jax.memory.Space.Device
        # Committed to a memory, as what a step returns: otherwise the second step compiles again.
        params, batches = jax.device_put((params, batches), jax.devices()[0])
        placed = jax.device_put(params, host if offload.params else device)
        actual = (placed, fused.init(placed, batches[0]))
        expected = (params, reference.init(params, batches[0]))
        chex.assert_trees_all_equal(jax.device_put(actual, device), expected)
        for batch in batches:
            *actual, actual_out = run_fused(*actual, batch)
            *expected, expected_out = run_reference(*expected, batch)
            assert_close(actual_out, expected_out, tolerance)
        for tree, is_on_host in ((actual[0], offload.params), (actual[1].optimizer, offload.state)):
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(tree)}
            assert kinds <= {"pinned_host" if is_on_host else "device"}
        actual = jax.device_put(tuple(actual), device)
        assert_close(actual, tuple(expected), tolerance)
        with pytest.raises(AssertionError):  # a step that does nothing would agree too
            assert_close(actual[0], params, tolerance)
        return actual, actual_out

    return check
