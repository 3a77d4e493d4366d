import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


class Demo:
    """`adashard demo` as a user starts it, with a mark that all its processes inherit."""

    def __init__(self, *options):
        self.mark = f"ADASHARD_TEST={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "adashard_server.cli", "demo", *options],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            text=True,
        )

    def processes(self):
        """Ids of all processes that bear the mark."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile, or is another user's
                continue
            if self.mark.encode() in environment:
                found.append(int(path.parent.name))
        return found

    def read_until(self, start):
        """The lines up to the first that starts so."""
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith(start):
                return lines
        raise AssertionError(f"no line starts with {start!r} in {''.join(lines)}")

    def rest(self):
        """The lines that are left, and the exit code."""
        output, _ = self.process.communicate()
        return output.splitlines(), self.process.returncode


@pytest.fixture
def start():
    demos = []

    def begin(*options):
        demos.append(Demo(*options))
        return demos[-1]

    yield begin
    for demo in demos:
        for pid in demo.processes():
            os.kill(pid, signal.SIGKILL)
        demo.process.wait()


def bits(lines, name):
    """The number of bits per byte in the table's row of this name."""
    words = row(lines, name)
    return float(words[words.index("bits/byte") - 1])


def row(lines, name):
    """The words of the table's row of this name."""
    (words,) = (line.split() for line in lines if line.strip().startswith(name))
    return words


def test_the_demo_learns_shows_it_and_leaves_nothing_behind(start):
    demo = start("--steps=30", "--workers=2", "--shards=2", "--seed=1")
    assert "http://127.0.0.1:" in "".join(demo.read_until("Dashboard"))
    lines, code = demo.rest()
    assert code == 0, lines
    assert bits(lines, "held-out, before") > 7.9
    assert bits(lines, "held-out, after") < 5
    assert any("step 30/30" in line for line in lines)
    assert any("Adam would hold 8.0 MB" in line for line in lines)
    assert demo.processes() == []


def test_an_interrupted_demo_leaves_nothing_behind(start):
    demo = start("--steps=100000")
    demo.read_until("step ")
    found = len(demo.processes())  # itself, a coordinator, shards, workers
    assert found - (1 + 1 + 2 + 2) in (0, 1), "and perhaps a shard that stands by"
    demo.process.send_signal(signal.SIGINT)
    lines, code = demo.rest()
    assert code == 130, lines
    assert demo.processes() == []


def test_a_demo_whose_shard_is_killed_comes_to_the_same_bits_as_a_calm_one(start):
    options = ("--steps=30", "--workers=2", "--shards=2", "--seed=1")
    calm, _ = start(*options).rest()
    chaos, code = start(*options, "--chaos", "shard").rest()
    assert code == 0, chaos
    assert any("shard 1 is killed" in line for line in chaos)
    for name in ("held-out, after", "weights"):
        assert row(calm, name) == row(chaos, name)


def test_a_demo_in_chaos_says_whom_it_has_lost_and_learns_all_the_same(start):
    demo = start("--steps=30", "--workers=2", "--shards=2", "--chaos")
    lines, code = demo.rest()
    assert code == 0, lines
    killed = [line.split(": ")[1] for line in lines if "is killed" in line]
    assert killed == ["shard 1 is killed (SIGKILL)", "worker 1 is killed (SIGKILL)"]
    assert any("1 workers, 2 shards" in line for line in lines)
    assert bits(lines, "held-out, after") < 5
    assert demo.processes() == []


def test_a_demo_whose_worker_dies_says_which_and_leaves_nothing_behind(start):
    demo = start("--steps=100000")
    demo.read_until("step ")
    (victim,) = (
        pid
        for pid in demo.processes()
        if b"--index=1" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    lines, code = demo.rest()
    assert code == 1, lines
    assert any("Worker 1 was ended by signal 9" in line for line in lines)
    assert demo.processes() == []
