"""Which operators of a rule torch's dispatcher is asked for."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from hybridzoo.kernels.operators import Operator


def dispatched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The names of `name` and its backward operator, one for each time from now on that the dispatcher is asked."""
    asked: list[str] = []

    def counted(operator: Any) -> Any:
        def run(*arguments: Any) -> Any:
            asked.append(operator.name())
            return operator(*arguments)

        return run

    # Nobody holds a backward operator but the autograd function of the forward one.
    both = [x for x in gc.get_objects() if type(x) is Operator and x.operator.name() in (name, f"{name}_backward")]
    assert len(both) == 2
    for one in both:
        monkeypatch.setattr(one, "operator", counted(one.operator))
    return asked
