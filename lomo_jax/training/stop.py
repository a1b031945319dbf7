"""Stops a run between two steps when a signal requests it."""

import os
import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Stop:
    """Turns signals into a request to stop after the current step; use as a context.

    SIGTERM, SIGINT and SIGUSR1 request a stop; SLURM sends SIGUSR1 before a time limit. A second
    SIGINT raises KeyboardInterrupt: the user does not want to wait for the step. SIGHUP is ignored:
    the run continues when its terminal is lost.

    With several processes any of them may get the signal. All must stop after the same step, which
    JAX's coordination service chooses; it also handles SIGTERM.
    """

    def __init__(self) -> None:
        self._is_requested = False  # by a signal that this process received
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGUSR1]
            if jax.process_count() == 1:
                numbers.append(signal.SIGTERM)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether a stop is requested. Always False with several processes: only a step decides."""
        return self._is_requested and jax.process_count() == 1

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`; all processes must call this after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, number: int, _frame: object) -> None:
        if self._is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_requested = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
