"""Make the tiny Atlas model: a Qwen3-VL of about a million parameters with its own tokenizer, in Hugging Face form.

Write tokenizer, template, configs and random weights to DIR:

    python -m tapo_jax.cold_start.tiny_model DIR
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tapo_jax.atlas.questions import ask, corpus
from tapo_jax.atlas.scene import COLOURS
from tapo_jax.atlas.world import fictional_world
from tapo_jax.cold_start.copying_init import write_copying_heads
from tapo_jax.cold_start.experts import answer_turn, search_call, tool_call, zoom_call
from tapo_jax.models import hf
from tapo_jax.models.config import Qwen3VLConfig, VisionConfig
from tapo_jax.models.qwen3_vl import Qwen3VL

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
TEMPLATE = """\
{%- macro show(content) %}
{%- if content is string %}{{- content }}
{%- else %}{%- for part in content or () %}{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + show(messages[0].content) + '<|im_end|>\\n' }}{%- endif %}
{%- if tools %}{{- '<|im_start|>system\\ntools: ' }}{%- for tool in tools %}{{- tool.function.name + ', ' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' + show(message.content) + '<|im_end|>\\n' }}{%- endif %}
{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + show(message.content) + '\\n</tool_response><|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""  # noqa: E501
# A digit; a word, with the space before it if a word or digit precedes that space; marks with the spaces after them;
# white space. So a name after `": "`, `. ` or at a line's start has the same tokens everywhere: it is easy to copy.
_SPLIT = r"\d|[A-Za-z_]+| [A-Za-z_]+|[^A-Za-z_\d\s][^A-Za-z_\d\n]*|\s"


def train_tokenizer(vocab: int = 1024, seed: int = 0) -> Tokenizer:
    """Train byte-level BPE on invented names and on the fixed phrases of the tools.

    Real names then split into trained pieces."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*SPECIAL, *TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return tokenizer


def _texts(seed: int):
    world, rng = fictional_world(seed, 400), np.random.default_rng(seed)
    yield from corpus(world)
    phrases = ["tools: image_zoom_in_tool, image_search_tool, text_search_tool, ", "Image 1."]
    phrases += ["user\n", "assistant\n", "system\n"] * 50
    phrases += [zoom_call([120, 30, 480, 990], colour) for colour in COLOURS]
    phrases += [tool_call("search the image", "image_search_tool", {"img_idx": 1}), answer_turn("x")]
    for name in world.asked:
        question = ask(world, name, str(rng.choice(list(COLOURS))), int(rng.integers(1, 4)), rng)
        if question is not None:
            phrases += [
                question.text,
                search_call(name, question.attribute),
                search_call(name, "neighbours"),
            ]
    # Phrases repeat in every episode, names do not: they are repeated here so that a phrase becomes a few tokens.
    yield from phrases * 60


def tiny_config(tokenizer: Tokenizer) -> Qwen3VLConfig:
    vision = VisionConfig(
        depth=2, hidden=64, mlp=128, heads=2, patch=8, merge=2, temporal=2, channels=3, out=128, positions=256,
        deepstack=(0,),
    )  # fmt: skip
    return Qwen3VLConfig(
        vocab=tokenizer.get_vocab_size(), hidden=128, mlp=320, layers=4, heads=4, kv_heads=2, head_dim=32,
        rope_theta=10000.0, mrope_section=(6, 5, 5), norm_epsilon=1e-6, attention_bias=False, tied=True,
        max_positions=4096,
        image_token=tokenizer.token_to_id("<|image_pad|>"), video_token=tokenizer.token_to_id("<|video_pad|>"),
        vision_start=tokenizer.token_to_id("<|vision_start|>"), vision_end=tokenizer.token_to_id("<|vision_end|>"),
        vision=vision,
    )  # fmt: skip


def write_files(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Write all files of the directory except config.json and the weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    kind = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps({**kind, **special}, indent=2))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 16384}, "min_pixels": 1024, "max_pixels": 16384,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": True, "do_rescale": True,
        "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3, "do_convert_rgb": True,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def create(path: str | pathlib.Path, seed: int = 0) -> None:
    """Write the whole directory with random weights."""
    path = pathlib.Path(path)
    tokenizer = train_tokenizer()
    write_files(path, tokenizer)
    config = tiny_config(tokenizer)
    model = Qwen3VL(config, rngs=nnx.Rngs(seed))
    state = nnx.state(model, nnx.Param)
    params = jax.tree.map(np.array, nnx.to_pure_dict(state))
    params["vision"]["position"] = plane_waves(config.vision.position_side, config.vision.hidden)
    write_copying_heads(params, config, np.random.default_rng(seed))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    nnx.update(model, state)
    hf.save(model, config, path)


def plane_waves(side: int, width: int, amplitude: float = 3.0) -> np.ndarray:
    """Return a position table, float32 [side², width], of sines and cosines of rows and columns.

    They are as large as what a patch's pixels contribute. A random table is a hundredth of that, and then locations in
    the image cannot be told apart."""
    frequency = np.pi * np.geomspace(1.0, side / 2, width // 4) / side
    angle = np.arange(side)[:, None] * frequency
    wave = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    rows, columns = np.repeat(wave, side, axis=0), np.tile(wave, (side, 1))
    return (amplitude * np.concatenate([rows, columns], axis=1)).astype(np.float32)


if __name__ == "__main__":
    create(sys.argv[1])
