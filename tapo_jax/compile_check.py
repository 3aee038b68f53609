"""Will a run fit its machines? Compiles the real programs of a config for a TPU topology, on a machine without a TPU.

The environment must be set before jax starts: see `launch/compile_check.py`. The programs are in `abstract_run.py`, the reading of what the
compiler made of them is in `hlo_costs.py`.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from tapo_jax import flops, hlo_costs
from tapo_jax.abstract_run import PROGRAMS, Abstract, Program, abstract_run
from tapo_jax.config import UserError, check_choice
from tapo_jax.flops import GIB, Chip
from tapo_jax.models import splash
from tapo_jax.models.parameters import logical_axes


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one chip. Sizes in bytes, times in seconds: what peak flops, memory and interconnect alone would take;
    `seconds` is the longest of them taken operation by operation (see `hlo_costs`). error: why it did not compile."""

    program: str
    fits: bool
    capacity: float
    arguments: float = 0.0
    temporaries: float = 0.0
    peak: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds_flops: float = 0.0
    seconds_memory: float = 0.0
    seconds_collectives: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""


def topology_devices(name: str) -> list:
    """The devices of a TPU topology such as "v5e:8x8". Raises UserError where there is no TPU compiler or no such topology."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={name} cannot be compiled for here ({str(error).splitlines()[0]}): "
            "install tapo_jax[tpu] and give a topology such as v5e:8x8, v6e:8x8, v5p:4x4x4 or tpu7x:4x4x4."
        ) from error


def report(run: Abstract, program: Program, chip: Chip) -> Report:
    """Compiles one program and reads what came out. What does not fit is a report too."""
    start = time.perf_counter()
    blank = Report(program.name, False, chip.memory)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(blank, error=_exhausted(str(error)), compile_seconds=time.perf_counter() - start)
    memory, chips = compiled.memory_analysis(), run.mesh.size
    # Donated arguments lie where the results will.
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    found = hlo_costs.costs(
        compiled.as_text(), flops_per_s=chip.flops, bytes_per_s=chip.bandwidth, loops=program.loops, kernel_flops=splash.kernel_flops
    )
    received = sum(size for _, _, size in found.collectives)
    network = received / chip.interconnect if chip.interconnect else 0.0
    return dataclasses.replace(
        blank, fits=peak <= chip.memory, arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes, peak=peak,
        flops=found.flops, model_flops=program.model_flops / chips, traffic=found.traffic,
        collectives={kind: {"count": count, "bytes": size} for kind, count, size in found.collectives},
        seconds_flops=found.flops / chip.flops, seconds_memory=found.traffic / chip.bandwidth, seconds_collectives=network,
        seconds=max(found.seconds, network), compile_seconds=time.perf_counter() - start,
    )  # fmt: skip


def _exhausted(message: str) -> str:
    """The compiler's own sentence about how much it would have needed."""
    found = re.search(r"Used [\d.]+\w of [\d.]+\w \w+", message)
    return found.group(0) if found else message.splitlines()[0]


def summary(run: Abstract, chip: Chip) -> str:
    """What is checked, in a line."""
    table = logical_axes(run.model_config)
    sizes = jax.tree.map(lambda x: x.size, run.params)
    total, tower = sum(jax.tree.leaves(sizes)), sum(jax.tree.leaves(sizes["vision"]))
    config, mesh = run.config, run.mesh
    B = config.data.prompts_per_step * config.rollout.group_size
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{total / 1e9:.2f} B parameters ({tower / 1e9:.2f} B vision, {len(table)} arrays); {mesh.size} × {chip.name} "
        f"({chip.memory / GIB:.0f} GiB), mesh {shape}; batch {B} × {config.rollout.max_length} tokens and up to "
        f"{max(config.train.patch_buckets, default=0)} patches in {config.train.micro_batches} micro-batches; {config.rollout.slots} slots"
    )


COLUMNS = ("program", "arguments", "temporaries", "peak", "fits", "flops", "model flops", "ratio", "collectives", "flops s", "memory s",
           "network s", "bound s", "of peak")  # fmt: skip


def row(found: Report) -> list[str]:
    """One line of the table. Sizes in GiB, flops in 10¹², collectives in GB received; `of peak`: the model's own flops at the bound."""
    if found.error:
        return [found.program, "", "", found.error, "no", *[""] * (len(COLUMNS) - 5)]
    traffic = ", ".join(f"{kind} {entry['count']:.0f}: {entry['bytes'] / 1e9:.1f}" for kind, entry in found.collectives.items())
    share = found.model_flops / found.flops * found.seconds_flops / found.seconds if found.seconds else 0.0
    return [
        found.program, *(f"{size / GIB:.2f}" for size in (found.arguments, found.temporaries)),
        f"{found.peak / GIB:.2f} of {found.capacity / GIB:.0f}", "yes" if found.fits else "no",
        *(f"{count / 1e12:.2f}" for count in (found.flops, found.model_flops)), f"{found.flops / found.model_flops:.2f}", traffic or "none",
        *(f"{t:.3f}" for t in (found.seconds_flops, found.seconds_memory, found.seconds_collectives, found.seconds)), f"{100 * share:.0f} %",
    ]  # fmt: skip


def markdown(rows: list[list[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_check(config: ConfigDict, topology: str, programs: tuple[str, ...], out: str = "", say: Callable[[str], None] = print) -> bool:
    """Compiles the programs for the topology, prints the table, writes JSON to `out`, and says whether all of them fit."""
    for name in programs:
        check_choice("--programs", name, tuple(PROGRAMS))
    devices = topology_devices(topology)
    chip = flops.chip(devices[0].device_kind)
    if chip is None:
        raise UserError(f"--topology={topology} has chips of the kind {devices[0].device_kind}, which tapo_jax/flops.py does not list.")
    run = abstract_run(config, devices)
    say(summary(run, chip))
    reports = []
    for name in programs:
        reports.append(report(run, PROGRAMS[name](run), chip))
        say(f"{name}: compiled in {reports[-1].compile_seconds:.0f} s")
    say(markdown([row(found) for found in reports]))
    if out:
        record = {"topology": topology, "chip": dataclasses.asdict(chip), "summary": summary(run, chip), "programs": [dataclasses.asdict(r) for r in reports]}
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return all(found.fits for found in reports)
