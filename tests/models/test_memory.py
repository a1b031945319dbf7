"""Loading weights into host memory, and saving them from there."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIG, TIED, graphdef_of

from lomo_jax import models

HOST = jax.memory.Space.Host


def spaces(tree):
    return {jax.typeof(leaf).memory_space for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize(("config", "dtype"), [(CONFIG, jnp.float32), (TIED, jnp.bfloat16)])
def test_init_layer_by_layer_equals_init(config, dtype):
    layerwise = models.init_layer_by_layer(config, 3, dtype, on_host=True)
    assert spaces(layerwise) == {HOST}
    expected = models.init(config, 3, dtype)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(layerwise, expected)
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (layerwise, expected)))


def test_a_checkpoint_is_loaded_into_host_memory_and_saved_from_there(tmp_path):
    params = models.init(CONFIG, 0)[1]
    models.save(tmp_path / "first", graphdef_of(CONFIG), params)
    _, on_host = models.load(tmp_path / "first", jnp.float32, on_host=True)
    assert spaces(on_host) == {HOST}
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (on_host, params)))
    models.save(tmp_path / "second", graphdef_of(CONFIG), on_host)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_stacks_in_host_memory_are_filled_in_place(monkeypatch):
    from lomo_jax.models import weights

    pointers: dict[tuple[int, ...], set[int]] = {}
    fill = weights._fill

    def watched(stack, tensor, index, *, transposed):
        filled = fill(stack, tensor, index, transposed=transposed)
        if index:
            assert stack.is_deleted()
            pointers.setdefault((id(stack.dtype), *stack.shape), set()).add(
                filled.unsafe_buffer_pointer()
            )
        return filled

    monkeypatch.setattr(weights, "_fill", watched)
    models.init_layer_by_layer(CONFIG, 0, jnp.float32, on_host=True)
    # One stack has this shape, and every layer was written to it.
    assert len(pointers[(id(np.dtype("float32")), 3, 24, 16)]) == 1


def test_the_shape_is_read_without_the_weights(tmp_path):
    models.save(tmp_path / "export", graphdef_of(CONFIG), models.init(CONFIG, 0)[1])
    (tmp_path / "export" / "model.safetensors").unlink()
    assert models.load_config(tmp_path / "export") == CONFIG
