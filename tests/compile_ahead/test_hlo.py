"""Costs read from HLO, against numbers worked out by hand."""

import pytest

from causalfusion_jax.compile_ahead import hlo
from causalfusion_jax.compile_ahead.costs import group_size, program_costs

NESTED = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p.1: (s32[], f32[256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %p.1 = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%inner_body (p.2: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p.2 = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i.2, %two)
  %x = f32[256]{0:T(256)} get-tuple-element(%p.2), index=1
  %reduced = f32[256]{0:T(256)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %result = (s32[], f32[256]) tuple(%next, %reduced)
}

%outer_condition (p.3: (s32[], f32[256])) -> pred[] {
  %p.3 = (s32[], f32[256]) parameter(0)
  ROOT %never_read = pred[] constant(true)
}

%outer_body (p.4: (s32[], f32[256])) -> (s32[], f32[256]) {
  %p.4 = (s32[], /*index=1*/f32[256]{0:T(256)}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %x.4 = f32[256] get-tuple-element(%p.4), index=1
  %gathered = f32[1024] all-gather(%x.4), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %one = s32[] constant(1)
  %start = (s32[], f32[256]) tuple(%one, %x.4)
  %inner = (s32[], f32[256]) while(%start), condition=%inner_condition, body=%inner_body
  %x.5 = f32[256] get-tuple-element(%inner), index=1
  ROOT %out = (s32[], f32[256]) tuple(%i.4, %x.5)
}

ENTRY %main (arg: f32[256]) -> f32[256] {
  %arg = f32[256]{0:T(256)} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[256]) tuple(%zero, %arg)
  %loop = (s32[], f32[256]) while(%begin), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = f32[256] get-tuple-element(%loop), index=1
}
"""


def costs_of(*lines, extra=""):
    """Costs of an entry computation of these lines; the last one is its result."""
    body = "\n".join(f"  {line}" for line in (*lines[:-1], "ROOT " + lines[-1].removeprefix("ROOT ")))
    text = f"HloModule m, num_partitions=4\n\n{extra}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    return program_costs(hlo.parse(text))


def test_the_body_of_a_loop_counts_once_for_each_iteration():
    costs = program_costs(hlo.parse(NESTED))
    # 5 turns of the outer loop by the compiler's note; in each 3 of the inner one: 1, 3, 5 < 7.
    assert costs.count == {"all-gather": 5, "all-reduce": 15}
    assert costs.bytes == {"all-gather": 5 * 4096, "all-reduce": 15 * 1024}
    # A ring of 4 sends 3 shards of 1 KiB; reducing over 2 sends 2 * 1/2 of 1 KiB.
    assert costs.sent == {"all-gather": 5 * 3 * 1024, "all-reduce": 15 * 1024}
    assert not costs.unknown


def test_a_loop_of_unknown_trip_count_is_named_and_counts_once():
    costs = program_costs(hlo.parse(NESTED.replace('"known_trip_count":{"n":"5"}', "")))
    assert costs.count == {"all-gather": 1, "all-reduce": 3} and costs.unknown == {"loop loop": 1}


def test_the_trip_count_of_a_fused_condition():
    fused = """\
%compare (x: s32[], y: s32[]) -> pred[] {
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %c = pred[] compare(%x, %y), direction=LT
}
"""
    text = NESTED.replace("%inner_condition (p.1", fused + "\n%inner_condition (p.1").replace(
        "compare(%i.1, %limit), direction=LT", "fusion(%i.1, %limit), kind=kLoop, calls=%compare"
    )
    assert program_costs(hlo.parse(text)).count["all-reduce"] == 15


@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        ("f32[8,16] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 512, 2 * 3 / 4 * 512),
        ("f32[32,16] all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}", "all-gather", 2048, 1536),
        ("f32[2,16] reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add", "reduce-scatter", 512, 384),
        ("f32[8,16] all-to-all(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-to-all", 512, 256),
        ("f32[8,16] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 512, 512),
        ("f32[8,16] all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 512, 768),
        ("(f32[8,16], f32[8,16]) all-reduce(%x, %x), replica_groups={}, to_apply=%add", "all-reduce", 1024, 1536),
    ],
)
def test_each_kind_of_collective(line, kind, size, sent):
    costs = costs_of("%x = f32[8,16] parameter(0)", f"ROOT %y = {line}")
    assert (costs.count, costs.bytes, costs.sent) == ({kind: 1}, {kind: size}, {kind: sent})


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2), ("[2,8]<=[16]", 8), ("[4,4]<=[4,4]T(1,0)", 4), ("{}", 4),
        ("mesh['axis_0'=4] {'axis_0'}", 4), ("mesh['a'=4,'b'=8] {'b'}", 8), ("mesh['a'=4,'b'=8] {'a','b'}", 32),
        ("mesh['a'=16] {'a':(2)4}", 4),
    ],
)  # fmt: skip
def test_sizes_of_groups_in_every_notation(groups, size):
    line = f"  %y = f32[8] all-reduce(%x), replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
    assert group_size(hlo.parse_instruction(line), 4) == size


def test_a_start_and_its_done_count_once():
    costs = costs_of(
        "%x = f32[8] parameter(0)",
        "%s = (f32[8], f32[32]) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}",
        "%d = f32[32] all-gather-done(%s)",
        "%p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
        "%q = f32[8] collective-permute-done(%p)",
        "%a = ((f32[8]), f32[2], u32[]) async-start(%x), calls=%scatter",
        "%u = ((f32[8]), f32[2], u32[]) async-update(%a), calls=%scatter",
        "ROOT %b = f32[2] async-done(%u), calls=%scatter",
        extra=(
            "%scatter (z: f32[8]) -> f32[2] {\n  %z = f32[8] parameter(0)\n"
            "  ROOT %r = f32[2] reduce-scatter(%z), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add\n}\n"
        ),
    )
    assert costs.count == {"all-gather": 1, "collective-permute": 1, "reduce-scatter": 1}
    assert costs.bytes == {"all-gather": 128, "collective-permute": 32, "reduce-scatter": 32}


def fusion(name, channel):
    """A fused computation that carries a part of an asynchronous all-gather."""
    return (
        f"%{name} (p: bf16[64]) -> bf16[256] {{\n  %p = bf16[64]{{0:T(128)}} parameter(0)\n"
        f"  ROOT %g = bf16[256] all-gather(%p), channel_id={channel}, replica_groups=[1,4]<=[4], dimensions={{0}}\n"
        "}\n\n"
    )


def test_a_collective_spread_over_fusions_counts_once():
    lines = ["%x = bf16[64] parameter(0)"]
    lines += [f"%f{i} = bf16[256] fusion(%x), kind=kCustom, calls=%part{i}" for i in range(3)]
    costs = costs_of(*lines, extra="".join(fusion(f"part{i}", 7) for i in range(3)))
    assert costs.count == {"all-gather": 1} and costs.bytes == {"all-gather": 512}
    other = costs_of(*lines, extra="".join(fusion(f"part{i}", i + 1) for i in range(3)))
    assert other.count == {"all-gather": 3}


def test_an_all_reduce_of_which_a_slice_stays_is_a_reduce_scatter():
    scatter = """\
%all-reduce-scatter (p: bf16[64,32]) -> bf16[16,32] {
  %p = bf16[64,32]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %r = bf16[64,32]{0,1:T(8,128)(2,1)} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = bf16[16,32]{0,1} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={16,32}
}
"""
    costs = costs_of(
        "%x = bf16[64,32] parameter(0)",
        "ROOT %f = bf16[16,32] fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        extra=scatter,
    )
    assert costs.count == {"reduce-scatter": 1} and costs.sent == {"reduce-scatter": 3 / 4 * 4096}


def test_of_a_conditional_the_branch_that_costs_most():
    branches = "".join(
        f"%branch{i} (p{i}: f32[16,16]) -> f32[16,16] {{\n  %p{i} = f32[16,16] parameter(0)\n  ROOT %o{i} = "
        + (f"f32[16,16] dot(%p{i}, %p{i}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
           if i else f"f32[16,16] negate(%p{i})") + "\n}\n\n"
        for i in range(2)
    )  # fmt: skip
    costs = costs_of(
        "%i = s32[] parameter(0)",
        "%x = f32[16,16] parameter(1)",
        "ROOT %c = f32[16,16] conditional(%i, %x, %x), branch_computations={%branch0, %branch1}",
        extra=branches,
    )
    assert costs.flops == 2 * 16**3


@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "flops"),
    [
        ("bf16[1152,1280]", "bf16[1280,3840]", "bf16[1152,3840]", "dim_labels=bf_io->bf", 2 * 1152 * 1280 * 3840),
        # As the TPU compiler writes a product of [2, 20, 576, 64] with [2, 20, 576, 64] over the last axis.
        (
            "bf16[2,576,20,64]", "bf16[2,576,20,64]", "f32[2,20,576,576]",
            "window={size=2x20 stride=1x19 lhs_dilate=2x20}, dim_labels=0b1f_0o1i->01bf", 2 * 2 * 20 * 576**2 * 64,
        ),
        # [1152, 20, 64] times [1280, 20, 64] over the last two, as a window of 20.
        (
            "bf16[1152,20,64]", "bf16[20,64,1280]", "bf16[1152,1280,1]",
            "window={size=20}, dim_labels=b0f_0io->bf0", 2 * 1152 * 1280 * 20 * 64,
        ),
        # Padding that the window covers is not computed: 3 taps on 4 values, 2 of 12 outside.
        (
            "f32[1,4,8]", "f32[3,8,16]", "f32[1,4,16]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 10 * 8 * 16,
        ),
    ],
)  # fmt: skip
def test_flops_of_products_written_as_convolutions(left, right, out, rest, flops):
    costs = costs_of(
        f"%l = {left} parameter(0)", f"%r = {right} parameter(1)", f"ROOT %y = {out} convolution(%l, %r), {rest}"
    )
    assert costs.flops == flops


def test_flops_of_fusions_and_of_kernels_by_their_estimate():
    product = """\
%product (a: f32[4,8,16], b: f32[4,16,32]) -> f32[4,8,32] {
  %a = f32[4,8,16] parameter(0)
  %b = f32[4,16,32] parameter(1)
  ROOT %d = f32[4,8,32] dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_contracting_dims={1}
}
"""
    costs = costs_of(
        "%a = f32[4,8,16] parameter(0)",
        "%b = f32[4,16,32] parameter(1)",
        "%f = f32[4,8,32] fusion(%a, %b), kind=kOutput, calls=%product",
        '%k = f32[4] custom-call(%a), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"1000","bytes_accessed":"8"}}}',
        '%flash_attention.3 = f32[4] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={}',
        '%free = f32[4] custom-call(), custom_call_target="AllocateBuffer"',
        extra=product,
    )
    assert costs.flops == 2 * 4 * 8 * 16 * 32 + 1000
    assert costs.unknown == {"kernel flash_attention": 1}


def test_bytes_of_slices_updates_and_on_chip_arrays():
    fused = """\
%layer (w: f32[32,64], i: s32[], c: f32[64], big: f32[32,64]) -> (f32[32,64], f32[64]) {
  %w = f32[32,64] parameter(0)
  %i = s32[] parameter(1)
  %c = f32[64] parameter(2)
  %big = f32[32,64] parameter(3)
  %zero = s32[] constant(0)
  %mine = f32[1,64] dynamic-slice(%w, %i, %zero), dynamic_slice_sizes={1,64}
  %flat = f32[64] bitcast(%mine)
  %sum = f32[64] add(%flat, %c)
  %row = f32[1,64] bitcast(%sum)
  %new = f32[32,64] dynamic-update-slice(%big, %row, %i, %zero)
  ROOT %both = (f32[32,64], f32[64]) tuple(%new, %sum)
}
"""
    costs = costs_of(
        "%w = f32[32,64] parameter(0)",
        "%i = s32[]{:T(128)S(6)} parameter(1)",
        "%c = f32[64]{0:T(128)S(1)} parameter(2)",
        "%big = f32[32,64] parameter(3)",
        "%f = (f32[32,64], f32[64]{0:T(128)S(1)}) fusion(%w, %i, %c, %big), kind=kLoop, calls=%layer",
        "%s = (f32[32,64], f32[32,64]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%w)",
        "%d = f32[32,64]{1,0:S(1)} copy-done(%s)",
        "%n = f32[32,64] negate(%d)",
        extra=fused,
    )
    # Fusion: a row of w read, a row of big written; w fetched on chip; negate: its result alone.
    assert costs.hbm_bytes == 2 * 256 + 8192 + 8192


def test_a_truncated_program_is_refused():
    assert hlo.is_complete(NESTED) and hlo.parse(NESTED).entry.root.name == "last"
    assert hlo.is_complete(NESTED.rstrip())
    end = NESTED.rindex("}")
    places = {end, end - 1, NESTED.index("  ROOT %last"), NESTED.index("ENTRY"), *range(1, end, 97)}
    for place in places:
        assert not hlo.is_complete(NESTED[:place]), NESTED[:place][-80:]
        with pytest.raises(ValueError, match="complete"):
            hlo.parse(NESTED[:place])


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("no program")


def test_slices_of_a_nested_fusion_count_as_read():
    """A stack of layers, of which a fusion inside a fusion takes one and another writes one."""
    nested = """\
%inner (p.0: f32[28,1024], p.1: s32[]) -> f32[1,1024] {
  %p.0 = f32[28,1024]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,1024}
}
%write (w.0: f32[28,1024], w.1: f32[1,1024], w.2: s32[]) -> f32[28,1024] {
  %w.0 = f32[28,1024]{1,0} parameter(0)
  %w.1 = f32[1,1024]{1,0} parameter(1)
  %w.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %all = f32[28,1024]{1,0} dynamic-update-slice(%w.0, %w.1, %w.2, %none)
}
%outer (q.0: f32[28,1024], q.1: s32[]) -> f32[28,1024] {
  %q.0 = f32[28,1024]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %taken = f32[1,1024]{1,0} fusion(%q.0, %q.1), kind=kLoop, calls=%inner
  ROOT %given = f32[28,1024]{1,0} fusion(%q.0, %taken, %q.1), kind=kLoop, calls=%write
}
"""
    costs = costs_of(
        "%x = f32[28,1024]{1,0} parameter(0)",
        "%i = s32[]{:S(2)} parameter(1)",
        "ROOT %r = f32[28,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer",
        extra=nested,
    )
    assert costs.hbm_bytes == 2 * 4096


def test_allocated_buffers_are_not_moved():
    costs = costs_of('ROOT %b = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"')
    assert costs.hbm_bytes == 0
