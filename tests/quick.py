"""Which cases of a test run each time, and which, marked slow, only with all of them."""
import functools

import pytest

slowly = functools.partial(pytest.param, marks=pytest.mark.slow)       # one case that is slow


def few(cases, *quick):
    """The cases for parametrize, of which all are slow but those that are equal to one of `quick`."""
    assert all(one in cases for one in quick), quick
    return [case if case in quick else slowly(*case) if isinstance(case, tuple) else slowly(case) for case in cases]
