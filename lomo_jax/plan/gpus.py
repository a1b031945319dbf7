"""Facts about NVIDIA GPUs: what XLA asks of a device that it compiles for without one."""

from __future__ import annotations

import dataclasses
import difflib

# The part of a GPU's memory that `train.py` lets JAX allocate: the CUDA context and the libraries
# need the rest, some hundred MiB and more on larger GPUs. JAX's own 0.75 leaves a quarter unused.
MEMORY_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class GPU:
    """A kind of GPU, from its maker's data sheets and XLA's own device descriptions."""

    title: str  # as the driver reports it
    compute_capability: tuple[int, int]
    memory_gib: float  # as the driver reports it
    bandwidth: float  # GB/s, of the memory
    cores: int  # streaming multiprocessors
    clock: float  # GHz, boost
    l2_mib: float
    shared_kib: int  # of one multiprocessor
    threads: int = 1536  # of one multiprocessor
    fpus: int = 128  # of one multiprocessor, float32

    @property
    def usable_gib(self) -> float:
        """What JAX may allocate of `memory_gib`."""
        return MEMORY_FRACTION * self.memory_gib

    def target_config(self) -> str:
        """The GPU as a `stream_executor.GpuTargetConfigProto` in text form."""
        major, minor = self.compute_capability
        accelerated = ""
        if self.compute_capability in ((9, 0), (10, 0)):
            accelerated = " feature_extension: ACCELERATED_FEATURES"
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {(self.shared_kib - 1) * 2**10}
  shared_memory_per_core: {self.shared_kib * 2**10} core_count: {self.cores}
  fpus_per_core: {self.fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {self.bandwidth * 1e9:.0f} l2_cache_size: {self.l2_mib * 2**20:.0f}
  clock_rate_ghz: {self.clock} device_memory_size: {self.memory_gib * 2**30:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.title}"
"""


GPUS = {
    "t4": GPU("Tesla T4", (7, 5), 15.0, 320, 40, 1.59, 4, 64, threads=1024, fpus=64),
    "rtx3060": GPU("NVIDIA GeForce RTX 3060", (8, 6), 12.0, 360, 28, 1.78, 3, 100),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", (8, 6), 24.0, 936, 82, 1.695, 6, 100),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", (8, 9), 16.0, 717, 76, 2.505, 64, 100),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", (8, 9), 24.0, 1008, 128, 2.52, 72, 100),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", (12, 0), 32.0, 1792, 170, 2.407, 96, 100),
    "a6000": GPU("NVIDIA RTX A6000", (8, 6), 47.5, 768, 84, 1.8, 6, 100),
    "l4": GPU("NVIDIA L4", (8, 9), 22.5, 300, 58, 2.04, 48, 100),
    "l40s": GPU("NVIDIA L40S", (8, 9), 44.5, 864, 142, 2.52, 96, 100),
    "a100-40": GPU(
        "NVIDIA A100-SXM4-40GB", (8, 0), 39.4, 1555, 108, 1.41, 40, 164, threads=2048, fpus=64
    ),
    "a100-80": GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), 79.2, 2039, 108, 1.41, 40, 164, threads=2048, fpus=64
    ),
    "h100": GPU("NVIDIA H100 80GB HBM3", (9, 0), 79.1, 3352, 132, 1.98, 50, 228, threads=2048),
    "h200": GPU("NVIDIA H200", (9, 0), 141.0, 4800, 132, 1.98, 50, 228, threads=2048),
    "b200": GPU("NVIDIA B200", (10, 0), 178.4, 7672, 148, 1.965, 126.5, 228, threads=2048),
}


def find(name: str) -> GPU:
    """Returns the GPU called `name`, such as "rtx3090".

    Raises:
      ValueError: none is called so.
    """
    if name not in GPUS:
        near = [known for known in GPUS if name and known.startswith(name)]
        near = near or difflib.get_close_matches(name, GPUS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GPUS)}"
        raise ValueError(f"no GPU {name!r}; {hint}")
    return GPUS[name]
