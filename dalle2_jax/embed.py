"""Writes CLIP's embeddings of captioned pictures, for stages to train on.

    python -m dalle2_jax.embed --model=MODEL --source=folder --path=DATA --out=DIR

MODEL is what the stages will build on: they refuse embeddings of any other CLIP. With
--config.data.source=embeddings --config.data.path=DIR both priors train without running
CLIP's image tower, and so does the decoder, if --image_size is its pictures' size. (The
text tower runs: the networks read its states of every token, too much for a disk.)
Pictures are embedded as the stages embed them, their middle square.

The same command goes on where it was interrupted. Several processes share the work
where JAX knows of them, or as --process_count and --process_index say.

A program calls pipeline.embed instead: the name dalle2_jax.embed is a function's.
"""

from absl import flags

from dalle2_jax import storage
from dalle2_jax.errors import UserError
from dalle2_jax.flags import run

MODEL = flags.DEFINE_string("model", "", "A model with a CLIP: a directory, hub id.")
SOURCE = flags.DEFINE_string("source", "folder", "A kind of data/sources.py.")
PATH = flags.DEFINE_string("path", "", "Of the source.")
OPTION = flags.DEFINE_multi_string("option", [], "NAME=VALUE, of the source.")
SPLIT = flags.DEFINE_string("split", "", "train or heldout; without it all pictures.")
OUT = flags.DEFINE_string("out", "", "Directory for the embeddings.")
LIMIT = flags.DEFINE_integer("limit", None, "Only the first pictures, so many.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures at once on a device.", 1)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 10_000, "Pictures in a shard.", 1)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side of pictures to be stored.", 1
)
IMAGE_FORMAT = flags.DEFINE_enum("image_format", "png", ["png", "jpeg"], "Theirs.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Activations.")
Z_DTYPE = flags.DEFINE_enum("z_dtype", "float32", ["float32", "float16"], "On disk.")
THREADS = flags.DEFINE_integer("threads", 4, "That read pictures.", 1)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that do, with threads each.")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "This one, from 0.")
PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "How many share the work.", 1
)


def main() -> None:
    """The command: reads the flags, and writes this process's shards."""
    for flag in (MODEL, OUT):
        if not flag.value:
            raise UserError(f"no --{flag.name}: give a directory")

    out = storage.directory(OUT.value, "--out")

    import jax

    from dalle2_jax import hub
    from dalle2_jax.data.sources import open_all
    from dalle2_jax.pipeline.embed import embed
    from dalle2_jax.runtime import use_compilation_cache

    use_compilation_cache()
    count, index = PROCESS_COUNT.value, PROCESS_INDEX.value
    count = jax.process_count() if count is None else count
    index = jax.process_index() if index is None else index
    if not 0 <= index < count:
        raise UserError(f"--process_index={index}: must be from 0 to {count - 1}")
    source = open_all(SOURCE.value, PATH.value, SPLIT.value, OPTION.value)
    if source.endless and LIMIT.value is None:
        raise UserError(f"{source.name} has no end: say how many with --limit=N")
    clip, fingerprint = hub.load_local_clip(MODEL.value, dtype=DTYPE.value)
    settings = {
        "clip": fingerprint,
        "model": MODEL.value,
        "dtype": DTYPE.value,
        "source": SOURCE.value,
        "path": PATH.value,
        "options": OPTION.value,
        "split": SPLIT.value,
        "examples": min(len(source), LIMIT.value or len(source)),
        "shard_size": SHARD_SIZE.value,
        "dim": clip.clip.network.embed_dim,
        "z_dtype": Z_DTYPE.value,
        "image_size": IMAGE_SIZE.value,
        "image_format": IMAGE_FORMAT.value,
    }
    metadata = embed(
        clip,
        source,
        out,
        settings,
        batch_size=BATCH_SIZE.value,
        threads=THREADS.value,
        workers=WORKERS.value,
        process_index=index,
        process_count=count,
    )
    if metadata is None:
        print(f"{OUT.value}: other processes are still at work on their shards")
    else:
        print(f"{OUT.value}: {metadata['count']} pictures")


if __name__ == "__main__":
    run(main)
