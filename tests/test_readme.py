"""The README's TAPO example runs as it stands and gives what its comments say."""

import re
from pathlib import Path

import numpy as np


def test_tapo_example(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "tapo.encode_steps" in block]
    assert len(code.splitlines()) <= 20 and "models" not in code
    names = {}
    exec(code, names)
    # The failing rollouts' right calls: -0.58 + 0.8·sim·1·1.15 with sim ≥ 0.8 passes 0 and is clipped.
    np.testing.assert_array_equal(names["transfer"].advantage_PxS, np.float32([[1.15, 1.15, 0, -0.58, -0.58, 0]]))
    first = capsys.readouterr().out.splitlines()[0]
    assert first == re.search(r"print\(transfer.*?# (\[\[.*\]\])", code)[1]
