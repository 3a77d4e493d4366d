import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adashard_server import cli
from adashard_server.demo import run
from adashard_server.demo.chaos import Chaos, Victim

STEPS = st.integers(1, 60)


def deaths(victims, steps, heard):
    """Who dies at which of the steps that are heard of."""
    chaos = Chaos(victims, steps)
    return [(step, victim) for step in heard for victim in chaos.due(step)]


@given(st.lists(st.sampled_from(Victim), max_size=2, unique=True), STEPS)
def test_everybody_dies_once_in_order_and_never_before_the_first_step(victims, steps):
    died = deaths(victims, steps, range(steps + 1))
    assert [victim for _, victim in died] == victims
    assert all(1 <= step <= steps for step, _ in died)


@given(STEPS, st.data())
def test_a_step_that_is_not_heard_of_spares_nobody(steps, data):
    heard = sorted(data.draw(st.sets(st.integers(0, steps))) | {steps})
    assert [victim for _, victim in deaths(list(Victim), steps, heard)] == list(Victim)


@pytest.mark.parametrize(
    ("victims", "expected"),
    [
        ([], []),
        ([Victim.SHARD], [(300, Victim.SHARD)]),
        ([Victim.SHARD, Victim.WORKER], [(200, Victim.SHARD), (400, Victim.WORKER)]),
    ],
)
def test_deaths_are_spread_over_the_training(victims, expected):
    assert deaths(victims, 600, range(601)) == expected


@pytest.fixture
def command(monkeypatch):
    """What `adashard demo` would kill with these arguments, or what it says of them."""

    def run_with(*arguments):
        killed = []

        def demo(*, victims, **_):
            killed.extend(victims)
            return 0

        monkeypatch.setattr(run, "run_demo", demo)
        result = CliRunner().invoke(cli.app, ["demo", *arguments])
        return killed if result.exit_code == 0 else " ".join(result.output.split())

    return run_with


@pytest.mark.parametrize(
    ("arguments", "killed"),
    [
        ((), []),
        (("--chaos",), ["shard", "worker"]),
        (("--chaos", "shard"), ["shard"]),
        (("worker", "shard", "--chaos"), ["worker", "shard"]),
        (("--chaos", "shard", "--workers", "1"), ["shard"]),
    ],
)
def test_the_command_says_who_dies(command, arguments, killed):
    assert command(*arguments) == killed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("shard",), "with --chaos only"),
        (("--chaos", "shard", "shard"), "one of each"),
        (("--chaos", "coordinator"), "not one of"),
        (("--chaos", "--workers", "1"), "--workers is 2 or more"),
    ],
)
def test_the_command_refuses_what_it_cannot_kill(command, arguments, said):
    assert said in command(*arguments)
