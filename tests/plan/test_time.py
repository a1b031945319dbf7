"""The model of a step's time, on programs that XLA compiled.

What a kernel does is counted by hand; the GPUs' facts are read from the table.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import llama_loss, tiny_llama
from jax.sharding import NamedSharding, PartitionSpec

import lomo_jax
from lomo_jax import models
from lomo_jax.plan import Program, find, read_time
from lomo_jax.plan import time as model
from lomo_jax.plan.kernels import Reader

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
    kernels = [i for i in program.computations[program.entry] if i.opcode not in model._NO_KERNEL]
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
    if remat != "none":  # the output of a layer is not computed again
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
