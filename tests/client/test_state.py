"""Optimizer state comes back from slices as it was cut into them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.fakes import record
from tests.client.states import (
    gathered,
    receive,
    runs_of,
    same,
    specs,
    state_of,
    tensors_of,
    weights_of,
)

from adashard.arrivals import Arrival
from adashard.push import Replies
from adashard.state import Gathering, State, fitted, moment_shapes, part_of
from adashard.wire.errors import Internal, InvalidFrame, InvalidSettings
from adashard.wire.messages import Content, Outcome
from adashard.wire.placement import cut
from adashard.wire.spec import AdafactorLayout, Group, JobSpec, Parameter

MATRIX = JobSpec(
    parameters=(Parameter(name="w", shape=(4, 6)), Parameter(name="b", shape=(3,))),
    groups=(Group(adafactor=AdafactorLayout(momentum=True)),),
    slice_bytes=64,
    min_workers=1,
)


# --- cut and put together ------------------------------------------------------------------------


@given(spec=specs(), data=st.data())
def test_a_state_that_was_cut_into_slices_comes_back_bit_for_bit(spec, data):
    masters = data.draw(st.sets(st.integers(0, len(spec.parameters) - 1)))
    state = state_of(spec, masters=tuple(masters))
    gathering = gathered(state, spec)
    gathering.receive(state.record())
    assert gathering.has(range(len(cut(spec))))
    assert same(gathering.state(), state)


@given(spec=specs(), data=st.data())
def test_the_order_of_slices_and_what_is_repeated_change_nothing(spec, data):
    state, slices = state_of(spec), cut(spec)
    order = data.draw(st.permutations(range(len(slices))))
    twice = data.draw(st.lists(st.sampled_from(order), max_size=3))
    gathering = gathered(state, spec, [*order, *twice])
    gathering.receive(state.record())
    assert same(gathering.state(), state)


@given(spec=specs())
def test_slices_cover_every_moment_and_share_only_the_mean_along_the_axis_that_is_cut(spec):
    state = state_of(spec)
    for (index, content), whole in tensors_of(state).items():
        pieces = [piece for piece in cut(spec) if piece.parameter == index]
        parts = [part_of(whole, piece, content) for piece in pieces]
        row, column = pieces[0].axes or (None, None)
        averaged = {Content.ROW: column, Content.COLUMN: row}.get(content)
        if len(pieces) > 1 and averaged == pieces[0].axis:
            assert all(torch.equal(part, whole) for part in parts)
        else:
            assert sum(part.numel() for part in parts) == whole.numel()


def test_a_slice_is_not_there_before_its_last_moment_is():
    state = state_of(MATRIX)
    runs = list(runs_of(state, weights_of(MATRIX), cut(MATRIX), [0]))
    assert [run.content for run, _ in runs] == list(Gathering(MATRIX, 3, masters=()).parts(0))
    for count in range(len(runs) + 1):
        gathering = Gathering(MATRIX, 3, masters=())
        receive(gathering, runs[:count])
        assert gathering.has([0]) == (count == len(runs))


@given(spec=specs(), data=st.data())
def test_a_stream_that_broke_off_anywhere_is_asked_for_again(spec, data):
    state, slices = state_of(spec, masters=(0,)), cut(spec)
    gathering = Gathering(spec, state.version, masters=(0,))
    runs = list(runs_of(state, weights_of(spec), slices, range(len(slices))))
    receive(gathering, runs[: data.draw(st.integers(0, len(runs)))])
    receive(gathering, runs)
    gathering.receive(state.record())
    assert same(gathering.state(), state)


# --- what is refused -----------------------------------------------------------------------------


def test_a_slice_that_is_said_to_be_unchanged_or_does_not_exist_is_refused():
    gathering = Gathering(MATRIX, 3, masters=())
    with pytest.raises(InvalidFrame, match="none was here"):
        gathering.receive(Arrival(slice=0))
    for index in (-1, 99):
        with pytest.raises(InvalidFrame, match="there is no slice"):
            gathering.parts(index)


def test_records_of_another_step_or_of_two_minds_are_refused():
    gathering = Gathering(MATRIX, 3, masters=())
    with pytest.raises(InvalidFrame, match="record of step 4"):
        gathering.receive(record(4))
    gathering.receive(record(3, count=1))
    with pytest.raises(Internal, match="different records of step 3"):
        gathering.receive(record(3, count=2))


def test_fresh_state_has_no_record_and_counts_nothing():
    assert gathered(state_of(MATRIX, version=0), MATRIX).state().step_counts == (0, 0)


# --- what a state is -----------------------------------------------------------------------------


@given(spec=specs(), data=st.data())
def test_every_element_and_every_count_is_in_the_fingerprint_and_no_weight(spec, data):
    state = state_of(spec, masters=(0,))
    print_of = state.fingerprint()
    assert replace(state, masters={}).fingerprint() == print_of
    assert replace(state, version=4).fingerprint() != print_of
    counts = (state.step_counts[0] + 1, *state.step_counts[1:])
    assert replace(state, step_counts=counts).fingerprint() != print_of
    index = data.draw(st.integers(0, len(spec.parameters) - 1))
    content = data.draw(st.sampled_from(sorted(state.moments[index])))
    flat = state.moments[index][content].view(-1)
    flat[data.draw(st.integers(0, flat.numel() - 1))] += 0.5
    assert state.fingerprint() != print_of


def test_a_fingerprint_is_the_same_on_every_machine():
    state = State(
        version=2,
        step_counts=(2, 1),
        moments=(
            {Content.ROW: torch.tensor([1.0, 2.0]), Content.COLUMN: torch.tensor([3.0])},
            {Content.VECTOR: torch.tensor(4.0)},
        ),
        masters={},
    )
    again = replace(
        state,
        moments=(
            {Content.COLUMN: torch.tensor([3.0]), Content.ROW: torch.tensor([1.0, 2.0])},
            {Content.VECTOR: torch.tensor(4.0)},
        ),
    )
    assert again.fingerprint() == state.fingerprint()
    assert state.fingerprint() == FINGERPRINT


FINGERPRINT = "37cdcd1cfae250a84c639e21386d0a74aa47d52fbeae8bc375b470586c5d3caa"


def test_its_record_is_that_of_a_step_that_nobody_of_the_job_took_part_in():
    found = state_of(MATRIX).record()
    assert (found.step, found.step_counts, found.outcome) == (3, (0, 1), Outcome.APPLY)
    assert (found.workers, found.present, found.groups) == ((), b"\x00", ())


def test_means_have_the_axes_that_are_not_averaged():
    layout = AdafactorLayout(momentum=True)
    assert moment_shapes((2, 3, 5), layout) == {
        Content.ROW: (2, 3),
        Content.COLUMN: (2, 5),
        Content.MOMENTUM: (2, 3, 5),
    }
    assert moment_shapes((), AdafactorLayout()) == {Content.VECTOR: ()}


# --- where a job begins with it ------------------------------------------------------------------

BF16 = Replies(dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_a_master_counts_for_either_neighbour_that_it_rounds_to(dtype, values):
    master = torch.tensor(values)
    nearest = master.to(dtype)
    spec = replace(MATRIX, parameters=(Parameter(name="b", shape=(len(values),)),))
    state = replace(state_of(spec), masters={0: master})
    other = torch.where(
        nearest.float() < master,
        torch.nextafter(nearest, torch.tensor(torch.inf, dtype=dtype)),
        torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype)),
    )
    other = torch.where(nearest.float() == master, nearest, other)
    for weight in (nearest, other):
        assert fitted(state, spec, [weight], Replies()).masters[0] is master


def test_other_weights_than_those_that_were_saved_count_and_that_is_logged(caplog):
    state = state_of(MATRIX, masters=(0, 1))
    weights = [state.masters[0].bfloat16(), state.masters[1].bfloat16() * 2]
    found = fitted(state, MATRIX, weights, Replies())
    assert found.masters.keys() == {0}
    assert "'b' has other weights" in caplog.text


def test_float32_weights_that_were_rounded_on_their_way_have_masters_too():
    state = state_of(MATRIX, masters=(0,))
    rounded = [(state.masters[0] + 0.001).bfloat16().float(), torch.zeros(3)]
    assert fitted(state, MATRIX, rounded, BF16).masters.keys() == {0}
    assert fitted(state, MATRIX, rounded, Replies()).masters.keys() == set()


def test_parameters_that_were_added_after_loading_have_fresh_state():
    state = state_of(MATRIX)
    more = replace(MATRIX, parameters=(*MATRIX.parameters, Parameter(name="c", shape=(2, 2))))
    found = fitted(state, more, [*weights_of(MATRIX), torch.zeros(2, 2)], Replies())
    assert found.step_counts == (*state.step_counts, 0)
    assert {one: moment.unique().tolist() for one, moment in found.moments[2].items()} == {
        Content.ROW: [0.0],
        Content.COLUMN: [0.0],
        Content.MOMENTUM: [0.0],
    }


def test_settings_that_make_another_kind_of_state_cannot_change_after_loading():
    other = replace(MATRIX, groups=(Group(adafactor=AdafactorLayout(momentum=False)),))
    with pytest.raises(InvalidSettings, match="group 0 has other settings"):
        fitted(state_of(MATRIX), other, weights_of(MATRIX), Replies())
