"""Show recorded episodes as one self-contained page. Imports no jax."""

from tapo_jax.viewer.page import MAX_GROUPS, write_page

__all__ = ["MAX_GROUPS", "write_page"]
