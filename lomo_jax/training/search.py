"""Searches for the fastest setting of a run that fits a GPU, by compiling it.

Only what does not change the result of a step is searched: `remat`, `microbatches`, `offload`, and
whether several GPUs share the weights. Search once for each batch size that is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lomo_jax.fused import Offload
from lomo_jax.plan import GPU, MemoryPlan, TimePlan
from lomo_jax.training.config import AUTO_REMATS, Config, MeshConfig
from lomo_jax.training.planning import as_flags, compile_run, mesh_shape
from lomo_jax.training.validation import leaves

REMATS = AUTO_REMATS[::-1]  # each needs more memory and fewer FLOPs than the one before
# From little in host memory to all. From the third on they are tried only if nothing else fits.
_OFFLOADS = (
    Offload(),
    Offload(activations=True),
    Offload(activations=True, state=True),
    Offload(activations=True, params=True),
    Offload(activations=True, params=True, state=True),
)
_SMALL_STATE = 0.1  # GiB, not worth offloading


class Setting(NamedTuple):
    """A setting that was compiled."""

    config: Config
    memory: MemoryPlan
    time: TimePlan

    def flags(self, config: Config) -> str:
        """Returns the flags that change `config` into this setting, "" if it is the same."""
        before = {name: value for name, value, _ in leaves(config)}
        after = {name: value for name, value, _ in leaves(self.config)}
        return as_flags({name: x for name, x in after.items() if x != before[name]})


def fastest(settings: Iterable[Setting]) -> Setting | None:
    """Returns the fastest setting that fits the GPU, by its tokens a second; None if none does."""
    fitting = [setting for setting in settings if setting.memory.fits]
    return max(fitting, key=lambda setting: setting.time.tokens_per_second, default=None)


def search(config: Config, gpu: GPU, devices: int | None = None) -> Iterator[Setting]:
    """Yields settings, each as soon as it is compiled.

    With each offload it compiles `remat="full"`, with as many microbatches as it needs to fit, and
    then less and less recomputation until that does not fit. Activations move to host memory only
    with a `remat` that does not fit otherwise; weights and state, if nothing else fits.

    Args:
      config: a config that is valid for a plan, with `fused=True`. Its own remat and offload do not
        matter; its microbatches are the fewest that are tried.
      gpu: kind of the GPUs.
      devices: number of GPUs; see `planning.mesh_shape`.
    """
    found: list[Setting] = []
    for mesh in _meshes(config, devices):
        if found and found[0].memory.weights_gib * mesh.data > gpu.usable_gib:
            break  # a whole copy does not fit
        first, done = len(found), set[str]()
        for index, offload in enumerate(_OFFLOADS):
            if index >= 2 and fastest(found):
                break
            if index and _is_hopeless(offload, found[first].memory):
                continue
            start = dataclasses.replace(config, mesh=mesh, offload=offload)
            remats = [remat for remat in REMATS if remat not in done]
            for setting in _try_remats(start, gpu, devices, remats):
                found.append(setting)
                done |= {setting.config.remat} if setting.memory.fits else set()
                yield setting


def _meshes(config: Config, devices: int | None) -> list[MeshConfig]:
    """Returns the meshes to try: each GPU has a part of the weights, or all of them."""
    data, fsdp, tensor = mesh_shape(config.mesh, devices)
    if (gpus := data * fsdp) == 1:
        return [config.mesh]
    return [MeshConfig(1, gpus, tensor), MeshConfig(gpus, 1, tensor)]


def _is_hopeless(offload: Offload, memory: MemoryPlan) -> bool:
    """Returns whether an offload cannot help, by the plan of the run without offload."""
    assert memory.usable_gib is not None
    weights = 0.0 if offload.params else memory.weights_gib
    state = 0.0 if offload.state else memory.state_gib
    useless = offload.state and memory.state_gib < _SMALL_STATE
    return useless or weights + state > memory.usable_gib


def _try_remats(
    config: Config, gpu: GPU, devices: int | None, remats: Sequence[str]
) -> Iterator[Setting]:
    """Yields settings of one offload until one does not fit."""
    for remat in remats:
        config = dataclasses.replace(config, remat=remat)
        yield (setting := _compile(config, gpu, devices))
        while remat == remats[0] and not setting.memory.fits:
            before = setting.memory
            microbatches = _more_microbatches(config, devices, before)
            if microbatches is None:
                return
            config = dataclasses.replace(config, microbatches=microbatches)
            yield (setting := _compile(config, gpu, devices))
            if setting.memory.total_gib >= before.total_gib:
                return
        if not setting.memory.fits:
            return


def _more_microbatches(config: Config, devices: int | None, memory: MemoryPlan) -> int | None:
    """Returns the number with which a run may fit, if its temporaries shrink in proportion."""
    assert memory.usable_gib is not None
    data, fsdp, _ = mesh_shape(config.mesh, devices)
    room = memory.usable_gib - (memory.total_gib - memory.temporaries_gib)
    factor = 2
    while config.batch_size % (data * fsdp * config.microbatches * factor) == 0:
        if memory.temporaries_gib / factor <= room:
            return config.microbatches * factor
        factor *= 2
    return None


def _compile(config: Config, gpu: GPU, devices: int | None) -> Setting:
    compiled = compile_run(config, gpu, devices)
    return Setting(config, compiled.plan, compiled.time)
