"""Laws of the log of faults: kind and place are in it, and nothing that a user sent."""

import io
import logging

import pytest

from captioner import faults

SECRET = "data:image/png;base64,U0VDUkVU"


def fail():
    try:
        {}[SECRET]
    except KeyError as err:
        raise ValueError(f"Received inputs: [{SECRET}]") from err


@pytest.fixture
def written():
    """A logger whose lines are as `write_places_only` makes them, and its file."""
    file, logger = io.StringIO(), logging.getLogger("captioner_test_faults")
    handler = logging.StreamHandler(file)
    handler.setFormatter(faults.PlaceFormatter())
    logger.handlers, logger.propagate = [handler], False
    return logger, file


def test_of_an_error_kind_and_place_are_written_and_not_what_it_says(written):
    logger, file = written
    try:
        fail()
    except ValueError:
        logger.exception("a request could not be answered")
    text = file.getvalue()
    assert "a request could not be answered" in text
    assert "ValueError at test_faults.py:" in text
    assert "KeyError at test_faults.py:" in text
    assert SECRET not in text
    assert "Traceback" not in text


def test_a_trace_that_another_formatter_has_made_is_not_written(written):
    logger, file = written
    other = logging.StreamHandler(io.StringIO())
    logger.handlers.insert(0, other)
    try:
        fail()
    except ValueError:
        logger.exception("fault")
    assert SECRET in other.stream.getvalue()
    assert SECRET not in file.getvalue()


def test_what_gradio_prints_of_an_error_is_its_kind_and_place(caplog, capfd):
    traces = faults.Traces()
    try:
        fail()
    except ValueError:
        traces.print_exc()
    assert "ValueError at test_faults.py:" in caplog.text
    assert SECRET not in caplog.text + capfd.readouterr().err
    assert traces.format_exc  # all else is Python's own


def test_all_who_run_a_page_write_so():
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in faults.LOGGERS}
    try:
        faults.write_places_only()
        for name in (*faults.LOGGERS, "uvicorn.error", "captioner.faults", "gradio.route_utils"):
            logger = logging.getLogger(name)
            while logger.propagate and not logger.handlers:
                logger = logger.parent
            assert [type(handler.formatter) for handler in logger.handlers] == [faults.PlaceFormatter]
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate
