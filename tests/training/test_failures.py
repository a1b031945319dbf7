"""What is kept from a person's eyes, and what is not."""

import asyncio
import gc
import logging

import pytest

from lomo_jax.training import failures


async def _write(text):
    raise ValueError(text)


async def _begin(text):
    task = asyncio.create_task(_write(text))  # which nobody waits for
    await asyncio.sleep(0)
    del task
    gc.collect()


def test_a_task_of_orbax_that_is_collected_late_says_nothing(caplog):
    with failures.quiet():
        pass
    with caplog.at_level(logging.ERROR):
        asyncio.run(
            _begin("Error writing in OCDBT database at /x/2.orbax-checkpoint-tmp: No space")
        )
        assert caplog.text == ""
        asyncio.run(_begin("of another library"))
        assert "of another library" in caplog.text


def test_a_part_of_a_checkpoint_that_is_collected_unwritten_says_nothing(recwarn):
    async def async_serialize_from_host():  # as orbax names it
        """Not awaited when another part has failed before its turn."""

    with failures.quiet():  # which an error that holds them outlives
        parts, another = [async_serialize_from_host()], [_write("of another library")]
    parts.clear()
    assert not recwarn
    with pytest.warns(RuntimeWarning, match="coroutine '_write' was never awaited"):
        another.clear()


def test_where_warnings_are_errors_too():
    source = compile("async def restore(): ...", "lib/orbax/checkpoint/reader.py", "exec")
    names = {}
    exec(source, names)
    with failures.quiet():
        parts = [names["restore"]()]
    parts.clear()  # pytest would fail the test that runs when this is told


def test_the_reason_is_the_first_line_in_words_that_people_know():
    error = ValueError("OUT_OF_RANGE: Error writing x: No space left on device [os_error_code=28]")
    assert failures.reason(error) == "the disk is full"
    assert failures.reason(ValueError("one\n  two. See full log")) == "one two."
    assert failures.reason(KeyError()) == "KeyError"
    assert failures.reason(ValueError("x" * 300)) == "x" * 200 + "..."
