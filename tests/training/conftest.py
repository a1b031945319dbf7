"""Fixtures for tests of whole runs."""

import json

import jax
import pytest
import runs

from lomo_jax.training import loop, to_dict

_NOT_OF_THE_STEP = ("workdir", "data", "resume", "log_", "eval_", "checkpoint_", "keep_", "prompt")


@pytest.fixture(scope="session", autouse=True)
def _compiled_once():
    """Runs with the same step share it: tracing it is half of the time of a tiny run."""
    compile_step, steps = loop._compile, {}

    def shared(config, model, batch, display):
        fields = {
            name: value
            for name, value in to_dict(config).items()
            if not name.startswith(_NOT_OF_THE_STEP)
        }
        mixes = jax.config.jax_numpy_dtype_promotion
        key = (json.dumps(fields, default=repr), str((model.config, model.shapes, batch)), mixes)
        if key not in steps or config.remat == "auto":
            steps[key] = compile_step(config, model, batch, display)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_compile", shared)
        yield


@pytest.fixture(scope="module")
def mixed_dtypes():
    """`standard_promotion` for a whole module: optax's cosine schedule mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sixty documents of words in random order."""
    return runs.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
