"""Adapters beside PEFT's: files in both directions, and twenty steps with the same losses."""

import json
import types

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import before_release, llama_loss, quick_jit

import lomo_jax
from lomo_jax import lora, models, peft_files
from lomo_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.oracle,
    # PEFT reads a property of transformers that has a new name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

STEPS, B, T = 20, 4, 16
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (["q_proj", "v_proj"], {}),
    "qwen2": (ALL_LINEAR, {}),
    "gemma": (ALL_LINEAR, {"use_rslora": True}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Returns (folder of the base, folder of PEFT's adapters, PEFT's model in evaluation mode)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **SIZES)
    folder = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", attn_implementation="eager"
    )
    targets, options = CASES[request.param]
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets, **options
    )
    model = peft.get_peft_model(base, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", model.eval()


@pytest.fixture(scope="module")
def batches():
    """Learnable batches: arithmetic progressions of tokens."""
    rng = np.random.default_rng(0)
    start, stride = rng.integers(0, 96, (STEPS, B, 1)), rng.integers(1, 4, (STEPS, B, 1))
    # Not 0: padding, whose embedding torch never updates.
    return (1 + (start + stride * np.arange(T)) % 95).astype(np.int32)


def load_ours(base, adapter):
    """Returns graphdef and parameters with PEFT's adapters, and what they are."""
    bare, params = models.load(base)
    adapters, trained = peft_files.load(adapter, models.load_config(base))
    graphdef, _ = lora.abstract(bare, params, adapters)
    return graphdef, nnx.merge_state(trained, params), adapters


def logits_of_torch(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()


def test_logits_of_their_adapters(case, batches):
    base, adapter, model = case
    graphdef, params, _ = load_ours(base, adapter)
    found = nnx.merge(graphdef, params)(batches[0])
    expected = logits_of_torch(model, batches[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    with model.disable_adapter():
        without = logits_of_torch(model, batches[0])
    assert abs(without - expected).max() > 0.01


def test_our_adapters_load_there(case, batches, tmp_path):
    base, adapter, _ = case
    graphdef, params, adapters = load_ours(base, adapter)
    params = jax.tree.map(lambda x: x * 1.1, params)  # scales the norms of the base too
    trained, _ = lora.split(params)
    params = nnx.merge_state(trained, models.load(base)[1])
    peft_files.save(tmp_path / "out", models.load_config(base), adapters, params, base=str(base))
    original = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(original, tmp_path / "out").eval()
    expected = nnx.merge(graphdef, params)(batches[0])
    found = logits_of_torch(model, batches[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    again = peft_files.load(tmp_path / "out", models.load_config(base))
    chex.assert_trees_all_equal(again[1], trained)
    assert again[0] == adapters


def test_merged_in_both(case, batches):
    base, adapter, _ = case
    graphdef, params, _ = load_ours(base, adapter)
    merged, state = lora.merge(graphdef, params)
    original = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(original, adapter).merge_and_unload().eval()
    expected = logits_of_torch(model, batches[0])
    found = nnx.merge(merged, state)(batches[0])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def losses_of_torch(base, adapter, batches):
    """Returns the losses of the reference, with AdamW on the adapters."""
    original = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(original, adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.01)
    losses = []
    for tokens in torch.as_tensor(batches, dtype=torch.long):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "case", ["llama", before_release("qwen2"), before_release("gemma")], indirect=True
)
def test_twenty_steps_with_adamw(case, batches, standard_promotion):
    base, adapter, _ = case
    expected = losses_of_torch(base, adapter, batches)
    graphdef, params, _ = load_ours(base, adapter)
    tx = optax.adamw(5e-3, weight_decay=0.01)
    step = lomo_jax.fused_step(llama_loss(graphdef), tx, has_aux=True, trainable=lora.is_adapter)
    state, run, losses = step.init(params, batches[0]), quick_jit(step), []
    for tokens in batches:
        params, state, out = run(params, state, tokens)
        losses.append(float(out.loss))
    chex.assert_trees_all_close(np.array(losses), np.array(expected), rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_twenty_steps_of_lora_and_lomo(case, batches, monkeypatch, standard_promotion):
    """The authors' combination: their LOMO on the base, AdamW on the adapters."""
    lomo_optim = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    base, adapter, _ = case
    original = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(original, adapter, is_trainable=True)
    # LOMO updates what has a gradient: it must not see the adapters.
    named = [(n, p.requires_grad_(True)) for n, p in model.named_parameters()]
    of_base = types.SimpleNamespace(
        named_parameters=lambda: [(n, p) for n, p in named if "lora_" not in n],
        parameters=lambda: [p for n, p in named if "lora_" not in n],
    )
    lomo = lomo_optim.Lomo(of_base, lr=5e-3)
    adapters = [p for name, p in named if "lora_" in name]
    adamw = torch.optim.AdamW(adapters, lr=5e-3, weight_decay=0.0)
    expected = []
    for tokens in torch.as_tensor(batches, dtype=torch.long):
        loss = model(input_ids=tokens, labels=tokens).loss
        expected.append(loss.item())
        adamw.zero_grad()
        lomo.fused_backward(loss, 5e-3)
        adamw.step()

    graphdef, params, _ = load_ours(base, adapter)
    tx = lora.partition(optax.adamw(5e-3, weight_decay=0.0), lomo_jax.lomo(5e-3))
    step = lomo_jax.fused_step(llama_loss(graphdef), tx, has_aux=True)
    state, run, losses = step.init(params, batches[0]), quick_jit(step), []
    for tokens in batches:
        params, state, out = run(params, state, tokens)
        losses.append(float(out.loss))
    chex.assert_trees_all_close(np.array(losses), np.array(expected), rtol=1e-4)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_mistakes_are_one_line(case, tmp_path):
    base, adapter, _ = case
    config = models.load_config(base)
    other = models.DecoderConfig(num_layers=3, width=16, num_heads=2, num_kv_heads=2, head_dim=8)
    with pytest.raises(UserError, match=r"lora_A.weight.*of another model"):
        peft_files.load(adapter, other)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        peft_files.load(base, config)
    changed = json.loads((adapter / "adapter_config.json").read_text())
    for key, value, message in [
        ("r", 8, "of another model or rank"),
        ("use_dora", True, "use_dora=True is not supported, only False"),
        ("peft_type", "LOHA", "peft_type='LOHA' is not supported, only 'LORA'"),
    ]:
        folder = tmp_path / key
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(changed | {key: value}))
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights)
        with pytest.raises(UserError, match=message) as error:
            peft_files.load(folder, config)
        assert "\n" not in str(error.value)
