"""A network with its parameters, and what the sampling loops of all parts share."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, freeze
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from dalle2_jax.diffusion import generate, sample
from dalle2_jax.nn.clip import Caption

static = partial(flax.struct.field, pytree_node=False)

Randomness = Key[Array, " b"] | Float[Array, "b steps ..."]
Known = tuple[Float[Array, "#b side side 3"], Float[Array, "#b side side 1"]]

# Which noise of a picture each network draws, so that a different number of steps in
# one leaves the others' alone. An upsampler's is its picture's side added.
PRIOR, DECODER, UPSAMPLER, CANDIDATES = 0, 1, 2, 3


@flax.struct.dataclass
class Component:
    """A network with its parameters.

    A pytree of the parameters: all else is static, so that a component can be an
    argument of a jitted function. How it is sampled is no part of it but an argument of
    its own, so that another setting is no other program.

    Attributes:
      params: of the network.
      network: the module.
      diffusion: the section that diffusion.generate explains; empty without one.
      size: side of the pictures that it makes, in pixels, or None.
      low_size: side of the pictures that it is given, or None.
      last: params of a second network of the kind, for the last step, or None.
      tile, overlap: the network is run on tiles of so many pixels; None for the whole.
      strips: a sharding of [b, h, w, c] over h: each device makes a strip.
    """

    params: Any
    network: nn.Module = static()
    diffusion: FrozenDict = static(default=FrozenDict())
    size: int | None = static(default=None)
    low_size: int | None = static(default=None)
    last: Any = None
    tile: int | None = static(default=None)
    overlap: int = static(default=0)
    strips: NamedSharding | None = static(default=None)


class Inputs(flax.struct.PyTreeNode):
    """All that a component may be given to make a batch of b; what isn't there is None.

    Attributes:
      caption, null: what to show, and what guidance leads away from.
      randomness: a key for each picture, or the noise itself (see `text_to_image`).
      z_image: [b, d]. None for the caption alone.
      low: pictures [b, h, w, 3] in [-1, 1] of the component before.
      start: x_T, in place of a draw.
      known: a picture in [-1, 1] and a mask: what is to stay where the mask is 0.
      mean, std: [d], of z_image, in which space the prior works.
      x0_error: [timesteps], of the prior.
      codes: of the autoregressive prior.
    """

    caption: Caption | None = None
    null: Caption | None = None
    randomness: Any = None
    z_image: Any = None
    low: Any = None
    start: Any = None
    known: Any = None
    mean: Any = None
    std: Any = None
    x0_error: Any = None
    codes: Any = None


def make_component(
    network: nn.Module, section: Mapping[str, Any], params: Any
) -> Component:
    """A component of its network and its section of a model's config."""
    return Component(
        params=params,
        network=network,
        diffusion=freeze(section.get("diffusion", {})),
        size=section.get("size"),
        low_size=section.get("low_size"),
    )


def noise_of(
    randomness: Randomness, network: int, shape: tuple[int, ...]
) -> sample.Draw:
    """The noise of a network: replayed, or drawn from each picture's key."""
    if not jax.dtypes.issubdtype(randomness.dtype, jax.dtypes.prng_key):
        return sample.replay(jnp.moveaxis(randomness, 1, 0))
    return sample.gaussian(fold(randomness, network), shape)


def fold(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """Other keys, of a number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


# Of parts that denoise


def make_sampling(
    component: Component, settings: Sequence[Mapping[str, Any]]
) -> generate.Sampling:
    """The settings of each picture as data; UserError where there are none such."""
    return generate.make_sampling(component.diffusion, settings)


def count_steps(component: Component, sampling: generate.Sampling) -> int:
    """How many steps the longest loop of a batch has."""
    return int(np.max(sampling.steps))
