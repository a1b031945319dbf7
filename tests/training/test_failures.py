"""What is said of a failure."""

from lomo_jax.training import failures


def test_the_reason_is_the_first_line_in_words_that_people_know():
    error = ValueError("OUT_OF_RANGE: Error writing x: No space left on device [os_error_code=28]")
    assert failures.reason(error) == "the disk is full"
    assert failures.reason(ValueError("one\n  two. See full log")) == "one two."
    assert failures.reason(KeyError()) == "KeyError"
    assert failures.reason(ValueError("x" * 300)) == "x" * 200 + "..."
