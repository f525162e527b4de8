import io
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specbatch.snapshot import json_state

SIMPLE = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
VALUES = st.recursive(
    SIMPLE, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(VALUES)
def test_a_value_comes_back_as_it_was(value):
    back = json_state.decode(json_state.encode(value))
    assert back == value
    assert repr(back) == repr(value), "the types differ"


def test_not_a_number_comes_back():
    assert math.isnan(json_state.decode(json_state.encode(math.nan)))


def test_pythons_random_state_comes_back():
    assert json_state.decode(json_state.encode(random.getstate())) == random.getstate()


@pytest.mark.parametrize("value", [object(), {1: 2}, 1 << 63, {3}, 1j, [print]])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(TypeError, match="can't hold"):
        json_state.encode(value)


@pytest.mark.parametrize("value", [{}, {"call": "x"}, {"tuple": 3}, [{"float": 1}]])
def test_what_was_never_encoded_is_refused(value):
    with pytest.raises(ValueError, match="no value like"):
        json_state.decode(value)


class Program:
    """An object whose pickle calls a function."""

    def __reduce__(self):
        return print, ("run",)


def test_a_pickled_program_is_refused_by_name_and_not_run(capsys):
    data = io.BytesIO()
    torch.save(Program(), data)
    with pytest.raises(TypeError, match=r"optimizer\.x"):
        json_state.from_torch("optimizer.x", data)
    assert capsys.readouterr().out == ""
