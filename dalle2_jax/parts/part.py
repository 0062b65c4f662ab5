"""What a part of the model declares: its network, how it is sampled, what trains it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
from ml_collections import ConfigDict

from dalle2_jax.parts.component import Component, Inputs
from dalle2_jax.parts.stage import Load, Stage
from dalle2_jax.rules import Rule, Rules


class Sampler(NamedTuple):
    """How a part makes something: a loop of steps, jit-compiled.

    A loop is begin, advance and finish. It can be cut anywhere into several advances,
    which are one program.

    Attributes:
      rules: what the section `sampling` of a config must have beside what all that
        denoise have; see diffusion.settings.
      settings: of `sampling`, those that a caller may change.
      make_sampling: (component, [settings of each picture]) -> sampling, a pytree of
        arrays, of which each has a first axis b.
      steps: (component, sampling) -> how many steps the longest loop of a batch has.
      begin: (component, sampling, inputs) -> (prepared, state).
      advance: (component, sampling, prepared, state, start, stop) -> state.
      finish: (component, sampling, prepared, state) -> [b, ...], what was made.
    """

    rules: Mapping[str, Rule]
    settings: tuple[str, ...]
    make_sampling: Callable[[Component, Sequence[Mapping[str, Any]]], Any]
    steps: Callable[[Component, Any], int]
    begin: Callable[[Component, Any, Inputs], tuple[Any, Any]]
    advance: Callable[[Component, Any, Any, Any, Any, Any], Any]
    finish: Callable[[Component, Any, Any, Any], Any]

    @property
    def diffuses(self) -> bool:
        """Whether it denoises, by the sections that diffusion.generate explains."""
        return "steps" in self.settings


class Part(NamedTuple):
    """A part of the model, such as the decoder.

    Attributes:
      name: of its stage, and of its component in a model.
      module: class of its network.
      arguments: (config, CLIP's arguments or None) -> the arguments of the module.
      make_stage: (config, load) -> the stage that trains it.
      most_left: of the loss of one batch, on which it is trained for 100 steps from
        random parameters, at most this part should be left.
      rules: what the values of its config may be, beside those that all stages have.
      check: raises a UserError if values of its config don't go together.
      makes: "embedding" (of an image), "picture", or None.
      sides: what its section of a config must have beside its network and the settings
        of its sampler: sides of pictures, in pixels.
      sampler: None where it makes nothing.
      several: whether a model may have several components of it, such as upsamplers;
        their names have "_SIZE" at the end.
      read_statistics: (a model's statistics, its sampling) -> what the sampler reads of
        them, as fields of Inputs.
      zero_statistics: (network) -> those statistics as zeros.
    """

    name: str
    module: type[nn.Module]
    arguments: Callable[[ConfigDict, Mapping[str, Any] | None], dict[str, Any]]
    make_stage: Callable[[ConfigDict, Load], Stage]
    most_left: float
    rules: Rules
    makes: str | None = None
    sides: tuple[str, ...] = ()
    sampler: Sampler | None = None
    several: bool = False
    check: Callable[[ConfigDict], None] = lambda config: None
    read_statistics: Callable[
        [Mapping[str, Any], Mapping[str, Any]], dict[str, Any]
    ] = lambda statistics, settings: {}
    zero_statistics: Callable[[Any], dict[str, Any]] = lambda network: {}

    def component_name(self, config: ConfigDict) -> str:
        """The name in a model of what a config trains."""
        return f"{self.name}_{config.size}" if self.several else self.name


def run(
    sampler: Sampler,
    component: Component,
    sampling: Any,
    inputs: Inputs,
    chunk: int | None = None,
) -> Iterator[tuple[int, int, Any]]:
    """Samples a batch, ``chunk`` steps at a time; None takes all of them at once.

    Yields:
      (steps taken, steps in all, the state), and in the end (steps, steps, what was
      made).
    """
    prepared, state = sampler.begin(component, sampling, inputs)
    total = sampler.steps(component, sampling)
    for start in range(0, total, chunk or max(total, 1)):
        if start:
            yield start, total, state
        stop = min(start + (chunk or total), total)
        state = sampler.advance(component, sampling, prepared, state, start, stop)
    yield total, total, sampler.finish(component, sampling, prepared, state)


def sample(
    sampler: Sampler,
    component: Component,
    settings: Sequence[Mapping[str, Any]],
    inputs: Inputs,
) -> Any:
    """Samples a batch with the settings of each picture; what was made, [b, ...]."""
    sampling = sampler.make_sampling(component, settings)
    *_, (_, _, made) = run(sampler, component, sampling, inputs)
    return made
