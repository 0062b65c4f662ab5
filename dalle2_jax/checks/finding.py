"""What a check says."""

from typing import NamedTuple

LEVELS = ("ok", "warning", "problem")
PARTS = ("memory", "data", "overfit", "speed")  # of the checks, that can be skipped


class Finding(NamedTuple):
    """What one check has found.

    Attributes:
      level: of LEVELS; with a problem a run fails, or is not worth its time.
      check: what was looked at.
      found: what is so.
      remedy: what to do; empty if nothing is to be done.
    """

    level: str
    check: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        what = f"{self.found}: {self.remedy}" if self.remedy else self.found
        return f"{self.level:<7}  {self.check:<10}  {what}"


def ok(check: str, found: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding("ok", check, found)


def size(count: float | int) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
