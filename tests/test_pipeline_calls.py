"""What a caller passes: all that is wrong is refused in one line, before any work."""

import inspect
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dalle2_jax
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
