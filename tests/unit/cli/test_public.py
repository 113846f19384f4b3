"""What ``import inversion_dpo`` offers, and what it costs."""

import subprocess
import sys

import pytest

import inversion_dpo
from inversion_dpo import api


@pytest.mark.parametrize("name", inversion_dpo.__all__)
def test_the_package_offers_the_public_functions(name):
    assert getattr(inversion_dpo, name) is getattr(api, name)


def test_nothing_else_is_an_attribute():
    with pytest.raises(AttributeError, match="no attribute 'aligned'"):
        inversion_dpo.aligned  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, inversion_dpo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
