import pytest

from adashard_server.demo.figures import Figures
from adashard_server.demo.progress import Began, Evaluated, Stepped
from adashard_server.demo.story import Story
from adashard_server.demo.worker import Task

FIGURES = Figures(state_bytes=5, adam_bytes=800, pushed_bytes=10, pulled_bytes=20)


def task(index, steps=3):
    return Task(address="127.0.0.1:1", index=index, workers=2, steps=steps, seed=0)


def stepped(step, loss=1.0, elapsed_s=0.0):
    return Stepped(step=step, loss=loss, elapsed_s=elapsed_s)


def evaluated(step, bits):
    return Evaluated(step=step, bits_per_byte=bits, predicted_bytes=3, weights=f"bits of {step}")


@pytest.fixture
def story():
    return Story([task(0), task(1)])


def test_before_the_first_step_there_is_nothing_to_show(story):
    story.add(0, Began(parameter_count=7, training_bytes=6, training_files=5, held_out_files=4))
    assert story.status(FIGURES) is None


def test_the_loss_is_the_mean_over_the_workers(story):
    story.add(0, stepped(1, loss=1.0))
    story.add(1, stepped(1, loss=2.0))
    assert story.status(FIGURES).loss == pytest.approx(1.5)


def test_the_rate_leaves_the_first_step_out_which_waited_for_all_workers(story):
    story.add(0, stepped(1, elapsed_s=90.0))
    assert story.status(FIGURES).steps_per_s is None
    story.add(0, stepped(2, elapsed_s=90.5))
    story.add(0, stepped(3, elapsed_s=91.0))
    assert story.status(FIGURES).steps_per_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        (None, None),
        (Figures(state_bytes=0, adam_bytes=0, pushed_bytes=0, pulled_bytes=0), None),
        (FIGURES, 5),
    ],
)
def test_state_that_shards_have_not_told_of_is_unknown_and_not_nothing(story, figures, shown):
    story.add(0, stepped(1))
    assert story.status(figures).state_bytes == shown


def test_the_summary_puts_together_what_workers_and_rest_have_told(story):
    story.add(0, Began(parameter_count=7, training_bytes=6, training_files=5, held_out_files=4))
    story.add(0, evaluated(0, 8.0))
    for step, elapsed_s in ((1, 1.0), (2, 2.5), (3, 3.0)):
        assert story.step == step - 1
        story.add(1, stepped(step, elapsed_s=step + 50.0))
        story.add(0, stepped(step, elapsed_s=elapsed_s))
    story.add(0, evaluated(3, 2.0))
    summary = story.summary(FIGURES, shards=9)
    assert (summary.bits_before, summary.bits_after) == (8.0, 2.0)
    assert (summary.steps, summary.workers, summary.shards) == (3, 2, 9)
    assert (summary.steps_per_s, summary.training_s) == (1.0, 3.0)
    assert (summary.state_bytes, summary.pulled_bytes) == (5, 20)
    assert summary.push_count == 6
    assert (summary.longest_s, summary.weights) == (1.5, "bits of 3")
