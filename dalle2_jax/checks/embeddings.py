"""Whether embeddings are of the kind that a model was trained on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dalle2_jax.checks.finding import Finding, ok

TIMES = 3.0  # what the sample's size explains, and more is another distribution
FAR = 1.0  # deviations by which the mean is off, where little of it is the same


class Distance(NamedTuple):
    """How far the statistics of a sample are from others, over all dimensions.

    Attributes:
      shift: root mean square of the means' difference, in deviations.
      spread: root mean square of the logarithm of the deviations' ratio.
      shift_of_chance, spread_of_chance: what these are, about, for a sample of the same
        normal distribution.
    """

    shift: float
    spread: float
    shift_of_chance: float
    spread_of_chance: float

    @property
    def explained(self) -> bool:
        """Whether the sample's size explains the differences."""
        return (
            self.shift <= TIMES * self.shift_of_chance
            and self.spread <= TIMES * self.spread_of_chance
        )


def distance(
    z: Float[np.ndarray, "n d"],
    mean: Float[np.ndarray, " d"],
    std: Float[np.ndarray, " d"],
) -> Distance:
    """Compares the mean and the deviation of a sample, per dimension, with others."""
    n = len(z)
    tiny = np.finfo(np.float32).tiny
    own = np.maximum(z.std(0, dtype=np.float64), tiny)
    std = np.maximum(np.asarray(std, np.float64), tiny)
    shift = (z.mean(0, dtype=np.float64) - mean) / std
    return Distance(
        shift=float(np.sqrt(np.mean(shift**2))),
        spread=float(np.sqrt(np.mean(np.log(own / std) ** 2))),
        # Of a mean and, for normal values, of the logarithm of a deviation.
        shift_of_chance=n**-0.5,
        spread_of_chance=(2 * max(n - 1, 1)) ** -0.5,
    )


def judge(
    z_image: Float[np.ndarray, "n d"], statistics: Mapping[str, Any], own: bool
) -> Finding:
    """Says whether a base's statistics are those of the sample.

    Args:
      z_image: of the sample.
      statistics: of the base, with or without z_image_mean and z_image_std.
      own: whether the stage takes statistics of its own from the data.
    """
    if not np.isfinite(z_image).all():
        bad = int((~np.isfinite(z_image)).any(1).sum())
        found = f"{bad} of {len(z_image)} embeddings are not finite"
        return Finding("problem", "embeddings", found, "embed again, or mend the CLIP")
    if not {"z_image_mean", "z_image_std"} <= statistics.keys():
        return ok("embeddings", "the base has no statistics to compare them with")
    mean, std = statistics["z_image_mean"], statistics["z_image_std"]
    if mean.shape != z_image.shape[1:]:
        found = f"they have {z_image.shape[1]} dimensions, the base's prior {len(mean)}"
        return Finding("problem", "embeddings", found, "give the base of one CLIP")
    far = distance(z_image, mean, std)
    found = (
        f"their means are {far.shift:.2g} deviations off the base's statistics, by "
        f"chance it were {far.shift_of_chance:.2g}; their deviations "
        f"{np.expm1(far.spread):.0%}, by chance {np.expm1(far.spread_of_chance):.0%}"
    )
    if far.explained:
        return ok("embeddings", found)
    if own:
        return ok("embeddings", f"{found}; this prior takes its own from the data")
    level = "problem" if far.shift > FAR else "warning"
    remedy = "the base's prior knows other pictures; train one on these"
    return Finding(level, "embeddings", found, remedy)
