"""SAPO without TAPO."""

from ml_collections import ConfigDict

from tapo_jax.config import beside


def get_config(arg: str = "") -> ConfigDict:
    c = beside(__file__, "tapo_grpo.py")(arg)
    c.algorithm.update(loss="sapo")
    c.algorithm.credit = "trajectory"
    return c
