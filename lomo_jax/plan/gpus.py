"""The table of devices: the GPUs that XLA can compile for without one, and peak FLOP/s."""

from __future__ import annotations

import dataclasses

from lomo_jax.errors import UserError, did_you_mean

# The fraction of a GPU's memory that the trainer lets JAX allocate. The CUDA context and libraries
# need the rest: some hundred MiB, more on larger GPUs. JAX's default of 0.75 leaves a quarter idle.
MEMORY_FRACTION = 0.92

# Bandwidths of links in one direction, GB/s, from data sheets, by compute capability. 16 lanes of
# PCIe 3.0, 4.0 or 5.0, by its major number; and NVLink to a switch of all GPUs, without bridges
# between two cards.
_PCIE = {7: 15.75, 8: 31.5, 9: 63.0, 10: 63.0, 12: 63.0}
_NVLINK = {(8, 0): 300.0, (9, 0): 450.0, (10, 0): 900.0}


@dataclasses.dataclass(frozen=True)
class GPU:
    """A kind of NVIDIA GPU, from data sheets and XLA's device descriptions."""

    device_kind: str  # as the driver reports it and JAX names it
    compute_capability: tuple[int, int]
    memory_gib: float  # as the driver reports it
    # Of dense bfloat16 products with float32 sums, at boost clock. The T4 lacks bfloat16: float16.
    peak_tflops: float
    bandwidth: float  # of the memory, GB/s
    cores: int  # streaming multiprocessors
    clock: float  # GHz, boost
    l2_mib: float
    shared_kib: int  # per multiprocessor
    threads: int = 1536  # per multiprocessor
    fpus: int = 128  # float32, per multiprocessor

    @property
    def usable_gib(self) -> float:
        """The part of `memory_gib` that JAX may allocate."""
        return MEMORY_FRACTION * self.memory_gib

    @property
    def pcie(self) -> float:
        """Bandwidth to the host in one direction, GB/s."""
        return _PCIE[self.compute_capability[0]]

    @property
    def link(self) -> float:
        """Bandwidth to other GPUs of the machine in one direction, GB/s: NVLink or PCIe."""
        return _NVLINK.get(self.compute_capability, self.pcie)

    def product_flops(self, dtype: str, *, exact: bool = False) -> float:
        """Returns the peak FLOP/s of dense matrix products.

        Args:
          dtype: of the operands, XLA's name, such as "bf16".
          exact: whether float32 products are computed in float32, as with JAX's precision
            "highest". Otherwise they are computed in TF32 from Ampere on, at half the rate of
            bfloat16.
        """
        if dtype not in ("f32", "f64"):
            return self.peak_tflops * 1e12
        if self.compute_capability >= (8, 0) and not exact:
            return self.peak_tflops * 1e12 / 2
        return 2 * self.fpus * self.cores * self.clock * 1e9  # a multiplication and an addition

    def target_config(self) -> str:
        """Returns a `stream_executor.GpuTargetConfigProto` in text form."""
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
device_description_str: "{self.device_kind}"
"""


GPUS = {
    "t4": GPU("Tesla T4", (7, 5), 15.0, 65, 320, 40, 1.59, 4, 64, threads=1024, fpus=64),
    "rtx3060": GPU("NVIDIA GeForce RTX 3060", (8, 6), 12.0, 25.5, 360, 28, 1.78, 3, 100),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", (8, 6), 24.0, 71, 936, 82, 1.695, 6, 100),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", (8, 9), 16.0, 97.5, 717, 76, 2.505, 64, 100),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", (8, 9), 24.0, 165.2, 1008, 128, 2.52, 72, 100),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", (12, 0), 32.0, 209.5, 1792, 170, 2.407, 96, 100),
    "a6000": GPU("NVIDIA RTX A6000", (8, 6), 47.5, 154.8, 768, 84, 1.8, 6, 100),
    "l4": GPU("NVIDIA L4", (8, 9), 22.5, 121, 300, 58, 2.04, 48, 100),
    "l40s": GPU("NVIDIA L40S", (8, 9), 44.5, 362, 864, 142, 2.52, 96, 100),
    "a100-40": GPU(
        "NVIDIA A100-SXM4-40GB", (8, 0), 39.4, 312, 1555, 108, 1.41, 40, 164, threads=2048, fpus=64
    ),
    "a100-80": GPU(
        "NVIDIA A100-SXM4-80GB", (8, 0), 79.2, 312, 2039, 108, 1.41, 40, 164, threads=2048, fpus=64
    ),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", (9, 0), 79.1, 989.4, 3352, 132, 1.98, 50, 228, threads=2048
    ),
    "h200": GPU("NVIDIA H200", (9, 0), 141.0, 989.4, 4800, 132, 1.98, 50, 228, threads=2048),
    "b200": GPU("NVIDIA B200", (10, 0), 178.4, 2250, 7672, 148, 1.965, 126.5, 228, threads=2048),
}

# TFLOP/s, as `GPU.peak_tflops`, of devices without a plan.
_OTHER_PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 PCIe": 756,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,  # v5p
    "TPU v5p": 459,
    "TPU v6 lite": 918,
}
_BY_KIND = {gpu.device_kind: gpu for gpu in GPUS.values()}


def find(name: str) -> GPU:
    """Returns a GPU by its name in `GPUS`, such as "rtx3090", or by its `device_kind`.

    Raises:
      UserError: The name is unknown; the message suggests others.
    """
    gpu = GPUS.get(name) or _BY_KIND.get(name)
    if gpu is None:
        versions = [known for known in GPUS if name and known.startswith(name)]
        hint = f"; did you mean {' or '.join(map(repr, versions))}?" if versions else ""
        hint = hint or did_you_mean(name, GPUS) or f"; known: {', '.join(GPUS)}"
        raise UserError(f"no GPU {name!r}{hint}")
    return gpu


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of a device in FLOP/s, None if it is unknown.

    Args:
      device_kind: `jax.Device.device_kind`; not a CPU.
    """
    gpu = _BY_KIND.get(device_kind)
    tflops = _OTHER_PEAKS.get(device_kind) if gpu is None else gpu.peak_tflops
    return None if tflops is None else tflops * 1e12
