"""Compile the real programs of a config for a TPU topology, on a machine without a TPU, and say whether they fit.

The environment must be set before jax starts: see `launch/compile_check.py`. The programs are in `programs.py`;
`hlo_costs.py` reads the compiler's output.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from tapo_jax.compile_check import estimate, hlo_costs
from tapo_jax.compile_check.programs import PROGRAMS, Abstract, Program, abstract_run, has_reference
from tapo_jax.config import UserError, check_choice
from tapo_jax.models import decode_kernel, flops, splash
from tapo_jax.models.flops import GIB, Chip
from tapo_jax.models.inputs import most_patches

FILLED = {"half": 1 / 2, "third": 1 / 3}  # shares of a slot's entries at which decoding is timed, besides all of them


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one chip; sizes in bytes, times in seconds."""

    program: str
    fits: bool
    capacity: float
    arguments: float = 0.0
    """Donated ones included, whose memory the results reuse."""
    temporaries: float = 0.0
    beside: float = 0.0
    """Other memory in use on the chip meanwhile."""
    peak: float = 0.0
    """Max memory in use at one time."""
    flops: float = 0.0
    """Loops multiplied out and kernels included."""
    model_flops: float = 0.0
    """The model's own count, without what is recomputed."""
    traffic: float = 0.0
    """Bytes between main memory and the core."""
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """kind -> {"count", "bytes" received}."""
    seconds_flops: float = 0.0
    """Time of the arithmetic alone, at the chip's peak."""
    seconds_memory: float = 0.0
    """Time of the memory traffic alone, at the chip's peak."""
    seconds_network: float = 0.0
    """Time of the collectives alone, at the interconnect's peak."""
    seconds: float = 0.0
    """Every operation at the speed of its bottleneck (see `hlo_costs`), or the interconnect if that is slower."""
    seconds_filled: dict[str, float] = dataclasses.field(default_factory=dict)
    """The same for a call that adds tokens, with slots that are filled to a share of their entries."""
    tokens: int = 0
    """Tokens that one call adds to the slots of all chips."""
    compile_seconds: float = 0.0
    error: str = ""
    """Why the program did not compile."""


def run_check(
    config: ConfigDict,
    topology: str,
    programs: tuple[str, ...],
    *,
    written: int = 4000,
    out: str = "",
    short: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Compile the programs for the topology, print the table, write JSON to `out`; return whether all fit.

    config: the run.
    topology: a TPU topology such as "v5e:8x8".
    programs: names of `PROGRAMS`; none means all that the run has.
    written: tokens that the policy writes in an episode, for the time of a rollout.
    out: the JSON file; "" writes none.
    short: print only a table of fewer columns, whose lines can be joined with those of other checks.
    say: prints a line.
    """
    for name in programs:
        check_choice("--programs", name, tuple(PROGRAMS))
    programs = programs or tuple(name for name in PROGRAMS if name != "log_probs" or has_reference(config))
    devices = topology_devices(topology)
    chip = flops.chip(devices[0].device_kind)
    if chip is None:
        raise UserError(
            f"--topology={topology} has chips ({devices[0].device_kind}) that tapo_jax/models/flops.py lacks."
        )
    run = abstract_run(config, devices)
    if not short:
        say(summary(run, chip))
    reports = []
    for name in programs:
        program = PROGRAMS[name](run)
        if program is None:  # the run has none
            continue
        reports.append(report(run, program, chip))
        if not short:
            say(f"{name}: compiled in {reports[-1].compile_seconds:.0f} s")
    if short:
        say(markdown(SHORT, [short_row(found, run, chip) for found in reports]))
    else:
        say(markdown(COLUMNS, [row(found) for found in reports]))
    speed = estimate.speed({found.program: found for found in reports}, run, written)
    if speed:
        say("")
        say(markdown(estimate.COLUMNS, [estimate.row(speed, model_name(run), f"{run.mesh.size} {chip.name}")]))
    if out:
        record = {"topology": topology, "chip": dataclasses.asdict(chip), "summary": summary(run, chip)}
        record["programs"] = [dataclasses.asdict(found) for found in reports]
        record["speed"] = speed
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return all(found.fits for found in reports)


def topology_devices(name: str) -> list:
    """Return the devices of a topology such as "v5e:8x8".

    Raises UserError without a TPU compiler or for an unknown topology."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={name} cannot be compiled for here ({str(error).splitlines()[0]}): "
            "install tapo_jax[tpu] and give a topology such as v5e:8x8, v6e:8x8, v5p:4x4x4 or tpu7x:4x4x4."
        ) from error


def report(run: Abstract, program: Program, chip: Chip) -> Report:
    """Compile one program and read the result. A program that does not fit gets a report too."""
    start = time.perf_counter()
    blank = Report(program.name, False, chip.memory, beside=program.beside)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(blank, error=needed(str(error)), compile_seconds=time.perf_counter() - start)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    found = costs(text, program, chip)
    network = sum(size for _, _, size in found.collectives) / chip.interconnect if chip.interconnect else 0.0
    shares = FILLED if program.name == "decode" else {}
    filled = {name: costs(text, program, chip, share).seconds for name, share in shares.items()}
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + program.beside
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return dataclasses.replace(
        blank,
        fits=peak <= chip.memory,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        flops=found.flops,
        model_flops=program.model_flops / run.mesh.size,
        traffic=found.traffic,
        collectives={kind: {"count": count, "bytes": size} for kind, count, size in found.collectives},
        seconds_flops=found.flops / chip.flops,
        seconds_memory=found.traffic / chip.bandwidth,
        seconds_network=network,
        seconds=max(found.seconds, network),
        seconds_filled={name: max(seconds, network) for name, seconds in filled.items()},
        tokens=program.tokens,
        compile_seconds=time.perf_counter() - start,
    )


def costs(text: str, program: Program, chip: Chip, filled: float = 1.0) -> hlo_costs.Costs:
    """Return the costs of a compiled program. filled: the share of the slots' entries that a decoding step reads."""
    attend = functools.partial(decode_kernel.kernel_flops, filled=filled)
    return hlo_costs.costs(
        text,
        flops_per_s=chip.flops,
        bytes_per_s=chip.bandwidth,
        loops=program.loops,
        kernel_flops=lambda *kernel: splash.kernel_flops(*kernel) + attend(*kernel),
        kernel_numbers=functools.partial(decode_kernel.kernel_numbers, filled=filled),
    )


def needed(message: str) -> str:
    """Return what the compiler's message says about the memory that it would have needed."""
    found = re.search(r"[Uu]sed [\d.]+\w of [\d.]+\w( \w+)?", message)
    return found.group(0) if found else message.splitlines()[0]


def summary(run: Abstract, chip: Chip) -> str:
    """Return what is checked, in two lines."""
    config, mesh = run.config, run.mesh
    total, tower = count(run.params), count(run.params["vision"])
    rows = config.data.prompts_per_step * config.rollout.group_size
    merge = run.model_config.vision.merge
    patches = most_patches(config.rollout.max_image_tokens, config.rollout.max_length, merge)
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{total / 1e9:.2f} B parameters ({tower / 1e9:.2f} B vision) on {mesh.size} {chip.name} "
        f"({chip.memory / GIB:.0f} GiB each), mesh {shape}\n"
        f"batch of {rows} rows × {config.rollout.max_length} tokens and up to "
        f"{patches} patches, in {config.train.updates_per_batch} × "
        f"{config.train.micro_batches} pieces; {config.rollout.slots} slots"
    )


def count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


COLUMNS = (
    "program", "arguments", "temporaries", "beside", "peak", "fits", "Tflop", "model's", "ratio", "collectives",
    "flops s", "memory s", "network s", "bound s", "MFU at bound",
)  # fmt: skip


def row(found: Report) -> list[str]:
    """Return a line of the table: sizes in GiB, flops in 10¹², collectives as kind, count and GB received."""
    if found.error:
        return [found.program, "", "", f"{found.beside / GIB:.2f}", found.error, "no", *[""] * (len(COLUMNS) - 6)]
    moved = [f"{kind} {e['count']:.0f} × {e['bytes'] / e['count'] / 1e9:.3g}" for kind, e in found.collectives.items()]
    return [
        found.program,
        *(f"{size / GIB:.2f}" for size in (found.arguments, found.temporaries, found.beside)),
        f"{found.peak / GIB:.2f} of {found.capacity / GIB:.0f}",
        "yes" if found.fits else "no",
        f"{found.flops / 1e12:.2f}",
        f"{found.model_flops / 1e12:.2f}",
        _ratio(found),
        ", ".join(moved) or "none",
        *(f"{t:.3f}" for t in (found.seconds_flops, found.seconds_memory, found.seconds_network, found.seconds)),
        f"{100 * found.model_flops / found.flops * found.seconds_flops / found.seconds:.0f} %" if found.flops else "",
    ]


SHORT = (
    "model", "chips", "program", "arguments", "temporaries", "peak, GiB", "Tflop", "model's", "GB received", "bound",
)  # fmt: skip


def short_row(found: Report, run: Abstract, chip: Chip) -> list[str]:
    """Return a line of the short table: arguments and other memory in one sum, collectives of all kinds too."""
    head = [f"{model_name(run)}, {count(run.params) / 1e9:.2f} B", f"{run.mesh.size} {chip.name}", found.program]
    if found.error:
        return [*head, "", "", f"does not fit: {found.error}", *[""] * (len(SHORT) - 6)]
    return [
        *head,
        f"{(found.arguments + found.beside) / GIB:.2f}",
        f"{found.temporaries / GIB:.2f}",
        f"{found.peak / GIB:.2f} of {found.capacity / GIB:.0f}" + ("" if found.fits else ": does not fit"),
        _few_digits(found.flops / 1e12),
        f"× {_ratio(found)}" if found.model_flops else "",
        _few_digits(sum(entry["bytes"] for entry in found.collectives.values()) / 1e9),
        f"{found.seconds:.3g} s",
    ]


def model_name(run: Abstract) -> str:
    return run.config.model.shape or Path(run.config.model.path).name


def _ratio(found: Report) -> str:
    """Return the operations of the program as a multiple of the model's own count; "" for one that only moves."""
    return f"{found.flops / found.model_flops:.2f}" if found.model_flops else ""


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def markdown(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
