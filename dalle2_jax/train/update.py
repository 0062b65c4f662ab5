"""What a training step computes, and the state that it changes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle2_jax import runtime
from dalle2_jax.train import mesh as meshes
from dalle2_jax.train import optim


class TrainState(NamedTuple):
    """All that training changes, and all that a checkpoint holds.

    The params have the dtype that the stage gives them; all else, and how it is
    computed, is float32.
    """

    step: jax.Array  # int32: updates done
    params: Any
    ema: Any  # moving average of the params: what is evaluated and exported
    opt_state: Any


class Step(NamedTuple):
    """A stage's training step on a mesh, and what it begins with.

    Attributes:
        update: (state, frozen, batch, step) -> (state, metrics), jitted; see
            `make_update`.
        abstract: the state's shapes, with where each array lies.
        begin: makes the first state, on the devices.
    """

    update: Any
    abstract: TrainState
    begin: Callable[[], TrainState]


def make_step(
    stage: Any,
    config: Any,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    options: dict[str, Any] | None = None,
) -> Step:
    """The step that `train.loop` runs; nothing is compiled or on the devices yet.

    Args:
        stage: a Stage.
        config: its ConfigDict, of which seed and ema_decay are read.
        mesh: to be set where the step is used, as `jax.set_mesh` does.
        optimizer: of `optim.make`.
        options: XLA's; None for those of the devices that are here.
    """
    if options is None:
        options = runtime.compiler_options()
    init_key, step_key, _ = split_seed(config.seed)

    def begin(params):
        return first_state(params, optimizer)

    def init(key):
        return begin(stage.init(key))

    abstract = jax.eval_shape(init, init_key)
    shardings = meshes.shardings(abstract, mesh)

    def start():
        if stage.start is None:
            return jax.jit(init, out_shardings=shardings)(init_key)
        params = meshes.put(stage.start, mesh)  # the state has its own
        return jax.jit(begin, out_shardings=shardings)(params)

    update = make_update(
        stage.loss, optimizer, step_key, config.ema_decay, stage.compares
    )
    return Step(
        update=jit_update(update, shardings, options),
        abstract=meshes.with_shardings(abstract, shardings),
        begin=start,
    )


def abstract_arguments(
    step: Step, stage: Any, config: Any, mesh: Mesh, example: Mapping[str, Any]
) -> tuple[Any, Any, Any]:
    """The step's state, what is frozen and a batch, as shapes with where each lies.

    Args:
        step: of `make_step` with the same stage, config and mesh.
        example: a batch of any number of rows; that of the result is `batch_size`.
    """
    frozen = meshes.with_shardings(stage.frozen, meshes.shardings(stage.frozen, mesh))
    rows = config.accumulate, config.batch_size // config.accumulate
    split = NamedSharding(mesh, PartitionSpec(None, meshes.BATCH))
    batch = {
        name: jax.ShapeDtypeStruct((*rows, *x.shape[1:]), x.dtype, sharding=split)
        for name, x in example.items()
    }
    return step.abstract, frozen, batch


def split_seed(seed: int) -> jax.Array:
    """The keys of a run's first params, its steps, and its metrics and previews."""
    return jax.random.split(jax.random.key(seed), 3)


def first_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    wide = optax.tree.cast(params, jnp.float32)
    return TrainState(jnp.zeros((), jnp.int32), params, wide, optimizer.init(wide))


def make_update(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema_decay: float,
    compares: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the training step, (state, frozen, batch, step) -> (state, metrics).

    The batch is [accumulate, b, ...]; gradients are averaged over its first axis. A
    loss that `compares` examples (see Stage) is given all of it, with one key.

    A step whose loss or gradient is not finite leaves the state as it was, and so do
    all steps after it, because their `step` is no longer the state's. So the host need
    not look at every step to stop at the last good one.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def gradient(params, frozen, batch, keys):
        """In float32, and what the loss says, both averaged over the micro-batches."""

        def add(total, micro):
            (value, extra), grads = value_and_grad(params, frozen, *micro)
            return jax.tree.map(jnp.add, total, grads), {**extra, "loss": value}

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        if compares:
            return add(zeros, (batch, keys[0]))
        if len(keys) == 1:  # XLA's CPU backend is several times slower in a loop
            return add(zeros, jax.tree.map(lambda x: x[0], (batch, keys)))
        grads, metrics = jax.lax.scan(add, zeros, (batch, keys))
        grads = jax.tree.map(lambda x: x / len(keys), grads)
        return grads, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    def update(state, frozen, batch, step):
        accumulate = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(key, step), accumulate + 1)
        keys, round_key = keys[:-1], keys[-1]

        def gradient_at(wide):
            params = _narrow(wide, state.params, round_key)
            return gradient(params, frozen, batch, keys)[0]

        grads, metrics = gradient(state.params, frozen, batch, keys)
        metrics["grad_norm"] = optax.tree.norm(grads)

        wide = optax.tree.cast(state.params, jnp.float32)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, wide, gradient=gradient_at
        )
        wide = optax.apply_updates(wide, updates)
        # Short runs would else average in their first, random params: the decay rises
        # to its value as TensorFlow's ExponentialMovingAverage has it.
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, wide)
        params = _narrow(wide, state.params, round_key)

        numbers = metrics["loss"], metrics["grad_norm"], optax.tree.norm(updates)
        good = jnp.isfinite(jnp.stack(numbers)).all() & (state.step == step)
        state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            TrainState(state.step + 1, params, ema, opt_state),
            state,
        )
        return state, metrics

    return update


def ema_distance(state: TrainState) -> jax.Array:
    """How far the average is behind the params, |params - ema| / |params|."""
    wide = optax.tree.cast(state.params, jnp.float32)
    behind = optax.tree.sub(wide, state.ema)
    return optax.tree.norm(behind) / optax.tree.norm(wide)


def jit_update(
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    shardings: TrainState,
    options: dict[str, Any],
) -> Any:
    """The training step as it runs: on the state in place, its metrics everywhere.

    Args:
        update: of `make_update`.
        shardings: of the state.
        options: XLA's.
    """
    everywhere = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(
        update,
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=options,
    )


def _narrow(wide: Any, like: Any, key: jax.Array) -> Any:
    """Float32 params in the dtypes of others; to bfloat16, rounded at random."""
    leaves, tree = jax.tree.flatten(wide)
    keys = tree.unflatten(jax.random.split(key, len(leaves)))
    return jax.tree.map(
        lambda x, y, k: x if y.dtype == x.dtype else optim.round_at_random(x, k),
        wide,
        like,
        keys,
    )
