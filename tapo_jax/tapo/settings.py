"""Hold TAPO's numbers and choices in one frozen object."""

import dataclasses
from typing import Any

from tapo_jax.tapo import clusters, controls, similarity

AGGREGATES = ("mean", "max", "min")
CLUSTERINGS = {"components": clusters.components, "leader": clusters.leaders}
SCOPES = ("prompt", "batch")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of `transfer`; the defaults are the published ones where the paper fixes them.

    Hashable, so that a jitted function can take it as a static argument. Raises ValueError for an unknown name.
    """

    theta: float = 0.7
    """The least similarity to a witness that a correction needs."""
    alpha_min: float = 0.25
    """The least similarity × support that a correction needs."""
    beta: float = 0.8
    """The share of a witness's credit that is transferred."""
    cluster: str = "components"
    """How witnesses are clustered: "components" or "leader" (`clusters.py`)."""
    cluster_theta: float | None = None
    """The least similarity of two witnesses of one cluster; None is theta."""
    aggregate: str = "mean"
    """Adv(C) from the advantages of the trajectories in C: "mean", "max" or "min"."""
    support: bool = True
    """False takes sup(C) = 1 (ablation)."""
    clip: bool = True
    """False lets a corrected advantage become positive (ablation)."""
    text: str = "dice"
    """The similarity of texts: "dice", "jaccard", "cosine" or "exact" (`similarity.py`)."""
    scope: str = "prompt"
    """Witnesses of the same group ("prompt") or of any group ("batch": memory grows with (P·S)²)."""
    control: str = "none"
    """An ablation's control in place of TAPO: "shuffled" or "zero_tools" (`controls.py`)."""
    chunks: int = 1
    """Parts of the prompts that are worked on one after another, so that one part's [P / chunks, S, S] arrays exist at
    a time. A divisor of P; on a mesh, P / chunks must be a multiple of the prompts' shards."""

    def __post_init__(self) -> None:
        known: dict[str, Any] = {
            "cluster": CLUSTERINGS,
            "aggregate": AGGREGATES,
            "text": similarity.TEXT_MEASURES,
            "scope": SCOPES,
            "control": controls.CONTROLS,
        }
        for name, names in known.items():
            value = getattr(self, name)
            if value not in names:
                raise ValueError(f"tapo.{name} is {value!r}; known: {', '.join(names)}")


PUBLISHED = Settings()
