"""Copies: whatever comes, breaks off and comes again, each is whole, and a shard gets it back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.states import runs_of, specs, state_of, tensors_of
from tests.models import GPT2_SMALL, T5_11B, T5_SMALL, Shape, job_of
from tests.shard import jobs
from torch import Tensor

from adashard.arrivals import Arrivals
from adashard.copies import Copies
from adashard.push import Replies
from adashard.routing import Routing
from adashard.state import State, part_of, state_parts
from adashard.wire import codec
from adashard.wire.errors import DamagedFrame
from adashard.wire.frames import read_frame
from adashard.wire.messages import Content, Outcome, Partial, Record, UploadBegin
from adashard.wire.placement import cut
from adashard.wire.spec import AdafactorLayout, JobSpec, Recovery
from adashard_server.shard.partials import short_count
from adashard_server.shard.slices import SliceStore
from adashard_server.shard.uploads import Upload

CPU = torch.device("cpu")
SPEC = jobs.spec((4, 6), (3,), slice_bytes=64)
LAYOUTS = st.builds(AdafactorLayout, min_dim_size_to_factor=st.integers(1, 4))
NARROW = (torch.bfloat16, torch.float16)


class Bench:
    """A worker's parameters and copies, and shards that send to it and take from it."""

    def __init__(
        self,
        spec: JobSpec = SPEC,
        dtype: torch.dtype = torch.float32,
        *,
        asked: torch.dtype | None = None,
        keep_masters: bool = False,
    ) -> None:
        self.spec, self.slices = spec, cut(spec)
        self.parameters = [torch.zeros(one.shape, dtype=dtype) for one in spec.parameters]
        self.replies = Replies(dtype=asked, keep_masters=keep_masters)
        self.copies = Copies(spec, Routing(spec, self.parameters, replies=self.replies))

    def state(self, version: int) -> State:
        """Weights and moments of a version; all elements of all versions differ."""
        everything = range(len(self.spec.parameters))
        state = state_of(self.spec, version=version, masters=tuple(everything))
        for tensor in tensors_of(state).values():
            tensor += version / 7
        return state

    def send(self, version: int, index: int, stop: int | None = None, turned: bool = False) -> None:
        """A stream that brings a slice, or breaks off, or brings a turned bit."""
        state, copies = self.state(version), self.copies
        pairs = zip(self.parameters, (state.masters[i] for i in sorted(state.masters)), strict=True)
        weights = [master.to(self.replies.wanted(one)) for one, master in pairs]
        runs = list(runs_of(replace(state, masters={}), weights, self.slices, [index]))
        arrivals = Arrivals(copies.parts)
        for run, buffer in runs[: None if stop is None else min(stop, len(runs) - 1)]:
            if turned:
                run = replace(run, checksum=run.checksum ^ 1)
            arrival = arrivals.take(run, buffer)
            if arrival is not None:
                copies.put(arrival)

    def upload(self, *indices: int) -> dict[int, dict[Content, Tensor]]:
        """What a shard gets back."""
        store = SliceStore(self.spec, self.slices, CPU)
        state = self.copies.stepped(indices[0])
        begin = UploadBegin(
            job=jobs.JOB, generation=1, sender="w", receiver="s", version=0, state=state
        )
        upload, found = Upload(begin, store.shapes, CPU), {}
        for data in self.copies.frames(indices):
            for run, buffer in read_frame(data).pieces():
                whole = upload.take(run, buffer)
                if whole is not None:
                    found[run.slice] = dict(whole)
        return found

    def expected(self, version: int, index: int) -> dict[Content, Tensor]:
        """The slice of a version as shards have it."""
        piece, named = self.slices[index], tensors_of(self.state(version))
        return {
            content: part_of(whole, piece, content).reshape(-1)
            for (parameter, content), whole in named.items()
            if parameter == piece.parameter
        }


def same(one: dict[Content, Tensor], other: dict[Content, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- whole, whatever comes -----------------------------------------------------------------------


@given(specs(LAYOUTS), st.booleans(), st.data())
def test_a_copy_is_what_was_sent_last_and_whole_whatever_broke_off_since(spec, narrow, data):
    """Weights, state and checksum are always of one version, in any order of slices."""
    dtype = torch.bfloat16 if narrow else torch.float32
    bench = Bench(spec, dtype, keep_masters=narrow)
    slices = st.integers(0, len(bench.slices) - 1)
    ends = st.sampled_from([None, None, 0, 1, 2, "turned"])
    held: dict[int, int] = {}
    for index, version, end in data.draw(
        st.lists(st.tuples(slices, st.integers(0, 3), ends), max_size=12)
    ):
        if end == "turned":
            with pytest.raises(DamagedFrame):
                bench.send(version, index, turned=True)
        else:
            bench.send(version, index, end)
        held |= {index: version} if end is None else {}
    for index, version in held.items():
        assert bench.copies.intact(index)
        assert same(bench.upload(index)[index], bench.expected(version, index))
        weights = part_of(
            bench.parameters[bench.slices[index].parameter], bench.slices[index], Content.WEIGHT
        )
        expected = bench.expected(version, index)[Content.WEIGHT].to(dtype)
        assert torch.equal(weights.reshape(-1), expected)


def test_several_copies_go_in_one_stream():
    bench = Bench()
    count = len(bench.slices)
    for index in range(count):
        bench.send(index, index)
    found = bench.upload(*reversed(range(count)))
    assert list(found) == list(reversed(range(count)))
    assert all(same(found[index], bench.expected(index, index)) for index in range(count))


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_masters", [False, True])
@pytest.mark.parametrize("asked", [None, torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW], ids=str)
def test_a_shard_gets_back_what_it_had_or_what_was_left_of_it(dtype, asked, keep_masters):
    bench = Bench(dtype=dtype, asked=asked, keep_masters=keep_masters)
    bench.send(1, 0)
    assert bench.copies.intact(0)
    exact = keep_masters or not {dtype, asked} & {*NARROW}
    assert bench.copies.exact(0) == exact
    came = bench.upload(0)[0]
    expected = bench.expected(1, 0)
    if exact:
        assert same(came, expected)
    else:
        left = part_of(bench.parameters[0], bench.slices[0], Content.WEIGHT)
        assert torch.equal(came[Content.WEIGHT], left.float().reshape(-1))
        assert not torch.equal(came[Content.WEIGHT], expected[Content.WEIGHT])


def test_masters_are_kept_only_where_the_parameter_is_not_exact():
    bench = Bench(keep_masters=True)
    assert bench.replies.wanted(bench.parameters[0]) is torch.float32
    assert not bench.replies.keeps_master(bench.parameters[0])
    assert Replies(keep_masters=True).keeps_master(torch.zeros(1, dtype=torch.float16))


# --- weights in the hands of others --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "keep_masters"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@given(data=st.data())
def test_an_element_that_was_changed_is_noticed_and_one_that_was_changed_back_is_not(
    dtype, keep_masters, data
):
    bench = Bench(dtype=dtype, keep_masters=keep_masters)
    for index in range(len(bench.slices)):
        bench.send(1, index)
    index = data.draw(st.integers(0, len(bench.slices) - 1))
    piece = bench.slices[index]
    part = part_of(bench.parameters[piece.parameter], piece, Content.WEIGHT)
    place = tuple(data.draw(st.integers(0, length - 1)) for length in part.shape)
    before = part[place].clone()
    part[place] = -before
    assert [bench.copies.intact(one) for one in range(len(bench.slices))] == [
        one != index for one in range(len(bench.slices))
    ]
    part[place] = before
    assert bench.copies.intact(index)


def test_a_change_that_comes_after_looking_is_noticed_by_the_shard():
    bench = Bench()
    bench.send(1, 0)
    assert bench.copies.intact(0)
    bench.parameters[0] += 1
    with pytest.raises(DamagedFrame):
        bench.upload(0)


# --- what a job begins with ----------------------------------------------------------------------


def test_own_weights_are_held_to_what_they_were_when_they_were_first_asked_for():
    bench = Bench()
    bench.copies.begin(None)
    bench.parameters[0] += 3
    assert bench.copies.intact(0)
    assert (bench.copies.stepped(0), bench.copies.exact(0)) == (False, True)
    assert torch.equal(bench.upload(0)[0][Content.WEIGHT], torch.full((12,), 3.0))
    bench.parameters[0] += 1
    assert not bench.copies.intact(0)


@pytest.mark.parametrize("spec", [SPEC, jobs.spec((4, 6), (3,), slice_bytes=64, momentum=True)])
def test_a_loaded_state_is_the_first_capsule_and_its_masters_the_first_weights(spec):
    bench = Bench(spec, torch.bfloat16)
    loaded = bench.state(3)
    bench.copies.begin(replace(loaded, masters={0: loaded.masters[0]}))
    for index, piece in enumerate(bench.slices):
        assert bench.copies.intact(index)
        expected = bench.expected(3, index)
        if piece.parameter == 1:
            expected[Content.WEIGHT] = torch.zeros(3)
        assert same(bench.upload(index)[index], expected)
    bench.parameters[0] += 1
    assert not bench.copies.intact(0), "the parameter beside a master is looked at too"


# --- what there is of them -----------------------------------------------------------------------


def test_where_a_checkpoint_is_what_counts_no_state_is_asked_for():
    spec = replace(SPEC, recovery=Recovery.CHECKPOINT)
    assert list(Bench(spec).copies.parts(0)) == [Content.WEIGHT]
    assert list(Bench().copies.parts(0)) == [Content.WEIGHT, Content.ROW, Content.COLUMN]


def record_bytes(spec: JobSpec) -> int:
    """A step's record on the wire: mostly the sums over parameters that are split."""
    pieces = [piece for piece in cut(spec) if piece.split and piece.place == 0]
    partials = [
        Partial(
            slice=piece.index,
            count=piece.count,
            weight_squared_sum=1.0,
            update_squared_sum=1.0,
            least=1.0,
            squares=bytes(4 * short_count(piece)),
            ratios=bytes(4 * short_count(piece)),
        )
        for piece in pieces
    ]
    count = len(spec.parameters)
    record = Record(
        step=1000,
        workers=("w" * 32,) * 8,
        shares=(1.0,) * 8,
        outcome=Outcome.APPLY,
        present=bytes((count + 7) // 8),
        step_counts=(1000,) * count,
        groups=(jobs.group_step([1000]),),
        partials=tuple(partials),
    )
    return codec.to_proto(record).ByteSize()


@pytest.mark.parametrize(
    ("shapes", "percent", "record"),
    [(GPT2_SMALL, 0.349, 229_562), (T5_SMALL, 0.317, 4_828), (T5_11B, 0.196, 3_171_194)],
    ids=["gpt2-small", "t5-small", "t5-11b"],
)
def test_capsules_are_under_half_a_percent_of_the_weights(
    shapes: list[Shape], percent: float, record: int
):
    """Of one worker's reply; the record comes once from each shard."""
    spec = job_of(shapes)
    capsules = sum(
        4 * part.element_count for piece in cut(spec) for part in state_parts(spec, piece).values()
    )
    share = 100 * capsules / (4 * sum(map(math.prod, shapes)))
    assert share < 0.5
    assert (round(share, 3), record_bytes(spec)) == (percent, record)
