"""Stopping a run between two steps when a person or a cluster asks for it."""

import os
import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Stop:
    """Takes SIGTERM and SIGINT for the wish to stop; use as a context.

    Until `begin` there is nothing to save, and a signal raises KeyboardInterrupt. From then on it
    is remembered until the run asks, at the end of a step. So is one before, in case that its
    exception was lost: Python drops what is raised while it collects garbage. A second SIGINT does
    not wait.

    Of several processes any may get the signal. They have to stop after the same step, which JAX's
    coordination service settles; it has a handler of its own for SIGTERM.
    """

    def __init__(self) -> None:
        self._is_asked = False  # by a signal to this process
        self._has_begun = False
        self.is_urgent = False  # asked again: the run is not to wait for anything
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            theirs = [signal.SIGTERM] if jax.process_count() > 1 else []
            for number in {signal.SIGTERM, signal.SIGINT}.difference(theirs):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on a signal waits for the end of a step."""
        self._has_begun = True

    @property
    def is_wanted(self) -> bool:
        """Whether this process need not begin anything long. Of several processes, none knows."""
        return self._is_asked and jax.process_count() == 1

    def after(self, step: int) -> bool:
        """Whether to stop after `step`; all processes ask this after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.is_wanted

    def _take(self, number: int, _frame: object) -> None:
        self.is_urgent |= self._is_asked and number == signal.SIGINT
        self._is_asked = True
        if not self._has_begun or (self.is_urgent and number == signal.SIGINT):
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
