"""Collectives and products of a compiled program are counted as they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpojax.planning.hlo import collectives, crossing_collectives, product_flops
from dpojax.sharding import make_mesh

WRITTEN = """HloModule by_hand

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %carry = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%carry), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %r = f32[4,8]{1,0} all-reduce(%y), replica_groups=GROUPS, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %r)
}

%condition (carry.1: (s32[], f32[4,8])) -> pred[] {
  ROOT %go = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4,8]) -> bf16[2,8] {
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body LOOP
  %both = (f32[4,8]{1,0}, /*index=1*/bf16[2]{0}) all-reduce(%p, %q), replica_groups={{0,1,2,3}}
  %s = bf16[2,8]{1,0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %nothing = f32[] all-reduce(%l), replica_groups=[8,1]<=[8], to_apply=%add
}
"""
THRICE = ', backend_config={"known_trip_count":{"n":"3"}}'


def program(groups="{{0,1},{2,3}}", loop=THRICE) -> str:
    return WRITTEN.replace("GROUPS", groups).replace(" LOOP", loop)


def test_what_stands_in_a_loop_counts_as_often_as_the_loop_runs():
    found = [(one.kind, one.times, one.size) for one in collectives(program())]
    wanted = [
        ("all-reduce", 1, 4 * 4 * 8 + 2 * 2),
        ("reduce-scatter", 1, 4 * 2 * 2 * 8),  # of the whole array, of which a quarter comes out
        ("all-reduce", 3, 4 * 4 * 8),
    ]
    assert sorted(found) == sorted(wanted)
    assert product_flops(program()) == 3 * 2 * 4 * 8 * 8


def test_a_loop_that_may_run_any_number_of_times_is_an_error():
    with pytest.raises(ValueError, match="does not say how often"):
        collectives(program(loop=""))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_of_devices_are_read_in_every_form(written, groups):
    (found,) = {str(one.groups) for one in collectives(program(written)) if one.times == 3}
    assert found == str(groups)


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="not understood"):
        collectives(program("mesh['a'=8] {'a':(1)2}"))


def test_known_collectives_of_a_compiled_program_are_found():
    """The mesh numbers its devices in order: axis `tensor` is the fastest."""
    mesh = make_mesh(2, 2, 2)

    def each(x):  # [4, 6] on every device
        return (
            jax.lax.psum(x, "fsdp"),
            jax.lax.all_gather(x, "tensor", tiled=True),
            jax.lax.psum_scatter(x, "data", tiled=True),
            jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
        )

    run = jax.shard_map(each, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    lowered = jax.jit(run).lower(jax.ShapeDtypeStruct((4, 6), jnp.float32))
    found = {one.kind: one for one in collectives(lowered.compile().as_text())}
    sizes = {kind: one.size for kind, one in found.items()}
    array = 4 * 4 * 6
    assert sizes == {
        "all-reduce": array,
        "all-gather": 2 * array,
        "reduce-scatter": array,
        "collective-permute": array,
    }
    ids = np.arange(8).reshape(2, 2, 2)
    along = {
        "all-reduce": ids.swapaxes(1, 2),
        "all-gather": ids,
        "reduce-scatter": ids.transpose(1, 2, 0),
    }
    for kind, groups in along.items():
        assert sorted(found[kind].groups) == sorted(groups.reshape(-1, 2).tolist())
    assert [0, 4] in found["collective-permute"].groups


@pytest.mark.parametrize(
    ("groups", "crossing"),
    [
        ("[4,2]<=[8]", []),  # four members on two devices each
        ("{{0,1},{2,3},{4,5},{6,7}}", []),
        ("{{0,1},{2,3},{4,6},{5,7}}", ["r"]),
        ("[4,2]<=[4,2]T(1,0)", ["r"]),
        ("mesh['sweep'=4,'fsdp'=2] {'fsdp'}", []),
        ("mesh['sweep'=4,'fsdp'=2] {'sweep'}", ["r"]),
    ],
)
def test_a_collective_in_which_two_members_take_part_is_named(groups, crossing):
    text = f"""ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
  ROOT %own = f32[8]{{0}} all-reduce(%r), replica_groups=[8,1]<=[8], to_apply=%add
}}
"""
    assert crossing_collectives(text, 2) == crossing


def test_a_permutation_between_two_members_is_named():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,3}}
  ROOT %b = f32[8]{0} collective-permute(%a), source_target_pairs={{0,1},{1,2}}
}
"""
    assert crossing_collectives(text, 2) == ["b"]


@pytest.mark.parametrize(("step", "trips"), [(1, 16), (2, 8), (3, 6)])
def test_a_loop_of_a_tpu_runs_as_often_as_its_counter_steps_to_the_limit(step, trips):
    text = f"""%body (carry: (f32[8], u32[])) -> (f32[8], u32[]) {{
  %carry = (f32[8]{{0}}, u32[]) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%carry), index=0
  %i = u32[] get-tuple-element(%carry), index=1
  %by = u32[] constant({step})
  %r = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}
  %sum = u32[] add(%i, %by)
  %next = u32[] copy(%sum)
  ROOT %both = (f32[8]{{0}}, u32[]) tuple(%r, %next)
}}

%condition (carry.1: (f32[8], u32[])) -> pred[] {{
  %carry.1 = (f32[8]{{0}}, u32[]) parameter(0)
  %limit = u32[] constant(16)
  %i.1 = u32[] get-tuple-element(%carry.1), index=1
  ROOT %go = pred[] compare(%i.1, %limit), direction=LT
}}

ENTRY %main (p: (f32[8], u32[])) -> (f32[8], u32[]) {{
  %p = (f32[8]{{0}}, u32[]) parameter(0)
  ROOT %loop = (f32[8]{{0}}, u32[]) while(%p), condition=%condition, body=%body
}}
"""
    (found,) = collectives(text)
    assert found.times == trips
