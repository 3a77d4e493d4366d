"""A snapshot is of one version, whatever goes on meanwhile; a checkpoint's slices come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from tests.shard import jobs
from tests.shard.scenes import SPEC, equal, values
from tests.shard.tables import Reply, Table, together, watched

from adashard.wire.control import Happened, Open, Planned, SnapshotRequest, Snapshotted
from adashard.wire.errors import CheckpointUnreadable, CheckpointUnwritable
from adashard.wire.messages import Content, Outcome, Plan, Record, Source

States = dict[int, dict[Content, torch.Tensor]]


class Disk:
    """A storage in memory: what was written for each attempt, and what is read."""

    def __init__(self) -> None:
        self.written: dict[str, States] = {}
        self.discarded: list[str] = []
        self.stored: States = {}
        self.read_indices: list[int] = []
        self.error: Exception | None = None

    def read(self, job: str, checkpoint: str, wanted: Mapping[int, Mapping]) -> Iterator:
        assert (job, checkpoint) == (jobs.JOB, "step-7")
        if self.error is not None:
            raise self.error
        for index, shapes in wanted.items():
            assert shapes.keys() == self.stored[index].keys()
            self.read_indices.append(index)
            yield index, {kind: one.clone() for kind, one in self.stored[index].items()}

    def write(self, job, attempt, shard, spec, slices, held) -> tuple:
        if self.error is not None:
            raise self.error
        self.written.setdefault(attempt, {}).update(held)
        return (), ()

    def discard(self, job: str, attempt: str) -> None:
        self.discarded.append(attempt)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def table(disk: Disk) -> Table:
    """One shard whose disk is in the test's hand, at version 0 of `values(0)`."""
    made = Table(storage=disk)
    made.open(jobs.plan(jobs.entry(SPEC)), values(0))
    return made


def request(version: int, generation: int = 1, attempt: str = "a") -> SnapshotRequest:
    return SnapshotRequest(job=jobs.JOB, generation=generation, version=version, directory=attempt)


def step(table: Table, number: int) -> Reply:
    begin = jobs.begin(table.entry, "a", number, version=number - 1, state=True)
    return table.step(begin, values(number))


def held(reply: Reply) -> States:
    """What a worker has after a step: weights and state."""
    return {
        index: {Content.WEIGHT: weight, **reply.states[index]}
        for index, weight in reply.weights.items()
    }


def bits(states: States) -> dict:
    return {
        (index, content): one.reshape(-1)
        for index, contents in states.items()
        for content, one in contents.items()
    }


class Cutting:
    """A snapshot that is being cut, in a thread of its own as in the process."""

    def __init__(self, table: Table, wanted: SnapshotRequest) -> None:
        self._table = table
        self.wanted = wanted
        self.answer: Snapshotted | None = None
        with watched(table.engine()) as waits:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            waits.one()

    def _run(self) -> None:
        self.answer = self._table.engine().snapshots.run(self.wanted)

    def join(self) -> Snapshotted:
        self._thread.join(60)
        assert self.answer is not None, "the snapshot hangs"
        return self.answer


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_snapshot_that_was_asked_for_ahead_is_of_its_version(
    table: Table, disk: Disk, version: int
) -> None:
    cutting = Cutting(table, request(version))
    replies = {number: step(table, number) for number in range(1, 6)}
    answer = cutting.join()
    assert equal(bits(disk.written["a"]), bits(held(replies[version])))
    assert answer.error is None
    assert answer.record == replies[version].record
    assert answer.slices == (0, 1, 2)


def test_it_is_cut_although_it_wakes_before_it_is_told_of_the_step(
    table: Table, disk: Disk
) -> None:
    """A step is decided under the lock, and told of under the lock, and it may wake in between."""
    table.engine().snapshots.committed = lambda record: None
    cutting = Cutting(table, request(1))
    reply = step(table, 1)
    answer = cutting.join()
    assert answer.error is None
    assert answer.record == reply.record
    assert equal(bits(disk.written["a"]), bits(held(reply)))


def test_a_job_at_rest_is_cut_as_it_is(table: Table, disk: Disk) -> None:
    last = [step(table, number) for number in (1, 2)][-1]
    answer = table.engine().snapshots.run(request(2))
    assert equal(bits(disk.written["a"]), bits(held(last)))
    assert answer is not None
    assert answer.record == last.record


def test_weights_without_a_step_have_no_record(table: Table, disk: Disk) -> None:
    answer = table.engine().snapshots.run(request(0))
    assert answer is not None
    assert (answer.error, answer.record) == (None, None)
    written = {index: one[Content.WEIGHT] for index, one in disk.written["a"].items()}
    assert equal(written, values(0))


def test_whoever_takes_the_next_step_copies_what_the_snapshot_has_not_come_to(
    table: Table, disk: Disk
) -> None:
    """The snapshot's own thread sleeps from version 1 to 4, and is none the wiser."""
    snapshots = table.engine().snapshots
    come, go = threading.Event(), threading.Event()
    copy = snapshots._copy

    def late(index: int, wanted) -> None:
        come.set()
        go.wait(60)
        copy(index, wanted)

    snapshots._copy = late
    cutting = Cutting(table, request(1))
    replies = {number: step(table, number) for number in range(1, 2)}
    come.wait(60)
    replies |= {number: step(table, number) for number in range(2, 5)}
    go.set()
    assert cutting.join().error is None
    assert equal(bits(disk.written["a"]), bits(held(replies[1])))


def test_parameters_that_nobody_has_a_gradient_for_are_cut_as_well(
    table: Table, disk: Disk
) -> None:
    cutting = Cutting(table, request(1))
    first = step(table, 1)
    begin = jobs.begin(table.entry, "a", 2, version=1, present=[0])
    table.step(begin, {0: values(2)[0]})
    assert cutting.join().error is None
    assert equal(bits(disk.written["a"]), bits(held(first)))


# --- what comes to nothing -----------------------------------------------------------------------


def reason(answer: Snapshotted | None) -> str:
    assert answer is not None
    assert answer.error is not None
    assert (answer.files, answer.slices) == ((), ())
    return answer.error.reason


def test_a_version_that_has_passed_is_not_cut(table: Table, disk: Disk) -> None:
    for number in (1, 2):
        step(table, number)
    assert reason(table.engine().snapshots.run(request(1))) == "StaleGeneration"
    assert disk.written == {}
    assert disk.discarded == ["a"]


def test_the_end_of_its_generation_voids_it(table: Table, disk: Disk) -> None:
    cutting = Cutting(table, request(9))
    table.freeze(jobs.entry(SPEC, generation=2))
    assert reason(cutting.join()) == "StaleGeneration"
    assert reason(table.engine().snapshots.run(request(0))) == "StaleGeneration"
    assert reason(table.engine().snapshots.run(request(0, generation=2))) == "StaleGeneration"
    assert disk.written == {}


def test_what_is_written_when_the_generation_ends_is_removed(table: Table, disk: Disk) -> None:
    write = disk.write

    def interrupted(*arguments) -> tuple:
        table.freeze(jobs.entry(SPEC, generation=2))
        return write(*arguments)

    disk.write = interrupted
    assert reason(table.engine().snapshots.run(request(0))) == "StaleGeneration"
    assert disk.discarded == ["a"]


def test_a_newer_request_takes_the_place_of_one_that_waits(table: Table, disk: Disk) -> None:
    cutting = Cutting(table, request(9))
    answer = table.engine().snapshots.run(request(0, attempt="b"))
    assert reason(cutting.join()) == "StaleGeneration"
    assert answer is not None
    assert answer.error is None
    assert disk.written.keys() == {"b"}
    assert "a" in disk.discarded


def test_a_repeated_request_gets_the_same_answer_and_writes_nothing_twice(
    table: Table, disk: Disk
) -> None:
    cutting = Cutting(table, request(1))
    assert table.engine().snapshots.run(request(1)) is None, "it is under way"
    step(table, 1)
    answer = cutting.join()
    disk.written.clear()
    assert table.engine().snapshots.run(request(1)) is answer
    assert disk.written == {}


def test_a_disk_that_refuses_is_told_and_the_steps_go_on(table: Table, disk: Disk) -> None:
    disk.error = CheckpointUnwritable("/c/x cannot be written: no room", file="/c/x")
    cutting = Cutting(table, request(1))
    for number in (1, 2):
        step(table, number)
    answer = cutting.join()
    assert reason(answer) == "CheckpointUnwritable"
    assert answer.error is not None
    assert answer.error.metadata == {"file": "/c/x"}


def test_a_job_that_is_dropped_leaves_no_thread_behind(table: Table) -> None:
    cutting = Cutting(table, request(9))
    table.shards["s0"]._forget(jobs.JOB)
    assert reason(cutting.join()) == "StaleGeneration"


def test_a_shard_answers_in_its_own_time(table: Table) -> None:
    shard = table.shards["s0"]
    assert shard.handle(request(0)) is None
    together(*(one.join for one in threading.enumerate() if one.name == "adashard-snapshot"))
    assert [one.version for one in table.told if isinstance(one, Snapshotted)] == [0]
    assert shard.handle(SnapshotRequest(job="x", generation=1, version=0, directory="a")) is None


# --- reading back --------------------------------------------------------------------------------


def restoring(version: int = 7) -> Plan:
    """A generation whose lineage begins from a checkpoint."""
    entry = jobs.entry(SPEC, generation=2, lineage=2, origin="")
    lineage = entry.lineage
    assert lineage is not None
    entry = replace(entry, lineage=replace(lineage, checkpoint="step-7", base_version=version))
    record = Record(
        step=version,
        workers=("old",),
        shares=(1.0,),
        outcome=Outcome.APPLY,
        present=jobs.bits(range(3), 3),
        step_counts=(version,) * 3,
        groups=(),
    )
    sources = tuple(Source(slice=index, member="", version=version) for index in range(3))
    return Plan(entry=entry, base=version, record=record, sources=sources)


def saved(table: Table, disk: Disk) -> States:
    """What is on the disk: another version's weights and state."""
    disk.stored = {
        index: {content: one.reshape(-1) for content, one in contents.items()}
        for index, contents in held(step(table, 1)).items()
    }
    return disk.stored


def test_slices_that_a_checkpoint_supplies_are_read_and_the_steps_go_on(
    table: Table, disk: Disk
) -> None:
    stored = saved(table, disk)
    plan = restoring()
    table.entry = plan.entry
    table.freeze(plan.entry)
    assert isinstance(table.plan(plan)[0], Planned)
    assert isinstance(table.plan(plan)[0], Planned)
    assert disk.read_indices == [0, 1, 2], "each is read once"
    for shard in table.shards.values():
        shard.handle(Open(plan=plan))
    begin = jobs.begin(table.entry, "a", 7, push=False, state=True)
    reply = table.step(begin, {})
    assert equal(bits(held(reply)), bits(stored))
    assert step(table, 8).record.step_counts == (8, 8, 8)


def test_a_slice_of_a_checkpoint_that_others_are_beyond_is_one_step_behind(
    table: Table, disk: Disk
) -> None:
    saved(table, disk)
    plan = restoring()
    behind = replace(plan, base=8, behind=(0, 1, 2), record=replace(plan.record, step=8))
    table.freeze(plan.entry)
    assert isinstance(table.plan(behind)[0], Planned)
    assert set(table.freeze(plan.entry)[0].versions) == {7}


def test_a_checkpoint_that_cannot_be_read_is_told_with_its_name(table: Table, disk: Disk) -> None:
    disk.error = CheckpointUnreadable("damaged in tensor 'p'", file="f", tensor="p")
    plan = restoring()
    table.freeze(plan.entry)
    assert table.plan(plan) == [None]
    (happened,) = (one for one in table.told if isinstance(one, Happened))
    assert happened.name == "checkpoint_unreadable"
    assert happened.facts == {"checkpoint": "step-7", "file": "f", "tensor": "p"}


def test_without_a_directory_nothing_is_written_or_read() -> None:
    table = Table()
    table.open(jobs.plan(jobs.entry(SPEC)), values(0))
    assert reason(table.engine().snapshots.run(request(0))) == "CheckpointUnwritable"
    plan = restoring()
    table.freeze(plan.entry)
    assert table.plan(plan) == [None]
