"""Whether a stage learns: it shall come to know a few examples by heart.

The stage's own loss and optimiser, at the config's learning rate after a short warm-up,
train on one batch. What is left of the loss is measured before and after with the same
`KEYS`, so with the same noise and the same captions dropped. Of a stage that begins
from random params at most this may be left (in brackets what 100 steps leave of the
rows `tiny` and, if there are two, `small`):

    clip       0.2  (0.00)        of the cost of guessing
    prior      0.5  (0.19, 0.03)  of the cost of an output of 0, as the next two
    decoder    0.5  (0.05)        (30 steps of `small` leave 0.14)
    upsampler  0.5
    ar_prior   0.3  (0.04)        of the cost of guessing

More is a warning, more than `HARDLY` a problem, as is a loss that rises. One that is
fine-tuned has little to lose: its loss must change, and must not rise.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle2_jax.checks.finding import Finding, ok
from dalle2_jax.parts import PARTS
from dalle2_jax.train import mesh as meshes
from dalle2_jax.train import optim, update

EXAMPLES = 32
KEYS = 8
HARDLY = 0.97  # of the loss is left where nothing was learnt
UNCHANGED = 1e-4  # part of the loss


class Overfit(NamedTuple):
    """What some steps on one batch did.

    Attributes:
      steps: how many were done, before one that was not finite.
      wanted: how many should have been.
      before, after: the loss, over the same noise.
      largest: the largest norm of the gradient.
      untouched: paths of params whose gradient was 0 in every step.
    """

    steps: int
    wanted: int
    before: float
    after: float
    largest: float
    untouched: Sequence[str]


def fixed_batch(
    batches: Iterator[dict[str, np.ndarray]], rows: int
) -> dict[str, np.ndarray]:
    """The first rows of a stage's batches, as one."""
    seen = [next(batches)]
    while sum(len(next(iter(batch.values()))) for batch in seen) < rows:
        seen.append(next(batches))
    return {name: np.concatenate([b[name] for b in seen])[:rows] for name in seen[0]}


def watch() -> optax.GradientTransformation:
    """Changes no gradient, and notes whether any of a param's was other than 0."""

    def init(params: Any) -> Any:
        return jax.tree.map(lambda _: jnp.zeros((), bool), params)

    def note(grads: Any, touched: Any, params: Any = None) -> tuple[Any, Any]:
        return grads, jax.tree.map(lambda t, g: t | jnp.any(g != 0), touched, grads)

    return optax.GradientTransformation(init, note)


def overfit(
    stage: Any,
    config: ConfigDict,
    mesh: Mesh,
    frozen: Any,
    batch: dict[str, np.ndarray],
    steps: int,
) -> Overfit:
    """Trains on one batch.

    Args:
      stage: a Stage, with a loss that can be given so many rows.
      config: its ConfigDict, of which seed, ema_decay and optim are read.
      mesh: which `jax.set_mesh` has set; its devices share the batch.
      frozen: of the stage, on the devices.
      batch: on the host.
    """
    options = {**config.optim, "schedule": "constant"}
    options["warmup"] = min(options["warmup"], steps // 10)
    step = update.make_step(
        stage, config, mesh, optax.chain(watch(), optim.make(steps, **options))
    )
    measured = meshes.put_batch(batch, mesh, 1 if stage.compares else None)
    loss = jax.jit(lambda *arguments: stage.loss(*arguments)[0])

    def measure(params: Any) -> float:
        keys = jax.random.split(jax.random.key(config.seed), KEYS)
        return float(np.mean([loss(params, frozen, measured, key) for key in keys]))

    state = step.begin()
    before = measure(state.params)
    trained = meshes.put_batch(batch, mesh, 1)
    norms = []
    for i in range(steps):
        state, values = step.update(state, frozen, trained, np.int32(i))
        norms.append(values["grad_norm"])
        jax.block_until_ready(norms[-2:-1])
    done = int(state.step)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.opt_state[0]))
    name = jax.tree_util.keystr
    return Overfit(
        steps=done,
        wanted=steps,
        before=before,
        after=measure(state.params),
        largest=float(np.max(jax.device_get(norms)[:done], initial=0.0)),
        untouched=[
            name(path, simple=True, separator="/") for path, seen in leaves if not seen
        ],
    )


def judge(stage: str, found: Overfit, starts: bool) -> list[Finding]:
    """Says whether that is learning, by the criterion of this module.

    Args:
      stage: the config's.
      starts: whether from random params; else it is fine-tuned.
    """
    if found.steps < found.wanted:
        what = f"the loss or its gradient is not finite at step {found.steps + 1}"
        remedy = "lower optim.learning_rate or raise optim.warmup"
        if not found.steps:
            remedy = "of random params it must be; look at the data and optim.eps"
        return [Finding("problem", "overfit", what, remedy)]
    left = found.after / found.before
    what = (
        f"the loss of one batch goes from {found.before:.4g} to {found.after:.4g} in "
        f"{found.steps} steps, {left:.0%} is left; the gradients are finite, their "
        f"norm is {found.largest:.3g} at most"
    )
    findings = [
        _judge_loss(what, left, PARTS[stage].most_left if starts else 1.0, starts)
    ]
    if found.untouched:
        few = ", ".join(found.untouched[:4])
        more = len(found.untouched) - 4
        what = f"no step had a gradient of {few}" + (f" and {more} more" * (more > 0))
        remedy = "they are not trained; a config that uses them, or none of them"
        findings.append(Finding("warning", "params", what, remedy))
    else:
        findings.append(ok("params", "every one has a gradient"))
    return findings


def _judge_loss(what: str, left: float, most: float, starts: bool) -> Finding:
    hardly = HARDLY if starts else 1 - UNCHANGED
    if left > 1 + UNCHANGED:
        return Finding("problem", "overfit", what, "lower optim.learning_rate")
    if left > hardly:
        remedy = "nothing is learnt: raise optim.learning_rate, look at optim"
        return Finding("problem", "overfit", what, remedy)
    if left > most:
        remedy = (
            f"at most {most:.0%} should be: raise --overfit_steps and, if that doesn't "
            "help, optim.learning_rate"
        )
        return Finding("warning", "overfit", what, remedy)
    return ok("overfit", what)
