"""In which format gradients travel from push to push: as asked, or as the link is."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from tests.client.cuts import Cut, cut_routing
from tests.client.test_link_speed import Clock
from tests.shard import jobs

from adashard.gradient_format import PUSHES_MEASURED, GradientFormat
from adashard.wire.messages import Entry, Member
from adashard.wire.spec import DType

SHAPE = (1 << 20, 5)  # 20 MiB: a stretch, and some
GRADIENTS = {0: torch.ones(SHAPE)}
INT8, BF16 = DType.INT8, DType.BFLOAT16


def pushed(chooser: GradientFormat, clock: Clock, gbit_s: float, **options) -> list[bytes]:
    """One push over a link of that speed, as a transport takes its frames."""
    routing = cut_routing([Cut(SHAPE)], [torch.zeros(SHAPE)])
    encoding = chooser.begin()
    frames = []
    for frame in routing.gradient_frames(GRADIENTS, [0], encoding=encoding):
        frames.append(frame)
        clock.now += 8e-9 * len(frame) / gbit_s
    chooser.end(encoding, GRADIENTS, **{"used": True, "job": "j", **options})
    return frames


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16", "int8"])
def test_a_format_that_is_asked_for_is_that_of_every_push(asked):
    chooser = GradientFormat(asked)
    for _ in range(PUSHES_MEASURED + 2):
        assert chooser.dtype is DType[asked.upper()]
        encoding = chooser.begin()
        assert encoding.meter is None
        chooser.end(encoding, {}, used=True, job="j")


def test_unless_a_format_is_asked_for_gradients_travel_as_they_are():
    encoding = GradientFormat(None).begin()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert encoding.dtype_of(torch.ones(2, dtype=dtype)).name.lower() in str(dtype)


@pytest.mark.parametrize(
    ("gbit_s", "chosen", "words"),
    [
        (0.94, INT8, "in int8: pushes have gone out at 0.94 Gbit/s"),
        (9.4, BF16, "in bfloat16: pushes have gone out at 9.4 Gbit/s"),
        (40.0, None, "as they are: pushes have gone out at 40 Gbit/s"),
    ],
)
def test_auto_chooses_once_after_a_few_pushes_and_says_what_and_why(caplog, gbit_s, chosen, words):
    clock = Clock()
    chooser = GradientFormat("auto", clock)
    with caplog.at_level(logging.INFO, "adashard"):
        for speed in (0.001, *[gbit_s] * (PUSHES_MEASURED - 1)):  # the first opens connections
            pushed(chooser, clock, speed)
            assert chooser.dtype is None
        assert caplog.messages == []
        pushed(chooser, clock, gbit_s)
        assert chooser.dtype is chosen
        for speed in (0.001, 1000.0):
            pushed(chooser, clock, speed)
            assert chooser.dtype is chosen
    (said,) = caplog.messages
    assert f"job 'j': gradients travel {words}" in said


def entry_at(*addresses: str) -> Entry:
    shards = [Member(id=f"s{place}", address=one) for place, one in enumerate(addresses)]
    return jobs.entry(jobs.spec(SHAPE), shards=shards, placement=range(len(addresses)))


@pytest.mark.parametrize(
    ("addresses", "decided"),
    [
        (["127.0.0.1:5"], True),
        (["localhost:5", "[::1]:6"], True),
        (["127.0.0.1:5", "10.0.0.2:5"], False),
        (["shard-0:5"], False),
    ],
)
def test_auto_measures_no_link_where_all_shards_are_on_this_machine(caplog, addresses, decided):
    routing = cut_routing([Cut(SHAPE)], [torch.zeros(SHAPE)])
    routing.by_shard(entry_at(*addresses))
    chooser = GradientFormat("auto", Clock())
    encoding = chooser.begin()
    list(routing.gradient_frames(GRADIENTS, [0], encoding=encoding))
    with caplog.at_level(logging.INFO, "adashard"):
        chooser.end(encoding, GRADIENTS, used=True, job="j")
    assert ("all shards are on this machine" in caplog.text) == decided
    assert (chooser.begin().meter is None) == decided
    assert chooser.dtype is None


def test_auto_counts_the_fastest_push_for_others_may_have_held_up_the_rest():
    clock = Clock()
    chooser = GradientFormat("auto", clock)
    for speed in (9.0, 0.1, 9.0, 0.2):
        pushed(chooser, clock, speed)
    assert chooser.dtype is BF16


def test_auto_sends_small_pushes_as_they_are(caplog):
    chooser = GradientFormat("auto", Clock())
    with caplog.at_level(logging.INFO, "adashard"):
        for _ in range(PUSHES_MEASURED + 1):
            encoding = chooser.begin()
            chooser.end(encoding, {0: torch.ones(2)}, used=True, job="j")
    assert "too small to measure" in caplog.text
    assert chooser.dtype is None


def test_steps_without_a_gradient_say_nothing_of_the_link():
    clock = Clock()
    chooser = GradientFormat("auto", clock)
    for _ in range(9):
        chooser.end(chooser.begin(), {}, used=True, job="j")
    for _ in range(PUSHES_MEASURED + 1):
        assert chooser.dtype is None
        pushed(chooser, clock, 1.0)
    assert chooser.dtype is INT8


def test_what_auto_has_chosen_is_saved_and_gone_on_with():
    clock = Clock()
    chooser = GradientFormat("auto", clock)
    assert chooser.saved([torch.zeros(SHAPE)]) == {}
    for _ in range(PUSHES_MEASURED + 2):
        pushed(chooser, clock, 1.0)
    saved = chooser.saved([torch.zeros(SHAPE)])
    assert saved["dtype"] == "int8"
    again = GradientFormat("auto", clock)
    again.load(**saved)
    assert again.dtype is INT8
    assert pushed(again, clock, 100.0) == pushed(chooser, clock, 1.0)


def test_what_was_saved_in_int8_is_of_no_use_to_another_format():
    chooser = GradientFormat("int8")
    pushed(chooser, Clock(), 1.0)
    saved = chooser.saved([torch.zeros(SHAPE)])
    other = GradientFormat("bfloat16")
    other.load(**saved)
    assert other.dtype is BF16
    assert other.saved([torch.zeros(SHAPE)]) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_another_workers_and_has_no_residuals(copied):
    chooser = GradientFormat("int8")
    encoding = chooser.begin()
    routing = cut_routing([Cut((3,))], [torch.zeros(3)])
    list(routing.gradient_frames({0: torch.tensor([1.0, 0.3, 0.2])}, [0], encoding=encoding))
    chooser.end(encoding, {}, used=True, job="j")
    assert chooser.saved([torch.zeros(3)])["residuals"].keys() == {0}
    again = copied(chooser)
    assert again.dtype is INT8
    assert again.saved([torch.zeros(3)]) == {}
