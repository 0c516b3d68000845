"""Bytes that kernels of a compiled text read and write."""

import pytest

from kdjax.aot import hlo, traffic
from tests.aot.test_hlo import TPU

# As a GPU's compiler writes it, shortened: residuals of a scan that an asynchronous
# fusion stacks, two arrays updated in place by one fusion, one read back by a slice, a
# scatter, and a library call with scratch memory.
GPU = """\
HloModule jit_train_step, is_scheduled=true

%stack (p.0: bf16[16,64,32], p.1: s32[], p.2: bf16[64,32]) -> bf16[16,64,32] {
  %p.0 = bf16[16,64,32]{2,1,0} parameter(0)
  %p.2 = bf16[64,32]{1,0} parameter(2)
  %row = bf16[1,64,32]{2,1,0} bitcast(%p.2)
  %p.1 = s32[] parameter(1)
  %zero.0 = s32[] constant(0)
  ROOT %dus.0 = bf16[16,64,32]{2,1,0} dynamic-update-slice(%p.0, %row, %p.1, %zero.0, \
%zero.0)
}

%stack_both (p.3: f32[16,8], p.4: f32[16,8], p.5: f32[8], p.6: s32[]) -> (f32[16,8], \
f32[16,8], f32[8]) {
  %p.3 = f32[16,8]{1,0} parameter(0)
  %p.4 = f32[16,8]{1,0} parameter(1)
  %p.5 = f32[8]{0} parameter(2)
  %p.6 = s32[] parameter(3)
  %twice = f32[8]{0} add(%p.5, %p.5)
  %one.row = f32[1,8]{1,0} bitcast(%p.5)
  %two.row = f32[1,8]{1,0} bitcast(%twice)
  %zero.1 = s32[] constant(0)
  %dus.1 = f32[16,8]{1,0} dynamic-update-slice(%p.3, %one.row, %p.6, %zero.1)
  %dus.2 = f32[16,8]{1,0} dynamic-update-slice(%p.4, %two.row, %p.6, %zero.1)
  ROOT %both = (f32[16,8]{1,0}, f32[16,8]{1,0}, f32[8]{0}) tuple(%dus.1, %dus.2, %twice)
}

%read_back (p.7: bf16[16,64,32], p.8: s32[]) -> f32[64,32] {
  %p.7 = bf16[16,64,32]{2,1,0} parameter(0)
  %p.8 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %slice.2 = bf16[1,64,32]{2,1,0} dynamic-slice(%p.7, %p.8, %zero.2, %zero.2), \
dynamic_slice_sizes={1,64,32}
  %same = bf16[64,32]{1,0} bitcast(%slice.2)
  ROOT %wide = f32[64,32]{1,0} convert(%same)
}

%assign (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %y = f32[] parameter(1)
}

%set_some (p.9: f32[64,1000], p.10: s32[64,2], p.11: f32[64]) -> f32[64,1000] {
  %p.9 = f32[64,1000]{1,0} parameter(0)
  %p.10 = s32[64,2]{1,0} parameter(1)
  %p.11 = f32[64]{0} parameter(2)
  ROOT %scatter.3 = f32[64,1000]{1,0} scatter(%p.9, %p.10, %p.11), to_apply=%assign
}

%body (state: (s32[], bf16[16,64,32], f32[16,8], f32[16,8], bf16[64,32], f32[8])) -> \
(s32[], bf16[16,64,32], f32[16,8], f32[16,8], bf16[64,32], f32[8]) {
  %state = (s32[], bf16[16,64,32]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, \
bf16[64,32]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stacked = bf16[16,64,32]{2,1,0} get-tuple-element(%state), index=1
  %first = f32[16,8]{1,0} get-tuple-element(%state), index=2
  %second = f32[16,8]{1,0} get-tuple-element(%state), index=3
  %layer = bf16[64,32]{1,0} get-tuple-element(%state), index=4
  %small = f32[8]{0} get-tuple-element(%state), index=5
  %start = ((bf16[16,64,32]{2,1,0}, s32[], bf16[64,32]{1,0}), bf16[16,64,32]{2,1,0}, \
u32[]) fusion-start(%stacked, %i, %layer), kind=kLoop, calls=%stack, \
metadata={op_name="jit(train_step)/jvp(student)/while/body/dynamic_update_slice"}
  %done = bf16[16,64,32]{2,1,0} fusion-done(%start)
  %three = (f32[16,8]{1,0}, f32[16,8]{1,0}, f32[8]{0}) fusion(%first, %second, \
%small, %i), kind=kLoop, calls=%stack_both
  %new.1 = f32[16,8]{1,0} get-tuple-element(%three), index=0
  %new.2 = f32[16,8]{1,0} get-tuple-element(%three), index=1
  ROOT %next = (s32[], bf16[16,64,32]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, \
bf16[64,32]{1,0}, f32[8]{0}) tuple(%i, %done, %new.1, %new.2, %layer, %small)
}

%condition (state: (s32[], bf16[16,64,32], f32[16,8], f32[16,8], bf16[64,32], f32[8])) \
-> pred[] {
  %state = (s32[], bf16[16,64,32]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, \
bf16[64,32]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(16)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[16,64,32], b: f32[16,8], c: bf16[64,32], d: f32[8], \
logits: f32[64,1000], ids: s32[64,2], values: f32[64]) -> f32[64,1000] {
  %a = bf16[16,64,32]{2,1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %c = bf16[64,32]{1,0} parameter(2)
  %d = f32[8]{0} parameter(3)
  %logits = f32[64,1000]{1,0} parameter(4)
  %ids = s32[64,2]{1,0} parameter(5)
  %values = f32[64]{0} parameter(6)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[16,64,32]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, \
bf16[64,32]{1,0}, f32[8]{0}) tuple(%zero, %a, %b, %b, %c, %d)
  %while.1 = (s32[], bf16[16,64,32]{2,1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, \
bf16[64,32]{1,0}, f32[8]{0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"16"}}
  %residuals = bf16[16,64,32]{2,1,0} get-tuple-element(%while.1), index=1
  %layer.0 = f32[64,32]{1,0} fusion(%residuals, %zero), kind=kLoop, calls=%read_back, \
metadata={op_name="jit(train_step)/transpose(jvp(student))/while/body/convert"}
  %product = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%layer.0, %layer.0), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/update/dot"}
  ROOT %set = f32[64,1000]{1,0} fusion(%logits, %ids, %values), kind=kInput, \
calls=%set_some, metadata={op_name="jit(train_step)/jvp(head_loss)/scatter"}
}
"""


def listed(text, **options):
    kernels = traffic.kernels(hlo.parse(text), **options)
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.parametrize(
    ("name", "written", "read", "trips", "part"),
    [
        # an update of [64, 32] in an array of 16 of them, by an asynchronous fusion
        ("start", 2 * 64 * 32, 2 * 64 * 32 + 4, 16, "forward"),
        # two updates of [8], and a third result; the arrays themselves are not read
        ("three", 3 * 4 * 8, 4 * 8 + 4, 16, "other"),
        # one of 16 layers is read
        ("layer.0", 4 * 64 * 32, 2 * 64 * 32 + 4, 1, "backward"),
        # scratch memory of a library does not count; an operand is read once
        ("product", 4 * 64 * 64, 4 * 64 * 32, 1, "update"),
        # 64 entries of [64, 1000], their values and their indices
        ("set", 4 * 64, 4 * 64 + 4 * 64 + 4 * 64 * 2, 1, "head"),
    ],
)
def test_in_place_updates_count_as_what_they_update(name, written, read, trips, part):
    kernel = listed(GPU)[name]
    assert (kernel.written, kernel.read, kernel.trips) == (written, read, trips)
    assert traffic.part(kernel) == part


def test_all_kernels_are_counted_once():
    kernels = listed(GPU)
    assert set(kernels) == {"start", "three", "layer.0", "product", "set"}
    values = list(kernels.values())
    assert traffic.written_bytes(values) == sum(k.trips * k.written for k in values)
    assert traffic.read_bytes(values) == sum(k.trips * k.read for k in values)


def test_written_by_a_tpu():
    """What stays in vector memory or is updated in place does not count."""
    start = 2 * 128 * 512  # of fused.1; its semaphore is in no main memory
    once = 4 + 2 * 256 * 512 + 4 * 64 * 32  # the copy, the gather, the permutation
    body = start + 4 * 4 + 2 * 4 * 4 * 32 + 4  # the second fusion makes only f32[4]
    kernels = list(listed(TPU).values())
    assert traffic.written_bytes(kernels) == once + 16 * body


def test_loops_whose_trips_depend_on_data():
    text = GPU.replace("%limit = s32[] constant(16)", "%limit = s32[] add(%i, %i)")
    text = text.replace('backend_config={"known_trip_count":{"n":"16"}}', "x=1")
    assert listed(text)["start"].trips == 1
    assert listed(text, unknown_trips=7)["start"].trips == 7
