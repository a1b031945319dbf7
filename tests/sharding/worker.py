"""One process of a run: trains on its share of the devices, restores and saves checkpoints.

    python worker.py COORDINATOR NUM_PROCESSES PROCESS_ID FIRST LAST RESTORE SAVE

runs steps FIRST to LAST and prints their losses; RESTORE and SAVE are folders or "-".
"""

import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import lomo_jax
from lomo_jax import losses, models, sharding

COORDINATOR, NUM_PROCESSES, PROCESS_ID = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
FIRST, LAST, RESTORE, SAVE = int(sys.argv[4]), int(sys.argv[5]), sys.argv[6], sys.argv[7]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // NUM_PROCESSES)
if NUM_PROCESSES > 1:
    jax.distributed.initialize(COORDINATOR, NUM_PROCESSES, PROCESS_ID)

CONFIG = models.DecoderConfig(48, 32, 40, 3, 4, 2, 8)
# Another mesh for each number of processes: a checkpoint must restore on any mesh.
MESHES = {1: (1, 4, 1), 2: (1, 2, 2), 4: (2, 2, 1)}
mesh = sharding.make_mesh(*MESHES[NUM_PROCESSES])
jax.set_mesh(mesh)
params = models.init_layer_by_layer(CONFIG, 0, np.float32, mesh=mesh)
graphdef, _ = models.abstract(CONFIG)


def loss(params, tokens):
    model = nnx.merge(graphdef, params)
    weights = np.ones((8, 16), np.float32)
    return losses.next_token_loss(
        model.hidden(tokens[:, :-1]), model.head(), tokens[:, 1:], weights
    )


rows = jax.sharding.NamedSharding(mesh, jax.P(sharding.BATCH, None))
tokens = np.random.default_rng(0).integers(48, size=(LAST + 1, 8, 17), dtype=np.int32)
batches = [jax.make_array_from_callback((8, 17), rows, lambda i, t=t: t[i]) for t in tokens]
tx = optax.adamw(1e-3)
step = lomo_jax.fused_step(loss, tx, has_aux=True, clip_norm=1.0, rounding="stochastic")
state = jax.jit(step.init)(params, batches[0])
with ocp.StandardCheckpointer() as checkpointer:
    if RESTORE != "-":
        params, state = checkpointer.restore(RESTORE, (params, state))
    update = jax.jit(step, donate_argnums=(0, 1))
    for batch in batches[FIRST : LAST + 1]:
        params, state, out = update(params, state, batch)
        print("loss", float(out.loss), flush=True)
    if SAVE != "-":
        checkpointer.save(SAVE, (params, state))
