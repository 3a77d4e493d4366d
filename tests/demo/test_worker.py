import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.demo.corpus import batches
from adashard_server.demo.model import Size, Transformer
from adashard_server.demo.progress import Began, Evaluated, Stepped, from_line, to_line
from adashard_server.demo.worker import Task, parse, train

NUMBERS = st.integers(0, 2**40)
REALS = st.floats(allow_nan=False)
PROGRESS = st.one_of(
    st.builds(
        Began,
        parameter_count=NUMBERS,
        training_bytes=NUMBERS,
        training_files=NUMBERS,
        held_out_files=NUMBERS,
    ),
    st.builds(
        Evaluated, step=NUMBERS, bits_per_byte=REALS, predicted_bytes=NUMBERS, weights=st.text()
    ),
    st.builds(Stepped, step=NUMBERS, loss=REALS, elapsed_s=REALS),
)


class Local(torch.optim.Adafactor):
    """What the service does, in this process; remembers what it was asked to show."""

    def __init__(self, params):
        super().__init__(params)
        self.shown = []

    def log(self, *, loss):
        self.shown.append(float(loss.detach()))


def test_the_loop_learns_and_tells_of_every_step():
    torch.manual_seed(0)
    model = Transformer(Size(width=32, depth=1, heads=2, context=16))
    text = torch.tensor(list(b"for step in range(steps): ") * 20, dtype=torch.uint8)
    optimizer = Local(model.parameters())
    told = []
    train(
        model,
        optimizer,
        batches(text, count=4, length=17, stream="a"),
        steps=100,
        tell=told.append,
    )
    assert [progress.step for progress in told] == list(range(1, 101))
    assert [progress.loss for progress in told] == optimizer.shown
    assert told[0].loss > 5
    assert told[-1].loss < 1
    assert sorted(told, key=lambda progress: progress.elapsed_s) == told


@given(
    st.builds(
        Task,
        address=st.just("127.0.0.1:50051"),
        index=NUMBERS,
        workers=NUMBERS,
        steps=NUMBERS,
        seed=st.integers(),
    )
)
def test_a_task_survives_its_command_line(task):
    assert parse(task.arguments()) == task


@given(PROGRESS)
def test_progress_survives_its_line(progress):
    line = to_line(progress)
    assert "\n" not in line
    assert from_line(line) == progress


@pytest.mark.parametrize(
    "line", ["", "Hello", "7", "{}", '{"kind": "Stepped"}', '{"kind": "Sung", "step": 1}']
)
def test_a_line_that_no_worker_wrote_is_refused(line):
    with pytest.raises(ValueError, match="progress"):
        from_line(line)
