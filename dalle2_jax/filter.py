"""Chooses which captioned pictures to train on, and says why the others are not.

    python -m dalle2_jax.filter --source=folder --path=DATA --out=DIR \
        --min_words=3 --min_side=64 --min_std=2 --model=MODEL --duplicates=0.96

A rule applies if its flag is given. Those that look at embeddings need a --model with a
CLIP, or a source "embeddings"; they see what the others leave. DIR gets

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
from dalle2_jax.flags import run

SOURCE = flags.DEFINE_string("source", "folder", "A kind of data/sources.py.")
PATH = flags.DEFINE_string("path", "", "Of the source.")
OPTION = flags.DEFINE_multi_string("option", [], "NAME=VALUE, of the source.")
OUT = flags.DEFINE_string("out", "", "Directory for the lists and the report.")
MODEL = flags.DEFINE_string("model", "", "A model with a CLIP: a directory, hub id.")
LIMIT = flags.DEFINE_integer("limit", None, "Only the first examples, so many.", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures at once on a device.", 1)
THREADS = flags.DEFINE_integer("threads", 4, "That read pictures.", 1)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that do, with threads each.")

LIMITS = {
    "min_words": flags.DEFINE_integer("min_words", None, "Of a caption."),
    "max_words": flags.DEFINE_integer("max_words", None, "Of a caption."),
    "min_characters": flags.DEFINE_integer("min_characters", None, "Of a caption."),
    "max_characters": flags.DEFINE_integer("max_characters", None, "Of a caption."),
    "min_latin": flags.DEFINE_float(
        "min_latin", None, "Share of Latin letters among a caption's letters.", 0, 1
    ),
    "min_side": flags.DEFINE_integer("min_side", None, "Of a picture, in pixels."),
    "max_aspect": flags.DEFINE_float("max_aspect", None, "Longer side by shorter.", 1),
    "min_std": flags.DEFINE_float("min_std", None, "Of a picture's pixels, 0 to 255."),
    "min_clip_score": flags.DEFINE_float("min_clip_score", None, "Cosine.", -1, 1),
    "max_clip_score": flags.DEFINE_float("max_clip_score", None, "Cosine.", -1, 1),
    "min_classifier": flags.DEFINE_float("min_classifier", None, "Of its score."),
    "max_classifier": flags.DEFINE_float("max_classifier", None, "Of its score."),
    "duplicates": flags.DEFINE_float(
        "duplicates", None, "Cosine of z_image from which the later of two goes.", -1, 1
    ),
}
BLOCKLIST = flags.DEFINE_string("blocklist", None, "File with a word or phrase a line.")
CLASSIFIER = flags.DEFINE_string(
    "classifier", None, "Linear, of unit z_image: weights, bias; .safetensors or .npz."
)


def main() -> None:
    """The command: reads the flags, and writes which examples are kept, and why."""
    if not OUT.value:
        raise UserError("no --out: give a directory")
    out = storage.directory(OUT.value, "--out")
    bounds = LIMITS["min_classifier"].value, LIMITS["max_classifier"].value
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
        **{name: flag.value for name, flag in LIMITS.items()},
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


if __name__ == "__main__":
    run(main)
