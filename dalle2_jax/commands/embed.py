"""Write CLIP's embeddings of captioned pictures, for stages to train on.

    dalle2 embed --model=MODEL --source=folder --path=DATA --out=DIR

MODEL is what the stages will build on: they refuse embeddings of any other CLIP. With
--config.data.source=embeddings --config.data.path=DIR both priors train without
running CLIP's image tower, and so does the decoder, if --image_size is the size of its
pictures. (The text tower runs: the networks read its states of every token, too much
for a disk.) Pictures are embedded as the stages embed them, their middle square.

A command that was interrupted continues when it is run again. Several processes share
the work where JAX knows of them, or as --process_count and --process_index say.
"""

from absl import flags

from dalle2_jax import storage
from dalle2_jax.errors import UserError
from dalle2_jax.flags import Flags

FLAGS = Flags()
_data = FLAGS.group("What to read")
MODEL = _data(
    flags.DEFINE_string,
    "model",
    "",
    "A model with a CLIP: a directory or a name on the hub.",
)
SOURCE = _data(
    flags.DEFINE_string,
    "source",
    "folder",
    "Kind of the data, as config.data.source has it.",
)
PATH = _data(flags.DEFINE_string, "path", "", "Path of the data.")
OPTION = _data(
    flags.DEFINE_multi_string,
    "option",
    [],
    "NAME=VALUE, an option of the source; may be given several times.",
)
SPLIT = _data(
    flags.DEFINE_string, "split", "", "train or heldout; by default all pictures."
)
LIMIT = _data(
    flags.DEFINE_integer, "limit", None, "Read only the first pictures, so many.", 1
)
_result = FLAGS.group("What to write")
OUT = _result(flags.DEFINE_string, "out", "", "Directory for the embeddings.")
SHARD_SIZE = _result(
    flags.DEFINE_integer, "shard_size", 10_000, "Pictures in a shard.", 1
)
Z_DTYPE = _result(
    flags.DEFINE_enum,
    "z_dtype",
    "float32",
    ["float32", "float16"],
    "Type of the embeddings.",
)
IMAGE_SIZE = _result(
    flags.DEFINE_integer,
    "image_size",
    None,
    "Store pictures of this side, too.",
    1,
)
IMAGE_FORMAT = _result(
    flags.DEFINE_enum, "image_format", "png", ["png", "jpeg"], "Format of the pictures."
)
_how = FLAGS.group("How")
BATCH_SIZE = _how(
    flags.DEFINE_integer, "batch_size", 64, "Pictures at a time on a device.", 1
)
DTYPE = _how(
    flags.DEFINE_enum,
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Type of the activations.",
)
THREADS = _how(flags.DEFINE_integer, "threads", 4, "Threads that read pictures.", 1)
WORKERS = _how(
    flags.DEFINE_integer,
    "workers",
    0,
    "Processes that read pictures, with so many threads each.",
    0,
)
PROCESS_INDEX = _how(
    flags.DEFINE_integer, "process_index", None, "Number of this process, from 0.", 0
)
PROCESS_COUNT = _how(
    flags.DEFINE_integer,
    "process_count",
    None,
    "Number of processes that share the work.",
    1,
)


def main() -> None:
    """Read the flags, and write the shards of this process."""
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
