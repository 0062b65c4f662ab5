"""What a script prints of what goes wrong beside it."""

import sys
from types import SimpleNamespace

from dalle2_jax import flags


def test_reads_that_tensorstore_ends_late_are_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("a bug"))
    for unraisable in (late, other):
        flags._tell_unraisable(unraisable)
    assert told == [other]
