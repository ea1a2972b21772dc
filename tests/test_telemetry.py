"""Laws of metrics and log: the text format is Prometheus's, and nothing of a user's stands in either."""

import io
import json
import math
import re
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.errors import ConfigError
from captioner.telemetry import SERIES_LIMIT, Counter, Gauge, Histogram, Telemetry

# The grammar of the format, version 0.0.4.
_VALUE = r"(?:[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|NaN|[+-]Inf)"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\[\\n"])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? ({_VALUE})")


def read(text):
    """Read the text as Prometheus does: samples by name and labels."""
    assert text.endswith("\n")
    samples, types = {}, {}
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in types
            types[name] = kind
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        name, labels, value = found.groups()
        assert any(name == known or name.startswith(f"{known}_") for known in types)
        assert (name, labels) not in samples
        samples[name, labels] = float(value)
    return samples


@settings(max_examples=200)
@given(st.text(), st.floats(0, 1e300))
def test_every_label_and_number_is_read_back(text, value):
    counter = Counter("a_total", "Of what.\nAnd \\ more.", ("label",))
    counter.add(value, label=text)
    ((_, labels), got), *more = read("\n".join(counter.lines()) + "\n").items()
    assert not more
    assert got == value
    quoted = labels.removeprefix('label="').removesuffix('"')
    assert re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), quoted) == text


@given(st.lists(st.floats(0, 100), max_size=30))
def test_buckets_are_cumulative_and_agree_with_sum_and_count(values):
    histogram = Histogram("h", "Of what.", bounds=(1.0, 10.0, 50.0))
    for value in values:
        histogram.observe(value)
    samples = read("\n".join(histogram.lines()) + "\n")
    for bound, text in ((1.0, "1"), (10.0, "10"), (50.0, "50"), (math.inf, "+Inf")):
        assert samples["h_bucket", f'le="{text}"'] == sum(value <= bound for value in values)
    assert samples["h_count", None] == len(values) == histogram.count()
    assert samples["h_sum", None] == pytest.approx(sum(values))


def test_a_metric_without_labels_is_there_from_the_start():
    text = Telemetry().prometheus()
    samples = read(text)
    assert samples["captioner_pictures_total", None] == 0
    assert samples["captioner_queue_pictures", None] == 0
    assert samples["captioner_batch_size_count", None] == 0


def test_a_gauge_is_asked_when_it_is_read():
    gauge, now = Gauge("g", "Of what."), [1]
    gauge.follow(lambda: now[0])
    assert gauge.value() == 1
    now[0] = math.nan
    assert gauge.lines()[-1] == "g NaN"


def test_labels_must_be_those_of_the_metric():
    with pytest.raises(ConfigError, match="a_total has the labels"):
        Counter("a_total", "Of what.", ("kind",)).add(other="x")


def test_series_are_bounded_whatever_comes():
    counter = Counter("a_total", "Of what.", ("kind",))
    for number in range(SERIES_LIMIT + 100):
        counter.add(kind=number)
    assert len(counter.lines()) <= SERIES_LIMIT + 3
    assert counter.value(kind="other") == 100


def test_no_count_is_lost_between_threads():
    counter, histogram = Counter("a_total", "Of what.", ("kind",)), Histogram("h", "Of what.", bounds=(1.0,))

    def count():
        for _ in range(2000):
            counter.add(kind="x")
            histogram.observe(0.5)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(switch_s)
    assert counter.value(kind="x") == histogram.count() == 8000


# --- The log ---


@given(st.text())
def test_a_line_of_the_log_is_one_object_on_one_line(text):
    file = io.StringIO()
    Telemetry(log=file).write("request", operation=text, error=None)
    line, rest = file.getvalue().split("\n")
    assert rest == ""
    said = json.loads(line)
    assert said.pop("time").endswith("Z")
    assert said == {"event": "request", "operation": text}


def test_captions_stand_in_the_log_only_when_asked_for():
    for asked in (False, True):
        file = io.StringIO()
        Telemetry(log=file, log_captions=asked).write("request", captions=["a secret"])
        assert ("secret" in file.getvalue()) is asked


def test_without_a_log_nothing_is_written(capsys):
    Telemetry().write("request")
    assert capsys.readouterr() == ("", "")
    Telemetry(log="stderr").write("request")
    assert json.loads(capsys.readouterr().err)["event"] == "request"


def test_a_closed_log_fails_no_request():
    file = io.StringIO()
    file.close()
    Telemetry(log=file).write("request")
