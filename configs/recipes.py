"""Recipes for the published Qwen3-VL models: `tapo_grpo.py:qwen3_vl_4b` and so on.

The paper's setting, on TPU slices, by size: 128 prompts × 8 rollouts, learning rate 1e-6, one update per batch,
episodes of up to 16,384 tokens and ten turns. Each of 64 devices trains one row at a time; `micro_batches` × devices
must be the 1,024 rows.

The 2B model on small machines: 16 prompts × 8 rollouts, episodes of up to 8,192 tokens and six turns.
`qwen3_vl_2b_v5e_8` trains all parameters on the eight chips of a v5e host, `qwen3_vl_2b_1gpu` low-rank updates on one
GPU of 80 GB.

To check how a recipe fits TPUs:

    python launch/compile_check.py --config=configs/tapo_grpo.py:qwen3_vl_4b --topology=v5e:8x8
    python launch/compile_check.py --config=configs/tapo_grpo.py:qwen3_vl_2b_v5e_8 --topology=v5e:2x4
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


def apply(c: ConfigDict, name: str) -> None:
    """Change the complete config `c` to a recipe.

    name: "2b", "4b" (v5e:8x8), "8b" (v6e:8x8), "32b" (v5p); "2b_v5e_8" (v5e:2x4), "2b_1gpu" (one GPU of 80 GB).
    """
    size, _, machine = name.partition("_")
    paper(c, size)
    if machine:
        small(c)
        {"v5e_8": v5e_8, "1gpu": one_gpu}[machine](c)


def paper(c: ConfigDict, size: str) -> None:
    """Change the config to the paper's setting for a size of the model."""
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
    c.tools.update(zoom_size=0, image_top_k=3, text_top_k=3, text_budget=4000, workers=64)
    c.tapo.max_tool_steps = 10
    c.optimizer.update(lr=1e-6, warmup_steps=0)
    c.train.update(updates_per_batch=1, micro_batches=16, length_buckets=(), patch_buckets=(), warm_up=True)
    c.mesh.update(data=1, fsdp=-1, tensor=1)
    c.log.episodes_every = 10


def small(c: ConfigDict) -> None:
    """Change the paper's setting for small machines: an eighth of the questions, half the length, fewer turns."""
    c.data.prompts_per_step = 16
    c.rollout.update(max_turns=6, max_new_tokens=1024, max_length=8192, max_image_tokens=4096)
    c.tools.workers = 32
    c.tapo.max_tool_steps = 6
    c.train.update(length_buckets=(4096,), patch_buckets=(8192,))


def v5e_8(c: ConfigDict) -> None:
    """Train all parameters, split over the eight chips of one v5e host, eight rows at a time.

    A slot of 8,192 tokens takes 0.94 GB of one chip: 48 slots are six on each chip.
    """
    c.rollout.slots = 48
    c.train.micro_batches = 16


def one_gpu(c: ConfigDict) -> None:
    """Train low-rank updates on one GPU of 80 GB, one row at a time; tests/test_recipes.py adds up its memory.

    24 slots take 22.5 GB, and as much again while a call works on a copy of them. The learning rate is ten times that
    of the paper, as usual for low-rank updates; it was not tuned.
    """
    c.model.update(lora_rank=32, train_vision=False)
    c.rollout.slots = 24
    c.optimizer.lr = 1e-5
    c.train.micro_batches = 128
