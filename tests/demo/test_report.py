import io
from dataclasses import replace

from rich.console import Console

from adashard_server.demo import report
from adashard_server.demo.processes import WorkerFailed
from adashard_server.demo.report import Status, Summary, failure, live_line, table

SUMMARY = Summary(
    parameter_count=1_004_640,
    training_bytes=10_357_132,
    training_files=582,
    workers=2,
    shards=2,
    steps=600,
    bits_before=8.0449,
    bits_after=2.2751,
    predicted_bytes=32_768,
    held_out_files=30,
    state_bytes=38_528,
    adam_bytes=8_037_120,
    steps_per_s=5.04,
    training_s=118.6,
    pushed_bytes=4_822_272_000,
    pulled_bytes=4_822_272_000,
    push_count=1200,
    longest_s=4.31,
    weights="0123456789abcdef" * 4,
)


def status(step, **fields):
    known = {"steps": 600, "loss": 2.0, "steps_per_s": 5.04, "state_bytes": 38_528}
    return Status(step=step, **known | fields)


def printed(what):
    console = Console(file=io.StringIO(), width=80)
    console.print(what)
    return console.file.getvalue()


def test_the_table_says_what_was_trained_and_what_came_of_it():
    text = printed(table(SUMMARY))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert [row for row in rows if row.strip("─")] == [
        "A Transformer of 1,004,640 parameters, 600 steps by 2 workers through 2 shards",
        "held-out, before 8.04 bits/byte 32,768 bytes of 30 files",
        "held-out, after 2.28 bits/byte trained on 10.4 MB of 582 other files",
        "optimizer state 38.5 kB Adam would hold 8.0 MB, 209 times that",
        "speed 5.0 steps/s training took 119 s",
        "longest step 4.3 s with all that it waited for",
        "pushed 4.8 GB gradients, 4.0 MB a worker and step",
        "pulled 4.8 GB weights, 4.0 MB a worker and step",
        "weights 0123456789abcdef begin of their SHA-256",
    ]


def test_one_of_a_thing_is_not_called_many():
    text = printed(table(replace(SUMMARY, steps=1, workers=1, shards=1, steps_per_s=None)))
    assert text.splitlines()[0].rstrip().endswith("1 step by 1 worker through 1 shard")


def test_the_live_line_names_step_loss_rate_and_state():
    assert (
        report.describe(status(1)) == "loss 2.89 bits/byte · 5.0 steps/s · optimizer state 38.5 kB"
    )


def test_what_is_not_known_yet_is_a_dash():
    line = report.describe(status(1, steps_per_s=None, state_bytes=None))
    assert line == "loss 2.89 bits/byte · - steps/s · optimizer state -"


def test_a_terminal_gets_one_line_that_moves():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with live_line(console, 600) as line:
        line.show(status(300))
        line.show(status(600))
    last = console.file.getvalue().rsplit("\r", 1)[-1]
    assert "step 600/600" in last
    assert "loss 2.89 bits/byte" in last
    assert "step 300/600" not in last


def test_a_file_gets_a_plain_line_now_and_then_and_the_last_step_once():
    times = iter([100.0, 101.0, 106.0, 107.0, 107.5, 113.0])
    console = Console(file=io.StringIO(), width=100)
    with report.PlainLines(console, lambda: next(times)) as line:
        for step in (1, 2, 20, 600, 600, 600):
            line.show(status(step))
    shown = [text.split("  ")[0] for text in console.file.getvalue().splitlines()]
    assert shown == ["step 1/600", "step 20/600", "step 600/600"]


def test_a_failure_names_the_worker_and_shows_its_last_lines():
    error = WorkerFailed(1, "exited with code 3", ["Traceback [red]", "ValueError: no"])
    text = printed(failure(error))
    assert "Worker 1 exited with code 3" in text
    assert "Traceback [red]\n" in text
    assert "ValueError: no" in text


def test_a_job_without_state_is_not_divided_by():
    text = printed(table(replace(SUMMARY, state_bytes=0)))
    assert "0 bytes" in text
    assert "Adam would hold 8.0 MB  " in text
