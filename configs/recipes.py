"""The paper's setting for the published Qwen3-VL models on TPU slices, by size: `tapo_grpo.py:qwen3_vl_4b` and so on.

128 prompts × 8 rollouts, learning rate 1e-6, one update per batch, episodes of up to 16,384 tokens and ten turns. Each
of 64 devices trains one row at a time; `micro_batches` × devices must be the 1,024 rows. To check how a size fits:

    python launch/compile_check.py --config=configs/tapo_grpo.py:qwen3_vl_4b --topology=v5e:8x8
"""

from ml_collections import ConfigDict

# Slots: conversations that are played at a time. A slot of 16,384 tokens takes 1.9 GB (2B), 2.4 GB (4B, 8B) or
# 4.3 GB (32B) of a device's memory; 64 devices share the slots.
SLOTS = {"2b": 256, "4b": 256, "8b": 512, "32b": 768}

# Devices that share a conversation's heads while episodes are played. Their memory holds 1 / TENSOR of the weights in
# bfloat16, next to the slots: 1.0 GiB (2B), 2.1 (4B), 2.0 (8B) or 7.8 (32B). Every token that is drawn reads both once.
TENSOR = {"2b": 4, "4b": 4, "8b": 8, "32b": 8}

# The published models know from the chat template how to call a tool, but not how to answer.
SYSTEM = (
    "Look things up before you answer. In every turn, think between <think> and </think>; then either call one tool, "
    "or, once you know it, write the answer, in as few words as possible, between <answer> and </answer>."
)


def apply(c: ConfigDict, size: str) -> None:
    """Change the complete config `c` to the recipe of a size: "2b", "4b" (v5e:8x8), "8b" (v6e:8x8), "32b" (v5p)."""
    c.data.prompts_per_step = 128
    c.model.update(shape=f"Qwen3-VL-{size.upper()}", dtype="bfloat16", remat="full", logp_chunk=512, train_vision=True)
    c.rollout.update(
        system=SYSTEM,
        group_size=8,
        slots=SLOTS[size],
        max_turns=10,
        max_new_tokens=2048,
        max_length=16384,
        decode_chunk=64,
        max_image_tokens=8192,
        max_pixels=1024 * 1024,  # 1,024 tokens an image
    )
    c.rollout.mesh.update(data=-1, tensor=TENSOR[size])
    c.tools.update(zoom_size=768, image_top_k=3, text_top_k=3, text_budget=4000, workers=64)
    c.tapo.max_tool_steps = 10
    c.optimizer.update(lr=1e-6, warmup_steps=0)
    c.train.update(updates_per_batch=1, micro_batches=16, length_buckets=(), patch_buckets=(), warm_up=True)
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.log.episodes_every = 10
