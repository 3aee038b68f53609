"""Count what a compiled program does on one device, from its optimised HLO: arithmetic, memory traffic, collectives.

The body of a loop counts as often as the loop iterates.
flops: matrix products and convolutions, 2 for each multiplication with its addition; kernels by the caller's count.
traffic: bytes between main memory and the core; every instruction that is not part of a fusion reads its operands and
writes its value once, and slices and in-place updates count only what they touch.
collectives: bytes that a device receives over the interconnect.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from tapo_jax.compile_check.hlo_text import Computation, Instruction, Module, Shape, read

IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # opcodes that change part of an operand -> where the part is
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Operations that move no data by themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id", "replica-id",
    "opt-barrier", "domain", "add-dependency", "async-done", "async-update", "call-done", "copy-done", "slice-done",
    "send-done", "recv-done", *(f"{name}-done" for name in COLLECTIVES),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one call."""

    flops: float = 0.0
    traffic: float = 0.0
    """Bytes."""
    seconds: float = 0.0
    """Sum over the instructions, each at the speed of its bottleneck, arithmetic or memory."""
    collectives: tuple[tuple[str, float, float], ...] = ()
    """(kind, count, bytes received)."""

    def __add__(self, other: "Costs") -> "Costs":
        sums = {kind: (count, size) for kind, count, size in self.collectives}
        for kind, count, size in other.collectives:
            have = sums.get(kind, (0.0, 0.0))
            sums[kind] = (have[0] + count, have[1] + size)
        merged = tuple((kind, *pair) for kind, pair in sorted(sums.items()))
        return Costs(self.flops + other.flops, self.traffic + other.traffic, self.seconds + other.seconds, merged)

    def times(self, turns: float) -> "Costs":
        collectives = tuple((kind, count * turns, size * turns) for kind, count, size in self.collectives)
        return Costs(self.flops * turns, self.traffic * turns, self.seconds * turns, collectives)


def costs(
    text: str,
    *,
    flops_per_s: float,
    bytes_per_s: float,
    loops: int = 1,
    kernel_flops: Callable | None = None,
    kernel_numbers: Callable | None = None,
) -> Costs:
    """Return the costs of the module in `text` (`compiled.as_text()`).

    text: the optimised HLO.
    flops_per_s, bytes_per_s: the chip's peak arithmetic and memory bandwidth.
    loops: iterations of a loop whose length depends on data.
    kernel_flops: maps (op_name, dims of the operands) to the flops of a Pallas kernel; None counts kernels as 0.
    kernel_numbers: maps the same to how many numbers of its first result's dtype a kernel moves; its result is None if
        the kernel moves all of its operands and results.
    """
    reader = _Reader(read(text), flops_per_s, bytes_per_s, loops, kernel_flops, kernel_numbers)
    return reader.computation(reader.module.entry)


class _Reader:
    def __init__(
        self,
        module: Module,
        flops_per_s: float,
        bytes_per_s: float,
        loops: int,
        kernel_flops: Callable | None,
        kernel_numbers: Callable | None,
    ):
        self.module, self.loops = module, loops
        self.kernel_flops, self.kernel_numbers = kernel_flops, kernel_numbers
        self.flops_per_s, self.bytes_per_s = flops_per_s, bytes_per_s
        self.computation = functools.cache(self._computation)
        self.inside = functools.cache(self._inside)

    def _computation(self, name: str) -> Costs:
        """Return the costs of a computation whose instructions run one by one."""
        computation = self.module.computations[name]
        seen: set[str] = set()
        total = Costs()
        for i in computation.instructions:
            costs = self._instruction(computation, i)
            channels = self._channels(i) if costs.collectives else set()
            # A collective that the compiler spreads over several fusions, to overlap it with arithmetic, has the same
            # channel in all of them.
            total += dataclasses.replace(costs, collectives=()) if channels and channels <= seen else costs
            seen |= channels
        return total

    def _channels(self, i: Instruction) -> set[str]:
        """Return the channels of the collectives of an instruction and of its fusion."""
        inner = i.called("calls") if i.opcode in ("fusion", "async-start") else None
        if inner:
            return set().union(*(self._channels(j) for j in self.module.computations[inner].instructions))
        found = re.search(r"channel_id=(\d+)", i.rest)
        return {found.group(1)} if found else set()

    def _inside(self, name: str) -> Costs:
        """Return the arithmetic and collectives of a fusion's computation, which touches no memory by itself."""
        computation = self.module.computations[name]
        total = Costs()
        for i in computation.instructions:
            inner = i.called("calls") or i.called("to_apply") if i.opcode in ("fusion", "call", "async-start") else None
            total += (
                self.inside(inner) if inner else Costs(self._flops(computation, i)) + self._collective(computation, i)
            )
        return total

    def _instruction(self, computation: Computation, i: Instruction) -> Costs:
        if i.opcode in FREE:
            return Costs()
        if i.opcode == "while":
            turns = self._turns(i)
            return (self.computation(i.called("body")) + self.computation(i.called("condition"))).times(turns)
        if i.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            branches = (
                re.findall(r"[\w.\-]+", listed.group(1))
                if listed
                else [i.called("true_computation"), i.called("false_computation")]
            )
            return max((self.computation(branch) for branch in branches), key=lambda c: (c.seconds, c.flops))
        if i.opcode in ("call", "call-start", "async-start"):
            return self.computation(i.called("calls") or i.called("to_apply"))
        if i.opcode == "fusion":
            inner = self.inside(i.called("calls"))
            return self._timed(inner, self._fusion_traffic(computation, i))
        traffic = self._traffic(computation, i)
        return self._timed(Costs(self._flops(computation, i)) + self._collective(computation, i), traffic)

    def _timed(self, work: Costs, traffic: float) -> Costs:
        seconds = max(work.flops / self.flops_per_s, traffic / self.bytes_per_s)
        return dataclasses.replace(work, traffic=traffic, seconds=seconds)

    def _turns(self, i: Instruction) -> int:
        """Return the iterations of a loop.

        The number is the compiler's own note, or the constant of a condition "counter < constant" (counters begin at 0
        and increase by 1), or `loops`."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest)
        if found:
            return int(found.group(1))
        condition = self.module.computations[i.called("condition")]
        test = condition.root
        if test.opcode == "compare" and "direction=LT" in test.rest:
            bound = condition.by_name[test.operands[1]]
            if bound.opcode == "constant":
                return int(bound.literal)
        return self.loops

    # Arithmetic.

    def _flops(self, computation: Computation, i: Instruction) -> float:
        if i.opcode == "dot":
            left = computation.operand_shapes(i, 0)[0]
            contracted = math.prod(left.dims[d] for d in _numbers(i.rest, "lhs_contracting_dims"))
            return 2.0 * i.shapes[0].size * contracted
        if i.opcode == "convolution":
            return _convolution(i, computation.operand_shapes(i, 0)[0], computation.operand_shapes(i, 1)[0])
        if self.kernel_flops is not None and _is_kernel(i):
            return self.kernel_flops(i.op_name, _operand_dims(computation, i))
        return 0.0

    # Memory.

    def _traffic(self, computation: Computation, i: Instruction) -> float:
        first = computation.operand_shapes(i, 0) if i.operands else ()
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _main_bytes(i.shapes)
        if i.opcode in IN_PLACE:
            return 2 * _main_bytes(computation.operand_shapes(i, IN_PLACE[i.opcode]))
        if i.opcode in ("copy-start", "slice-start"):  # the value is (target, source, …) or (source, target, …)
            target = i.shapes[0 if i.opcode == "copy-start" else 1]
            return target.bytes * (target.main + first[0].main)
        if i.opcode.endswith("-start"):
            return 2 * _main_bytes(first)
        if self.kernel_numbers is not None and _is_kernel(i):
            numbers = self.kernel_numbers(i.op_name, _operand_dims(computation, i))
            if numbers is not None:
                return numbers * i.shapes[0].bytes / i.shapes[0].size
        return _main_bytes(i.shapes) + sum(
            _main_bytes(computation.operand_shapes(i, k)) for k in range(len(i.operands))
        )

    def _fusion_traffic(self, computation: Computation, i: Instruction) -> float:
        inner = self.module.computations[i.called("calls")]
        total = 0.0
        for index in range(len(i.operands)):
            outer = computation.operand_shapes(i, index)
            if index in inner.parameters and any(shape.main for shape in outer):
                total += min(_main_bytes(outer), _read_bytes(self.module, inner, inner.parameters[index]))
        leaves = [inner.by_name[name] for name in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
        for leaf, shape in zip(leaves, i.shapes, strict=False):
            total += _written_bytes(self.module, inner, leaf) if shape.main else 0.0
        return total

    # Collectives.

    def _collective(self, computation: Computation, i: Instruction) -> Costs:
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Costs()
        operands = sum(s.bytes for k in range(len(i.operands)) for s in computation.operand_shapes(i, k))
        n = _group_size(i.rest)
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the compiler writes it as a fusion of the reduction with a slice
        share = (n - 1) / n
        received = {
            "all-gather": operands * (n - 1),
            "all-reduce": 2 * operands * share,
            "reduce-scatter": operands * share,
            "collective-permute": operands,
        }.get(kind, operands * share)
        return Costs(collectives=((kind, 1.0, received),)) if received else Costs()


def _is_kernel(i: Instruction) -> bool:
    return i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.rest


def _operand_dims(computation: Computation, i: Instruction) -> list[tuple[int, ...]]:
    return [shape.dims for k in range(len(i.operands)) for shape in computation.operand_shapes(i, k)]


def _numbers(rest: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", rest)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _main_bytes(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.main)


def _through_bitcasts(inner: Computation, i: Instruction) -> Instruction:
    while i.opcode == "bitcast":
        i = inner.by_name[i.operands[0]]
    return i


def _read_bytes(module: Module, inner: Computation, parameter: Instruction) -> float:
    """Return the bytes that a fusion reads of a parameter: slices of it, 0 if it is only updated in place, or all.

    A fusion may have fusions inside, which take slices of what is theirs: of stacked kernels the one of a layer."""
    whole = sum(shape.bytes for shape in parameter.shapes)
    total, waiting = 0.0, [parameter]
    while waiting:
        value = waiting.pop()
        if value.name == inner.root.name:
            return whole
        for user in inner.users[value.name]:
            if user.opcode == "bitcast":
                waiting.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "fusion":
                called = module.computations[user.called("calls")]
                for place in (place for place, name in enumerate(user.operands) if name == value.name):
                    if _through_bitcasts(called, called.root) is called.parameters[place]:
                        waiting.append(user)  # only the parameter itself, written otherwise
                    else:
                        total += _read_bytes(module, called, called.parameters[place])
            elif not (user.opcode in IN_PLACE and user.operands[0] == value.name):
                return whole
    return min(total, whole)


def _written_bytes(module: Module, inner: Computation, leaf: Instruction) -> float:
    leaf = _through_bitcasts(inner, leaf)
    if leaf.opcode == "fusion" and len(leaf.shapes) == 1:
        called = module.computations[leaf.called("calls")]
        return _written_bytes(module, called, called.root)
    if leaf.opcode in IN_PLACE:
        return sum(shape.bytes for shape in inner.operand_shapes(leaf, IN_PLACE[leaf.opcode]))
    return sum(shape.bytes for shape in leaf.shapes)


def _group_size(rest: str) -> int:
    """Return the number of devices that take part in a collective together."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota.group(2))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if mesh:  # mesh['x'=2,'y'=4] {'y'}: over the axes in braces
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh.group(2)))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed.group(1).split(",")) if listed else 2


def _convolution(i: Instruction, left: Shape, right: Shape) -> float:
    """Return the flops of a convolution.

    The compiler writes matrix products as convolutions; batch dimensions may be spatial ones with dilation."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.rest)
    lhs, rhs, out = labels.groups()
    groups = int(found.group(1)) if (found := re.search(r"feature_group_count=(\d+)", i.rest)) else 1
    batches = int(found.group(1)) if (found := re.search(r"batch_group_count=(\d+)", i.rest)) else 1
    count = left.dims[lhs.index("f")] / groups * i.shapes[0].dims[out.index("f")] * left.dims[lhs.index("b")] / batches
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    spatial = sorted(label for label in lhs if label.isdigit())
    for d, label in enumerate(spatial):
        one = {name: text.split("x")[d] for name, text in fields.items()}
        count *= _valid_pairs(
            left.dims[lhs.index(label)],
            right.dims[rhs.index(label)],
            i.shapes[0].dims[out.index(label)],
            stride=int(one.get("stride", 1)),
            low=int(one.get("pad", "0_0").split("_")[0]),
            lhs_dilate=int(one.get("lhs_dilate", 1)),
            rhs_dilate=int(one.get("rhs_dilate", 1)),
        )
    return 2.0 * count


@functools.cache
def _valid_pairs(size: int, kernel: int, out: int, *, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Count pairs of an output and a kernel position that meet an input value, not padding or a hole of dilation."""
    pairs, starts = 0, np.arange(out, dtype=np.int64) * stride - low
    for k in range(kernel):
        place = starts + k * rhs_dilate
        inside = (place >= 0) & (place <= (size - 1) * lhs_dilate)
        pairs += int((inside & (place % lhs_dilate == 0)).sum())
    return pairs
