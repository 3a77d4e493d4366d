import httpx
import pytest

from adashard.wire.errors import CannotReachServer
from adashard_server.demo import figures
from adashard_server.demo.figures import FiguresReader


class Rest:
    """A coordinator that tells of `steps` steps of 10 bytes up and 20 down, or of nothing."""

    def __init__(self):
        self.steps = 0
        self.up = True
        self.asked = []

    def __call__(self, request):
        self.asked.append(request.url)
        if not self.up:
            raise httpx.ConnectError("nobody there")
        if self.steps == 0:
            return httpx.Response(404)
        if request.url.path.endswith("/state"):
            return httpx.Response(200, json={"total_bytes": 5, "adam_bytes": 800})
        first = int(request.url.params["from"])
        steps = [
            {"step": step, "pushed_bytes": 10, "pulled_bytes": 20}
            for step in range(first, self.steps + 1)
        ]
        return httpx.Response(200, json={"items": steps, "next_cursor": None})


@pytest.fixture
def rest(monkeypatch):
    monkeypatch.setattr(figures, "INTERVAL_S", 0.0)
    monkeypatch.setattr(figures, "SETTLE_S", 0.0)
    return Rest()


@pytest.fixture
def reader(rest):
    with FiguresReader("http://a", "demo", transport=httpx.MockTransport(rest)) as reader:
        yield reader


def test_before_the_job_begins_there_are_no_figures(reader):
    assert reader.newest() is None


def test_every_step_counts_once_however_often_it_is_read(rest, reader):
    for rest.steps in (1, 5, 5, 40, 41):
        found = reader.newest()
        assert found.pushed_bytes == 10 * rest.steps
        assert found.pulled_bytes == 20 * rest.steps
    assert (found.state_bytes, found.adam_bytes) == (5, 800)


def test_old_steps_are_not_asked_for_again(rest, reader):
    rest.steps = 1000
    reader.newest()
    reader.newest()
    assert int(rest.asked[-1].params["from"]) > 900


def test_an_answer_that_does_not_come_leaves_what_was_known(rest, reader):
    rest.steps = 3
    known = reader.newest()
    rest.up = False
    assert reader.newest() == known
    assert reader.after(3) == known


def test_figures_are_read_no_more_often_than_they_change(rest, reader, monkeypatch):
    monkeypatch.setattr(figures, "INTERVAL_S", 1000.0)
    rest.steps = 3
    for _ in range(10):
        reader.newest()
    assert len(rest.asked) == 2


def test_a_job_that_nobody_knows_of_at_the_end_is_an_error(reader):
    with pytest.raises(CannotReachServer, match="demo"):
        reader.after(1)
