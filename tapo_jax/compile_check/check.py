"""Will a run fit its machines? Compiles the real programs of a config for a TPU topology, on a machine without a TPU.

The environment must be set before jax starts: see `launch/compile_check.py`. The programs are in `programs.py`,
the reading of what the compiler made of them is in `hlo_costs.py`.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from tapo_jax.compile_check import hlo_costs
from tapo_jax.compile_check.programs import PROGRAMS, Abstract, Program, abstract_run, has_reference
from tapo_jax.config import UserError, check_choice
from tapo_jax.models import decode_kernel, flops, splash
from tapo_jax.models.flops import GIB, Chip
from tapo_jax.models.inputs import most_patches


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one chip; sizes in bytes, times in seconds.

    arguments: donated ones included, whose place the results take. beside: what else lies on the chip meanwhile.
    peak: the most that is used at a time. error: why the program did not compile.
    flops: with loops multiplied out and kernels included; model_flops: the model's own count, without what is computed
    twice. collectives: kind -> {"count", "bytes" received}. seconds_…: what peak arithmetic, memory and interconnect
    alone would take; seconds: every operation at the speed of what limits it (see `hlo_costs`), or the interconnect.
    """

    program: str
    fits: bool
    capacity: float
    arguments: float = 0.0
    temporaries: float = 0.0
    beside: float = 0.0
    peak: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds_flops: float = 0.0
    seconds_memory: float = 0.0
    seconds_network: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""


def run_check(
    config: ConfigDict,
    topology: str,
    programs: tuple[str, ...],
    *,
    out: str = "",
    short: bool = False,
    say: Callable[[str], None] = print,
) -> bool:
    """Compiles the programs for the topology, prints the table, writes JSON to `out`, and says whether all fit.

    programs: names of `PROGRAMS`; none: all that the run has. short:
    prints nothing but a table of fewer columns, with lines that can stand below those of other checks."""
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
        reports.append(report(run, PROGRAMS[name](run), chip))
        if not short:
            say(f"{name}: compiled in {reports[-1].compile_seconds:.0f} s")
    if short:
        say(markdown(SHORT, [short_row(found, run, chip) for found in reports]))
    else:
        say(markdown(COLUMNS, [row(found) for found in reports]))
    if out:
        record = {"topology": topology, "chip": dataclasses.asdict(chip), "summary": summary(run, chip)}
        record["programs"] = [dataclasses.asdict(found) for found in reports]
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return all(found.fits for found in reports)


def topology_devices(name: str) -> list:
    """The devices of a topology such as "v5e:8x8". Raises UserError without a TPU compiler or for another topology."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={name} cannot be compiled for here ({str(error).splitlines()[0]}): "
            "install tapo_jax[tpu] and give a topology such as v5e:8x8, v6e:8x8, v5p:4x4x4 or tpu7x:4x4x4."
        ) from error


def report(run: Abstract, program: Program, chip: Chip) -> Report:
    """Compiles one program and reads what came out. That it does not fit is a report too."""
    start = time.perf_counter()
    blank = Report(program.name, False, chip.memory, beside=program.beside)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(blank, error=needed(str(error)), compile_seconds=time.perf_counter() - start)
    memory = compiled.memory_analysis()
    found = hlo_costs.costs(
        compiled.as_text(),
        flops_per_s=chip.flops,
        bytes_per_s=chip.bandwidth,
        loops=program.loops,
        kernel_flops=lambda *kernel: splash.kernel_flops(*kernel) + decode_kernel.kernel_flops(*kernel),
        kernel_numbers=decode_kernel.kernel_numbers,
    )
    network = sum(size for _, _, size in found.collectives) / chip.interconnect if chip.interconnect else 0.0
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
        compile_seconds=time.perf_counter() - start,
    )


def needed(message: str) -> str:
    """What the compiler says about the memory that it would have needed."""
    found = re.search(r"[Uu]sed [\d.]+\w of [\d.]+\w( \w+)?", message)
    return found.group(0) if found else message.splitlines()[0]


def summary(run: Abstract, chip: Chip) -> str:
    """What is checked, in two lines."""
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
    """A line of the table: sizes in GiB, flops in 10¹², collectives as kind, count and GB received."""
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
        f"{found.flops / found.model_flops:.2f}",
        ", ".join(moved) or "none",
        *(f"{t:.3f}" for t in (found.seconds_flops, found.seconds_memory, found.seconds_network, found.seconds)),
        f"{100 * found.model_flops / found.flops * found.seconds_flops / found.seconds:.0f} %",
    ]


SHORT = (
    "model", "chips", "program", "arguments", "temporaries", "peak, GiB", "Tflop", "model's", "GB received", "bound",
)  # fmt: skip


def short_row(found: Report, run: Abstract, chip: Chip) -> list[str]:
    """As `row`; arguments with what lies beside them, collectives of all kinds together."""
    model = run.config.model.shape or Path(run.config.model.path).name
    head = [f"{model}, {count(run.params) / 1e9:.2f} B", f"{run.mesh.size} {chip.name}", found.program]
    if found.error:
        return [*head, "", "", f"does not fit: {found.error}", *[""] * (len(SHORT) - 6)]
    return [
        *head,
        f"{(found.arguments + found.beside) / GIB:.2f}",
        f"{found.temporaries / GIB:.2f}",
        f"{found.peak / GIB:.2f} of {found.capacity / GIB:.0f}" + ("" if found.fits else ": does not fit"),
        _few_digits(found.flops / 1e12),
        f"× {found.flops / found.model_flops:.2f}",
        _few_digits(sum(entry["bytes"] for entry in found.collectives.values()) / 1e9),
        f"{found.seconds:.3g} s",
    ]


def _few_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def markdown(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
