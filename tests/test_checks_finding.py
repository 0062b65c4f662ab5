"""How findings read."""

from dalle2_jax.checks.finding import Finding, ok, size


def test_a_line():
    assert str(ok("data", "all is well")) == "ok       data        all is well"
    problem = Finding("problem", "embeddings", "none", "make some")
    assert str(problem) == "problem  embeddings  none: make some"


def test_bytes():
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**20, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3 MiB",
        "5120 GiB",
    ]
