"""Compare the model with transformers (PyTorch) on the same random weights: forward, prefill, decode, train step.

Forward: log-probabilities of every token. Prefill: images and prompts into an empty cache. Decode: one greedy step of
all slots. Train step: the whole update (loss, gradient, clipping, Adam). Every row begins with one image. On our side
the programs are those that training and sampling run.

agree: the max difference of log-probabilities, the share of equal greedy tokens, the relative difference of the
gradient's norm.
MiB: max memory that a call needs in addition to what was in use before it.
mfu: from the model's own flops, on chips of known peak.
Without a PyTorch for this device, or with --no-torch, its columns stay empty.
"""

import dataclasses
import importlib.util
import json
import os
from typing import Any

import numpy as np
from flax import nnx

from tapo_jax.bench.model_work import Measured, Size
from tapo_jax.models import flops, shipped
from tapo_jax.models.config import Qwen3VLConfig
from tapo_jax.models.published import MODELS

ATLAS = Qwen3VLConfig.from_hf(json.loads((shipped.DIRECTORY / "config.json").read_text()))


_POD = dict(rows=4, tokens=4096, slots=16, prompt=2048, chunk=32, patches=1024, dtype="bfloat16", remat="full")
SIZES = {
    "atlas": Size(
        ATLAS, rows=32, tokens=320, slots=64, prompt=256, chunk=32, patches=256, dtype="float32", remat="none"
    ),
    "2b": Size(MODELS["Qwen3-VL-2B"], **_POD),
    "4b": Size(MODELS["Qwen3-VL-4B"], **_POD),
}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--size", default="atlas", choices=SIZES, help="atlas: the shape of the tiny model that ships with the package"
    )
    parser.add_argument("--rows", type=int, default=0, help="another batch for forward and train step")
    parser.add_argument("--layers", type=int, default=0, help="another depth of the decoder")
    parser.add_argument("--no-torch", action="store_true", help="only the model here")


def run(args) -> list[dict]:
    # Both frameworks share the GPU: neither may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from tapo_jax.bench import model_jax  # noqa: PLC0415 - jax starts its devices only after the line above

    size = SIZES[args.size]
    size = dataclasses.replace(size, rows=args.rows or size.rows)
    size = dataclasses.replace(size, config=dataclasses.replace(size.config, layers=args.layers or size.config.layers))
    here = model_jax.OurModel(size)
    there = None if args.no_torch else reference(here.model, size)
    ours, theirs = here.work(), {} if there is None else there.work()
    return [row(name, ours[name](args.repeats), theirs[name](args.repeats) if theirs else None) for name in ours]


def reference(model: nnx.Module, size: Size) -> Any:
    """Return the same weights in transformers, or None without a PyTorch for this device."""
    if importlib.util.find_spec("torch") is None:
        return None
    from tapo_jax.bench import model_torch  # noqa: PLC0415 - torch belongs to the test extra

    return model_torch.make(model, size)


def row(name: str, here: Measured, there: Measured | None) -> dict[str, Any]:
    import jax  # noqa: PLC0415 - see run

    chip = flops.chip(jax.devices()[0].device_kind)
    return {
        "what": name,
        "ms": 1e3 * here.seconds,
        "tokens/s": here.tokens / here.seconds,
        "MiB": _blank(here.mib),
        "mfu": _blank(chip and here.flops / here.seconds / chip.flops),
        "transformers ms": _blank(there and 1e3 * there.seconds),
        "transformers MiB": _blank(there and there.mib),
        "times faster": _blank(there and there.seconds / here.seconds),
        "times less cpu": _blank(there and there.cpu / here.cpu),
        "agree": _blank(there and agreement(name, here.value, there.value)),
    }


def _blank(value: Any) -> Any:
    return "" if value is None else value


def agreement(name: str, here: Any, there: Any) -> str:
    if here is None:
        return ""
    if name == "decode":
        return f"{100 * np.mean(here == there):.1f} %"
    difference = np.abs(np.asarray(here, np.float64) - np.asarray(there, np.float64))
    return f"{difference.max():.1e}" if name == "forward" else f"{difference / there:.1e}"
