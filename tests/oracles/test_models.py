"""Our Llama against the Llama of transformers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomo_jax import models
from lomo_jax.models.hf_config import write_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

CONFIG = models.DecoderConfig(
    vocab_size=97,
    width=48,
    mlp_width=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_length=128,
    bos_id=1,
    eos_id=2,
)
CONFIGS = {
    "grouped": CONFIG,
    "full_heads": dataclasses.replace(CONFIG, num_kv_heads=6, rope_theta=5e5, norm_eps=1e-6),
    "free_head_dim": dataclasses.replace(CONFIG, head_dim=20),
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "llama3_rope": dataclasses.replace(
        CONFIG, rope_theta=100.0, rope_scaling=models.RopeScaling("llama3", 8.0, 32)
    ),
}
RNG = np.random.default_rng(0)
TOKENS_BxT = RNG.integers(0, CONFIG.vocab_size, (2, 100))


def random_torch_model(config):
    """Returns a transformers model with weights so large that every part affects the logits."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**write_config(config, "float32"))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return model.eval()


def random_params(config, dtype=jnp.float32):
    _, params = models.abstract(config, dtype)
    return jax.tree.map(
        lambda x: jnp.asarray(RNG.normal(float(x.ndim == 1), 0.15, x.shape), dtype), params
    )


def logits_of_torch(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BxT)).logits.float().numpy()


def logits_of_ours(config, params):
    model = nnx.merge(models.abstract(config)[0], params)
    return np.array(jax.jit(model.__call__)(jnp.array(TOKENS_BxT)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_after_loading_their_weights(tmp_path, name):
    theirs = random_torch_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    graphdef, params = models.load(tmp_path)
    config = nnx.merge(graphdef, params).config
    assert config == CONFIGS[name]
    expected = logits_of_torch(theirs)
    assert expected.std() > 0.5
    chex.assert_trees_all_close(logits_of_ours(config, params), expected, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_after_loading_our_export(tmp_path, name):
    config = CONFIGS[name]
    params = random_params(config)
    models.save(tmp_path / "export", models.abstract(config)[0], params, max_shard_bytes=30_000)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.dtype == torch.float32
    chex.assert_trees_all_close(
        logits_of_torch(theirs.eval()), logits_of_ours(config, params), atol=2e-5
    )


def test_logits_agree_for_a_bfloat16_export(tmp_path):
    params = random_params(CONFIG, jnp.bfloat16)
    models.save(tmp_path / "export", models.abstract(CONFIG)[0], params)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert theirs.dtype == torch.bfloat16
    ours = logits_of_ours(CONFIG, params)
    error = np.linalg.norm(logits_of_torch(theirs) - ours) / np.linalg.norm(ours)
    assert error < 1e-2
