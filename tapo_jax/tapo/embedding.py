"""Beyond the paper: text compared by embeddings (`config.tapo.text = "embedding"`): a paraphrase is a similar query.

Any function from token ids to a vector serves; the default is the policy's own embedding table, which costs nothing:
v(text) = mean over its tokens of (table[id] − mean of the table), and sim = max(0, cosine of two of them). The table's
mean is taken off because it is common to all tokens and would make every pair of texts similar.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.typing import ArrayLike


def mean_of_table(table_VxD: ArrayLike) -> Callable[[Sequence[int]], np.ndarray]:
    """Return ids -> float32 [D]: the mean of the ids' rows minus the table's mean; zeros for no ids."""
    row_VxD = np.asarray(table_VxD, np.float32)
    centre_D = row_VxD.mean(axis=0)

    def vector(ids: Sequence[int]) -> np.ndarray:
        if len(ids) == 0:
            return np.zeros_like(centre_D)
        return row_VxD[np.asarray(ids)].mean(axis=0) - centre_D

    return vector


def text_embedding(
    tokenize: Callable[[str], Sequence[int]], vector: Callable[[Sequence[int]], np.ndarray]
) -> Callable[[str], np.ndarray]:
    """Return text -> vector.

    For `encode_steps(…, embed=text_embedding(tokenize, vector), features=D)` and text="cosine".
    """
    return lambda text: vector(tokenize(text))
