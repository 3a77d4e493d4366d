import signal
import sys

import pytest

from adashard_server.demo import run
from adashard_server.demo.chaos import Victim

pytestmark = pytest.mark.processes


class NoCluster:
    """Stands where the cluster stands; nobody answers there."""

    address = "127.0.0.1:1"
    url = "http://127.0.0.1:1"
    left = False

    def __init__(self, shards):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        type(self).left = True


@pytest.fixture
def demo(monkeypatch):
    """Runs the demo without a cluster, and with workers that do no more than this source says."""

    def run_with(source, workers=2):
        monkeypatch.setattr(NoCluster, "left", False)
        monkeypatch.setattr(run, "LocalCluster", NoCluster)
        monkeypatch.setattr(run, "worker_command", lambda _: [sys.executable, "-c", source])
        code = run.run_demo(steps=3, workers=workers, shards=1)
        assert NoCluster.left
        return code

    return run_with


def test_a_worker_that_fails_ends_the_demo_and_is_shown(demo, capsys):
    assert demo("raise ValueError('no such corpus')") == 1
    shown = capsys.readouterr().out
    assert "exited with code 1" in shown
    assert "ValueError: no such corpus" in shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_and_is_heeded_as_before_thereafter(demo, capsys, number, code):
    before = signal.getsignal(number)
    signalling = f"import os, time; os.kill(os.getppid(), {number}); time.sleep(1000)"
    assert demo(signalling, workers=1) == code  # a second signal would come when all is over
    assert "Interrupted" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_the_last_worker_is_not_killed():
    with pytest.raises(ValueError, match="workers=1: one has to live on"):
        run.run_demo(workers=1, victims=[Victim.WORKER])


@pytest.mark.parametrize("option", ["steps", "workers", "shards"])
def test_less_than_one_of_anything_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0: at least 1"):
        run.run_demo(**{option: 0})
