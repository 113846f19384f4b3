"""Pipelines of tiny folders, loaded once for all tests of the models."""

from copy import deepcopy
from functools import cache

import pytest

from inversion_dpo.models.loading import load_pipeline
from inversion_dpo.run.fields import ModelConfig


@pytest.fixture(scope="session")
def pipe(tiny):
    """family -> its pipeline; do not change it. ``embedded`` is the packaged one."""

    def load(family):
        return load_pipeline(
            ModelConfig("asset:pipeline" if family == "embedded" else str(tiny(family)))
        )

    return cache(load)


@pytest.fixture(scope="session")
def fresh(pipe):
    """family -> a copy of its pipeline, to be changed."""
    return lambda family: deepcopy(pipe(family))
