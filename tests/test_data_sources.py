"""Sources: what they read, what they hold out, what they skip and what they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from dalle2_jax.data import shapes, sources
from dalle2_jax.data.examples import BadExample
from dalle2_jax.data.sources import open_all, open_source
from dalle2_jax.errors import UserError
from tests.pictures import every, png, write_shards

ALL = {"holdout": 0.0}


# Shapes


def test_shapes_depend_on_seed_split_and_index():
    def captions(**options):
        source = open_source("shapes", **options)
        return [source[i]["caption"] for i in range(20)]

    assert captions(seed=1) == captions(seed=1)
    assert captions(seed=1) != captions(seed=2)
    assert captions(split="heldout") != captions() != captions(split="unseen")


def test_shapes_render_their_caption():
    source = open_source("shapes", pairs=0.0)
    for i in range(10):
        example = source[i]
        colour = shapes.COLOURS[example["caption"].split()[2]]
        assert (example["image"](64) == colour).all(-1).any()


def test_shapes_contrast_in_groups():
    source = open_source("shapes", contrast=4)
    for group in range(20):
        words = [set(source[4 * group + k]["caption"].split()) for k in range(4)]
        assert len(set.union(*words) - set.intersection(*words)) <= 8
        assert len({str(w) for w in words}) > 1


# Which are read


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def test_keep_reads_only_what_it_lists(folder, tmp_path):
    lines = [{"file_name": f"{i % 3}.png", "caption": f"{i}"} for i in range(12)]
    text = "\n".join(map(json.dumps, lines))
    (folder / "metadata.jsonl").write_text(text)
    keys = [open_source("folder", folder, **ALL)[i]["key"] for i in range(12)]
    assert keys[:4] == ["0.png", "1.png", "2.png", "0.png #2"]
    keep = tmp_path / "keep.jsonl"
    keep.write_text("".join(json.dumps({"key": k}) + "\n" for k in [*keys[3:], "x"]))
    source = open_source("folder", folder, keep=keep, **ALL)
    assert [source[i]["caption"] for i in range(len(source))] == [
        str(i) for i in range(3, 12)
    ]
    # Captions of one picture are held out together.
    every = {s: open_source("folder", folder, s, holdout=0.3) for s in sources.SPLITS}
    names = [{s[i]["key"][:5] for i in range(len(s))} for s in every.values()]
    assert [len(s) for s in every.values()] == [8, 4] and not names[0] & names[1]

    keep.write_text('{"key": "x"}\n')
    with pytest.raises(UserError, match="has none of the 12 examples of folder"):
        open_source("folder", folder, keep=keep)
    keep.write_text("x\n")
    with pytest.raises(UserError, match="is not a list of keys"):
        open_source("folder", folder, keep=keep)
    keep.write_bytes(
        b'\n\xef\xbb\xbf{"key": "1.png"}\r\n{"key": "\xe2\x80\xa8", "x": NaN}'
    )
    assert len(open_source("folder", folder, keep=keep, **ALL)) == 1
    for text in (b"[" * 100_000, b'{"key": "\xff"}', b'["key"]', b'{"keys": 1}'):
        keep.write_bytes(text)
        with pytest.raises(UserError, match="is not a list of keys"):
            open_source("folder", folder, keep=keep)
    with pytest.raises(UserError, match="cannot read keep=/dev/zero: not a regular"):
        open_source("folder", folder, keep="/dev/zero")
    with pytest.raises(UserError, match="cannot read keep=nowhere"):
        open_source("folder", folder, keep="nowhere")
    with pytest.raises(UserError, match='"shapes" has no option "keep"'):
        open_source("shapes", keep=keep)


# TFDS

BUILDER = """
    import io
    import tensorflow_datasets as tfds
    from PIL import Image

    
    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "caption": text(),
                "captions": tfds.features.Sequence({"text": text()}),
                "names": tfds.features.Sequence(text()),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(12):
                file = io.BytesIO()
                Image.new("RGB", (8, 6), (i, 0, 0)).save(file, "PNG")
                file.seek(0)
                texts = [f"picture {i}", f"image {i}"]
                yield i, {
                    "image": file,
                    "caption": texts[0],
                    "captions": [{"text": t} for t in texts],
                    "names": texts,
                    "label": i % 2,
                }
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A data set prepared as array_record, in a process of its own: a builder has to be
    a module of a package, and shows progress bars."""
    root = tmp_path_factory.mktemp("tfds")
    package = root / "tiny_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.py").write_text(textwrap.dedent(BUILDER))
    command = (
        "from tiny_package.tiny import Tiny; "
        "Tiny(data_dir='data', file_format='array_record').download_and_prepare()"
    )
    subprocess.run(
        [sys.executable, "-c", command],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return root / "data"


def test_tfds_by_folder_and_by_name(tfds_dir):
    expected = {f"picture {i}": png(i) for i in range(12)}
    folder = tfds_dir / "tiny" / "1.0.0"
    assert every(open_source("tfds", str(folder), **ALL)) == expected
    assert every(open_source("tfds", "tiny", data_dir=str(tfds_dir), **ALL)) == expected
    part = open_source("tfds", str(folder), tfds_split="train[:4]", **ALL)
    assert len(part) == 4
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("field", ["captions/text", "names"])
def test_tfds_with_several_captions(tfds_dir, field):
    source = open_source("tfds", str(tfds_dir / "tiny" / "1.0.0"), caption=field)
    first, second = source[0]["caption"]
    assert first.replace("picture", "image") == second


def test_tfds_with_class_names(tfds_dir):
    source = open_source("tfds", str(tfds_dir / "tiny" / "1.0.0"), caption="label")
    assert set(sources.captions(source)) == {"cat", "dog"}


def test_tfds_errors(tfds_dir, tmp_path):
    folder = str(tfds_dir / "tiny" / "1.0.0")
    with pytest.raises(UserError, match='no captions "text", but .*names'):
        open_source("tfds", folder, caption="text")
    with pytest.raises(UserError, match='no captions "captions/x"'):
        open_source("tfds", folder, caption="captions/x")
    with pytest.raises(UserError, match='no images "label"'):
        open_source("tfds", folder, image="label")
    with pytest.raises(UserError, match="cannot read TFDS .*test"):
        open_source("tfds", folder, tfds_split="test")
    with pytest.raises(UserError, match="has no dataset_info.json"):
        open_source("tfds", str(tfds_dir))
    with pytest.raises(UserError, match="cannot open TFDS no_such_data"):
        open_source("tfds", "no_such_data")

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    os.mkfifo(other / "features.json.pipe")
    with pytest.raises(UserError, match="features.json.pipe is not a regular file"):
        open_source("tfds", str(other))
    (other / "features.json.pipe").unlink()
    info = (other / "dataset_info.json").read_text()
    (other / "dataset_info.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot open TFDS"):
        open_source("tfds", str(other))
    (other / "dataset_info.json").write_text(info)
    info = other / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match='prepared, with file_format="array_record"'):
        open_source("tfds", str(other))


def test_a_damaged_record_of_tfds_is_bad(tfds_dir, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tfds_dir / "tiny" / "1.0.0", folder)
    (records,) = folder.glob("*.array_record*")
    data = bytearray(records.read_bytes())
    data[200:300] = b"\xff" * 100
    records.write_bytes(data)
    source = open_source("tfds", str(folder))
    with pytest.raises(BadExample, match="damaged record: 0"):
        source[0]


# All of them


@pytest.fixture
def shards(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def test_holdout_splits_without_overlap(shards):
    path = f"{shards}/*.tar"
    parts = {
        split: set(every(open_source("webdataset", path, split, holdout=0.25)))
        for split in ("train", "heldout")
    }
    assert len(parts["heldout"]) == 3 and not parts["train"] & parts["heldout"]
    assert len(parts["train"]) == 9
    # The least is one; and a picture's part does not depend on the other shards.
    assert len(open_source("webdataset", path, "heldout")) == 1
    few = f"{shards}/a-000.tar"
    for split in ("train", "heldout"):
        assert len(open_source("webdataset", few, split)) == 4


def test_captions_are_evenly_spread(shards):
    source = open_source("webdataset", f"{shards}/*.tar", **ALL)
    assert sources.captions(source, 4) == [f"picture {i}" for i in (0, 3, 6, 9)]
    assert len(sources.captions(source)) == 12
    assert len(sources.captions(open_source("shapes"), 5)) == 5


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("tape", "x"), {}, 'data "tape": there is shapes, mixture, folder, webd'),
        (("folder",), {}, 'data "folder" needs a path'),
        (("webdataset", ""), {}, "needs a path"),
        (("shapes", "x"), {}, 'takes no path, and was given "x"'),
        (("shapes", None, "test"), {}, 'no split "test", but .*unseen'),
        (("folder", ".", "unseen"), {}, 'no split "unseen"'),
        (("folder", "."), {"contrast": 4}, 'no option "contrast", but .*holdout'),
        (("shapes",), {"contrast": 0}, "contrast is 0"),
        (
            ("shapes", None, "train", -1),
            {},
            "seed is -1: must be a whole number from 0",
        ),
    ],
)
def test_open_source_errors(arguments, options, message):
    with pytest.raises(UserError, match=message):
        open_source(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["split=train"], "'split' is not an option of a source"),
        (["path=x"], "'path' is not an option of a source"),
        (["keep=3"], "keep=3 is not a path"),
        (["holdout=0.5"], "option holdout: give a split"),
        (["keep=a", "keep=b"], "option 'keep=b': keep is given twice"),
        (["keep=" + "[" * 5000], "cannot read keep="),
    ],
)
def test_options_of_commands(shards, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_all("webdataset", f"{shards}/*.tar", "", options)


def test_options_that_are_none_are_not_given():
    assert open_source("shapes", "", contrast=None, data_dir=None)[0]["caption"]


def test_holdout_must_be_a_fraction(shards):
    with pytest.raises(UserError, match="holdout is 1.5"):
        open_source("webdataset", f"{shards}/*.tar", holdout=1.5)
