"""What the tests of whole models share: the shipped specs, by size."""

from __future__ import annotations

import pytest

from hybridzoo.architectures import list_specs

TINY = [name for name in list_specs() if name.endswith("-tiny")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for `tiny_spec` every tiny spec, and one that asks for `any_spec` every spec."""
    if "tiny_spec" in metafunc.fixturenames:
        metafunc.parametrize("tiny_spec", TINY)
    if "any_spec" in metafunc.fixturenames:
        metafunc.parametrize("any_spec", list_specs())
