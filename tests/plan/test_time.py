"""The model of a step's time, on programs that XLA compiled.

What a kernel does is counted by hand; the GPUs' facts are read from the table.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import llama_loss, tiny_llama
from jax.sharding import NamedSharding, PartitionSpec

import lomo_jax
from lomo_jax import Offload, models
from lomo_jax.plan import Program, find, read_time
from lomo_jax.plan import time as model
from lomo_jax.plan.kernels import Reader, is_free
from lomo_jax.training import Config, MeshConfig, ModelConfig
from lomo_jax.training.planning import compile_run

H100 = find("h100")
B, D, F, L = 64, 128, 256, 6


def compiled(function, *shapes, donate=(), dtype=jnp.float32):
    arguments = [
        jax.ShapeDtypeStruct(*(x if isinstance(x[0], tuple) else (x, dtype))) for x in shapes
    ]
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


def read(function, *shapes, **options):
    return read_time(compiled(function, *shapes, **options), H100, tokens=1)


def traffic(function, *shapes, **options):
    """Returns the bytes that the kernels of a program move in device memory."""
    program = Program.parse(compiled(function, *shapes, **options).as_text())
    reader = Reader(program)
    kernels = [i for i in program.computations[program.entry] if not is_free(i)]
    assert kernels
    return sum(reader.traffic(kernel).device for kernel in kernels)


def layers(w_LxDxD, x_BxD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BxD, w_LxDxD)[0]


@pytest.mark.parametrize(
    ("equation", "left", "right", "flops"),
    [
        ("bd,df->bf", (B, D), (D, F), 2 * B * D * F),
        ("bd,fd->fb", (B, D), (F, D), 2 * B * D * F),
        ("lbd,ldf->lbf", (L, B, D), (L, D, F), 2 * L * B * D * F),
        ("lbd,lbf->df", (L, B, D), (L, B, F), 2 * L * B * D * F),
    ],
)
def test_flops_of_a_product(equation, left, right, flops):
    assert read(lambda x, y: jnp.einsum(equation, x, y), left, right).flops == flops


def test_a_product_inside_a_kernel_is_counted():
    assert read(lambda x, w: jnp.tanh(x @ w) + 1, (B, D), (D, F)).flops == 2 * B * D * F


@pytest.mark.parametrize(
    ("function", "shapes", "arrays"),
    [
        (lambda x, y: x + y, [(L, D, D), (L, D, D)], 3 * L),
        (lambda x: x.T + 1, [(D, L * D)], 2 * L),
        (lambda x, i: x[i] + 1, [(D * D, D), ((D,), jnp.int32)], 2),
        (lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 0) + 1, [(L, D, D), ((), jnp.int32)], 2),
    ],
    ids=["sum", "transpose", "gather", "slice"],
)
def test_bytes_of_a_kernel(function, shapes, arrays):
    """In arrays [D, D]; a slice of a stack is read, and not the stack."""
    assert traffic(function, *shapes) == pytest.approx(4 * arrays * D * D, rel=0.01)


def test_an_update_in_place_moves_a_layer_and_not_the_stack():
    def update(x_LxDxD, y_DxD, i):
        return jax.lax.dynamic_update_index_in_dim(x_LxDxD, y_DxD * 2, i, 0)

    shapes = ((L, D, D), (D, D), ((), jnp.int32))
    assert traffic(update, *shapes, donate=0) == pytest.approx(4 * 2 * D * D, rel=0.001)
    copied = 2 * L + 2  # the stack is read and written once more
    assert traffic(update, *shapes) == pytest.approx(4 * copied * D * D, rel=0.001)


def test_a_loop_takes_as_long_as_its_iterations():
    times = [read(layers, (n, D, D), (B, D)) for n in (1, 2, 7, 12)]
    assert [time.flops for time in times] == [n * 2 * B * D * D for n in (1, 2, 7, 12)]
    (_, two, seven, twelve) = (time.step_seconds for time in times)
    assert twelve - seven == pytest.approx(seven - two)
    assert twelve - seven > 5 * model.LAUNCH


def test_loops_inside_loops():
    def twice(w_LxDxD, x_BxD):
        return jax.lax.scan(lambda x, _: (layers(w_LxDxD, x), None), x_BxD, length=3)[0]

    assert read(twice, (L, D, D), (B, D)).flops == 3 * L * 2 * B * D * D


def test_the_longest_branch_of_a_condition_is_taken():
    def step(which, x_BxD, w_DxD):
        return jax.lax.cond(which, lambda x: x, lambda x: x @ w_DxD, x_BxD)

    assert read(step, ((), bool), (B, D), (D, D)).flops == 2 * B * D * D


@pytest.mark.parametrize(
    ("precision", "share"), [(None, 1 / 2), ("highest", 66.9e12 / 989.4e12)], ids=["TF32", "exact"]
)
def test_a_large_product_takes_its_flops_at_the_rate_of_its_precision(precision, share):
    size = 8192
    time = read(lambda x, y: jnp.matmul(x, y, precision=precision), (size, size), (size, size))
    seconds = 2 * size**3 / (share * 989.4e12 * model.PRODUCTS)
    assert time.step_seconds == pytest.approx(seconds, rel=0.01)
    assert time.products_seconds == time.step_seconds


def test_an_elementwise_kernel_takes_its_bytes():
    size = 2**28
    time = read(lambda x: x + 1, (size,), dtype=jnp.bfloat16)
    assert time.step_seconds == pytest.approx(2 * 2 * size / (3352e9 * model.BANDWIDTH), rel=0.01)
    assert time.other_seconds == time.step_seconds


def test_the_update_and_attention_are_known_by_their_scopes():
    def step(x, y):
        with jax.named_scope("attention"):
            x = jnp.cumsum(jnp.sin(x))
        with jax.named_scope("update"):
            return x, jnp.sort(y)

    time = read(step, (2**12,), (2**12,))
    assert time.attention_seconds > 0
    assert time.update_seconds > 0


def test_the_parts_add_up_to_the_step():
    time = read(jax.grad(lambda w, x: layers(w, x).sum()), (L, D, D), (B, D))
    parts = sum(getattr(time, field) for field in model.SHARES.values())
    assert parts == pytest.approx(time.step_seconds)
    assert time.tokens_per_second == pytest.approx(1 / time.step_seconds)
    assert (time.transfer_seconds, time.hidden_fraction) == (0, None)


def test_a_collective_that_blocks_is_exposed():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((8, 2**20), jnp.float32, sharding=sharding)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    time = read_time(total.lower(x).compile(), H100, tokens=1)
    sent = 2 * 7 / 8 * 2**20 * 4  # around a ring, twice
    assert time.transfer_seconds == pytest.approx(sent / (450e9 * model.LINK), abs=1e-4)
    assert time.transfer_seconds > sent / 450e9
    assert time.exposed_seconds == time.transfer_seconds
    assert time.hidden_fraction == 0


def decoder_flops(config, batch, length, remat, attention):
    """Returns the FLOPs of a training step of a decoder, from its shape.

    Args:
      config: models.DecoderConfig.
      batch: rows.
      length: tokens of a row.
      remat: as for `fused_step`.
      attention: (products forward, products backward, part of the scores that is computed).
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    down = config.width * config.mlp_width
    weights = config.width * (2 * heads + 2 * kv_heads) + 3 * down
    forward, backward, part = attention
    scores = 2 * batch * length * length * heads * part
    tokens = batch * length
    # The products of the gradients of inputs and of weights.
    flops = 3 * 2 * tokens * weights + (forward + backward) * scores
    if remat in ("full", "attention"):  # the output of a layer is not computed again
        flops += 2 * tokens * (weights - down)
    if remat == "full":
        flops += forward * scores
    # The loss computes its logits twice, 2048 columns at a time.
    return config.num_layers * flops + 4 * 2 * tokens * config.width * config.vocab_size


@pytest.mark.parametrize("remat", ["full", "none"])
def test_flops_of_a_decoder_on_a_cpu(remat):
    config = tiny_llama(width=64, mlp_width=96, vocab_size=4096, head_dim=16)
    graphdef, params = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))
    step = lomo_jax.fused_step(
        llama_loss(graphdef), lomo_jax.adalomo(1e-3), has_aux=True, remat=remat
    )
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    state = jax.eval_shape(step.init, params, tokens)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    # Each row of scores is computed whole, and so are its gradients.
    expected = decoder_flops(config, 4, 32, remat, attention=(2, 4, 1))
    assert read_time(program, H100, tokens=128).flops == expected


DECODER = models.DecoderConfig(4096, 512, 1408, 6, 8, 4, 64, max_length=16384)
CUDNN, TRITON, WHOLE = (2, 5, 1 / 2), (2, 7, 1 / 2), (2, 4, 1)
LIBRARIES = {"xla_gpu_enable_triton_gemm": False}


@pytest.fixture
def run():
    """Compiles the step of a small decoder for a GPU."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `cuda`")

    def run(gpu="rtx3090", devices=1, options=None, **fields):
        config = Config(model=ModelConfig(architecture=DECODER), batch_size=4, sequence_length=512)
        config = dataclasses.replace(config, **fields)
        with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule mixes dtypes
            return compile_run(config, find(gpu), devices, options)

    return run


@pytest.mark.plan
@pytest.mark.parametrize(
    ("gpu", "fields", "options", "attention"),
    [
        ("rtx3090", {}, None, CUDNN),
        ("h100", {}, None, CUDNN),
        ("rtx3090", {"remat": "none"}, LIBRARIES, CUDNN),
        ("rtx3090", {"remat": "products", "offload": Offload(activations=True)}, None, CUDNN),
        ("rtx3090", {"batch_size": 1, "sequence_length": 16384}, None, TRITON),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                ("rtx3090", {}, LIBRARIES, CUDNN),
                ("rtx3090", {"remat": "attention"}, None, CUDNN),
                ("rtx3090", {"remat": "none"}, None, CUDNN),
                ("rtx3090", {"attention": "xla"}, None, WHOLE),
                ("t4", {"param_dtype": "float16"}, None, WHOLE),
            )
        ),
    ],
)
def test_flops_of_a_decoder_on_a_gpu(run, gpu, fields, options, attention):
    shape = {"batch_size": 4, "sequence_length": 512, "remat": "full"} | fields
    batch, length, remat = (shape[name] for name in ("batch_size", "sequence_length", "remat"))
    expected = decoder_flops(DECODER, batch, length, remat, attention)
    assert run(gpu, options=options, **fields).time.flops == expected


def moved(executable):
    """Returns the bytes that a step copies from the host, copies to it and sends."""
    program = Program.parse(executable.as_text())
    reader, found = Reader(program), [0, 0, 0.0]
    for instructions, trips in program.scheduled():
        for i in instructions:
            if is_free(i) or i.opcode.endswith("-done"):
                continue
            times = 1 if not trips else trips[0]
            found[0] += times * reader.traffic(i).from_host
            found[1] += times * reader.traffic(i).to_host
            found[2] += times * (reader.sent(i) or 0)
    return found


@pytest.mark.plan
def test_transfers_of_offloaded_weights_and_layer_inputs(run):
    offloaded = run(offload=Offload(params=True, activations=True))
    sizes = {path[0].key: 0 for path, _ in jax.tree.leaves_with_path(offloaded.params)}
    for path, leaf in jax.tree.leaves_with_path(offloaded.params):
        sizes[path[0].key] += 2 * leaf.size
    layers, rest = sizes.pop("layers"), sum(sizes.values())
    inputs = 6 * 4 * 512 * DECODER.width * 2
    from_host, to_host, sent = moved(offloaded.executable)
    # The layers are read in the forward pass and in the backward pass, which may read one of them
    # once more: it reads ahead.
    again = from_host - (2 * layers + rest + inputs)
    assert 0 <= again <= layers / DECODER.num_layers
    assert to_host == layers + rest + inputs
    assert sent == 0
    time, plain = offloaded.time, run().time
    seconds = (from_host + to_host) / (31.5e9 * model.LINK)
    assert time.transfer_seconds > seconds
    assert 0 <= time.hidden_fraction < 1
    assert plain.transfer_seconds == 0
    assert plain.step_seconds < time.step_seconds


@pytest.mark.plan
@pytest.mark.parametrize("gpu", ["rtx3090", "h100"])
def test_transfers_between_gpus(run, gpu):
    sharded = run(gpu, devices=4, mesh=MeshConfig(1, 4, 1))
    _, _, sent = moved(sharded.executable)
    weights = 2 * sum(x.size for x in jax.tree.leaves(sharded.params))
    # Each weight is gathered twice or three times, each gradient reduced once.
    assert 3 < sent / (3 / 4 * weights) < 4.2
    time, bandwidth = sharded.time, {"rtx3090": 31.5e9, "h100": 450e9}[gpu]
    # Collectives run one after the other; XLA lets some run beside kernels of an H100.
    assert time.step_seconds > time.transfer_seconds > sent / (bandwidth * model.LINK)
    assert time.hidden_fraction > 0.1 if gpu == "h100" else time.hidden_fraction >= 0
    # Each GPU has one of the four rows; the embedding and the loss differ.
    assert time.flops == decoder_flops(DECODER, 1, 512, "full", CUDNN)
