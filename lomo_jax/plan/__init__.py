"""Plans a step: compiles it for a GPU that need not be installed, reads its memory and its time."""

from lomo_jax.plan.compiling import compile_step as compile_step
from lomo_jax.plan.compiling import make_mesh as make_mesh
from lomo_jax.plan.gpus import GPU as GPU
from lomo_jax.plan.gpus import GPUS as GPUS
from lomo_jax.plan.gpus import find as find
from lomo_jax.plan.gpus import peak_flops as peak_flops
from lomo_jax.plan.memory import MemoryPlan as MemoryPlan
from lomo_jax.plan.memory import read_memory as read_memory
from lomo_jax.plan.program import Program as Program
from lomo_jax.plan.time import TimePlan as TimePlan
from lomo_jax.plan.time import read_time as read_time
