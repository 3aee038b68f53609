"""The reading of optimised HLO, on texts whose costs are worked out by hand. Real programs: test_flops.py."""

import pytest

from tapo_jax.compile_check import hlo_costs, hlo_text

# What the TPU compiler writes: layouts with memory spaces (S(1) is the chip's scratch memory), a kernel whose attribute
# goes over several lines, a loop with a counter.
MODULE = """\
HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %w = f32[16,16]{1,0:T(8,128)} iota(), iota_dimension=0
  %y = f32[8,16]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (arg: (s32[], f32[8,16])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %turns = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %turns), direction=LT
}

ENTRY %main (p: f32[8,16], q: bf16[2,4,256,64], k: bf16[2,2,256,64]) -> f32[8,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %q = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[2,2,256,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %kernel = bf16[2,4,256,64]{3,2,1,0:T(8,128)(2,1)} custom-call(%q, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def costs(text: str, **more) -> hlo_costs.Costs:
    return hlo_costs.costs(text, **({"flops_per_s": 1.0, "bytes_per_s": 1e30} | more))


def entry(*lines: str, before: str = "") -> str:
    return f"HloModule m\n\n{before}ENTRY %main () -> f32[] {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_a_loop_with_a_counter_and_a_kernel():
    seen = []

    def kernel(op_name, dims):
        seen.append((op_name, dims))
        return 1000.0

    # 5 turns · 2 · 8 · 16 · 16 and the kernel's 1000.
    assert costs(MODULE, kernel_flops=kernel).flops == 5 * 2 * 8 * 16 * 16 + 1000
    assert seen == [("jit(f)/splash_mha_fwd/pallas_call", [(2, 4, 256, 64), (2, 2, 256, 64)])]


def test_only_main_memory_is_traffic():
    # A turn: x read and y written, 512 bytes each, w 1,024; add: three scalars of 4 bytes; compare: two and one byte;
    # 5 turns.
    # The kernel reads q and writes its result, 2 · 4 · 256 · 64 · 2 bytes each; k lies in scratch memory.
    assert costs(MODULE).traffic == 5 * (512 + 512 + 1024 + 12 + 9) + 2 * 262_144


def test_an_attribute_over_several_lines_belongs_to_its_instruction():
    module = hlo_text.read(MODULE)
    assert [i.opcode for i in module.computations["main"].instructions][-2:] == ["custom-call", "get-tuple-element"]


def test_products_written_as_convolutions():
    # Batch of 3 products [8, 16] · [16, 32] with the batch as a dilated window: 2 · 3 · 8 · 16 · 32, no more.
    text = entry(
        "%a = f32[3,8,16]{2,1,0} parameter(0)",
        "%b = f32[3,32,16]{2,1,0} parameter(1)",
        "ROOT %c = f32[3,8,32]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
        "dim_labels=0bf_0oi->0bf",
    )
    assert costs(text).flops == 2 * 3 * 8 * 16 * 32


def test_padding_of_a_window_is_no_work():
    # 1-d convolution, 4 places, window 3, padding 1 on both sides: 2 + 3 + 3 + 2 = 10 pairs; 2 features in, 5 out.
    text = entry(
        "%a = f32[1,4,2]{2,1,0} parameter(0)",
        "%b = f32[3,2,5]{2,1,0} parameter(1)",
        "ROOT %c = f32[1,4,5]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    )
    assert costs(text).flops == 2 * 10 * 2 * 5


SLICE = """\
%slice (whole: f32[100,8], at: s32[]) -> f32[1,8] {
  %whole = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%whole, %at, %none), dynamic_slice_sizes={1,8}
}

"""
UPDATE = """\
%update (whole: f32[100,8], new: f32[1,8], at: s32[]) -> f32[100,8] {
  %whole = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %out = f32[100,8]{1,0} dynamic-update-slice(%whole, %new, %at, %none)
}

"""


def test_a_fused_slice_reads_only_its_part():
    text = entry(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "ROOT %f = f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice",
        before=SLICE,
    )
    assert costs(text).traffic == 32 + 4 + 32  # the part, the index, the result


NESTED = """
%bits (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8]{1,0} parameter(0)
  ROOT %c = f32[8,8]{1,0} bitcast(%b)
}

%product (s: f32[100,8], n: s32[], w: f32[8,8]) -> f32[1,8] {
  %s = f32[100,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = f32[8,8]{1,0} parameter(2)
  %row = f32[1,8]{1,0} fusion(%s, %n), kind=kLoop, calls=%slice
  %all = f32[8,8]{1,0} fusion(%w), kind=kLoop, calls=%bits
  ROOT %d = f32[1,8]{1,0} dot(%row, %all), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""


def test_a_slice_in_a_fusion_within_a_fusion_reads_only_its_part():
    """As the compiler writes a product with one layer of a stack of weights; the other factor is read whole."""
    text = entry(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%v = f32[8,8]{1,0} parameter(2)",
        "ROOT %f = f32[1,8]{1,0} fusion(%a, %i, %v), kind=kOutput, calls=%product",
        before=SLICE + NESTED,
    )
    assert costs(text).traffic == 32 + 4 + 256 + 32 and costs(text).flops == 2 * 8 * 8


def test_a_fused_update_in_place_writes_only_its_part():
    """Also in a fusion of a fusion."""
    text = entry(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%n = f32[1,8]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        "ROOT %f = f32[100,8]{1,0} fusion(%a, %n, %i), kind=kLoop, calls=%update",
        before=UPDATE,
    )
    assert costs(text).traffic == 32 + 4 + 32
    nested = """\
%outer (whole: f32[100,8], new: f32[1,8], at: s32[]) -> f32[100,8] {
  %whole = f32[100,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %out = f32[100,8]{1,0} fusion(%whole, %new, %at), kind=kLoop, calls=%update
}

"""
    both = text.replace("calls=%update", "calls=%outer").replace(UPDATE, UPDATE + nested)
    assert costs(both).traffic == 32 + 4 + 32


def test_a_fused_scatter_writes_only_its_part():
    scatter = """\
%scatter_two (whole: f32[100,8], at: s32[2,1], new: f32[2,8]) -> f32[100,8] {
  %whole = f32[100,8]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %new = f32[2,8]{1,0} parameter(2)
  ROOT %out = f32[100,8]{1,0} scatter(%whole, %at, %new), update_window_dims={1}, to_apply=%take
}

"""
    text = entry(
        "%a = f32[100,8]{1,0} parameter(0)",
        "%i = s32[2,1]{1,0} parameter(1)",
        "%n = f32[2,8]{1,0} parameter(2)",
        "ROOT %f = f32[100,8]{1,0} fusion(%a, %i, %n), kind=kLoop, calls=%scatter_two",
        before=scatter,
    )
    assert costs(text).traffic == 64 + 8 + 64


@pytest.mark.parametrize(
    "line, kind, received",
    [
        # Of 4 devices each holds 400 bytes: 3 · 400 come in.
        ("f32[400]{0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}", "all-gather", 1200),
        ("f32[400]{0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 1200),
        ("f32[400]{0} all-gather(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}", "all-gather", 1200),
        # As reduce-scatter then all-gather: 2 · 3/4 · 400.
        ("f32[100]{0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 600),
        ("f32[25]{0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add", "reduce-scatter", 300),
        ("f32[100]{0} all-to-all(%a), replica_groups={{0,1,2,3}}", "all-to-all", 300),
        ("f32[100]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}", "collective-permute", 400),
    ],
)
def test_collectives(line, kind, received):
    text = entry("%a = f32[100]{0} parameter(0)", f"ROOT %b = {line}")
    assert costs(text).collectives == ((kind, 1.0, received),)


def test_a_collective_of_one_device_moves_nothing():
    text = entry("%a = f32[100]{0} parameter(0)", "ROOT %b = f32[100]{0} all-reduce(%a), replica_groups={{0},{1}}")
    assert costs(text).collectives == ()


PART = """\
%part{n} (a: f32[100]) -> f32[400] {{
  %a = f32[100]{{0}} parameter(0)
  ROOT %g = f32[400]{{0}} all-gather(%a), channel_id=7, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}

"""


def test_a_collective_spread_over_fusions_counts_once():
    part = PART.format(n=1) + PART.format(n=2)
    text = entry(
        "%a = f32[100]{0} parameter(0)",
        "%b = f32[400]{0} fusion(%a), kind=kCustom, calls=%part1",
        "ROOT %c = f32[400]{0} fusion(%a), kind=kCustom, calls=%part2",
        before=part,
    )
    assert costs(text).collectives == (("all-gather", 1.0, 1200),)


def test_time_goes_by_what_limits_each_instruction():
    # 2 · 8 · 16 · 16 = 4,096 flops at 1,024 a second: 4 s; 512 + 1,024 + 512 bytes at 1,024 a second: 2 s. Then a copy
    # of 512 bytes: 1 s for reading and writing.
    text = entry(
        "%a = f32[8,16]{1,0} parameter(0)",
        "%w = f32[16,16]{1,0} parameter(1)",
        "%y = f32[8,16]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "ROOT %z = f32[8,16]{1,0} copy(%y)",
    )
    assert costs(text, flops_per_s=1024.0, bytes_per_s=1024.0).seconds == 4 + 1


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        costs("HloModule empty\n")


def test_work_of_the_second_kind_of_core_is_counted():
    """Of a TPU v6e: called asynchronously, its computations end with the name of their thread."""
    before = (
        "%second (x: f32[8,16], w: f32[16,16]) -> f32[8,16] {\n  %x = f32[8,16]{1,0} parameter(0)\n"
        "  %w = f32[16,16]{1,0} parameter(1)\n"
        "  ROOT %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
        '}, execution_thread="sparsecore"\n\n'
    )
    text = entry(
        "%a = f32[8,16]{1,0} parameter(0)",
        "%b = f32[16,16]{1,0} parameter(1)",
        "%s = ((f32[8,16]{1,0}, f32[16,16]{1,0}), f32[8,16]{1,0}, u32[]{:S(8)}) call-start(%a, %b), to_apply=%second",
        "ROOT %d = f32[8,16]{1,0} call-done(%s)",
        before=before,
    )
    found = costs(text)
    assert (found.flops, found.traffic) == (2 * 8 * 16 * 16, 4 * (8 * 16 + 16 * 16 + 8 * 16))
