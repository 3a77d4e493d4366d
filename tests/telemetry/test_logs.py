import io
import json
import logging
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adashard_server.telemetry import logs


@pytest.fixture(autouse=True)
def _leave_no_handler():
    loggers = [logging.getLogger(name) for name in ("adashard", "uvicorn")]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(stream, **options):
    logs.configure(stream=stream, **options)
    return stream


def test_a_line_of_json_has_time_level_event_and_fields():
    stream = written(io.StringIO())
    logs.membership.info(
        "worker_joined", extra={"worker": "w-1", "job": "demo", "generation": 3, "host": "node-a"}
    )
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("ts")).tzinfo is not None
    assert list(entry.items()) == [
        ("level", "info"),
        ("logger", "adashard.membership"),
        ("event", "worker_joined"),
        ("job", "demo"),
        ("worker", "w-1"),
        ("generation", 3),
        ("host", "node-a"),
    ]


def test_a_terminal_gets_text_and_a_file_gets_json_unless_told_otherwise():
    for stream, options, is_json in (
        (Terminal(), {}, False),
        (io.StringIO(), {}, True),
        (Terminal(), {"json": True}, True),
        (io.StringIO(), {"json": False}, False),
    ):
        written(stream, **options)
        logs.rounds.warning("step_skipped", extra={"job": "my run", "step": 7})
        assert stream.getvalue().startswith("{") == is_json
        assert is_json or stream.getvalue().endswith('step_skipped  job="my run"  step=7\n')


@given(st.text(), st.text(), st.booleans())
def test_whatever_a_job_is_called_an_event_is_one_line(event, job, as_json):
    stream = written(io.StringIO(), json=as_json)
    logs.membership.info("%s", event, extra={"job": job})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert as_json or text.rstrip("\n").isprintable()
    if as_json:
        assert (json.loads(text)["event"], json.loads(text)["job"]) == (event, job)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_defect_has_its_traceback(as_json):
    stream = written(io.StringIO(), json=as_json)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logs.errors.exception("request_failed", extra={"request_id": "call-7"})
    assert "ZeroDivisionError" in stream.getvalue()
    assert "request_failed" in stream.getvalue()
    if as_json:
        assert "Traceback" in json.loads(stream.getvalue())["exception"]


def test_levels_are_kept_and_others_speak_from_warning_on():
    stream = written(io.StringIO(), level="warning")
    logs.rounds.info("step_taken")
    logs.rounds.warning("step_skipped")
    logging.getLogger("uvicorn.error").info("chatter")
    logging.getLogger("uvicorn.error").error("trouble")
    events = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert events == ["step_skipped", "trouble"]


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="LOUD"):
        logs.configure("loud", stream=io.StringIO())


def test_configuring_again_replaces_what_was_there():
    first, second = written(io.StringIO()), written(io.StringIO())
    logs.membership.info("worker_joined")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


def test_every_line_is_counted_by_logger_and_level():
    counted = []
    written(io.StringIO(), on_record=lambda *record: counted.append(record))
    logs.membership.warning("worker_silent")
    logs.rounds.debug("step_taken")
    assert counted == [("adashard.membership", "warning")]
