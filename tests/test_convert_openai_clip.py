"""CLIP weights of transformers: into our module, back, and what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle2_jax import checkpoint, hub
from dalle2_jax.commands import run
from dalle2_jax.convert import karlo_config, openai_clip, table, weights
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
from dalle2_jax.pipeline import encode
from tests.golden import peer

# That of the network in golden/make.py, with what a config.json may leave out.
CONFIG = {
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 39,
    },
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 96,
        "image_size": 12,
        "patch_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def stored():
    return peer.unpack(peer.load("clip"))


def write(folder, arrays, config=CONFIG, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / name)
    return folder


def same(actual, expected, tolerance=2e-6):
    peer.assert_close(actual, expected, tolerance)


def test_weights_of_transformers_answer_as_there(tmp_path):
    arrays, inputs, outputs = stored()
    model = openai_clip.read(write(tmp_path / "clip", arrays))
    network = CLIP(**model.config["parts"]["clip"]["net"])
    variables = {"params": model.params["clip"]}
    z_image = network.apply(
        variables, inputs["image"].transpose(0, 2, 3, 1), method="encode_image"
    )
    z_text, states = network.apply(variables, inputs["tokens"], method="encode_text")
    same(z_image, outputs["image_embeds"])
    same(z_text, outputs["text_embeds"])
    same(states, outputs["last_hidden_state"])


def test_there_and_back_is_exact(tmp_path):
    arrays, _, _ = stored()
    model = openai_clip.read(write(tmp_path / "clip", arrays))
    network = CLIP(**model.config["parts"]["clip"]["net"])
    back = table.to_theirs(
        openai_clip.clip_table(network), network, model.params["clip"]
    )
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_shards_and_half_precision_are_read_the_same(tmp_path):
    arrays, _, _ = stored()
    whole = openai_clip.read(write(tmp_path / "whole", arrays))
    names = sorted(arrays)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        # The numbers are such that float16 holds them.
        halves = {name: arrays[name].astype(np.float16) for name in part}
        folder = write(tmp_path / "shards", halves, name=file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    halves = openai_clip.read(folder)
    assert {x.dtype.name for x in jax.tree.leaves(halves.params)} == {"float16"}
    read = openai_clip.read(folder, weights.caster("float32"))
    jax.tree.map(np.testing.assert_array_equal, read.params, whole.params)


def test_bfloat16_is_read(tmp_path):
    arrays, _, _ = stored()
    rounded = {k: np.asarray(jnp.asarray(v, jnp.bfloat16)) for k, v in arrays.items()}
    model = openai_clip.read(write(tmp_path / "clip", rounded))
    scale = model.params["clip"]["vision"]["ln_post"]["scale"]
    assert scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scale, rounded["vision_model.post_layernorm.weight"])


FIRST = "text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop(FIRST), f"missing: {FIRST}"),
        (lambda a: a.update(more=a[FIRST]), "unexpected: more"),
        (
            lambda a: a.update({FIRST: a[FIRST][1:]}),
            rf"wrong shape: {FIRST} \(39, 16\) instead of \(40, 16\)",
        ),
    ],
)
def test_every_weight_is_accounted_for(tmp_path, change, message):
    arrays, _, _ = stored()
    change(arrays)
    with pytest.raises(UserError, match=message):
        openai_clip.read(write(tmp_path / "clip", arrays))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", "siglip", "'siglip' in config.json: must be 'clip'"),
        ("text_config", {"hidden_act": "tanh"}, "text_config.hidden_act is 'tanh'"),
        ("vision_config", {"hidden_act": "tanh"}, "vision_config.hidden_act is 'tanh'"),
        ("vision_config", {"num_channels": 1}, "num_channels is 1 .*: must be 3"),
    ],
)
def test_a_clip_that_is_not_ours_is_refused(key, value, message):
    config = CONFIG | {key: CONFIG[key] | value if key.endswith("config") else value}
    with pytest.raises(UserError, match=message):
        openai_clip.net(config)


def test_the_end_of_text_of_old_configs_is_the_greatest_id():
    text = CONFIG["text_config"] | {"eos_token_id": 2}
    assert openai_clip.net(CONFIG | {"text_config": text})["eot"] == 39


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    arrays, _, _ = stored()
    with pytest.raises(UserError, match="there is no folder"):
        weights.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no weights"):
        weights.find(tmp_path)
    with pytest.raises(UserError, match="cannot read .*config.json: No such file"):
        openai_clip.read(tmp_path)
    path = write(tmp_path / "clip", arrays) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="clip/model.safetensors is truncated"):
        openai_clip.read(tmp_path / "clip")


def test_the_command_writes_a_model(tmp_path):
    arrays, _, _ = stored()
    text = tokenizer.train(["a red circle"], tokenizer.SMALLEST, 10)
    text.save(write(tmp_path / "clip", arrays))
    run("convert", [str(tmp_path / "clip"), str(tmp_path / "model")])
    model = checkpoint.load(tmp_path / "model")
    assert model.config["parts"]["clip"]["net"] == openai_clip.net(CONFIG)
    kernel = model.params["clip"]["text"]["projection"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["text_projection.weight"].T)
    assert tokenizer.load(model.tokenizer_dir).encode(["red"], 5).shape == (1, 5)


def test_the_command_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("convert", [str(tmp_path), str(tmp_path / "model")])
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_what_configs_leave_out_is_as_in_transformers():
    import transformers

    for ours, theirs in (
        (openai_clip.TEXT_DEFAULTS, transformers.CLIPTextConfig()),
        (openai_clip.VISION_DEFAULTS, transformers.CLIPVisionConfig()),
    ):
        assert ours == {key: getattr(theirs, key) for key in ours}
    assert transformers.CLIPConfig().projection_dim == 512
    net = openai_clip.net({"model_type": "clip"})
    assert (net["text_width"], net["vision_width"], net["embed_dim"]) == (512, 768, 512)
    assert "text_mlp_width" not in net and net["vision_mlp_width"] == 3072


def test_of_a_config_that_is_there_twice_the_older_counts():
    wide = {"text_config_dict": CONFIG["text_config"] | {"hidden_size": 32}}
    assert openai_clip.net(CONFIG | wide)["text_width"] == 32


def test_towers_differ_in_all_that_they_can():
    towers = {
        "text_config": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        "vision_config": {"hidden_act": "swish", "layer_norm_eps": 1e-4},
    }
    config = {
        key: value | towers[key] if key in towers else value
        for key, value in CONFIG.items()
    }
    config["text_config"]["intermediate_size"] = 60
    net = openai_clip.net(config)
    network = CLIP(**net)
    assert (network.activation, network.vision_activation) == ("gelu_new", "silu")
    assert (network.text_eps, network.vision_eps) == (1e-6, 1e-4)
    assert (network.text_mlp_width, network.vision_mlp_width) == (60, 96)
    back = karlo_config.text_encoder_config(network)
    assert (
        openai_clip.towers_net(back, karlo_config.image_encoder_config(network)) == net
    )


TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
SHAPES = {
    "mlps and activations": (
        {"intermediate_size": 40, "hidden_act": "gelu_new"},
        {"intermediate_size": 100, "hidden_act": "relu"},
        12,
    ),
    "epsilons and layers": (
        {"layer_norm_eps": 1e-2, "num_hidden_layers": 1, "hidden_act": "gelu_fast"},
        {"layer_norm_eps": 1e-1, "num_hidden_layers": 3, "hidden_act": "silu"},
        7,
    ),
    "heads, patches and sizes": (
        {"num_attention_heads": 4, "hidden_act": "gelu", "max_position_embeddings": 13},
        {"num_attention_heads": 3, "image_size": 14, "patch_size": 5},
        20,
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("text, vision, dim", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("towers", ["both", "text", "vision"])
def test_any_shape_answers_as_in_transformers(tmp_path, text, vision, dim, towers):
    torch, transformers = (
        pytest.importorskip("torch"),
        pytest.importorskip("transformers"),
    )
    from tests.golden import make

    text, vision = TEXT | text, VISION | vision
    side = {"projection_dim": dim}
    kind, config = {
        "both": (
            transformers.CLIPModel,
            transformers.CLIPConfig(text_config=text, vision_config=vision, **side),
        ),
        "text": (
            transformers.CLIPTextModelWithProjection,
            transformers.CLIPTextConfig(**text, **side),
        ),
        "vision": (
            transformers.CLIPVisionModelWithProjection,
            transformers.CLIPVisionConfig(**vision, **side),
        ),
    }[towers]
    model, rng = kind(config), np.random.default_rng(0)
    make.randomise(model, rng)
    model.save_pretrained(tmp_path)
    image = make.normal(rng, 2, 3, vision["image_size"], vision["image_size"])
    tokens = make.captions([4, 9], text["max_position_embeddings"], 39)
    read = openai_clip.read(tmp_path)
    network = CLIP(**read.config["parts"]["clip"]["net"])
    peer.assert_fits(network, read.params["clip"])
    variables = {"params": read.params["clip"]}
    with torch.no_grad():
        if towers != "text":
            pixels = torch.tensor(image)
            theirs = (
                model(pixel_values=pixels).image_embeds
                if towers == "vision"
                else model.visual_projection(
                    model.vision_model(pixel_values=pixels).pooler_output
                )
            )
            image = jnp.asarray(image.transpose(0, 2, 3, 1))
            ours = network.apply(variables, image, method="encode_image")
            same(ours, jnp.asarray(theirs.numpy()), 1e-5)
        if towers != "vision":
            ids = torch.tensor(tokens)
            theirs = (
                model(input_ids=ids).text_embeds
                if towers == "text"
                else model.text_projection(
                    model.text_model(input_ids=ids).pooler_output
                )
            )
            tokens = jnp.asarray(tokens)
            ours, _ = network.apply(variables, tokens, method="encode_text")
            same(ours, jnp.asarray(theirs.numpy()), 1e-5)


def one_tower(folder, prefixes, kind):
    arrays, _, _ = stored()
    arrays = {k: v for k, v in arrays.items() if k.startswith(prefixes)}
    config = CONFIG[f"{kind}_config"] | {
        "model_type": f"clip_{kind}_model",
        "projection_dim": 12,
    }
    return write(folder, arrays, config)


def test_one_tower_with_its_projection(tmp_path):
    arrays, inputs, outputs = stored()
    folder = one_tower(tmp_path / "text", ("text_",), "text")
    tokenizer.train(["a"], tokenizer.SMALLEST, 10).save(folder)
    read = openai_clip.read(folder)
    assert set(read.params["clip"]) == {"text"} and read.tokenizer_dir == folder
    folder = one_tower(tmp_path / "vision", ("vis",), "vision")
    read = openai_clip.read(folder)
    assert set(read.params["clip"]) == {"vision"} and read.tokenizer_dir is None
    clip = hub.load_clip(folder)
    image = inputs["image"].transpose(0, 2, 3, 1)
    apply = jax.jit(clip.clip.network.apply)
    z_image, *_ = apply({"params": clip.clip.params}, image, None)
    same(z_image, outputs["image_embeds"])
    with pytest.raises(UserError, match="has no tokenizer"):
        encode.encode_text(clip, "a")
    run("convert", [str(folder), str(tmp_path / "model")])
    assert checkpoint.load(tmp_path / "model").tokenizer_dir is None


def test_two_folders_of_one_tower_make_a_clip(tmp_path):
    text = openai_clip.read(one_tower(tmp_path / "text", ("text_",), "text"))
    vision = openai_clip.read(one_tower(tmp_path / "vision", ("vis",), "vision"))
    whole = openai_clip.read(write(tmp_path / "both", stored()[0]))
    for pair in ([text, vision], [vision, text]):
        merged = checkpoint.merge(pair)
        assert merged.config["parts"] == whole.config["parts"]
        assert merged.tokenizer_dir == text.tokenizer_dir
        for tower in ("text", "vision"):
            ours, theirs = merged.params["clip"][tower], whole.params["clip"][tower]
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for pair in ([whole, vision], [whole, text], [text, whole]):
        assert set(checkpoint.merge(pair).params["clip"]) == set(whole.params["clip"])
