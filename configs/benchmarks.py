"""The published benchmarks, evaluated in one run: the settings of the tables.

    python launch/eval.py --config=configs/benchmarks.py:qwen3_vl_8b --config.model.path=DIR --checkpoint=WORKDIR \\
        --config.benchmarks.mmsearch=DATA/MMSearch --config.benchmarks.fvqa_test=DATA/FVQA --out=OUT

Arguments: as in tapo_grpo.py; without a size, the tiny model that ships with the package. docs/evaluate.md shows what
to give for each benchmark and what is left in OUT.
"""

from ml_collections import ConfigDict

from tapo_jax.config import beside


def get_config(arg: str = "") -> ConfigDict:
    c = beside(__file__, "tapo_grpo.py")(arg)
    c.tools.source = "recorded"  # zoom, and the image searches that were recorded for the questions
    c.tools.names = ("image_zoom_in_tool", "image_search_tool")
    c.tools.image_top_k = 5
    c.eval.prompts = 0  # nothing but the benchmarks
    c.eval.update(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5)  # as SenseNova-MARS evaluates
    return c
