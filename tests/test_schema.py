"""The kinds of values in files; each file's schema is tested with its reader."""

import math

import pytest

from lomo_jax import _schema
from lomo_jax._schema import (
    BOOLEAN,
    NULL,
    TEXT,
    choice,
    integer,
    list_of,
    number,
    object_of,
    record,
)
from lomo_jax.errors import UserError

NESTED = record({"a": list_of(integer(0, 9), 3)}, {"b": object_of(TEXT) | NULL})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (integer(0, 9), 0),
        (integer(0, 9), 9),
        (number(0, 1), 1),
        (number(0, 1), 0.5),
        (BOOLEAN | NULL, None),
        (BOOLEAN | NULL, False),
        (choice("a", 2), 2),
        (NESTED, {"a": [], "other": object()}),
        (NESTED, {"a": [1, 2, 3], "b": {"x": "y"}}),
        (NESTED, {"a": [1], "b": None}),
        (TEXT | list_of(TEXT), ["a"]),
    ],
)
def test_values_that_fit(kind, value):
    kind.check(value)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (integer(0, 9), 10, "=10 must be an integer from 0 to 9"),
        (integer(0, 9), True, "=True must be"),
        (integer(0, 9), 1.0, "=1.0 must be"),
        (number(0, 1), math.nan, "=nan must be a number from 0 to 1"),
        (number(0, 1), -(10**500), "=-1000"),
        (number(0, 1), False, "=False must be"),
        (BOOLEAN | NULL, 0, "=0 must be true or false or null"),
        (choice("a", 2), "b", "='b' must be 'a' or 2"),
        (NESTED, [], "=[] must be an object"),
        (NESTED, {}, "the key 'a' is missing"),
        (NESTED, {"a": [1, 2, 3, 4]}, "a=[1, 2, 3, 4] must be a list of at most 3"),
        (NESTED, {"a": [1, "2"]}, "a[1]='2' must be an integer"),
        (NESTED, {"a": [], "b": {"x": 1}}, "b.x=1 must be a string"),
        (NESTED, {"a": [], "b": {"x\ny": 1}}, "b['x\\ny']=1 must be a string"),
        (TEXT | list_of(TEXT), [1], "[0]=1 must be a string"),
    ],
)
def test_values_that_do_not_fit_are_one_line(kind, value, message):
    with pytest.raises(UserError) as caught:
        kind.check(value, "file.json")
    assert str(caught.value).startswith(f"file.json: {message}")
    assert "\n" not in str(caught.value)


def test_nesting_is_measured_without_recursion():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert _schema.depth_of(deep) > _schema.MAX_DEPTH
    assert _schema.depth_of({"a": [{"b": 1}]}) == 2


@pytest.mark.parametrize("name", ["a.bin", "a/b.bin", "..a", "a..b/c"])
def test_names_inside_a_folder(name):
    assert _schema.is_inside(name)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a\0b", "..", ".", "a" * 256])
def test_names_outside_a_folder(name):
    assert not _schema.is_inside(name)
