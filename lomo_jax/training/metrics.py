"""What a run measures of itself."""

import time

import jax

from lomo_jax.flops import flops_per_token
from lomo_jax.models import LlamaConfig
from lomo_jax.plan import peak_flops


class Stopwatch:
    """Tokens a second since the last reading, and the share of the devices' peak that they are."""

    def __init__(
        self, config: LlamaConfig, batch_size: int, sequence_length: int, devices: int = 1
    ) -> None:
        self._tokens = batch_size * sequence_length
        self._flops = self._tokens * flops_per_token(config, sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * devices
        self.restart()

    def restart(self) -> None:
        """Forgets the time until now: it was not spent on steps."""
        self._start, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """Counts one step that has ended."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns `tokens_per_second` and, if the peak is known, `flop_utilisation`; restarts."""
        steps_per_second = self._steps / (time.perf_counter() - self._start)
        self.restart()
        speed = {"tokens_per_second": steps_per_second * self._tokens}
        if self._peak is not None:
            speed["flop_utilisation"] = steps_per_second * self._flops / self._peak
        return speed


def device_memory() -> dict[str, float]:
    """Returns `device_memory_gib`, the most in use so far, where the backend tells it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        return {}
    return {"device_memory_gib": stats["peak_bytes_in_use"] / 2**30}
