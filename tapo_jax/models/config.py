"""The shapes of a Qwen3-VL model, read from and written to Hugging Face's config.json. Imports neither jax nor flax."""

import dataclasses
from typing import Any

ACTIVATIONS = {"text": "silu", "vision": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The shapes of the vision tower."""

    depth: int
    hidden: int
    mlp: int
    heads: int
    patch: int
    merge: int
    temporal: int
    channels: int
    out: int
    positions: int
    deepstack: tuple[int, ...]
    """Indices of the blocks whose output also feeds the decoder's first layers."""
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patch_features(self) -> int:
        """Return F, the number of values in one flattened patch."""
        return self.channels * self.temporal * self.patch**2

    @property
    def position_side(self) -> int:
        """Return the side of the learned position table, which is square."""
        return int(self.positions**0.5)


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """The whole model: the decoder's shapes, the ids of the vision tokens, and the vision tower."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    norm_epsilon: float
    attention_bias: bool
    tied: bool
    max_positions: int
    image_token: int
    video_token: int
    vision_start: int
    vision_end: int
    vision: VisionConfig

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "Qwen3VLConfig":
        """Read the dictionary of a config.json. Raises ValueError naming what this family does not cover."""
        _check_family(raw)
        try:
            return cls._from_fields(raw)
        except KeyError as error:
            raise ValueError(f"config.json has no field {error}") from error

    @classmethod
    def _from_fields(cls, raw: dict[str, Any]) -> "Qwen3VLConfig":
        text, vision = raw["text_config"], raw["vision_config"]
        _expect(text, "text_config", "hidden_act", ACTIVATIONS["text"])
        _expect(vision, "vision_config", "hidden_act", ACTIVATIONS["vision"])
        rope = _rope(text)
        heads = text["num_attention_heads"]
        section = tuple(rope.get("mrope_section", (24, 20, 20)))
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        if sum(section) != head_dim // 2:
            raise ValueError(f"mrope_section {section} must add up to half of head_dim {head_dim}")
        return cls(
            vocab=text["vocab_size"],
            hidden=text["hidden_size"],
            mlp=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rope_theta=float(rope.get("rope_theta", 500000.0)),
            mrope_section=section,
            norm_epsilon=text.get("rms_norm_eps", 1e-6),
            attention_bias=text.get("attention_bias", False),
            tied=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            max_positions=text.get("max_position_embeddings", 128000),
            image_token=raw["image_token_id"],
            video_token=raw["video_token_id"],
            vision_start=raw["vision_start_token_id"],
            vision_end=raw["vision_end_token_id"],
            vision=_vision_from_hf(vision, text["hidden_size"]),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary of a config.json for transformers and vLLM; `from_hf` turns it into this config."""
        vision = self.vision
        rope = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "mrope_section": list(self.mrope_section),
            "mrope_interleaved": True,
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": self.tied,
            "image_token_id": self.image_token,
            "video_token_id": self.video_token,
            "vision_start_token_id": self.vision_start,
            "vision_end_token_id": self.vision_end,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "intermediate_size": self.mlp,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "hidden_act": ACTIVATIONS["text"],
                "rms_norm_eps": self.norm_epsilon,
                "attention_bias": self.attention_bias,
                "attention_dropout": 0.0,
                "tie_word_embeddings": self.tied,
                "max_position_embeddings": self.max_positions,
                # Both spellings: transformers 5 reads rope_parameters, older readers rope_theta and rope_scaling.
                "rope_parameters": rope,
                "rope_theta": self.rope_theta,
                "rope_scaling": rope,
            },
            "vision_config": {
                "model_type": "qwen3_vl_vision",
                "depth": vision.depth,
                "hidden_size": vision.hidden,
                "intermediate_size": vision.mlp,
                "num_heads": vision.heads,
                "in_channels": vision.channels,
                "patch_size": vision.patch,
                "spatial_merge_size": vision.merge,
                "temporal_patch_size": vision.temporal,
                "out_hidden_size": vision.out,
                "num_position_embeddings": vision.positions,
                "deepstack_visual_indexes": list(vision.deepstack),
                "hidden_act": ACTIVATIONS["vision"],
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
        }


def _check_family(raw: dict[str, Any]) -> None:
    """Raise ValueError for a mixture of experts, quantised weights and other families."""
    kind, text = raw.get("model_type"), raw.get("text_config") or {}
    if "moe" in str(kind) or text.get("num_experts") or text.get("num_local_experts"):
        raise ValueError(f'model_type "{kind}" is a mixture of experts; dense models only')
    if kind != "qwen3_vl":
        raise ValueError(f'model_type is "{kind}", expected "qwen3_vl"')
    quantised = raw.get("quantization_config") or text.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ValueError(f'the weights are quantised (quantization_config, "{method}"); full-precision weights only')


def _expect(raw: dict[str, Any], section: str, name: str, value: Any) -> None:
    if raw.get(name, value) != value:
        raise ValueError(f"{section}.{name} is {raw[name]!r}; only {value!r} is covered")


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters, from either spelling. Only the default type is covered: no YaRN, no scaling."""
    rope = dict(text.get("rope_scaling") or {})
    if "rope_theta" in text:
        rope["rope_theta"] = text["rope_theta"]
    rope.update(text.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f'text_config rope_type is "{kind}"; only "default" is covered')
    return rope


def _vision_from_hf(raw: dict[str, Any], text_hidden: int) -> VisionConfig:
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ValueError(f'vision_config rope_type is "{rope["rope_type"]}"; only "axial" is covered')
    if raw["out_hidden_size"] != text_hidden:
        raise ValueError(f"vision_config.out_hidden_size {raw['out_hidden_size']} is not the text's {text_hidden}")
    deepstack = tuple(raw["deepstack_visual_indexes"])
    if list(deepstack) != sorted(set(deepstack)) or (deepstack and deepstack[-1] >= raw["depth"]):
        raise ValueError(f"deepstack_visual_indexes {deepstack} must increase and stay below depth {raw['depth']}")
    return VisionConfig(
        depth=raw["depth"],
        hidden=raw["hidden_size"],
        mlp=raw["intermediate_size"],
        heads=raw["num_heads"],
        patch=raw["patch_size"],
        merge=raw["spatial_merge_size"],
        temporal=raw["temporal_patch_size"],
        channels=raw["in_channels"],
        out=raw["out_hidden_size"],
        positions=raw["num_position_embeddings"],
        deepstack=deepstack,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
