"""`deploy/`: the Ray Serve application, started and called for real; and what its pictures cost."""

import concurrent.futures
import functools
import http.client
import json
import re
import shlex
import socket
from pathlib import Path
from urllib.parse import urlencode

import loops
import pytest
import rays
from pictures import EXAMPLES

from captioner import Captioner, ConfigError

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2**20


@pytest.fixture(scope="module")
def from_root():
    """Modules of `deploy` are found, here and by Ray's processes, as from the repository's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def ray(from_root):
    ray = pytest.importorskip("ray", reason="Ray is not installed; it comes with pip install 'captioner[ray]'")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed; it comes with pip install 'ray[serve]'")
    return ray


@pytest.fixture(scope="module")
def model(tiny_captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_captioner.save(folder)
    return folder


@pytest.fixture(scope="module")
def call(ray, model):
    """Start the application on this machine alone; return how to call it."""
    from ray import serve

    from deploy.serve_app import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rays.start(ray)
    settings = {"model": str(model), "device": "cpu", "max_upload_bytes": str(LIMIT), "max_replicas": "1"}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(settings))
        yield functools.partial(request, port)
        serve.shutdown()
    finally:
        ray.shutdown()


def request(port, body=b"", *, verb="POST", path="/", **query):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(verb, f"{path}?{urlencode(query, doseq=True)}", body)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text


def test_the_served_record_is_the_one_of_the_library(call, tiny_captioner):
    data = EXAMPLES[0].read_bytes()
    expected = tiny_captioner.caption(data, beam_size=4, n_best=2, ban=["dog", "man"]).to_record("a photo.jpg")
    status, found = call(data, image="a photo.jpg", beam_size=4, n_best=2, ban=["dog", "man"])
    assert status == 200
    assert list(found) == list(expected)
    assert (found["image"], found["caption"], found["error"]) == ("a photo.jpg", expected["caption"], None)
    assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert len(found["alternatives"]) == 1


def test_many_requests_at_once_get_their_own_captions(call, tiny_captioner):
    photos = [path.read_bytes() for path in EXAMPLES[:4]]
    options = [{"method": "greedy"}, {"beam_size": 2}]
    asked = [(photo, option) for photo in photos for option in options] * 2
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda each: call(each[0], **each[1]), asked))
    expected = {id(photo): {} for photo in photos}
    for photo in photos:
        for option in options:
            expected[id(photo)][str(option)] = tiny_captioner.caption(photo, **option).text
    for (photo, option), (status, found) in zip(asked, answers, strict=True):
        assert (status, found["caption"]) == (200, expected[id(photo)][str(option)])


@pytest.mark.parametrize(
    ("body", "query", "status", "kind", "message"),
    [
        (b"no picture", {}, 422, "ImageReadError", "<bytes>: a text file, not a picture"),
        (b"", {}, 422, "ImageReadError", "<bytes>"),
        (bytes(LIMIT + 1), {}, 413, "ImageTooLargeError", f"more than {LIMIT} bytes"),
        (None, {"beam_size": "three"}, 400, "ConfigError", "beam_size must be a whole number, got 'three'"),
        (None, {"beam_size": "0"}, 400, "ConfigError", "beam_size"),
        (None, {"beam": "3"}, 400, "ConfigError", "did you mean 'beam_size'"),
        (None, {"seed": ["1", "2"]}, 400, "ConfigError", "seed is given twice"),
        (None, {"must_include": "zeppelin"}, 422, "SearchError", "zeppelin"),
    ],
)
def test_what_cannot_be_captioned_is_answered_with_our_message(call, body, query, status, kind, message):
    found_status, found = call(EXAMPLES[0].read_bytes() if body is None else body, **query)
    assert found_status == status
    assert found["error"]["type"] == kind
    assert message in found["error"]["message"]
    assert found["caption"] is None


def test_health_and_method_are_answered(call):
    assert call(verb="GET", path="/-/healthz") == (200, b"success")
    status, found = call(verb="GET")
    assert (status, found["error"]["message"]) == (405, "POST the bytes of a picture")


def test_a_copy_whose_model_has_failed_is_unhealthy(ray, model, monkeypatch):
    from deploy.serve_app import CaptionReplica, Settings

    replica = CaptionReplica(Settings(model=str(model), device="cpu"))
    picture, options = replica._captioner.prepare(EXAMPLES[0]), replica._captioner.search_options()
    assert [str(found) for found in loops.run(replica._caption_all([(picture, options)]))]
    replica.check_health()
    monkeypatch.setattr(Captioner, "caption_batch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loops.run(replica._caption_all([(picture, options)]))
    with pytest.raises(ZeroDivisionError):
        replica.check_health()


def test_a_wrong_setting_of_the_application_is_said(ray):
    from deploy.serve_app import app

    with pytest.raises(ConfigError, match="unknown setting modle"):
        app({"modle": "x"})
    with pytest.raises(ConfigError, match="max_batch must be a whole number, got 'many'"):
        app({"max_batch": "many"})


# --- What it costs ---


def test_costs_follow_from_rates_and_prices(from_root):
    from deploy.cost import Machine, duration, machine_hours, parse_machine

    machine = parse_machine("two = cores=50:0.25")
    assert machine == Machine("two = cores", 50.0, 0.25)
    assert machine_hours(3600 * 50, machine) == pytest.approx(1.0)
    assert [duration(hours) for hours in (0.5, 6.04, 60, 240)] == ["30 min", "6.04 h", "2.5 days", "10 days"]


def test_the_table_of_the_page_is_what_its_command_prints(from_root, capsys):
    from deploy.cost import main

    page = (ROOT / "deploy" / "README.md").read_text()
    (command,) = re.findall(r"^python deploy/cost\.py (.+)$", page, re.MULTILINE)
    main(shlex.split(command))
    assert capsys.readouterr().out in page


@pytest.mark.parametrize(
    "text", ["50:1", "=50:1", "a=50", "a=0:1", "a=-1:1", "a=nan:1", "a=inf:1", "a=1:-1", "a=1:2:3"]
)
def test_an_impossible_machine_is_refused(from_root, text, capsys):
    from deploy.cost import main

    with pytest.raises(SystemExit, match="2"):
        main([text])
    assert text in capsys.readouterr().err
