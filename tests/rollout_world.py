"""A small world for the rollout's tests: a byte tokenizer, a model of some thousand random weights, tools, and a
reading of the random text as calls and answers (a random model never writes a real call)."""

import functools
import time
import zlib

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tapo_jax.models.config import Qwen3VLConfig, VisionConfig
from tapo_jax.models.image_processor import ImageProcessor
from tapo_jax.models.inputs import PixelStore
from tapo_jax.models.qwen3_vl import Qwen3VL
from tapo_jax.rollout.chat import Chat, ParsedTurn
from tapo_jax.tools.base import ToolRunner, function_schema
from tapo_jax.types import Image, Prompt, ToolCall, ToolResult

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n[' + m.content + ']<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
VISION = VisionConfig(
    depth=1, hidden=16, mlp=16, heads=2, patch=4, merge=2, temporal=1, channels=3, out=32, positions=16, deepstack=(0,)
)
PROCESSOR = ImageProcessor(patch=4, merge=2, temporal=1, min_pixels=64, max_pixels=24 * 24)


@functools.cache
def chat(stops: int = 1) -> Chat:
    """stops > 1: the last byte ids end a turn too, so that a random model ends its turns after about 262 / stops
    tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    made = Chat(tokenizer, TEMPLATE)
    made.stop_ids += tuple(range(256 - stops + 1, 256))
    return made


@functools.cache
def config() -> Qwen3VLConfig:
    token = chat().tokenizer.token_to_id
    return Qwen3VLConfig(
        vocab=272, hidden=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8, rope_theta=1e4,
        mrope_section=(2, 1, 1), norm_epsilon=1e-6, attention_bias=False, tied=False, max_positions=512,
        image_token=token("<|image_pad|>"), video_token=token("<|video_pad|>"),
        vision_start=token("<|vision_start|>"), vision_end=token("<|vision_end|>"), vision=VISION,
    )  # fmt: skip


@functools.cache
def model(seed: int = 0) -> Qwen3VL:
    """Random weights, made larger than an initialisation: else every logit is about 0 and images change nothing."""
    made = Qwen3VL(config(), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(made)
    for _, leaf in nnx.to_flat_state(state):
        leaf[...] = leaf[...] + 0.15 * rng.normal(size=leaf.shape).astype(np.float32)
    nnx.update(made, state)
    return made


def params(seed: int = 0):
    return nnx.to_pure_dict(nnx.state(model(seed)))


def pixels() -> PixelStore:
    return PixelStore(PROCESSOR)


def picture(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def prompts(count: int, images: bool = True) -> list[Prompt]:
    """Questions of different lengths, about one image, two or none."""
    made = []
    for p in range(count):
        shown = [picture(10 * p + i, 16 + 8 * i, 24) for i in range((1, 2, 0)[p % 3])] if images else []
        made.append(Prompt(f"q{p}", "which " * (p % 3) + f"country {p}?", tuple(shown), ("x",)))
    return made


class Crop:
    """The upper left part of an image: a result with an image, of a size that depends on the call."""

    name = "crop"
    schema = function_schema(
        "crop",
        "",
        {"img_idx": {"type": "integer", "x-kind": "image"}, "size": {"type": "integer", "x-kind": "identity"}},
        ("img_idx", "size"),
    )

    def __call__(self, arguments, images):
        image = images[arguments["img_idx"]]
        return ToolResult(
            "cut", (Image(image.pixels[: arguments["size"], : arguments["size"]], image.root, (0, 0, 0.5, 0.5)),)
        )


class Say:
    """A sentence of `length` bytes; `slow` makes it wait, `broken` makes it raise."""

    name = "say"
    schema = function_schema("say", "", {"length": {"type": "integer", "x-kind": "identity"}}, ("length",))

    def __init__(self, *, slow: float = 0.0, broken: bool = False):
        self.slow, self.broken = slow, broken

    def __call__(self, arguments, images):
        time.sleep(self.slow)
        if self.broken:
            raise RuntimeError("no connection")
        return ToolResult("s" * arguments["length"])


def runner(say: Say | None = None, timeout_s: float = 5.0) -> ToolRunner:
    return ToolRunner([Crop(), say or Say()], workers=2, timeout_s=timeout_s, retries=0)


def read_turn(text: str) -> ParsedTurn:
    """Stands in for `parse_turn`: the text's hash decides. 2 of 8 crop, 2 say, 1 is unparsable, 1 calls an unknown
    tool, 1 answers, 1 is malformed."""
    kind, rest = zlib.crc32(text.encode()) % 8, zlib.crc32(text.encode()) // 8
    if kind < 2:
        return ParsedTurn(call=ToolCall("crop", {"img_idx": rest % 3, "size": 8 + 8 * (rest % 2)}))
    if kind < 4:
        return ParsedTurn(call=ToolCall("say", {"length": rest % 9}))
    if kind == 4:
        return ParsedTurn(error="That is no call.")
    if kind == 5:
        return ParsedTurn(call=ToolCall("fly", {}))
    return ParsedTurn(answer="x") if kind == 6 else ParsedTurn()
