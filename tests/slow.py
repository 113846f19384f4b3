"""Which cases of a parametrisation `make test` leaves to `make test-slow`."""

import pytest


def slow_but(kept, cases):
    """The cases as pytest parameters, marked slow but for the kept ones.

    For parametrisations that take one path again and again: one case of each kind stays fast.
    A tuple is a case of several parameters.
    """
    cases = list(cases)
    assert all(case in cases for case in kept), "a kept case is none of the cases"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in kept else pytest.mark.slow,
        )
        for case in cases
    ]
