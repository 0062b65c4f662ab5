"""Choose which captioned pictures to train on, and say why.

    dalle2 filter --path=DATA --out=DIR --min_words=3 --min_side=64 --min_std=2 \\
        --model=MODEL --duplicates=0.96

A rule applies if its flag is given. Rules that look at embeddings need a --model with
a CLIP, or --source=embeddings; they see what the other rules leave. DIR gets

    keep.jsonl     {"key": KEY} of each that stays: --config.data.keep=DIR/keep.jsonl
    removed.jsonl  {"key": KEY, "rule": RULE} of each other, once; a duplicate with the
                   key that it is a duplicate "of"
    report.json    how many there are, stay, and were removed by each rule

The rules, in their order: words, characters, language, blocked word (of captions; one
of several is enough); size, aspect, blank (of the picture); clip score (of the worst
caption), classifier, duplicate. Examples that can't be used are counted by the reason,
and are in neither list.
"""

from absl import flags

from dalle2_jax import storage
from dalle2_jax.errors import UserError
from dalle2_jax.flags import Flags

FLAGS = Flags()
_data = FLAGS.group("What to read")
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
LIMIT = _data(
    flags.DEFINE_integer, "limit", None, "Read only the first examples, so many.", 1
)
MODEL = _data(
    flags.DEFINE_string,
    "model",
    "",
    "A model with a CLIP: a directory or a name on the hub.",
)
_result = FLAGS.group("What to write")
OUT = _result(flags.DEFINE_string, "out", "", "Directory for the lists and the report.")

_captions, _pictures = (
    FLAGS.group("Rules on captions"),
    FLAGS.group("Rules on pictures"),
)
_embeddings = FLAGS.group("Rules on embeddings")
LIMITS = [
    _captions(flags.DEFINE_integer, "min_words", None, "Least number of words."),
    _captions(flags.DEFINE_integer, "max_words", None, "Largest number of words."),
    _captions(
        flags.DEFINE_integer, "min_characters", None, "Least number of characters."
    ),
    _captions(
        flags.DEFINE_integer, "max_characters", None, "Largest number of characters."
    ),
    _captions(
        flags.DEFINE_float,
        "min_latin",
        None,
        "Least share of Latin letters among the letters, 0 to 1.",
        0,
        1,
    ),
    _pictures(flags.DEFINE_integer, "min_side", None, "Least side, in pixels."),
    _pictures(
        flags.DEFINE_float,
        "max_aspect",
        None,
        "Largest ratio of the sides.",
        1,
    ),
    _pictures(
        flags.DEFINE_float,
        "min_std",
        None,
        "Least standard deviation of the pixels, which are 0 to 255.",
    ),
    _embeddings(
        flags.DEFINE_float,
        "min_clip_score",
        None,
        "Least cosine to captions.",
        -1,
        1,
    ),
    _embeddings(
        flags.DEFINE_float,
        "max_clip_score",
        None,
        "Largest cosine with text.",
        -1,
        1,
    ),
    _embeddings(
        flags.DEFINE_float, "min_classifier", None, "Least score of the classifier."
    ),
    _embeddings(
        flags.DEFINE_float, "max_classifier", None, "Largest score of the classifier."
    ),
    _embeddings(
        flags.DEFINE_float,
        "duplicates",
        None,
        "Cosine of two pictures from which the later one is removed.",
        -1,
        1,
    ),
]
BLOCKLIST = _captions(
    flags.DEFINE_string, "blocklist", None, "File with a blocked word or phrase a line."
)
CLASSIFIER = _embeddings(
    flags.DEFINE_string,
    "classifier",
    None,
    "Linear classifier of unit embeddings: a .safetensors or .npz with weights and "
    "bias.",
)
_how = FLAGS.group("How")
BATCH_SIZE = _how(
    flags.DEFINE_integer, "batch_size", 64, "Pictures at a time on a device.", 1
)
THREADS = _how(flags.DEFINE_integer, "threads", 4, "Threads that read pictures.", 1)
WORKERS = _how(
    flags.DEFINE_integer,
    "workers",
    0,
    "Processes that read pictures, with so many threads each.",
    0,
)


def main() -> None:
    """Read the flags, and write which examples are kept, and why."""
    if not OUT.value:
        raise UserError("no --out: give a directory")
    out = storage.directory(OUT.value, "--out")
    given = {flag.name: flag.value for flag in LIMITS}
    bounds = given["min_classifier"], given["max_classifier"]
    if (CLASSIFIER.value is None) != (bounds == (None, None)):
        raise UserError(
            "--classifier needs --min_classifier or --max_classifier, and they need it"
        )

    from dalle2_jax import hub
    from dalle2_jax.data import filter as rules
    from dalle2_jax.data.sources import open_all
    from dalle2_jax.pipeline import choose
    from dalle2_jax.runtime import use_compilation_cache

    use_compilation_cache()
    blocked = None if BLOCKLIST.value is None else rules.read_blocklist(BLOCKLIST.value)
    classifier = CLASSIFIER.value and rules.read_classifier(CLASSIFIER.value)
    limits = rules.Limits(
        blocked=blocked,
        classifier=classifier,
        **given,
    )
    source = open_all(SOURCE.value, PATH.value, "", OPTION.value)
    model = hub.load_clip(MODEL.value) if MODEL.value else None
    kept, removed, report = choose.choose(
        source,
        limits,
        model,
        limit=LIMIT.value,
        batch_size=BATCH_SIZE.value,
        threads=THREADS.value,
        workers=WORKERS.value,
    )
    choose.write(out, kept, removed, report)
    print(f"{report['kept']} of {report['examples']} examples stay: {out}/keep.jsonl")
    for rule, number in report["removed"].most_common():
        print(f"{number:8d} {rule}")
