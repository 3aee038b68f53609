"""config.optimizer -> an optax chain: clip, Adam, weight decay, the vision tower's own rate, schedule."""

from typing import Any

import jax
import optax

from tapo_jax import sharding
from tapo_jax.config import check_choice

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(lr: float, kind: str, warmup: int, total: int) -> optax.Schedule:
    """update number -> learning rate: a line from 0 to lr over `warmup` updates, then by `kind`.

    "constant": lr; "cosine": half a cosine from lr to 0 at `total`; "linear": a line from lr to 0 at `total`.
    The first update uses lr / warmup (not 0, which would waste it). Raises UserError for another kind.
    """
    check_choice("optimizer.schedule", kind, SCHEDULES)
    rest = max(1, total - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "linear": lambda: optax.linear_schedule(lr, 0.0, rest),
    }[kind]()
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(lr / warmup, lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def is_vision(name: str) -> bool:
    """Of a parameter's path such as "vision/blocks/qkv"."""
    return name.startswith("vision/")


def is_trained(name: str, *, train_vision: bool, lora: bool) -> bool:
    """With low-rank parameters nothing else is trained; else everything, or everything but the vision tower."""
    if lora:
        return name.endswith(("_lora_a", "_lora_b"))
    return train_vision or not is_vision(name)


def is_decayed(name: str) -> bool:
    """Weight decay is for matrices: no scale of a norm, no bias (stacked layers make both of them two-dimensional)."""
    last = name.rsplit("/", 1)[-1]
    return "norm" not in last and "bias" not in last


def _labels(tree: Any, label: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: label(sharding.path_name(path)), tree)


def make_optimizer(
    optimizer: Any, *, total_steps: int, updates_per_step: int = 1, train_vision: bool = True, lora: bool = False
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The chain and its schedule (of update numbers). `optimizer` has lr, schedule, warmup_steps, b1, b2, weight_decay,
    grad_clip (0: no clipping) and vision_lr_multiplier; its steps are steps of the loop, each of `updates_per_step`
    updates.

    A parameter that is not trained (`is_trained`) has no update, no decay, no moments in memory, no part in the clipped
    norm.
    """
    schedule = make_schedule(
        optimizer.lr, optimizer.schedule, optimizer.warmup_steps * updates_per_step, total_steps * updates_per_step
    )
    chain = [
        optax.clip_by_global_norm(optimizer.grad_clip) if optimizer.grad_clip else optax.identity(),
        optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, mu_dtype="float32"),
        optax.add_decayed_weights(optimizer.weight_decay, mask=lambda tree: _labels(tree, is_decayed)),
        optax.masked(optax.scale(optimizer.vision_lr_multiplier), lambda tree: _labels(tree, is_vision)),
        optax.scale_by_learning_rate(schedule),
    ]
    trained = optax.chain(*chain)
    if train_vision and not lora:
        return trained, schedule
    label = lambda name: "trained" if is_trained(name, train_vision=train_vision, lora=lora) else "frozen"  # noqa: E731
    kind = lambda tree: _labels(tree, label)  # noqa: E731
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, kind), schedule
