"""The count of model flops against hand counts and XLA's own count, and the reading of HLO that compile_check rests
on."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tapo_jax.batch import ModelInputs
from tapo_jax.compile_check import hlo_costs
from tapo_jax.models import flops, parameters, published, qwen3_vl
from tapo_jax.models.config import Qwen3VLConfig, VisionConfig

VISION = VisionConfig(
    depth=2,
    hidden=128,
    mlp=256,
    heads=4,
    patch=8,
    merge=2,
    temporal=2,
    channels=3,
    out=256,
    positions=64,
    deepstack=(0,),
)
CONFIG = Qwen3VLConfig(
    vocab=2000,
    hidden=256,
    mlp=768,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    rope_theta=1e4,
    mrope_section=(12, 10, 10),
    norm_epsilon=1e-6,
    attention_bias=False,
    tied=True,
    max_positions=512,
    image_token=1,
    video_token=2,
    vision_start=3,
    vision_end=4,
    vision=VISION,
)
B, T, N = 2, 64, 64


def inputs() -> ModelInputs:
    i32, F = jnp.int32, VISION.patch_features
    return ModelInputs(
        token_BxT=jnp.zeros((B, T), i32),
        segment_BxT=jnp.ones((B, T), i32),
        position_BxTx3=jnp.zeros((B, T, 3), i32),
        feature_BxT=jnp.zeros((B, T), i32),
        pixels_BxNxF=jnp.zeros((B, N, F)),
        patch_image_BxN=jnp.ones((B, N), i32),
        patch_rowcol_BxNx2=jnp.zeros((B, N, 2), i32),
        patch_corner_BxNx4=jnp.zeros((B, N, 4), i32),
        patch_weight_BxNx4=jnp.zeros((B, N, 4)),
    )


def compiled(function):
    graph, state = nnx.split(nnx.eval_shape(lambda: qwen3_vl.Qwen3VL(CONFIG, rngs=nnx.Rngs(0))))

    def whole(state, inputs):
        model = nnx.merge(graph, state)
        return function(qwen3_vl.logits(model, qwen3_vl.hidden_states(model, inputs)))

    return whole, state, jax.eval_shape(inputs)


# XLA computes the scores of all T² pairs of a row here (64 tokens are one block of queries), the model's own count is
# of the pairs needed.
ALL_PAIRS = flops.decoder(CONFIG, tokens=B * T, pairs=B * T * T, logits=B * T) + flops.vision_tower(
    VISION, patches=B * N, pairs=B * N * N
)


def test_decoder_by_hand():
    # One layer, 1 token: q and o 2·256·256, k and v 2·256·128, SwiGLU 3·256·768 multiplications: 786,432 with 2 flops
    # each = 1,572,864. Attention: 10 pairs · 4 heads · 64 numbers · 2 products · 2 flops = 10,240. Logits: 2·256·2000
    # = 1,024,000.
    assert flops.decoder(CONFIG, tokens=1, pairs=10, logits=1) == 2 * (1_572_864 + 10_240) + 1_024_000


def test_vision_by_hand():
    # 4 patches: embedding 4·384·128; a block 4·(4·128² + 2·128·256) = 524,288 and, with 16 pairs, 16·128·2; 2 blocks;
    # one joined patch through merger and deepstack merger, 512² + 512·256 each. 2 flops each.
    expected = 2 * (4 * 384 * 128 + 2 * (524_288 + 16 * 128 * 2) + 2 * (512 * 512 + 512 * 256))
    assert flops.vision_tower(VISION, patches=4, pairs=16) == expected


def test_pairs():
    assert flops.causal_pairs([1, 3]) == 1 + 6  # 1; 1 + 2 + 3
    assert flops.full_pairs([2, 3]) == 4 + 9


def test_passes():
    text = flops.decoder(CONFIG, tokens=12, pairs=flops.causal_pairs([5, 7]), logits=12)
    tower = flops.vision_tower(VISION, patches=20, pairs=16 + 256)
    assert flops.forward(CONFIG, [5, 7], [4, 16]) == text + tower
    assert flops.update(CONFIG, [5, 7], [4, 16]) == 3 * (text + tower)
    assert flops.update(CONFIG, [5, 7], [4, 16], train_vision=False) == 3 * text + tower
    assert flops.update(CONFIG, [5, 7], [4, 16], lora=True) == 2 * text + tower
    # A decoding step of slots with 5 and 7 tokens: 2 new tokens that meet 12 keys.
    assert flops.decode(CONFIG, [5, 7]) == flops.decoder(CONFIG, tokens=2, pairs=12, logits=2)


def test_forward_is_what_xla_counts():
    whole, state, shapes = compiled(lambda logits: logits)
    program = jax.jit(whole).lower(state, shapes).compile()
    # XLA adds norms, softmax, activations and rotations: between 0 and 3 % more at these widths.
    assert ALL_PAIRS <= program.cost_analysis()["flops"] <= 1.03 * ALL_PAIRS
    # The matrix products alone are the model's own count, to the last flop.
    read = hlo_costs.costs(program.as_text(), flops_per_s=1.0, bytes_per_s=1.0)
    assert read.flops == ALL_PAIRS


def test_update_is_three_forward_passes():
    whole, state, shapes = compiled(jnp.sum)
    program = jax.jit(jax.grad(whole)).lower(state, shapes).compile()
    read = hlo_costs.costs(program.as_text(), flops_per_s=1.0, bytes_per_s=1.0)
    # Not needed: the gradient of the pixels (one product of the size of the patch embedding); made again: the scores
    # in attention (one product of `pairs` in each layer), and the logits themselves are not read by the gradient of
    # their sum.
    pixels = 2.0 * B * N * VISION.patch_features * VISION.hidden
    logits = 2.0 * B * T * CONFIG.hidden * CONFIG.vocab
    scores = 2.0 * (
        CONFIG.layers * CONFIG.heads * CONFIG.head_dim * B * T * T + VISION.depth * VISION.hidden * B * N * N
    )
    low, high = 3 * ALL_PAIRS - pixels - logits - scores, 3 * ALL_PAIRS + 2 * scores
    assert low <= read.flops <= high


def test_loops_count_their_turns():
    """cost_analysis counts the body of a loop once; the reader multiplies it by the turns, nested ones too."""

    def loops(x, w):
        def layer(x, w):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(layer, x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    text = jax.jit(loops).lower(*shapes).compile().as_text()
    # 5 layers · 3 turns · 8·16·16 multiplications · 2
    assert hlo_costs.costs(text, flops_per_s=1.0, bytes_per_s=1.0).flops == 5 * 3 * 8 * 16 * 16 * 2


def test_data_decides_the_turns():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ w, x)

    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    text = jax.jit(loop).lower(*shapes).compile().as_text()
    one = hlo_costs.costs(text, flops_per_s=1.0, bytes_per_s=1.0).flops
    assert one == 8 * 16 * 16 * 2
    assert hlo_costs.costs(text, flops_per_s=1.0, bytes_per_s=1.0, loops=7).flops == 7 * one


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("cpu", None),
    ],
)
def test_chips(kind, name):
    found = flops.chip(kind)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    # The totals that Hugging Face shows for the safetensors of Qwen/Qwen3-VL-…-Instruct.
    "name, total",
    [
        ("Qwen3-VL-2B", 2127532032),
        ("Qwen3-VL-4B", 4437815808),
        ("Qwen3-VL-8B", 8767123696),
        ("Qwen3-VL-32B", 33357390064),
    ],
)
def test_published_shapes_have_the_published_size(name, total):
    assert sum(math.prod(spec.shape) for spec in parameters.specs(published.MODELS[name]).values()) == total
