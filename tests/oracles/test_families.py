"""Every family against transformers: tiny random models in, logits, training, and back out."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import before_release, quick_jit
from tiny_families import CONFIGS, SIZES, random_model

import lomo_jax
from lomo_jax import models, sharding
from lomo_jax.losses import next_token_loss
from lomo_jax.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

LENGTH = 24
# Training compiles for seconds: one with nearly all switches, and what it has not: norms after the
# layers alone, attention and MLP side by side, experts.
SLOW = ("olmo2", "cohere", "mixtral")
TRAINED = [
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    *(before_release(name) for name in CONFIGS if name not in ("gemma3", *SLOW)),
]
TOKENS_BxT = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, LENGTH))


def logits_of_torch(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BxT)).logits.float().numpy()


@functools.cache
def ours(folder):
    return models.load(folder)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, *arguments):
    return nnx.merge(graphdef, params)(*arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the folder of a family's random model and its logits, made once."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name) / "model"
        model = random_model(name)
        model.save_pretrained(folder)
        return folder, logits_of_torch(model)

    return make


def assert_equal_logits(actual, expected):
    assert expected.std() > 0.2
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree(saved, name):
    folder, expected = saved(name)
    assert_equal_logits(np.asarray(logits_of(*ours(folder), TOKENS_BxT)), expected)


# Windows, scaled rotation, experts, norms in other places, two rotations, or none of them.
PACKED = ["llama", "llama_yarn_rope", "mistral_window", "mixtral", "olmo2", "gemma3"]


@pytest.mark.parametrize("name", [n if n in PACKED else before_release(n) for n in CONFIGS])
def test_packed_documents_equal_each_alone(saved, name):
    graphdef, params = ours(saved(name)[0])
    one, two = TOKENS_BxT[:1, :10], TOKENS_BxT[1:, : LENGTH - 10]
    positions_T = np.concatenate([np.arange(10), np.arange(LENGTH - 10)])
    segments_T = np.repeat([1, 2], [10, LENGTH - 10])
    row = np.concatenate([one, two], axis=1)
    packed = np.asarray(logits_of(graphdef, params, row, positions_T[None], segments_T[None]))
    if nnx.merge(graphdef, params).config.rope_scaling is not None:
        # Scalings that depend on the length look at the row: keep it as long as the packed one.
        one, two = (np.pad(x, ((0, 0), (0, LENGTH - x.shape[1]))) for x in (one, two))
    for tokens, start, length in ((one, 0, 10), (two, 10, LENGTH - 10)):
        alone = np.asarray(logits_of(graphdef, params, tokens))[:, :length]
        assert_equal_logits(packed[:, start : start + length], alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_the_model_that_it_was(saved, name, tmp_path):
    folder, expected = saved(name)
    graphdef, params = ours(folder)
    models.save(tmp_path / "out", graphdef, params)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    np.testing.assert_array_equal(logits_of_torch(theirs.eval()), expected)
    before = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    generation = "generation_config.json"
    assert (tmp_path / "out" / generation).read_bytes() == (folder / generation).read_bytes()


def loss_of(graphdef):
    def loss(params, tokens_BxT):
        model = nnx.merge(graphdef, params)
        weights_BxT = jnp.ones(tokens_BxT.shape).at[:, -1].set(0.0)
        targets_BxT = jnp.roll(tokens_BxT, -1, axis=1)
        x_BxTxD = model.hidden(tokens_BxT)
        return next_token_loss(
            x_BxTxD, model.head(), targets_BxT, weights_BxT, cap=model.config.logit_cap
        )[0]

    return loss


@pytest.mark.parametrize("name", TRAINED)
def test_ten_fused_steps_equal_the_reference(saved, name, assert_close):
    # LOMO, whose updates are as small as the gradients. AdaLomo would enlarge rounding: the loss
    # hardly depends on the bias of a key where rotation is slow. Larger steps would, too, for
    # weights as large as these.
    equal = functools.partial(assert_close, tolerance=1e-6)
    assert_fused_equals_reference(saved(name)[0], lomo_jax.lomo(1e-4), equal)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_ten_steps_of_adalomo_equal_the_reference(saved, name, assert_close):
    assert_fused_equals_reference(saved(name)[0], lomo_jax.adalomo(1e-3), assert_close)


def assert_fused_equals_reference(folder, optimizer, assert_close):
    graphdef, params = ours(folder)
    tokens = jnp.asarray(TOKENS_BxT)
    results = []
    for make in (lomo_jax.fused_step, lomo_jax.reference_step):
        step = make(loss_of(graphdef), optimizer)
        state, weights = step.init(params, tokens), params
        run = quick_jit(step)
        for _ in range(10):
            weights, state, out = run(weights, state, tokens)
        results.append((weights, out.loss))
    (fused, loss), (expected, expected_loss) = results
    assert_close(fused, expected)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        pytest.param("mixtral", marks=pytest.mark.slow),
        *(before_release(n) for n in CONFIGS if n not in ("gemma3", "mixtral")),
    ],
)
def test_eight_devices_equal_one(saved, name):
    graphdef, params = ours(saved(name)[0])
    tokens = jnp.tile(TOKENS_BxT, (2, 1))
    value, gradient = quick_jit(jax.value_and_grad(loss_of(graphdef)))(params, tokens)
    mesh = sharding.make_mesh(2, 2, 2)
    config = nnx.merge(graphdef, params).config
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, models.shardings(config, params, mesh))
        found, found_gradient = quick_jit(jax.value_and_grad(loss_of(graphdef)))(spread, tokens)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-7)


def test_every_family_is_tested():
    assert {model_type for model_type, _ in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_loss_that_balances_experts(saved, name):
    folder, _ = saved(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    mask_BxT = np.ones(TOKENS_BxT.shape, np.int32)
    mask_BxT[1, 20:] = 0  # padding
    with torch.no_grad():
        tokens, mask = torch.tensor(TOKENS_BxT), torch.tensor(mask_BxT)
        expected = theirs(tokens, attention_mask=mask, output_router_logits=True).aux_loss
    model = nnx.merge(*ours(folder))
    _, found = model.hidden_and_balance(jnp.asarray(TOKENS_BxT), None, jnp.asarray(mask_BxT))
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
