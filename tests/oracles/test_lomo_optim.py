"""Our losses and the authors' PyTorch code agree over twenty steps of a small LLaMA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import before_release

import lomo_jax
from lomo_jax import models
from lomo_jax.losses import next_token_loss

torch = pytest.importorskip("torch")
lomo_optim = pytest.importorskip("lomo_optim")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

STEPS, B, T, VOCABULARY = 20, 4, 24, 160


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def batches():
    """Learnable batches: arithmetic progressions of tokens."""
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, VOCABULARY, (STEPS, B, 1)), rng.integers(1, 4, (STEPS, B, 1))
    return (start + stride * np.arange(T)) % VOCABULARY


def losses_of_torch(checkpoint, batches, make_optimizer, learning_rates, monkeypatch):
    # AdaLomo's constructor calls `.cuda()` on its state even without a GPU.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    optimizer = make_optimizer(model)
    losses = []
    for tokens, learning_rate in zip(torch.as_tensor(batches), learning_rates, strict=True):
        if optimizer.clip_grad_norm is not None:
            optimizer.grad_norm(model(input_ids=tokens, labels=tokens).loss)
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.fused_backward(loss, learning_rate)
    return losses


def losses_of_jax(checkpoint, batches, tx, **options):
    graphdef, params = models.load(checkpoint, jnp.float32)

    def loss_fn(params, tokens):
        model = nnx.merge(graphdef, params)
        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)
        return next_token_loss(model.hidden(tokens), model.head(), targets, weights)[0]

    step = lomo_jax.fused_step(loss_fn, tx, **options)
    state = step.init(params, batches[0])
    # Without LLVM's optimisations, which take most of a small test's time.
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(step, donate_argnums=(0, 1), compiler_options=quick)
    losses = []
    for tokens in batches:
        params, state, out = run(params, state, tokens)
        losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize(
    ("rule", "clip_value", "weight_decay"),
    [
        ("lomo", None, 0.0),
        ("adalomo", None, 0.0),
        before_release("lomo", 1e-3, 0.1),
        ("adalomo", 1e-3, 0.1),
    ],
)
def test_all_losses_agree(rule, clip_value, weight_decay, checkpoint, batches, monkeypatch):
    peak = {"lomo": 0.3, "adalomo": 0.05}[rule]
    learning_rates = peak * np.linspace(1.0, 0.5, STEPS)
    schedule = lambda count: jnp.asarray(learning_rates)[count]  # noqa: E731
    torch_rule = {"lomo": lomo_optim.Lomo, "adalomo": lomo_optim.AdaLomo}[rule]
    expected = losses_of_torch(
        checkpoint,
        batches,
        lambda model: torch_rule(model, clip_grad_value=clip_value, weight_decay=weight_decay),
        learning_rates,
        monkeypatch,
    )
    jax_rule = {"lomo": lomo_jax.lomo, "adalomo": lomo_jax.adalomo}[rule]
    tx = jax_rule(schedule, clip_value=clip_value, weight_decay=weight_decay)
    actual = losses_of_jax(checkpoint, batches, tx)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    if clip_value is None:  # clipped steps are too small to learn much
        assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize(("rule", "peak"), [before_release("lomo", 0.3), ("adalomo", 0.05)])
def test_all_losses_agree_with_clip_norm(rule, peak, checkpoint, batches, monkeypatch):
    clip_norm = 0.5
    learning_rates = peak * np.linspace(1.0, 0.5, STEPS)
    torch_rule = {"lomo": lomo_optim.Lomo, "adalomo": lomo_optim.AdaLomo}[rule]
    expected = losses_of_torch(
        checkpoint,
        batches,
        lambda model: torch_rule(model, clip_grad_norm=clip_norm),
        learning_rates,
        monkeypatch,
    )
    tx = getattr(lomo_jax, rule)(lambda count: jnp.asarray(learning_rates)[count])
    # Only our code has microbatches; they must not change the losses.
    actual = losses_of_jax(checkpoint, batches, tx, clip_norm=clip_norm, microbatches=2)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    unclipped = losses_of_jax(checkpoint, batches, tx)
    assert abs(unclipped[-1] - expected[-1]) > 1e-3 * expected[-1]
