"""The recipes for small machines: their fields, and what the one for a GPU keeps in memory, added up from shapes.

No GPU compiler is here, so temporaries are bounded by arithmetic; what is in memory for certain is read off the shapes
of the run itself.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tapo_jax import check
from tapo_jax.compile_check import programs
from tapo_jax.config import beside
from tapo_jax.learn.optimizer import is_trained
from tapo_jax.models.cache import init_cache
from tapo_jax.models.flops import CHIPS
from tapo_jax.programs import buckets
from tapo_jax.sharding import path_name

CONFIGS = str(Path(__file__).parents[1] / "configs" / "x")
GPU = CHIPS["A100"].memory  # 80 GB, as an H100 has
RESERVED = 6e9  # the driver, the libraries' work spaces, and what is lost between blocks


def config(name: str):
    return beside(CONFIGS, "tapo_grpo.py")(name)


@functools.cache
def run() -> programs.Abstract:
    return programs.abstract_run(config("qwen3_vl_2b_1gpu"), jax.devices()[:1])


def size(tree) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def weights() -> tuple[float, float, float]:
    """-> bytes of the parameters, of those that are trained, of the optimizer's state."""
    leaves = jax.tree_util.tree_leaves_with_path(run().params)
    trained = [x for path, x in leaves if is_trained(path_name(path), train_vision=False, lora=True)]
    return size(run().params), size(trained), size(run().opt_state)


def cache() -> float:
    c, shapes = run().config, run().model_config
    return size(jax.eval_shape(lambda: init_cache(shapes, c.rollout.slots, c.rollout.max_length, jnp.bfloat16)))


def test_the_weights_of_the_gpu_recipe():
    """2.13 billion parameters in float32. Rank 32 on seven kernels of 28 layers: 32 · (inputs + outputs) each, and two
    moments of only those."""
    parameters, trained, moments = weights()
    wide, narrow, mlp = 2048, 1024, 6144
    kernels = [wide + wide, wide + narrow, wide + narrow, wide + wide, wide + mlp, wide + mlp, mlp + wide]
    assert trained == 4 * 28 * 32 * sum(kernels)
    assert 2.12e9 < (parameters - trained) / 4 < 2.14e9
    assert 2 * trained <= moments < 2.01 * trained


def test_a_slot_of_the_small_recipes_takes_0_94_gb():
    c = config("qwen3_vl_2b_v5e_8")
    assert cache() / run().config.rollout.slots == pytest.approx(28 * 2 * 8 * 128 * 2 * c.rollout.max_length, rel=1e-3)
    assert cache() / run().config.rollout.slots == pytest.approx(0.94e9, rel=0.01)


def rollout_bytes() -> dict[str, float]:
    """The parts of what a rollout keeps. Off TPUs a call works on a copy of the entries that it needs, at most all."""
    c, m = run().config, run().model_config
    parameters, _, moments = weights()
    rows, length = c.rollout.slots, 4096  # of the largest extension: schedule.Shapes.tokens_per_call
    return {
        "parameters": parameters,
        "moments": moments,
        "parameters in bfloat16": parameters / 2,
        "cache": cache(),
        "copy of the cache": cache(),
        "logits": 3.0 * 4 * rows * m.vocab,  # float32: themselves, noise, sorted or masked
        "scores": 2.0 * 4 * 2**27,  # attention.SCORES, before and after the softmax
        "activations": 2.0 * length * (4 * m.hidden + 3 * m.mlp),
    }


def update_bytes() -> dict[str, float]:
    """The parts of what an update keeps; the slots are free meanwhile."""
    c, m = run().config, run().model_config
    parameters, trained, moments = weights()
    length, patches = buckets(c, m)[-1]
    rows = c.data.prompts_per_step * c.rollout.group_size // c.train.micro_batches
    layer = 2.0 * rows * length * (6 * m.hidden + 3 * m.mlp)  # bfloat16: the states of one layer, recomputed
    tower = 2.0 * rows * patches * (6 * m.vision.hidden + m.vision.mlp)
    pairs = float(rows) * (length**2 + patches**2)
    return {
        "parameters": parameters,
        "moments": moments,
        "parameters in bfloat16": parameters / 2,
        "gradients, their sum and the update": 3 * trained,
        "batch": size(jax.eval_shape(lambda: programs.largest_batch(run()))),
        "states between layers": 2.0 * rows * length * m.hidden * (m.layers + len(m.vision.deepstack)),
        "one layer, forward and backward": 2 * layer,
        "vision tower": tower,
        "masks of cuDNN as bool and as bias": 3 * pairs,
        "logits": 3.0 * 4 * rows * c.model.logp_chunk * m.vocab,
    }


@pytest.mark.parametrize("parts", [rollout_bytes, update_bytes])
def test_the_gpu_recipe_fits_80_gb(parts):
    found = parts()
    assert sum(found.values()) + RESERVED < GPU, found
    assert sum(found.values()) > 0.2 * GPU  # not empty by a mistake of the arithmetic


def test_the_gpu_recipe_would_not_hold_twice_the_slots():
    """The bound bites: a recipe with 48 slots of this length is refused by the same arithmetic."""
    assert sum(rollout_bytes().values()) + 2 * cache() + RESERVED > GPU


def test_what_stays_on_a_chip_of_the_v5e_recipe():
    """Without temporaries, which only the TPU's compiler knows: an eighth of the weights and of their two moments, six
    slots in a rollout, 16 rows with their pixels in an update. GiB of a chip's 16."""
    c = config("qwen3_vl_2b_v5e_8")
    made = programs.abstract_run(c, jax.devices()[:8])
    kept = programs.bytes_of_one(made.params) + programs.bytes_of_one(made.opt_state)
    slots = cache() / run().config.rollout.slots * c.rollout.slots / 8
    batch = programs.bytes_of_one(programs.largest_batch(made))
    assert kept / 2**30 == pytest.approx(3.0, abs=0.05)
    assert slots / 2**30 == pytest.approx(5.25, abs=0.05)
    assert batch / 2**30 == pytest.approx(0.77, abs=0.05)


@pytest.mark.parametrize(("name", "devices"), [("qwen3_vl_2b_1gpu", 1), ("qwen3_vl_2b_v5e_8", 8)])
def test_the_small_recipes_divide_their_rows_over_their_machine(name, devices):
    c = config(name)
    check.check(c)
    rows = c.data.prompts_per_step * c.rollout.group_size
    assert rows == 128 and rows == c.train.micro_batches * devices and c.rollout.slots % devices == 0
    assert (c.model.shape, c.model.dtype, c.model.remat) == ("Qwen3-VL-2B", "bfloat16", "full")
    assert c.tapo.max_tool_steps >= c.rollout.max_turns and "<answer>" in c.rollout.system


if __name__ == "__main__":
    for one in (rollout_bytes, update_bytes):
        print(one.__name__, f"{sum(one().values()) / 1e9:.1f} GB")
        for part, number in one().items():
            print(f"  {part}: {number / 1e9:.2f}")
