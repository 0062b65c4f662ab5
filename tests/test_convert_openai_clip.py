"""CLIP weights of transformers: into our module, back, and what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dalle2_jax import checkpoint
from dalle2_jax.convert import openai_clip, table, weights
from dalle2_jax.data import tokenizer
from dalle2_jax.errors import UserError
from dalle2_jax.nn.clip import CLIP
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
    openai_clip.main([str(tmp_path / "clip"), str(tmp_path / "model")])
    model = checkpoint.load(tmp_path / "model")
    assert model.config["parts"]["clip"]["net"] == openai_clip.net(CONFIG)
    kernel = model.params["clip"]["text"]["projection"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["text_projection.weight"].T)
    assert tokenizer.load(model.tokenizer_dir).encode(["red"], 5).shape == (1, 5)


def test_the_command_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        openai_clip.main([str(tmp_path), str(tmp_path / "model")])
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
