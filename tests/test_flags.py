"""What a script prints of what goes wrong beside it."""

import contextlib
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from dalle2_jax import flags


def test_reads_that_tensorstore_ends_late_are_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("a bug"))
    for unraisable in (late, other):
        flags._tell_unraisable(unraisable)
    assert told == [other]


def test_an_interruption_that_python_ignores_is_made_again():
    # A process in the background may have been started to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, before)
        _interrupt()


def _interrupt():
    with pytest.raises(KeyboardInterrupt):
        flags._tell_unraisable(SimpleNamespace(exc_value=KeyboardInterrupt()))
        time.sleep(10)
