"""Laws of the service: every request gets exactly one answer, its own, in fair order; a fault is nobody else's."""

import contextlib
import contextvars
import math
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import claiming, encode, gradient

from captioner.batching import Batcher
from captioner.config import PreprocessingConfig, SearchDefaults, SearchOptions
from captioner.errors import (
    ConfigError,
    ImageReadError,
    ImageTooLargeError,
    SearchError,
    ServiceBusyError,
    ServiceClosedError,
    ServiceError,
    ServiceTimeoutError,
)
from captioner.prepared import PreparedPicture
from captioner.requests import PLACED, Callers, Turnstile
from captioner.service import DECODING_PIXELS, MAX_DECODERS, ServiceLimits
from captioner.service import Service as RealService
from captioner.telemetry import Telemetry

LONG_S = 30.0  # no test waits so long unless it fails


def picture(number):
    """A prepared picture whose name says which one it is."""
    return PreparedPicture(name=str(number), pixels_u8=np.zeros((3, 32, 32), np.uint8), picture_hw_px=(32, 32))


class FakeCaptioner:
    """Answers each picture with its name; its doors let a test hold a batch as long as it likes."""

    def __init__(self):
        self.config = SimpleNamespace(preprocessing=PreprocessingConfig(side_px=32), search=SearchDefaults())
        self.batches = []
        self.entered = threading.Semaphore(0)
        self.door = threading.Event()
        self.door.set()
        self.fault = None  # called with the names of a batch; may raise

    def search_options(self, **options):
        return SearchOptions.from_dict(options)

    def check_sentence(self, sentence):
        pass

    def prepare(self, source):
        return source

    def caption_batch(self, pictures, *, batch_size, on_error, **options):
        assert batch_size == len(pictures)
        assert on_error == "return"
        names = [each.name for each in pictures]
        self._pass(names)
        return iter([(name, options["beam_size"]) for name in names])

    def score(self, prepared, sentence):
        self._pass([prepared.name])
        return (prepared.name, sentence)

    def stream(self, prepared, **options):
        self._pass([prepared.name])
        if options.get("method", "greedy") == "beam":
            raise ConfigError("a beam knows no word before its end")
        return iter(["one", "two", "three"])

    def _pass(self, names):
        self.batches.append(names)
        self.entered.release()
        assert self.door.wait(LONG_S)
        if self.fault is not None:
            self.fault(names)


def answer(future: Future):
    return future.result(timeout=LONG_S)


def until(condition):
    """Wait until it holds; other threads have their turn meanwhile."""
    deadline_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0)


def started(captioner):
    """Wait until one more batch has reached the model."""
    assert captioner.entered.acquire(timeout=LONG_S)


@pytest.fixture
def captioner():
    return FakeCaptioner()


@pytest.fixture
def make(captioner):
    """Make a service on the fake; it is closed at the end, whatever happened."""
    made = []

    def service(**limits):
        made.append(RealService(captioner, limits=ServiceLimits(**limits)))
        return made[-1]

    yield service
    captioner.door.set()
    for each in made:
        each.close(drain_s=LONG_S)


def held(service, captioner):
    """Let one picture into the model, and keep it there."""
    captioner.door.clear()
    future = service.submit(picture("first"))
    started(captioner)
    return future


# --- Batches ---


def test_pictures_that_come_while_the_model_is_busy_share_the_next_batch(make, captioner):
    service = make(max_batch=8)
    first = held(service, captioner)
    futures = [service.submit(picture(number)) for number in range(10)]
    captioner.door.set()
    assert [answer(future) for future in futures] == [(str(number), 3) for number in range(10)]
    assert answer(first) == ("first", 3)
    assert [len(batch) for batch in captioner.batches] == [1, 8, 2]


def test_one_who_is_alone_does_not_wait_for_others():
    batcher = Batcher(lambda key, works: works, max_wait_s=3600, max_queue=9, timeout_s=9e3, telemetry=Telemetry())
    for work in range(3):
        ticket = batcher.admit(1)
        future = batcher.put(ticket, "key", work, limit=9).future
        batcher.release(ticket)
        assert answer(future) == work  # the model started though an hour for others was not over
    batcher.close(LONG_S)


def test_the_model_waits_for_pictures_that_are_being_decoded(captioner):
    def run(key, works):
        batches.append(works)
        return works

    batches = []
    batcher = Batcher(run, max_wait_s=LONG_S, max_queue=9, timeout_s=LONG_S, telemetry=Telemetry())
    one, other = batcher.admit(1), batcher.admit(1)
    first = batcher.put(one, "key", 1, limit=9).future
    batcher.release(one)
    assert not first.done()
    second = batcher.put(other, "key", 2, limit=9).future
    assert [answer(first), answer(second)] == [1, 2]
    assert batches == [[1, 2]]
    batcher.release(other)
    batcher.close(LONG_S)


def test_the_model_stops_waiting_when_a_picture_turns_out_bad(captioner):
    batcher = Batcher(lambda key, works: works, max_wait_s=LONG_S, max_queue=9, timeout_s=9, telemetry=Telemetry())
    good, bad = batcher.admit(1), batcher.admit(1)
    future = batcher.put(good, "key", 1, limit=9).future
    batcher.release(bad)
    assert answer(future) == 1
    batcher.release(good)
    batcher.close(LONG_S)


def test_only_equal_options_share_a_batch(make, captioner):
    service = make()
    held(service, captioner)
    futures = [service.submit(picture(number), beam_size=1 + number % 2) for number in range(6)]
    captioner.door.set()
    assert [answer(future)[1] for future in futures] == [1, 2, 1, 2, 1, 2]
    assert captioner.batches[1:] == [["0", "2", "4"], ["1", "3", "5"]]


def test_wide_beams_come_in_smaller_batches(make, captioner):
    service = make(max_batch=32)
    held(service, captioner)
    futures = [service.submit(picture(number), beam_size=256) for number in range(5)]
    captioner.door.set()
    wait(futures, timeout=LONG_S)
    assert [len(batch) for batch in captioner.batches[1:]] == [2, 2, 1]


# --- Fairness ---


def test_a_large_request_does_not_starve_a_small_one(make, captioner):
    service = make(max_queue=600, max_batch=32)
    held(service, captioner)
    many = threading.Thread(target=service.caption_batch, args=([picture(f"many {n}") for n in range(500)],))
    many.start()
    until(lambda: service.waiting == 500)
    lone = service.submit(picture("lone"))
    captioner.door.set()
    assert answer(lone) == ("lone", 3)
    assert "lone" in captioner.batches[1]
    many.join(LONG_S)
    assert not many.is_alive()


def test_a_request_with_other_options_waits_for_one_batch_at_most(make, captioner):
    service = make(max_queue=600, max_batch=4)
    held(service, captioner)
    futures = [service.submit(picture(n)) for n in range(4)]  # someone else's, one by one
    ticket_of_many = threading.Thread(target=service.caption_batch, args=([picture(f"many {n}") for n in range(100)],))
    ticket_of_many.start()
    until(lambda: service.waiting == 104)
    lone = service.submit(picture("lone"), beam_size=7)
    captioner.door.set()
    assert answer(lone) == ("lone", 7)
    wait(futures, timeout=LONG_S)
    ticket_of_many.join(LONG_S)
    # At most those whose turn had come, and one more batch.
    assert captioner.batches.index(["lone"]) <= 3


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=8), st.integers(1, 6))
def test_every_request_is_served_in_turn(requests, max_batch):
    """Between two items of a request, another that waits gets its turn, up to the rest of a batch of one key."""
    order, begin = [], threading.Event()

    def run(key, works):
        assert begin.wait(LONG_S)
        order.append((key, works))
        return works

    batcher = Batcher(run, max_wait_s=0.0, max_queue=1000, timeout_s=LONG_S, telemetry=Telemetry())
    plug = batcher.admit(1)
    plugged = batcher.put(plug, "plug", None, limit=1).future
    batcher.release(plug)
    futures = []
    for request, (count, key) in enumerate(requests):
        ticket = batcher.admit(count)
        futures += [batcher.put(ticket, key, (request, item), limit=max_batch).future for item in range(count)]
        batcher.release(ticket)
    begin.set()
    answers = [answer(future) for future in futures]
    assert answer(plugged) is None
    batcher.close(LONG_S)
    assert answers == [(request, item) for request, (count, _) in enumerate(requests) for item in range(count)]
    served = [work for key, works in order if key != "plug" for work in works]
    for request, (count, _) in enumerate(requests):
        assert [item for owner, item in served if owner == request] == [*range(count)]
    # The head of each batch is the item with the fewest of its own request before it.
    left = set(answers)
    for _, works in order:
        if works == [None]:
            continue
        assert works[0][1] == min(item for _, item in left)
        left -= set(works)


# --- No request is lost ---


@settings(max_examples=40)
@given(st.data())
def test_every_admitted_request_gets_exactly_one_answer(data):
    """Whatever is put in, cancelled, faulty or late: each future ends once, with its own answer or a named error."""
    plan = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2), st.sampled_from("gggbcx")), min_size=1, max_size=25)
    )
    drain_s = data.draw(st.sampled_from([LONG_S, 0.0]))
    runs = []

    def run(key, works):
        if any(kind == "x" for _, _, kind in works) and len(works) > 1:
            raise RuntimeError("one of these")
        if any(kind == "x" for _, _, kind in works):
            raise ValueError("this one")
        runs.extend(works)
        return [
            SearchError("none", picture=0) if kind == "b" else ("answer", *work) for work in works for kind in work[2]
        ]

    batcher = Batcher(run, max_wait_s=0.001, max_queue=40, timeout_s=LONG_S, telemetry=Telemetry())
    ends, futures, refused = [], {}, []
    for request, (count, key, kind) in enumerate(plan):
        try:
            ticket = batcher.admit(count)
        except ServiceBusyError:
            refused.append(request)
            continue
        for index in range(count):
            work = (request, index, kind)
            futures[work] = batcher.put(ticket, key, work, limit=4).future
            futures[work].add_done_callback(lambda _, work=work: ends.append(work))
            if kind == "c":
                futures[work].cancel()
        batcher.release(ticket)
    batcher.close(drain_s)
    _, open_ = wait(futures.values(), timeout=LONG_S)
    assert not open_
    assert sorted(ends) == sorted(futures)
    assert {*refused, *(request for request, _, _ in futures)} == {*range(len(plan))}
    for work, future in futures.items():
        kind = work[2]
        if future.cancelled():
            assert kind == "c"
        elif (error := future.exception()) is None:
            assert future.result() == ("answer", *work)
        else:
            wanted = {"b": SearchError, "x": ServiceError}.get(kind, ServiceClosedError)
            assert isinstance(error, wanted | ServiceClosedError)
            assert drain_s == 0.0 or not isinstance(error, ServiceClosedError)
    assert batcher.waiting == 0
    assert len(runs) == len(set(runs))


def test_many_threads_each_get_their_own_answer(make):
    service = make(max_queue=64, max_batch=5)
    wrong = []

    def user(name):
        for number in range(20):
            mine = f"{name}-{number}"
            if number % 5 == 4:
                got = service.caption_batch([picture(f"{mine}-{n}") for n in range(3)])
                right = [(f"{mine}-{n}", 3) for n in range(3)]
            else:
                got, right = service.caption(picture(mine), beam_size=1 + number % 3), (mine, 1 + number % 3)
            if got != right:
                wrong.append((got, right))

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=user, args=(name,)) for name in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
    finally:
        sys.setswitchinterval(switch_s)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert service.waiting == 0


# --- Admission ---


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make, captioner):
    service = make(max_queue=2)
    first = held(service, captioner)
    waiting = [service.submit(picture(number)) for number in range(2)]
    with pytest.raises(ServiceBusyError, match="2 of 2 places") as caught:
        service.submit(picture("late"))
    assert caught.value.retry_after_s >= 1
    assert isinstance(service.refusal(), ServiceBusyError)
    captioner.door.set()
    assert [answer(future) for future in (first, *waiting)] == [("first", 3), ("0", 3), ("1", 3)]
    assert service.refusal() is None


@contextlib.contextmanager
def with_place(place):
    """Work for the one who was given this place at the door."""
    token = PLACED.set(place)
    try:
        yield
    finally:
        PLACED.reset(token)


def test_who_was_let_in_at_the_door_has_a_place_and_who_comes_meanwhile_has_none(make, captioner):
    service = make(max_queue=2)
    first = held(service, captioner)
    one, other = service.reserve(1), service.reserve(1)
    assert service.waiting == 2
    for refused in (service.reserve, lambda count: service.submit(picture("late"))):
        with pytest.raises(ServiceBusyError):
            refused(1)
    with with_place(one):
        future = service.submit(picture("one"))
        assert service.waiting == 2
        with pytest.raises(ServiceBusyError):  # a place is for one request
            service.submit(picture("two"))
    other.drop()
    other.drop()
    assert service.waiting == 1
    with with_place(other):  # it was given back: it gives no right any more, and takes none
        last = service.submit(picture("last"))
    captioner.door.set()
    assert [answer(each) for each in (first, future, last)] == [("first", 3), ("one", 3), ("last", 3)]


@pytest.mark.parametrize(("reserved", "needed"), [(3, 2), (2, 3), (1, 1)])
def test_a_request_takes_as_many_places_as_it_needs_whatever_was_reserved(make, captioner, reserved, needed):
    service = make(max_queue=3)
    first = held(service, captioner)
    with with_place(service.reserve(reserved)):
        given = [picture(number) for number in range(needed)]
        run = contextvars.copy_context().run
        caller = threading.Thread(target=run, args=(service.caption_batch, given))
        caller.start()
        until(lambda: service.waiting == needed)
    captioner.door.set()
    caller.join(LONG_S)
    assert answer(first) == ("first", 3)
    assert service.waiting == 0


def test_places_that_nobody_uses_are_free_after_the_time_limit(make):
    service = make(max_queue=1, timeout_s=0.05)
    place = service.reserve(1)
    until(lambda: service.waiting == 0)
    with with_place(place), pytest.raises(ServiceTimeoutError):
        service.caption(picture("late"))
    assert service.caption(picture("next")) == ("next", 3)


def test_the_model_does_not_wait_for_places_that_nobody_works_at(make):
    service = make(max_wait_ms=1000.0, timeout_s=LONG_S)
    service.reserve(1)
    assert service._batcher._patience_s(1) == 0
    assert service.caption(picture("alone")) == ("alone", 3)


def test_closing_does_not_wait_for_places_that_nobody_works_at(make):
    service = make(timeout_s=LONG_S)
    place = service.reserve(1)
    service.close(drain_s=1e6)
    with with_place(place), pytest.raises(ServiceClosedError):
        service.caption(picture("late"))


def test_a_service_that_drains_gives_no_places_at_the_door(make):
    service = make()
    place = service.reserve(1)
    service.drain()
    with pytest.raises(ServiceClosedError):
        service.reserve(1)
    with with_place(place):
        assert service.caption(picture("inside")) == ("inside", 3)


def test_a_place_of_one_service_is_none_in_another(make):
    service, other = make(max_queue=1), make(max_queue=1)
    with with_place(service.reserve(1)):
        assert other.caption(picture("there")) == ("there", 3)
        assert service.waiting == 1
        assert service.caption(picture("here")) == ("here", 3)


def test_a_batch_is_admitted_whole_or_not_at_all(make, captioner):
    service = make(max_queue=3)
    held(service, captioner)
    waiting = service.submit(picture(1))
    with pytest.raises(ServiceBusyError):
        service.caption_batch([picture(number) for number in range(3)])
    assert service.waiting == 1
    captioner.door.set()
    answer(waiting)
    assert service.caption_batch([picture(number) for number in range(3)]) == [("0", 3), ("1", 3), ("2", 3)]


def test_a_request_that_can_never_fit_is_a_mistake_not_a_full_queue(make):
    with pytest.raises(ConfigError, match="at most 3 pictures per request, got 4"):
        make(max_queue=3).caption_batch([picture(number) for number in range(4)])


def test_a_bad_picture_never_reaches_the_model_and_gives_its_place_back(make, captioner):
    service = make(max_queue=1, max_pixels=10_000)
    with pytest.raises(ImageReadError):
        service.caption(b"no picture")
    with pytest.raises(ImageTooLargeError):
        service.caption(claiming(20_000)["png"])
    assert captioner.batches == []
    assert service.waiting == 0
    assert service.caption(picture("good")) == ("good", 3)


def test_bad_pictures_of_a_batch_get_their_errors_in_their_places(make):
    service = make(max_upload_bytes=100_000)
    good, bad, large = encode(gradient(), "PNG"), b"no picture", bytes(100_001)
    found = service.caption_batch([bad, good, large])
    assert [type(each) for each in found] == [ImageReadError, tuple, ImageTooLargeError]


def test_impossible_options_are_refused_before_anything_else(make, captioner):
    service = make(max_queue=1)
    held(service, captioner)
    service.submit(picture("takes the only place"))
    for call in (service.caption, service.submit, service.stream):
        with pytest.raises(ConfigError):
            call(b"no picture", beam_size=0)
    with pytest.raises(ConfigError):
        service.caption_batch([b"no picture"], beams=3)


@pytest.mark.parametrize("one", ["photo.jpg", b"bytes", 3])
def test_one_picture_is_no_batch(make, one):
    with pytest.raises(ConfigError, match="list of pictures"):
        make().caption_batch(one)


def test_a_batch_of_nothing_is_nothing(make):
    assert make().caption_batch([]) == []


# --- Cancelled and late ---


def test_a_cancelled_picture_leaves_the_queue(make, captioner):
    service = make()
    first = held(service, captioner)
    gone, stays = service.submit(picture("gone")), service.submit(picture("stays"))
    assert gone.cancel()
    assert service.waiting == 1
    captioner.door.set()
    assert answer(stays) == ("stays", 3)
    assert answer(first) == ("first", 3)
    assert captioner.batches == [["first"], ["stays"]]
    with pytest.raises(CancelledError):
        gone.result(timeout=LONG_S)


def test_of_a_caller_who_left_nothing_waits_and_nothing_more_is_decoded(make, captioner, monkeypatch):
    service, callers = make(), Callers()
    first = held(service, captioner)
    other = service.submit(picture("other"))
    decoded = []
    monkeypatch.setattr(captioner, "prepare", lambda source: decoded.append(source.name) or source)

    def pictures():
        yield picture("one")
        yield picture("two")

    with callers.waiting("call", "page") as caller:
        one = service.submit(picture("one"))
        callers.leave("another page")
        assert service.waiting == 2
        callers.leave("page")
        assert one.cancelled()
        assert service.waiting == 1
        with pytest.raises(CancelledError):
            service.caption_batch([*pictures()])
        with pytest.raises(CancelledError):
            service.score(picture("three"), "a dog")
        late: Future = Future()
        caller.wait_for(late)
        assert late.cancelled()
    assert decoded == ["one"]
    assert service.waiting == 1
    assert callers._present == {}
    service.submit(picture("later"))  # who comes after is another
    captioner.door.set()
    assert (answer(first), answer(other)) == (("first", 3), ("other", 3))
    service.close(LONG_S)
    assert captioner.batches == [["first"], ["other", "later"]]
    assert service.telemetry.requests.value(operation="caption", outcome="Cancelled") == 1
    assert service.telemetry.requests.value(operation="score", outcome="Cancelled") == 1


def test_what_has_started_cannot_be_cancelled(make, captioner):
    service = make()
    first = held(service, captioner)
    assert not first.cancel()
    captioner.door.set()
    assert answer(first) == ("first", 3)


def test_late_requests_end_with_a_timeout_and_leave_the_queue(make, captioner):
    service = make(timeout_s=1)
    running = held(service, captioner)
    waiting = service.submit(picture("waiting"))
    for future in (running, waiting):
        with pytest.raises(ServiceTimeoutError, match="within the time limit of 1 s"):
            answer(future)
    assert service.waiting == 0
    captioner.door.set()
    service.close(LONG_S)
    assert captioner.batches == [["first"]]


def test_a_model_that_hangs_is_not_ready(make, captioner):
    service = make(timeout_s=1)
    assert service.ready
    with pytest.raises(ServiceTimeoutError):
        answer(held(service, captioner))
    until(lambda: not service.ready)
    captioner.door.set()
    until(lambda: service.ready)


# --- Faults ---


def test_a_failing_batch_fails_only_who_is_to_blame(make, captioner):
    def fault(names):
        if "bad" in names:
            raise SearchError("no caption")

    service = make()
    held(service, captioner)
    captioner.fault = fault
    futures = [service.submit(picture(name)) for name in ("a", "bad", "b")]
    captioner.door.set()
    assert answer(futures[0]) == ("a", 3)
    assert answer(futures[2]) == ("b", 3)
    with pytest.raises(SearchError):
        answer(futures[1])


def test_what_is_too_much_together_is_run_one_by_one(make, captioner):
    def fault(names):
        if len(names) > 1:
            raise MemoryError

    service = make()
    held(service, captioner)
    captioner.fault = fault
    futures = [service.submit(picture(number)) for number in range(5)]
    captioner.door.set()
    assert [answer(future) for future in futures] == [(str(number), 3) for number in range(5)]
    assert service.telemetry.batch_size.count() == 6


def test_an_unforeseen_fault_is_an_error_of_the_service_with_its_cause(make, captioner):
    def fault(names):
        raise ZeroDivisionError("secret.jpg")

    captioner.fault = fault
    service = make()
    with pytest.raises(ServiceError, match="ZeroDivisionError") as caught:
        service.caption(picture(1))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "secret" not in str(caught.value)
    captioner.fault = None
    assert service.caption(picture(2)) == ("2", 3)


def test_outcomes_that_do_not_fit_their_pictures_are_a_fault():
    batcher = Batcher(lambda key, works: [], max_wait_s=0, max_queue=1, timeout_s=LONG_S, telemetry=Telemetry())
    ticket = batcher.admit(1)
    future = batcher.put(ticket, "key", 1, limit=1).future
    batcher.release(ticket)
    with pytest.raises(ServiceError):
        answer(future)
    batcher.close(LONG_S)


def test_the_end_of_the_model_thread_is_fatal_and_seen(make, captioner):
    def fault(names):
        raise SystemExit

    service = make()
    running = held(service, captioner)
    waiting = service.submit(picture("waiting"))
    captioner.fault = fault
    captioner.door.set()
    for future in (running, waiting):
        with pytest.raises(ServiceError, match="SystemExit"):
            answer(future)
    assert not service.ready
    with pytest.raises(ServiceError, match="start it again"):
        service.caption(picture("late"))
    assert service.telemetry.ready.value() == 0


# --- Closing ---


def test_closing_finishes_what_is_open_and_refuses_what_comes(make, captioner):
    service = make()
    open_ = [held(service, captioner), service.submit(picture("waiting"))]
    closing = threading.Thread(target=service.close, args=(LONG_S,))
    closing.start()
    until(lambda: service.refusal() is not None)
    assert not service.ready
    with pytest.raises(ServiceClosedError):
        service.caption(picture("late"))
    captioner.door.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert [answer(future) for future in open_] == [("first", 3), ("waiting", 3)]
    service.close()


def test_closing_without_patience_answers_everybody(make, captioner):
    service = make()
    open_ = [held(service, captioner), service.submit(picture("waiting"))]
    closing = threading.Thread(target=service.close, args=(0.0,))
    closing.start()
    for future in open_:
        with pytest.raises(ServiceClosedError):
            answer(future)
    captioner.door.set()
    closing.join(LONG_S)
    assert not closing.is_alive()


def test_draining_shuts_the_door_and_answers_who_is_inside(make):
    service = make()
    service.drain()
    assert isinstance(service.refusal(), ServiceClosedError)
    assert not service.ready
    assert service.caption(picture(1)) == ("1", 3)


def test_leaving_the_context_closes(captioner):
    with RealService(captioner) as service:
        assert service.caption(picture(1)) == ("1", 3)
    with pytest.raises(ServiceClosedError):
        service.caption(picture(2))


# --- Sentences and streams ---


def test_scores_and_streams_take_their_turn_in_the_queue(make, captioner):
    service = make()
    held(service, captioner)
    results = {}
    threads = [
        threading.Thread(target=lambda: results.update(score=service.score(picture("a"), "a dog"))),
        threading.Thread(target=lambda: results.update(stream=[*service.stream(picture("b"))])),
    ]
    for thread in threads:
        thread.start()
    until(lambda: service.waiting == 2)
    captioner.door.set()
    for thread in threads:
        thread.join(LONG_S)
    assert results == {"score": ("a", "a dog"), "stream": ["one", "two", "three"]}


def test_a_stream_raises_at_once_what_is_known_at_once(make):
    with pytest.raises(ConfigError, match="beam"):
        make().stream(picture(1), method="beam")


def test_a_stream_that_is_closed_early_frees_the_model(make, captioner):
    endless = threading.Event()

    def words(prepared, **options):
        def run():
            while True:
                assert not endless.wait(0)
                yield "word"

        return run()

    captioner.stream = words
    service = make()
    stream = service.stream(picture(1))
    assert next(stream) == "word"
    stream.close()
    assert service.caption(picture(2)) == ("2", 3)


def test_a_picture_is_opened_within_the_limits_in_turn_and_for_who_is_there(make):
    service = make(max_pixels=64 * 40, timeout_s=1, max_queue=8)
    png = encode(gradient(), "PNG")
    assert service.open(png, name="mine").full_hw_px == (40, 64)
    with pytest.raises(ImageTooLargeError):
        service.open(encode(gradient().resize((65, 40)), "PNG"))
    with Callers().waiting("call") as caller:
        caller.leave()
        with pytest.raises(CancelledError):
            service.open(png)
    while service._decoding.enter(0.0):  # nobody else has a turn
        pass
    with pytest.raises(ServiceTimeoutError):
        service.open(png)
    assert service.waiting == 0


# --- The turnstile before the decoders ---


def test_the_turnstile_lets_in_who_came_first():
    turnstile = Turnstile(1)
    assert turnstile.enter(0.0)
    order, threads = [], []

    def pass_through(name):
        assert turnstile.enter(time.monotonic() + LONG_S)
        order.append(name)
        turnstile.leave()

    for name in range(5):
        threads.append(threading.Thread(target=pass_through, args=(name,)))
        threads[-1].start()
        until(lambda name=name: len(turnstile._line) > name)
    turnstile.leave()
    for thread in threads:
        thread.join(LONG_S)
    assert order == [0, 1, 2, 3, 4]


def test_the_turnstile_forgets_who_gave_up():
    turnstile = Turnstile(1)
    assert turnstile.enter(0.0)
    assert not turnstile.enter(0.0)
    turnstile.leave()
    assert turnstile.enter(0.0)


def test_together_those_inside_weigh_no_more_than_the_capacity_and_the_line_keeps_its_order():
    turnstile = Turnstile(4, capacity=100)
    order, threads = [], []

    def pass_through(weight):
        assert turnstile.enter(time.monotonic() + LONG_S, weight=weight)
        order.append(weight)

    assert turnstile.enter(0.0, weight=60)
    for number, weight in enumerate((50, 30, 20)):
        threads.append(threading.Thread(target=pass_through, args=(weight,)))
        threads[-1].start()
        until(lambda number=number: len(turnstile._line) > number)
    assert order == []  # 30 would fit, but 50 came first
    turnstile.leave(weight=60)
    for thread in threads:
        thread.join(LONG_S)
    assert sorted(order) == [20, 30, 50]
    assert not turnstile.enter(0.0, weight=1)
    for weight in order:
        turnstile.leave(weight=weight)
    assert turnstile.enter(0.0, weight=1000)  # too heavy for all, and alone
    assert not turnstile.enter(0.0, weight=1)


def test_when_a_heavy_one_gives_up_who_stood_behind_goes_in():
    turnstile = Turnstile(4, capacity=100)
    assert turnstile.enter(0.0, weight=60)
    heavy = threading.Thread(target=turnstile.enter, args=(time.monotonic() + 0.5,), kwargs={"weight": 90})
    heavy.start()
    until(lambda: len(turnstile._line) == 1)
    assert turnstile.enter(time.monotonic() + LONG_S, weight=30)
    heavy.join(LONG_S)
    assert turnstile._inside == 90


def test_pictures_that_are_decoded_together_have_no_more_pixels_than_fit(make, monkeypatch):
    service = make(max_pixels=10**6)
    seen = []

    def noting(deadline_s, *, weight):
        seen.append(weight)
        return True

    monkeypatch.setattr(service._decoding, "enter", noting)
    png = encode(gradient(), "PNG")
    service.open(png)
    service.caption(png)
    assert seen == [64 * 40] * 2
    assert service._decoding._capacity == DECODING_PIXELS
    assert make(max_pixels=2 * DECODING_PIXELS)._decoding._capacity == 2 * DECODING_PIXELS


def test_no_more_pictures_are_decoded_at_a_time_than_there_are_processors(make, monkeypatch):
    monkeypatch.setattr("captioner.service.available_cpus", lambda: 1)  # of a container's quota
    assert make()._decoding._free == 1
    monkeypatch.setattr("captioner.service.available_cpus", lambda: 64)
    assert make()._decoding._free == MAX_DECODERS


# --- Limits ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_batch": 1.5},
        {"max_queue": True},
        {"max_queue": -1},
        {"max_wait_ms": -1},
        {"max_wait_ms": math.nan},
        {"timeout_s": 0},
        {"timeout_s": "1"},
        {"max_upload_bytes": 0},
        {"max_pixels": None},
    ],
)
def test_limits_check_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServiceLimits(**wrong)


# --- The real model ---


OPTIONS = [
    {},
    {"method": "greedy"},
    {"beam_size": 4, "n_best": 3},
    {"method": "sample", "seed": 7, "n_best": 2},
    {"method": "sample", "seed": 7, "temperature": 1.5},
    {"beam_size": 4, "groups": 2, "diversity": 1.0},
]


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_caption_from_a_shared_batch_is_the_one_alone(tiny_captioner, options):
    pictures = [noise(number) for number in range(7)]
    alone = [tiny_captioner.caption(each, **options) for each in pictures]
    with RealService(tiny_captioner, limits=ServiceLimits(max_wait_ms=1000.0)) as service:
        together = service.caption_batch(pictures, **options)
        assert service.telemetry.batch_size.count() == 1  # they did share one
        single = service.caption(pictures[3], **options)
    for one, other in zip([*alone, alone[3]], [*together, single], strict=True):
        assert other.text == one.text
        assert other.score == pytest.approx(one.score, abs=1e-4)
        assert [each.text for each in other.alternatives] == [each.text for each in one.alternatives]
        for mine, its in zip(one.words, other.words, strict=True):
            np.testing.assert_allclose(its.attention, mine.attention, atol=1e-4)


def test_streams_and_scores_are_those_of_the_captioner(tiny_captioner):
    with RealService(tiny_captioner) as service:
        words = [word.text for word in service.stream(noise(1))]
        assert words == [word.text for word in tiny_captioner.stream(noise(1))]
        sentence = tiny_captioner.caption(noise(1)).text
        assert service.score(noise(2), sentence).score == pytest.approx(
            tiny_captioner.score(noise(2), sentence).score, abs=1e-4
        )
        with pytest.raises(SearchError, match="does not know"):
            service.score(noise(2), "a xylophone")
        with pytest.raises(SearchError, match="does not know"):
            service.caption(noise(2), must_include=["xylophone"])
        with pytest.raises(ConfigError, match="beam knows no word"):
            service.stream(noise(2), method="beam")
