"""Reading compiled text: what is communicated, how often, and how much."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.aot import hlo

# As a TPU's compiler writes it, shortened: layouts with memory spaces, a loop whose
# trips only its condition tells, an attribute that spans lines, an asynchronous gather
# in two fusions of one channel, and a reduce-scatter that is a fusion.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused.1 (p.1: bf16[8,512]) -> (bf16[128,512], u32[]) {
  %p.1 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[128,512]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=16], device_ids=([16,2]T(1,0)) {'b'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[128,512]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1)
}

%async_collective_fusion.2 (p.2: bf16[8,512]) -> (f32[4], bf16[8,512], bf16[128,512]) {
  %p.2 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %made.2 = f32[4]{0} custom-call(%p.2), custom_call_target="meanwhile"
  %all-gather.2 = bf16[128,512]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7,\
 replica_groups=mesh['a'=2,'b'=16], device_ids=([16,2]T(1,0)) {'b'}, dimensions={0}
  ROOT %tuple.2 = (f32[4]{0}, bf16[8,512]{1,0}, bf16[128,512]{1,0}) tuple(%made.2, \
%p.2, %all-gather.2)
}

%all-reduce-scatter.3 (p.3: f32[64,32]) -> f32[4,32] {
  %p.3 = f32[64,32]{1,0} parameter(0)
  %all-reduce.3 = f32[64,32]{1,0} all-reduce(%p.3), channel_id=8, \
replica_groups=[2,16]<=[32], to_apply=%add
  %zero.3 = s32[] constant(0)
  ROOT %slice.3 = f32[4,32]{1,0} dynamic-slice(%all-reduce.3, %zero.3, %zero.3), \
dynamic_slice_sizes={4,32}
}

%write (p.4: f32[16,4,32], p.5: f32[1,4,32], p.6: s32[]) -> f32[16,4,32] {
  %p.4 = f32[16,4,32]{2,1,0} parameter(0)
  %p.5 = f32[1,4,32]{2,1,0} parameter(1)
  %p.6 = s32[] parameter(2)
  %zero.4 = s32[] constant(0)
  ROOT %update = f32[16,4,32]{2,1,0} dynamic-update-slice(%p.4, %p.5, %p.6, %zero.4, \
%zero.4)
}

%body (state: (s32[], bf16[8,512], f32[64,32], f32[16,4,32])) -> (s32[], bf16[8,512], \
f32[64,32], f32[16,4,32]) {
  %state = (s32[], bf16[8,512]{1,0}, f32[64,32]{1,0}, f32[16,4,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[8,512]{1,0} get-tuple-element(%state), index=1
  %g = f32[64,32]{1,0} get-tuple-element(%state), index=2
  %out = f32[16,4,32]{2,1,0} get-tuple-element(%state), index=3
  %start = (bf16[128,512]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%fused.1
  %kernel = f32[4,512]{1,0:T(8,128)S(1)} custom-call(%w), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/while/body/kernel"}
  %done = (f32[4]{0}, bf16[8,512]{1,0}, bf16[128,512]{1,0}) fusion(%w), \
kind=kCustom, calls=%async_collective_fusion.2
  %scattered = f32[4,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %row = f32[1,4,32]{2,1,0} bitcast(%scattered)
  %written = f32[16,4,32]{2,1,0} fusion(%out, %row, %i), kind=kLoop, calls=%write
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %tuple = (s32[], bf16[8,512]{1,0}, f32[64,32]{1,0}, f32[16,4,32]{2,1,0}) \
tuple(%next, %w, %g, %written)
}

%condition (state: (s32[], bf16[8,512], f32[64,32], f32[16,4,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(16)
  %state = (s32[], bf16[8,512]{1,0}, f32[64,32]{1,0}, f32[16,4,32]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (w: bf16[8,512], g: f32[64,32], out: f32[16,4,32]) -> f32[16,4,32] {
  %w = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[64,32]{1,0:T(8,128)} parameter(1)
  %out = f32[16,4,32]{2,1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %ag-start = (bf16[8,512]{1,0}, bf16[256,512]{1,0}) all-gather-start(%w), \
channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %ag-done = bf16[256,512]{1,0} all-gather-done(%ag-start)
  %shift = (f32[64,32]{1,0}, f32[64,32]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%g), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %shifted = f32[64,32]{1,0} collective-permute-done(%shift)
  %prefetch = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) \
copy-start(%g)
  %prefetched = f32[64,32]{1,0:T(8,128)S(1)} copy-done(%prefetch)
  %init = (s32[], bf16[8,512]{1,0}, f32[64,32]{1,0}, f32[16,4,32]{2,1,0}) \
tuple(%begin, %w, %shifted, %out)
  %while.9 = (s32[], bf16[8,512]{1,0}, f32[64,32]{1,0}, f32[16,4,32]{2,1,0}) \
while(%init), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %result = f32[16,4,32]{2,1,0} get-tuple-element(%while.9), index=3
}
"""


def rows(text):
    return [
        (c.kind, c.name, c.num_bytes, c.group_size, c.trips)
        for c in hlo.collectives(hlo.parse(text))
    ]


def test_what_a_tpu_writes():
    assert rows(TPU) == [
        ("all-gather", "ag-start", 2 * 256 * 512, 4, 1),
        ("collective-permute", "shift", 4 * 64 * 32, 2, 1),
        ("all-gather", "all-gather.1", 2 * 128 * 512, 16, 16),
        ("reduce-scatter", "all-reduce.3", 4 * 64 * 32, 16, 16),
    ]


def test_bytes_on_the_wire():
    gather, shift, _, scatter = hlo.collectives(hlo.parse(TPU))
    assert gather.wire_bytes == 3 / 4 * gather.num_bytes
    assert shift.wire_bytes == shift.num_bytes
    assert scatter.wire_bytes == 15 / 16 * scatter.num_bytes
    summed = hlo.collectives(hlo.parse(TPU.replace("%all-reduce-scatter.3", "%f.3")))
    assert summed[-1].kind == "all-reduce"
    assert summed[-1].wire_bytes == 2 * scatter.wire_bytes


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("constant(16)", "constant(5)", 5),
        ("direction=LT", "direction=NE", None),
        ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[] constant(3)", None),
        ("%limit = s32[]{:T(128)} constant(16)", "%limit = s32[] add(%i, %i)", None),
        (
            "body=%body,",
            'body=%body, backend_config={"known_trip_count":{"n":"7"}},',
            7,
        ),
    ],
)
def test_trips(old, new, trips):
    assert old in TPU
    found = hlo.collectives(hlo.parse(TPU.replace(old, new)))
    assert [c.trips for c in found] == [1, 1, trips, trips]
    assert found[-1].loops[0].op_name == "jit(step)/while"


@pytest.mark.parametrize(
    ("notation", "group"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (0, 1, 2, 3)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("{}", ()),
    ],
)
def test_groups(notation, group):
    text = TPU.replace("{{0,1,2,3},{4,5,6,7}}", notation)
    collective = hlo.collectives(hlo.parse(text))[0]
    assert collective.group == group and collective.group_size == len(group)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_f {\n}")


def compiled_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )


def test_collectives_of_what_is_compiled_here(mesh):
    """One gather of each layer's weight in the scan, one sum of the loss outside."""

    def local(x, weights):
        def layer(x, weight):
            whole = jax.lax.all_gather(weight, "b", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(layer, x, weights)
        total = jax.lax.psum(x.sum(), ("a", "b"))
        return total, jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True)

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("a"), P(None, "b")),
        out_specs=(P(), P("a", "b")),
        check_vma=False,
    )
    text = compiled_text(
        step, array(mesh, (16, 64), "a"), array(mesh, (5, 64, 64), None, "b")
    )
    found = {c.kind: c for c in hlo.collectives(hlo.parse(text))}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    gather, total = found["all-gather"], found["all-reduce"]
    assert (gather.num_bytes, gather.trips, gather.group_size) == (4 * 64 * 64, 5, 4)
    assert (total.num_bytes, total.trips, total.group_size) == (4, 1, 8)
    scatter = found["reduce-scatter"]
    assert (scatter.num_bytes, scatter.group_size) == (4 * 8 * 64, 4)
    assert scatter.shapes == (("f32", (8, 64)),)


def test_loops_in_loops_and_loops_without_a_number(mesh):
    def local(x, limit):
        def inner(_, x):
            return jax.lax.psum(jnp.sin(x), "b")

        def outer(_, x):
            return jax.lax.fori_loop(0, 3, inner, x)

        return jax.lax.fori_loop(0, limit, outer, x)

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False
    )
    limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    text = compiled_text(step, array(mesh, (16, 8), "a"), limit)
    (found,) = hlo.collectives(hlo.parse(text))
    assert [loop.trips for loop in found.loops] == [None, 3] and found.trips is None
    assert all("shard_map/while" in loop.op_name for loop in found.loops)
