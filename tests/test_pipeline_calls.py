"""What a caller passes: all that is wrong is refused in one line, before any work."""

import inspect
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dalle2_jax
from dalle2_jax import hub
from dalle2_jax.data import image
from dalle2_jax.errors import UserError, short
from dalle2_jax.nn import codes
from dalle2_jax.parts import part
from dalle2_jax.pipeline import encode, generate, latent, paint

RED = "a small red circle"
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
MASK = np.zeros((24, 24), bool)
MASK[8:20, 8:20] = True
NAN, INF, LONG = float("nan"), float("inf"), 10**5000

CLOSED = Image.fromarray(PICTURE)
CLOSED.close()
MODEL = "the model"  # which a fixture puts in its place

# What makes a call of each function; what is not here is not needed.
CALLS = {
    "text_to_image": {"prompts": RED},
    "stream": {"prompts": RED},
    "variations": {"picture": PICTURE},
    "interpolate": {"picture": PICTURE, "other": PICTURE},
    "blend": {"pictures": PICTURE, "prompts": RED, "weights": [1, 1]},
    "text_diff": {"picture": PICTURE, "prompt_from": RED, "prompt": "a blue star"},
    "pca": {"picture": PICTURE},
    "embed": {"prompts": RED},
    "invert": {"pictures": PICTURE},
    "decode": {"z": np.zeros((1, 32))},
    "reconstruct": {"pictures": PICTURE},
    "img2img": {"picture": PICTURE, "prompt": RED},
    "inpaint": {"picture": PICTURE, "mask": MASK, "prompt": RED},
    "outpaint": {"picture": PICTURE, "prompt": RED},
    "encode_text": {"texts": RED},
    "encode_image": {"images": PICTURE},
    "clip_score": {"images": PICTURE, "texts": RED},
}
NO_TEXT = [
    *(None, 3, 2.5, True, RED.encode(), [], (), [None], [RED, 3], [[RED]], {"a": RED}),
    *({RED}, np.array([[RED]]), np.zeros(3), MODEL, object(), iter(()), range(3)),
    *([RED.encode()], PICTURE, Image.new("1", (3, 3))),
]
NO_PROMPT = [*NO_TEXT, "", " \n", [RED, ""]]
NO_PICTURE = [
    *(None, 3, True, "no/such.png", "/", b"", b"no picture", [], CLOSED, MODEL),
    *([[PICTURE]], {"image": PICTURE}, iter(()), object(), io.BytesIO(), RED),
    *(PICTURE[:0], PICTURE[:, :0], PICTURE[None][:0], PICTURE[..., :2], PICTURE[0, 0]),
    *(PICTURE + 0j, PICTURE.astype(object), PICTURE.astype(int), PICTURE / 255),
    *(PICTURE / 127.5 - 1, np.float32(PICTURE), PICTURE * NAN, np.array(["a.png"])),
    *(jnp.asarray(PICTURE, jnp.bfloat16), PICTURE[None, None], [PICTURE, None]),
]
NO_COUNT = [0, -1, 2.5, 2.0, True, "3", [2], NAN, INF, LONG, np.float32(1), 10**6, 1j]
NO_FRACTION = [-0.1, 1.1, NAN, INF, "0.5", True, 1j, LONG, np.float32("nan"), {}, b""]
NO_NUMBERS = [3, "ab", [], [NAN], [INF], ["1"], [None], [[1]], {1: 1}, {1}, [-1], [1j]]
NO_NUMBERS += [MODEL, np.array([[1.0]]), [True], [LONG], object(), np.ones(1, bool)]
NO_ARRAY = [3, "ab", [], [[1]], [["1"]], [[1], [1, 2]], np.zeros(32), {}, object()]
NO_ARRAY += [np.full((1, 32), NAN), np.zeros((0, 32)), np.zeros((1, 32), complex)]
NO_ARRAY += [np.zeros((1, 16, 16, 3), bool), np.full((1, 32), 1e300), PICTURE]
NO_ARRAY += [np.full((1, 16, 16, 3), object()), np.full((1, 16, 16, 3), NAN)]

HOSTILE = {
    "model": [None, 3, RED, "a/path", PICTURE, {}, [MODEL], object()],
    "prompts": NO_PROMPT,
    "prompt": [*NO_PROMPT, [RED, RED]],
    "prompt_from": [*NO_PROMPT, [RED, RED]],
    "texts": NO_TEXT,
    "negative_prompt": [3, b"a", [], [RED, RED], [3], [[RED]], {"a": RED}, MODEL, NAN],
    "picture": [*NO_PICTURE, [PICTURE, PICTURE], np.stack([PICTURE] * 2)],
    "other": [*NO_PICTURE, [PICTURE, PICTURE]],
    "pictures": NO_PICTURE,
    "images": NO_PICTURE,
    "mask": [
        *(3, "no/such.png", [MASK], MASK[1:], MASK.T[:9], ~MASK & MASK, MASK * 2.0),
        *(MASK.astype(int), MASK.astype(object), MASK * 1j, MASK * NAN, MASK[None]),
        *(MASK.astype(np.uint8), MASK[:0], CLOSED, MODEL, None, b"", {}, MASK[0]),
    ],
    "mask_mode": [
        3,
        "white",
        ["alpha"],
        np.array(["alpha", "alpha"]),
        b"alpha",
        "alpha",
    ],
    "num": [*NO_COUNT, None],
    "best_of": NO_COUNT,
    "every": [*NO_COUNT, "all"],
    "frames": [*NO_COUNT, 1, None],
    "repeats": [*NO_COUNT, None],
    "components": [*NO_NUMBERS, [33], [1.0], 33],
    "seed": [-1, 2**32, 1.5, 1.0, True, "0", [1], NAN, LONG, {}],
    "size": [100, 0, -16, 16.0, True, "16", [16], NAN, LONG, (16, 16)],
    "prior": [3, "gpt", True, ["diffusion"], np.array(["none", "none"]), b"none"],
    "steps": [
        *(0, -3, 2.0, 2.5, True, "abc", "0", "9" * 5000, "5,0", [5, 3], [1.5], [], NAN),
        *([[1]], [-1], [3, 3], {1}, b"3", 10**6, LONG, MODEL, [10**6], object(), "-3"),
        *({"clip": 3}, {3: 3}, {None: 3}, {"decoder": None}, {"decoder": {}}),
    ],
    "guidance": [
        *(-1, INF, -INF, NAN, 1e38, "4", True, 1j, [2.0], LONG, MODEL, b"1", object()),
        *({"upsampler": 2.0}, {"clip": 2}, {3: 3}, np.ones(2), np.float32("inf")),
    ],
    "guidance_interval": [
        *(3, "ab", (1,), (1, 2, 3), (5, 1), (0, 1000), (-1, 3), (NAN, 3), [None, 3]),
        *({1, 2}, {"clip": (0, 3)}, {"upsampler": (0, 3)}, (), np.zeros((2, 2)), MODEL),
    ],
    "sampler": [
        *(3, "euler", "repaint", ["ddim"], {"clip": "ddim"}, True, b"ddim", MODEL),
        np.array(["ddim", "ddim"]),
    ],
    "noise": [
        *(3, "a", [PICTURE], {"clip": PICTURE}, {3: PICTURE}, {"decoder": 0}, MODEL),
        *({"decoder": PICTURE}, {"decoder": "a"}, {"decoder": None}, {"upsampler": 3}),
        *({"upsampler": ()}, {"upsampler": (PICTURE,)}, {"decoder": [[1], [1, 2]]}),
        {"decoder": np.full((4, 1, 16, 16, 3), NAN)},
    ],
    "progress": [3, "bar", [print], {}, MODEL],
    "eta": [*NO_FRACTION, [0.5], np.ones(2), np.ones(1), MODEL],
    "theta": [*NO_FRACTION, [], [2.0], [[0.1]], ["a"], [NAN], [True], MODEL],
    "strength": [*NO_FRACTION, 0, None, [0.5], MODEL],
    "extend": [0, -1, NAN, INF, "1", True, None, 1e9, [1], MODEL, 1j],
    "place": [*NO_NUMBERS, None, (0.5,), (2, 0), (0, 0, 0), (0, NAN), "ab", 0.5],
    "weights": [*NO_NUMBERS, [0.5, -1], [0.5, 1e9], [0.5, NAN]],
    "shared_noise": [None, 1, 0, "no", [True], NAN, np.ones(2, bool)],
    "direction": [3, "up", ["text"], True, b"text", MODEL],
    "z": [None, *NO_ARRAY, np.zeros((1, 16, 16, 3))],
    "x_T": [*NO_ARRAY, np.zeros((1, 32)), np.zeros((2, 16, 16, 3))],
}
# How an argument is called in an error where it is not by its name.
CALLED = {
    "prompts": "prompt",
    "texts": "text",
    "negative_prompt": "negative",
    "pictures": "picture",
    "images": "picture",
    "other": "picture",
    "picture": "picture",
    "mask_mode": "mask",
}


@pytest.fixture(scope="module")
def model(tiny_models):
    """A tiny model, with principal components for `pca`."""
    table = codes.fit(np.eye(32, dtype=np.float32), 4)
    model = dalle2_jax.load(tiny_models["upsampler"])
    return model._replace(statistics={**model.statistics, "ar_prior": table._asdict()})


@pytest.fixture
def no_work(monkeypatch):
    """Whatever computes fails."""

    def fail(*_, **__):
        raise AssertionError("something is computed before all arguments are checked")

    for module, names in {
        encode: ("encode_caption", "encode_pictures"),
        generate: ("encode_caption", "run_batch", "_make_keys"),
        latent: ("encode_caption",),
        paint: ("_noised",),
        part: ("run", "sample"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, fail)


def put(value, model):
    """A hostile value with the model in its place."""
    if isinstance(value, list):
        return [put(x, model) for x in value]
    return model if isinstance(value, str) and value == MODEL else value


def refusal(name, arguments):
    """What a function says of a call, without the tests' checks of its annotations."""
    try:
        inspect.unwrap(getattr(dalle2_jax, name))(**arguments)
    except UserError as error:
        return str(error)
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("name", CALLS)
def test_hostile_calls_are_refused_in_a_line(name, model, no_work, capsys):
    signature = inspect.signature(getattr(dalle2_jax, name))
    first, *rest = signature.parameters
    assert set(rest) <= set(HOSTILE), "an argument without hostile values"
    wrong = []
    for argument in (first, *rest):
        key = "model" if argument == first else argument
        for value in HOSTILE[key]:
            arguments = {first: model, **CALLS[name], argument: put(value, model)}
            said = refusal(name, arguments)
            told = isinstance(said, str) and CALLED.get(key, key) in said
            if not told or "\n" in said or len(said) > 400:
                wrong.append(f"{argument}={short(value)}: {said}")
    assert not wrong, "\n".join(wrong)
    assert "seed=" not in capsys.readouterr().err


NO_PATH = [3, None, b"model", "", [RED], {}, 2.5, object()]
HOSTILE_LOADS = {
    "dtype": [None, 3, "int8", float, "abc", jnp.int32, [], "", object(), "f4,f4", {}],
    "offload": ["no", 1, None, [True], NAN],
    "tile": ["a", 0, -1, 2.5, True, [16], NAN, LONG],
    "overlap": ["b", -1, 2.5, True, 32, 10**9, [4]],
    "variant": [3, "", b"fp16", True, ["fp16"]],
}


def test_hostile_loads_are_refused_in_a_line(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("something is read before all arguments are checked")

    monkeypatch.setattr(hub, "find", fail)
    calls = [
        (name, (path,), {}, "path")
        for name in ("load", "load_clip")
        for path in NO_PATH
    ]
    for argument, values in HOSTILE_LOADS.items():
        given = {"tile": 32} if argument == "overlap" else {}
        calls += [("load", (), {**given, argument: v}, argument) for v in values]
        if argument in ("dtype", "variant"):
            calls += [("load_clip", ("a",), {argument: v}, argument) for v in values]
    calls.append(("load", (), {"overlap": 4}, "overlap=4: give tile, too"))
    for name, paths, given, told in calls:
        with pytest.raises(UserError) as error:
            inspect.unwrap(getattr(dalle2_jax, name))(*paths, **given)
        said = str(error.value)
        assert told in said and "\n" not in said and len(said) < 300


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("bfloat16"), "bfloat16"])
def test_a_dtype_may_be_an_object(tiny_models, dtype):
    clip = inspect.unwrap(dalle2_jax.load_clip)(tiny_models["clip"], dtype=dtype)
    assert clip.clip.network.dtype == jnp.bfloat16


def test_loading_turns_on_the_compilation_cache(tiny_models, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "use_compilation_cache", lambda **k: calls.append(k))
    dalle2_jax.load_clip(tiny_models["clip"])
    assert calls == [{"quiet": True}]


def test_arguments_that_are_swapped_are_told(model):
    swapped = (RED, model)
    with pytest.raises(
        UserError, match="'a small red circle': the first argument must"
    ):
        inspect.unwrap(dalle2_jax.text_to_image)(*swapped)
    with pytest.raises(UserError, match="prompt=Model /.*: give a text"):
        inspect.unwrap(dalle2_jax.text_to_image)(model, model)
    for name in ("variations", "img2img", "encode_image"):
        with pytest.raises(UserError, match="model=array.*: the first argument must"):
            arguments = inspect.unwrap(getattr(dalle2_jax, name)), PICTURE, model
            arguments[0](*arguments[1:], *([RED] if name == "img2img" else []))


@pytest.fixture
def request_for(model, monkeypatch):
    """What a call of text_to_image, or of another function, asks the networks for."""
    asked = []

    def run(model, request, every=None):
        asked.append((model.sizes, request._asdict()))
        raise StopIteration

    monkeypatch.setattr(generate, "cascade", run)

    def call(name="text_to_image", **arguments):
        asked.clear()
        arguments = CALLS[name] | arguments
        with pytest.raises(StopIteration):
            inspect.unwrap(getattr(dalle2_jax, name))(model, **arguments)
        return asked[0]

    return call


STAR = "a blue star"
ALL = ("prior", "decoder", "upsampler")
TIMESTEPS = [0, 500, 999]


@pytest.mark.parametrize(
    ("argument", "value", "others"),
    [
        ("num", 2, [np.int64(2), np.array(2), jnp.int32(2)]),
        ("seed", 3, [np.uint32(3), jnp.array(3), np.array(3, np.uint8)]),
        ("size", 16, [np.int64(16), jnp.int32(16)]),
        (
            *("steps", 3),
            [np.int64(3), jnp.int32(3), dict.fromkeys(ALL, 3)]
            + [{"prior": 3, "decoder": 3, "upsampler": (3,)}],
        ),
        (
            *("steps", TIMESTEPS),
            [
                np.array(TIMESTEPS),
                jnp.array(TIMESTEPS),
                dict.fromkeys(ALL[:2], TIMESTEPS) | {"upsampler": [TIMESTEPS]},
            ],
        ),
        (
            *("guidance", 4.0),
            [4, np.float32(4), jnp.array(4.0), dict.fromkeys(ALL[:2], np.float64(4))],
        ),
        (
            *("guidance_interval", (0, 500)),
            [[0.0, 500], np.array([0, 500]), jnp.array([0, 500])]
            + [dict.fromkeys(ALL[:2], (0, 500))],
        ),
        ("sampler", "ddim", [np.str_("ddim"), dict.fromkeys(ALL, "ddim")]),
        ("negative_prompt", "", [None, [""], [None], ("",), np.array([""])]),
        (
            "negative_prompt",
            "a star",
            [["a star"], np.str_("a star"), iter(["a star"])],
        ),
        (
            *("prompts", STAR),
            [[STAR], (STAR,), np.array([STAR]), np.array(STAR), iter([STAR])],
        ),
        ("prior", "none", [np.str_("none")]),
    ],
)
def test_forms_of_one_value_are_one_request(request_for, argument, value, others):
    expected = request_for(**{argument: value})
    for other in others:
        np.testing.assert_equal(request_for(**{argument: other}), expected)
    if value:
        with pytest.raises(AssertionError):
            np.testing.assert_equal(request_for(), expected)


def test_a_negative_prompt_for_each_prompt(request_for, model):
    _, request = request_for(
        prompts=[RED, "a star"], negative_prompt=["a", None], num=2
    )
    first, second = (generate.tokenize(model, [text]) for text in ("a", ""))
    expected = np.concatenate([first, first, second, second])
    np.testing.assert_array_equal(request["null"], expected)


def test_a_seed_of_none_is_drawn_and_told(request_for, capsys):
    seeds = [request_for(seed=None, num=2)[1]["seeds"].tolist() for _ in range(2)]
    told = [int(line.removeprefix("seed=")) for line in capsys.readouterr().err.split()]
    assert seeds == [[seed, seed] for seed in told] and told[0] != told[1]


def test_numbers_of_edits_may_be_of_numpy_and_jax(request_for):
    expected = request_for("outpaint", extend=1.0, place=(0, 1), repeats=2)
    for xp in (np, jnp):
        given = {
            "extend": xp.float32(1),
            "place": xp.array([0, 1]),
            "repeats": xp.int32(2),
        }
        np.testing.assert_equal(request_for("outpaint", **given), expected)


def test_what_pictures_may_be(model):
    file = io.BytesIO()
    clear = np.dstack([PICTURE, np.where(MASK, 0, 255).astype(np.uint8)])
    Image.fromarray(clear).save(file, "PNG")
    grey, png = PICTURE[..., 0], file.getvalue()
    for same in (
        [png, clear, jnp.asarray(clear), Image.fromarray(clear), io.BytesIO(png)],
        [PICTURE, jnp.asarray(PICTURE), [PICTURE], PICTURE[None], iter([PICTURE])],
        [grey, grey[..., None], jnp.asarray(grey), grey[..., None].repeat(3, -1)],
        [MASK, jnp.asarray(MASK), MASK * np.uint8(255), MASK[..., None]],
    ):
        first, *others = (latent.read(model, image.as_list(one)) for one in same)
        for other in others:
            np.testing.assert_equal(other, first)
        assert len(first.seen) == 1 and first.made.std() > 0


def test_what_masks_may_be(request_for):
    expected = request_for("inpaint")
    for form in (
        *(
            np.float32(MASK),
            jnp.asarray(MASK),
            jnp.float32(MASK),
            np.float16(0.9 * MASK),
        ),
        *(MASK[..., None], np.float32(MASK)[..., None], 255 * np.uint8(MASK)),
        *(Image.fromarray(MASK), jnp.asarray(MASK, jnp.bfloat16)),
    ):
        np.testing.assert_equal(request_for("inpaint", mask=form), expected)


def test_a_prompt_is_no_list_of_letters(model, monkeypatch):
    monkeypatch.setattr(
        generate, "run_batch", lambda model, request, rows: iter([Row(rows)])
    )
    assert dalle2_jax.embed(model, "circle", num=3).ravel().tolist() == [0, 1, 2]
    assert len(dalle2_jax.encode_text(model, "circle")) == 1


class Row:
    """What is made of a batch: the numbers of its rows."""

    def __init__(self, rows):
        self.x = np.float32(rows)[:, None]
