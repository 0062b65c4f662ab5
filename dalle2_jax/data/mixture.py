"""Several sources as one, each drawn from as often as its weight says."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dalle2_jax.data.examples import ENDLESS, Source
from dalle2_jax.errors import UserError, short


def mix(sources: Sequence[Source], weights: Sequence[Any], seed: int) -> Source:
    """An endless source whose every run of examples has them in these proportions.

    Example i is the same for a seed wherever reading begins: the sources take turns in
    a fixed pattern, and each gives all of its examples, in an order of its own that is
    new in each of its epochs, before any again. Endless ones are read in order.

    Args:
      sources: all with CLIP's embeddings, of one CLIP and with pictures of one size, or
        all without.
      weights: above 0; only their ratios count.
      seed: of the orders.

    Raises:
      UserError: there are none, a weight is not above 0, a source is empty, or they
        don't go together.
    """
    import grain

    if not sources:
        raise UserError("a mixture needs at least one source, and has none")
    for source, weight in zip(sources, weights, strict=True):
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise UserError(
                f"the weight of {source.name} is {short(weight)}: must be a number "
                "above 0"
            )
        if len(source) == 0:
            raise UserError(f"{source.name} has no examples")
        if source.embedded != sources[0].embedded:
            raise UserError(
                f"{sources[0].name} and {source.name} can't be mixed: embeddings only "
                "with embeddings, of the same CLIP and with pictures of the same size"
            )

    def order(number: int, source: Source) -> grain.MapDataset:
        indices = grain.MapDataset.range(len(source))
        if not source.endless:
            indices = indices.shuffle(seed=(seed + number) % 2**32)
        return indices.repeat().map(lambda i: (number, int(i)))

    turns = grain.MapDataset.mix(
        [order(number, source) for number, source in enumerate(sources)], weights
    )

    def read(i: int) -> dict:
        number, index = turns[i]
        return sources[number][index]

    name = "mixture of " + ", ".join(source.name for source in sources)
    return Source(
        name,
        range(ENDLESS),
        read,
        endless=True,
        embedded=sources[0].embedded,
        left_out=sum((Counter(source.left_out) for source in sources), Counter()),
    )
