"""What is said of a failure."""

import asyncio
import threading
import time

from lomo_jax.training import failures


def test_what_a_closed_event_loop_has_begun_is_waited_for():
    loop, done = asyncio.new_event_loop(), threading.Event()
    loop.run_in_executor(None, lambda: (time.sleep(0.5), done.set()))
    loop.close()
    failures.settle()
    assert done.is_set()


def test_the_threads_of_an_open_event_loop_are_not_waited_for_for_ever():
    loop, go = asyncio.new_event_loop(), threading.Event()
    loop.run_in_executor(None, go.wait)
    failures.settle(seconds=0.1)
    assert not go.is_set()
    go.set()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_the_reason_is_the_first_line_in_words_that_people_know():
    error = ValueError("OUT_OF_RANGE: Error writing x: No space left on device [os_error_code=28]")
    assert failures.reason(error) == "the disk is full"
    assert failures.reason(ValueError("one\n  two. See full log")) == "one two."
    assert failures.reason(KeyError()) == "KeyError"
    assert failures.reason(ValueError("x" * 300)) == "x" * 200 + "..."
