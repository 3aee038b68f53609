"""The shapes of the published dense Qwen3-VL models, for uses that need no weights: compile checks and benchmarks.

Sources: config.json of Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct on Hugging Face; transformers' Qwen3VLConfig for what
those files leave at its default; the 2B and 8B shapes are also in pytorch/torchtitan, experiments/qwen3_vl.
"""

from tapo_jax.models.config import Qwen3VLConfig, VisionConfig


def _vision(out: int, *, large: bool) -> VisionConfig:
    """Return the vision tower: the smaller one of 2B and 4B, or the larger one of 8B and 32B."""
    sizes = (
        dict(depth=27, hidden=1152, mlp=4304, deepstack=(8, 16, 24))
        if large
        else dict(depth=24, hidden=1024, mlp=4096, deepstack=(5, 11, 17))
    )
    return VisionConfig(heads=16, patch=16, merge=2, temporal=2, channels=3, out=out, positions=2304, **sizes)


def _model(*, hidden: int, mlp: int, layers: int, heads: int, tied: bool, large_vision: bool) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        vocab=151936,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        norm_epsilon=1e-6,
        attention_bias=False,
        tied=tied,
        max_positions=262144,
        image_token=151655,
        video_token=151656,
        vision_start=151652,
        vision_end=151653,
        vision=_vision(hidden, large=large_vision),
    )


MODELS: dict[str, Qwen3VLConfig] = {
    "Qwen3-VL-2B": _model(hidden=2048, mlp=6144, layers=28, heads=16, tied=True, large_vision=False),
    "Qwen3-VL-4B": _model(hidden=2560, mlp=9728, layers=36, heads=32, tied=True, large_vision=False),
    "Qwen3-VL-8B": _model(hidden=4096, mlp=12288, layers=36, heads=32, tied=False, large_vision=True),
    "Qwen3-VL-32B": _model(hidden=5120, mlp=25600, layers=64, heads=64, tied=False, large_vision=True),
}
