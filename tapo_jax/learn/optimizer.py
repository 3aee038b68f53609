"""The optimizer as an optax chain: clip, Adam, weight decay, the vision tower's own rate, schedule."""

import dataclasses
import math
from typing import Any

import jax
import optax

from tapo_jax import sharding
from tapo_jax.config import UserError, check_choice

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The optimizer's numbers. Steps are steps of the training loop."""

    lr: float
    schedule: str = "constant"
    """One of `SCHEDULES`."""
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Max global norm of the gradient; 0 means no bound."""
    vision_lr_multiplier: float = 1.0


def make_schedule(lr: float, kind: str, warmup: int, total: int) -> optax.Schedule:
    """Return the map from update number to learning rate: a line from 0 to lr, then a curve of the given kind.

    The first update uses lr / warmup (not 0, which would waste it).

    lr: the peak rate.
    kind: "constant" stays at lr, "cosine" is half a cosine from lr to 0, "linear" is a line from lr to 0.
    warmup: updates of the first line.
    total: the update at which "cosine" and "linear" reach 0.

    Raises UserError for another kind.
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
    """Return whether a parameter path such as "vision/blocks/qkv" belongs to the vision tower."""
    return name.startswith("vision/")


def is_trained(name: str, *, train_vision: bool, lora: bool) -> bool:
    """Return whether a parameter is trained: with lora only the low-rank ones, else all or all but the vision tower."""
    if lora:
        return name.endswith(("_lora_a", "_lora_b"))
    return train_vision or not is_vision(name)


def is_decayed(name: str) -> bool:
    """Return whether a parameter decays: a matrix does, a norm's scale or a bias (2-D when stacked) does not."""
    last = name.rsplit("/", 1)[-1]
    return "norm" not in last and "bias" not in last


def _labels(tree: Any, label: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: label(sharding.path_name(path)), tree)


def make_optimizer(
    settings: Settings, *, total_steps: int, updates_per_step: int = 1, train_vision: bool = True, lora: bool = False
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the chain and its schedule (of update numbers).

    A parameter that is not trained (`is_trained`) has no update, no decay, no moments in memory, no part in the clipped
    norm. updates_per_step: updates of one step of the loop.

    Raises UserError for a negative or non-finite grad_clip, which would turn descent into ascent, and for negative
    warm-up.
    """
    if not 0 <= settings.grad_clip < math.inf:
        raise UserError(f"optimizer.grad_clip is {settings.grad_clip}: it must be 0 (no clipping) or positive.")
    if settings.warmup_steps < 0:
        raise UserError(f"optimizer.warmup_steps is {settings.warmup_steps}: it must be at least 0.")
    schedule = make_schedule(
        settings.lr, settings.schedule, settings.warmup_steps * updates_per_step, total_steps * updates_per_step
    )
    chain = [
        optax.clip_by_global_norm(settings.grad_clip) if settings.grad_clip else optax.identity(),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, mu_dtype="float32"),
        optax.add_decayed_weights(settings.weight_decay, mask=lambda tree: _labels(tree, is_decayed)),
        optax.masked(optax.scale(settings.vision_lr_multiplier), lambda tree: _labels(tree, is_vision)),
        optax.scale_by_learning_rate(schedule),
    ]
    trained = optax.chain(*chain)
    if train_vision and not lora:
        return trained, schedule
    label = lambda name: "trained" if is_trained(name, train_vision=train_vision, lora=lora) else "frozen"  # noqa: E731
    kind = lambda tree: _labels(tree, label)  # noqa: E731
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, kind), schedule
