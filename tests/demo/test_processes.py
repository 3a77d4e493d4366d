import os
import sys

import pytest

from adashard_server.demo import processes
from adashard_server.demo.processes import Crew, WorkerFailed
from adashard_server.demo.progress import Stepped, to_line

pytestmark = pytest.mark.processes

STEPS = [Stepped(step=step, loss=1.0, elapsed_s=0.0) for step in (1, 2, 3)]
SAYS_ALL = "".join(f"print({to_line(step)!r}, flush=True);" for step in STEPS)
WAITS = "import time; time.sleep(1000)"


def python(source):
    return [sys.executable, "-c", source]


def listened(*sources):
    with Crew([python(source) for source in sources]) as crew:
        return [told for told in crew.listen() if told is not None]


def gone(pid):
    """Whether there is no such process, not even one that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_all_that_workers_tell_is_heard_in_order():
    told = listened(SAYS_ALL, SAYS_ALL)
    for index in (0, 1):
        assert [progress for number, progress in told if number == index] == STEPS


def test_a_line_that_comes_in_pieces_is_one_line(monkeypatch):
    monkeypatch.setattr(processes, "_READ_BYTES", 9)
    assert listened(SAYS_ALL) == [(0, step) for step in STEPS]


def test_a_worker_that_fails_is_named_with_its_last_lines():
    fails = "import sys; [print(n, file=sys.stderr) for n in range(99)]; sys.exit(3)"
    with pytest.raises(WorkerFailed) as failed:
        listened(SAYS_ALL, fails)
    assert failed.value.index == 1
    assert failed.value.reason == "exited with code 3"
    assert failed.value.last_lines[-1] == "98"
    assert len(failed.value.last_lines) == processes.LAST_LINES


def test_a_worker_that_is_killed_is_named_with_the_signal():
    with pytest.raises(WorkerFailed, match="worker 0 was ended by signal 9"):
        listened("import os; os.kill(os.getpid(), 9)")


def test_a_worker_that_the_demo_kills_has_not_failed_and_the_others_are_heard():
    told = []
    with Crew([python(SAYS_ALL), python(SAYS_ALL + WAITS)]) as crew:
        for one in crew.listen():
            told.append(one)
            if one == (1, STEPS[-1]):
                crew.workers[1].kill()
    assert [one for one in told if one and one[0] == 0] == [(0, step) for step in STEPS]
    assert gone(crew.workers[1].pid)


def test_a_worker_that_says_nothing_for_too_long_has_failed(monkeypatch):
    monkeypatch.setattr(processes, "SILENCE_MAX_S", 0.0)
    with pytest.raises(WorkerFailed, match="did not say a word"):
        listened(WAITS)


@pytest.mark.parametrize("error", [WorkerFailed(0, "", []), KeyboardInterrupt(), ValueError()])
def test_no_process_outlives_the_block_however_it_is_left(error, monkeypatch):
    ignores = f"import signal; signal.signal(15, signal.SIG_IGN); {SAYS_ALL} {WAITS}"
    monkeypatch.setattr(processes, "STOP_S", 0.1)
    pids = []

    def leave():
        with Crew([python(WAITS), python(ignores)]) as crew:
            pids.extend(worker.pid for worker in crew.workers)
            next(told for told in crew.listen() if told is not None)
            raise error

    with pytest.raises(type(error)):
        leave()
    assert len(pids) == 2
    assert all(map(gone, pids))


def test_while_workers_are_silent_the_listener_gets_its_turn():
    with Crew([python(WAITS)]) as crew:
        assert next(crew.listen()) is None
