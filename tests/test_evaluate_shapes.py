"""The command that judges a model's pictures of shapes: its captions and its rates."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.commands import run
from dalle2_jax.data import shapes
from dalle2_jax.evaluate import shapes as evaluated
from dalle2_jax.evaluate.judge import parse


def test_reads_every_caption_that_it_makes():
    rng = np.random.default_rng(0)
    for kind in evaluated.KINDS:
        captions = [evaluated.make_caption(kind, rng) for _ in range(300)]
        wanted = [parse(caption) for caption in captions]
        assert {len(w.things) for w in wanted} == {2 if kind == "pair" else 1}
        for thing in (thing for w in wanted for thing in w.things):
            assert ((thing.colour, thing.shape) in evaluated.UNSEEN) == (
                kind == "unseen"
            )


def test_intervals_are_wilsons():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    cell = evaluated.rate([True] * 81 + [False] * 182)
    assert (cell.right, cell.of) == (81, 263)
    assert [cell.low, cell.high] == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert evaluated.rate([False] * 10).low == 0.0
    assert evaluated.rate([True] * 10).high == pytest.approx(1.0)


def draw(model, prompts, *, seed):
    """Stands for a model: it knows single things only, and always makes them small."""
    rng = np.random.default_rng(seed)
    pictures = []
    for wanted in map(parse, prompts):
        thing = shapes.Thing(*wanted.things[0])._replace(size="small")
        background = wanted.background or "white"
        chance = tuple(rng.random(6).tolist())
        scene = shapes.Scene((thing,), None, background, True, chance)
        pictures.append(shapes.render(scene, 64))
    return np.stack(pictures)


def test_the_command_reports_a_model(tmp_path, monkeypatch, capsys):
    from dalle2_jax import hub
    from dalle2_jax.pipeline import generate

    monkeypatch.setattr(hub, "load", lambda *paths: types.SimpleNamespace(path="here"))
    monkeypatch.setattr(generate, "text_to_image", draw)
    out = tmp_path / "new" / "report.json"
    run("evaluate", ["--model=here", "--num=30", "--seed=1", f"--out={out}"])

    report = json.loads(out.read_text())
    assert (report["model"], report["num"], report["seed"]) == ("here", 30, 1)
    assert len(report["captions"]) == 90
    rates = report["accuracy"]
    assert rates["single"]["shape"]["rate"] == rates["unseen"]["colour"]["rate"] == 1
    assert 0 < rates["single"]["size"]["rate"] == rates["single"]["all"]["rate"] < 1
    assert rates["pair"]["count"]["rate"] == rates["pair"]["relation"]["rate"] == 0
    assert rates["single"]["background"]["of"] < 30
    table = capsys.readouterr().out
    assert "relation" in table and "100.0% (88.6% to 100.0%)" in table
    with Image.open(out.with_suffix(".png")) as gallery:
        assert gallery.size == (1088, 5 * 214)


def test_exchanged_captions_are_right_by_chance():
    """Of perfect pictures: as often as the captions themselves agree."""
    verdicts = evaluated.evaluate(
        lambda prompts, seed: draw(None, prompts, seed=seed), 40, seed=2
    )
    exchanged = evaluated.exchange_captions(verdicts)
    rates = evaluated.accuracy(exchanged)
    for kind in ("single", "unseen"):
        own = [v.caption for v in verdicts if v.kind == kind]
        things = [parse(c).things[0] for c in own]
        pairs = list(zip(things, [*things[1:], things[0]], strict=True))
        assert rates[kind]["count"].rate == 1
        for name in ("colour", "shape"):
            same = sum(getattr(a, name) == getattr(b, name) for a, b in pairs)
            assert rates[kind][name].right == same
    assert [v.caption for v in exchanged[:2]] == [v.caption for v in verdicts[1:3]]


@pytest.mark.parametrize(
    "arguments, message", [(["--num=0"], "flag --num=0: 0 is not a positive")]
)
def test_the_command_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run("evaluate", arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
