"""Laws of the served process: its options, its login, its health, its end, and what is left after a kill."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import pytest
from pictures import encode, gradient
from served import API, HTTP, ROOT, WAIT_S, Process, ask, events, post, upload
from typer.testing import CliRunner

from captioner import Captioner, ConfigError, cli, serving
from captioner.model import DECODERS
from captioner.serving import ServeSettings, Stopping, read_users, title
from captioner.telemetry import Telemetry

PNG = encode(gradient(), "PNG")


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    """A tiny model as a folder."""
    from captioner import Captioner

    folder = tmp_path_factory.mktemp("model") / "tiny"
    Captioner(tiny_checkpoint("multihead"), device="cpu").save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    """A page in a process of its own, with login, log and small limits."""
    folder = tmp_path_factory.mktemp("page")
    limits = ("--max-upload-mb", "1", "--max-pixels", "1000000", "--max-queue", "4", "--log")
    with Process(folder, "--model", model, "--compare", model, *limits, CAPTIONER_AUTH="me:secret") as page:
        yield page


@pytest.fixture(scope="module")
def known(page):
    """A client that has logged in."""
    with httpx.Client(timeout=180) as client:
        answer = client.post(f"{page.url}/login", data={"username": "me", "password": "secret"})
        assert answer.status_code == 200
        yield client


# --- A page that runs ---


def test_health_and_metrics_need_no_login(page):
    assert HTTP.get(f"{page.url}/healthz").json() == {"status": "alive"}
    assert HTTP.get(f"{page.url}/readyz").json() == {"status": "ready"}
    metrics = HTTP.get(f"{page.url}/metrics").text
    assert "\ncaptioner_ready 1\n" in metrics
    sample = re.compile(r'[a-z_]+(\{([a-z_]+="[^"]*",?)+\})? [\d.e+-]+')
    assert all(sample.fullmatch(line) for line in metrics.splitlines() if not line.startswith("#"))


def test_everything_else_needs_the_login(page):
    call = post(page.url, "call/v2/caption", {"image": {}})
    form = HTTP.post(f"{page.url}{API}/upload", files={"files": ("a.png", PNG)})
    shown = HTTP.get(f"{page.url}{API}/file={page.uploads()[0]}/a.png")
    assert (call.status_code, form.status_code) == (401, 401)
    assert shown.status_code in (401, 404)
    assert HTTP.get(f"{page.url}/config").status_code == 401
    wrong = HTTP.post(f"{page.url}/login", data={"username": "me", "password": "wrong"})
    assert wrong.status_code == 400


def test_the_limits_of_the_options_hold(page, known):
    def said(data):
        answer = known.post(f"{page.url}{API}/upload", files={"files": ("a.png", data)})
        if answer.status_code != 200:
            return answer.status_code
        event = known.post(f"{page.url}{API}/call/v2/caption", json={"image": {"path": answer.json()[0]}}).json()
        return events(known.get(f"{page.url}{API}/call/v2/caption/{event['event_id']}").text).value

    assert said(PNG)[0]["caption"]
    assert said(encode(gradient().resize((1100, 1000)), "PNG"))["title"] == "ImageTooLargeError"
    assert said(os.urandom(1_200_000)) == 413


def test_uploads_lie_where_nobody_else_can_read(page):
    (folder,) = [each for each in page.uploads() if each.is_dir()]
    assert folder.stat().st_mode & 0o077 == 0


def test_the_log_is_json_and_holds_neither_captions_nor_names(page):
    lines = [line for line in page.errors().splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    assert {record["event"] for record in records} >= {"http", "request"}
    assert not any("captions" in record or "a.png" in line for record, line in zip(records, lines, strict=True))


# --- The end ---


def load_until(url, ended, outcomes):
    """Ask again and again; note each answer."""
    with httpx.Client(timeout=180) as client:
        path = client.post(f"{url}{API}/upload", files={"files": ("a.png", PNG)}).json()[0]
        body = {"image": {"path": path}, "beam_size": 8}
        while not ended.is_set():
            try:
                call = client.post(f"{url}{API}/call/v2/caption", json=body)
            except httpx.TransportError:
                outcomes.put("gone")  # nothing listens any more
                return
            if call.status_code == 503:
                outcomes.put(call.headers["retry-after"] and "refused")
                return
            event = call.json()["event_id"]
            outcomes.put(events(client.get(f"{url}{API}/call/v2/caption/{event}").text).kind)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_under_load_open_requests_are_answered_new_ones_refused_and_nothing_is_left(model, tmp_path, number, status):
    with Process(tmp_path, "--model", model) as page:
        ended, outcomes = threading.Event(), queue.SimpleQueue()
        users = [threading.Thread(target=load_until, args=(page.url, ended, outcomes)) for _ in range(6)]
        for user in users:
            user.start()
        before = [outcomes.get(timeout=WAIT_S) for _ in range(12)]
        assert page.stop(number) == status
        ended.set()
        for user in users:
            user.join()
        after = [outcomes.get() for _ in range(outcomes.qsize())]
        assert set(before) == {"complete"}
        assert set(after) <= {"complete", "refused", "gone"}
        assert "refused" in after
        assert page.uploads() == []
        assert page.errors() == ("error: interrupted\n" if number == signal.SIGINT else "")


def test_after_a_kill_under_load_the_next_start_answers_and_deletes_what_was_left(model, tmp_path):
    with Process(tmp_path, "--model", model) as page:
        ended, outcomes = threading.Event(), queue.SimpleQueue()
        users = [threading.Thread(target=load_or_fail, args=(page.url, ended, outcomes)) for _ in range(4)]
        for user in users:
            user.start()
        assert outcomes.get(timeout=WAIT_S) == "complete"
        assert page.stop(signal.SIGKILL) == -signal.SIGKILL
        ended.set()
        for user in users:
            user.join()
        left = page.uploads()
        assert len(left) == 2  # the folder and its lock
    with Process(tmp_path, "--model", model) as again:
        assert not set(left) & set(again.uploads())
        answer = ask(again.url, "caption", image={"path": upload(again.url, PNG)})
        assert answer.kind == "complete"
        assert again.stop() == 0
        assert again.uploads() == []


def load_or_fail(url, ended, outcomes):
    """Ask until the server is gone."""
    try:
        load_until(url, ended, outcomes)
    except (httpx.TransportError, ValueError):  # in the middle of an answer
        outcomes.put("broken")


def test_folders_of_processes_that_live_are_left_alone(tmp_path):
    mine = tmp_path / "captioner-uploads-aa"
    hold = (
        "import sys; from pathlib import Path; from captioner.serving import open_uploads\n"
        f"open_uploads(Path({str(mine)!r})); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        abandoned = tmp_path / "captioner-uploads-bb"
        abandoned.mkdir()
        (abandoned / "half.png").write_bytes(b"half")
        (tmp_path / "captioner-uploads-bb.lock").touch()
        (tmp_path / "captioner-uploads-link.lock").symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_text("precious")
        for lock_file in tmp_path.glob("*.lock"):
            serving._delete_abandoned(lock_file)
        assert mine.is_dir()
        assert not abandoned.exists()
        assert (tmp_path / "precious").read_text() == "precious"
    finally:
        other.communicate("")
    assert not mine.exists()


def test_the_end_has_one_deadline_for_all_that_is_open(monkeypatch):
    monkeypatch.setattr(serving, "DRAIN_S", 0.05)
    told = []
    telemetry = Telemetry()
    telemetry.http_open.add(1)  # one that never ends
    serving.finish(SimpleNamespace(drain=lambda: None, telemetry=telemetry, close=told.append))
    assert told == [0.0]


def test_a_second_interrupt_does_not_wait():
    with Stopping() as stopping:

        def interrupt_who_waits():
            while signal.getsignal(signal.SIGINT) != stopping._note:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        interrupt = threading.Thread(target=interrupt_who_waits)
        interrupt.start()
        assert stopping.wait()
        interrupt.join()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_sigterm_that_comes_early_is_kept():
    with Stopping() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert not stopping.wait()


# --- Options ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port (or GRADIO_SERVER_PORT) must be"),
        (["--max-upload-mb", "0"], "max_upload_bytes must be"),
        (["--max-queue", "-1"], "max_queue must be"),
        (["--max-uploads-mb", "19"], "max_uploads_bytes must be at least max_upload_bytes"),
        (["--trust-proxy", "proxy.example"], "--trust-proxy (or FORWARDED_ALLOW_IPS) must be"),
        (["--max-pixels", "0"], "max_pixels must be"),
        (["--timeout-s", "0"], "timeout_s must be"),
        (["--timeout-s", "nan"], "timeout_s must be"),
        (["--auth", "nobody"], "--auth must be USER:PASSWORD"),
        (["--auth", ":x"], "--auth must be USER:PASSWORD"),
        (["--auth", "x:"], "--auth must be USER:PASSWORD"),
        (["--auth", "a:b", "--auth-file", "x"], "exclude each other"),
        (["--auth-file", "absent"], "absent: cannot be read"),
        (["--log-captions"], "--log-captions needs --log"),
    ],
    ids=str,
)
def test_an_impossible_option_is_one_line_and_status_2(arguments, message):
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_missing_extra_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'captioner\[mcp\]'"):
        ServeSettings(mcp=True)


def test_users_come_from_the_option_the_file_or_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(serving.AUTH_VARIABLE, raising=False)
    assert read_users(None, None) is None
    monkeypatch.setenv(serving.AUTH_VARIABLE, "me:a:b c")
    assert read_users(None, None) == (("me", "a:b c"),)
    assert read_users("you:x", None) == (("you", "x"),)
    (tmp_path / "users").write_text("a:1\n\nb:2\n")
    assert read_users(None, tmp_path / "users") == (("a", "1"), ("b", "2"))
    (tmp_path / "users").write_text("\n")
    for empty in ("", "a"):
        monkeypatch.setenv(serving.AUTH_VARIABLE, empty)
        with pytest.raises(ConfigError, match="must be USER:PASSWORD"):
            read_users(None, None)
    with pytest.raises(ConfigError, match="must be USER:PASSWORD"):
        read_users(None, tmp_path / "users")


def test_the_ends_of_lines_alone_are_no_part_of_a_password(tmp_path):
    (tmp_path / "users").write_bytes("a: 1 \r\n \nb:\u20282\x0b\n".encode())
    assert read_users(None, tmp_path / "users") == (("a", " 1 "), ("b", "\u20282\x0b"))


@pytest.mark.parametrize("given", [" me:geheim", "me:geheim\nyou:geheim\nme:geheim"])
def test_a_password_is_not_repeated_in_messages(tmp_path, given):
    (tmp_path / "users").write_text(given)
    with pytest.raises(ConfigError, match=r"twice|blank") as refused:
        read_users(None, tmp_path / "users")
    assert "geheim" not in str(refused.value)


def test_a_model_is_shown_without_its_path():
    assert title(None, 1) == "The bundled model (1)"
    assert title("/home/me/models/mine", 2) == "mine (2)"


def test_a_model_is_shown_with_its_kind_of_decoder():
    assert set(serving.KINDS) == set(DECODERS)
    assert title("/home/me/models/mine", 2, "mean") == "mine (2), no attention"


def test_both_ways_to_start_have_the_same_options():
    def options(*command):
        shown = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        return set(re.findall(r"--[a-z-]+", shown.stdout))

    served = options("-m", "captioner", "serve")
    assert served == options("app.py")
    assert served >= {"--model", "--compare", "--host", "--port", "--auth", "--max-upload-mb", "--max-pixels"}
    assert served >= {"--max-queue", "--timeout-s", "--mcp", "--log", "--log-captions", "--max-uploads-mb"}
    assert served >= {"--device", "--runtime", "--threads", "--trust-proxy"}


def test_every_model_is_loaded_as_the_options_say(monkeypatch, tiny_captioner):
    loaded = []
    monkeypatch.setattr(Captioner, "load", lambda model, **how: loaded.append((model, how)) or tiny_captioner)
    settings = ServeSettings(model="one", compare=("two",), device="cpu", runtime="torch", threads=3)
    with contextlib.ExitStack() as closing:
        serving.open_services(settings, closing)
    assert loaded == [(model, {"device": "cpu", "runtime": "torch", "threads": 3}) for model in ("one", "two")]


@pytest.mark.parametrize("trusted", ["", "*", "127.0.0.1", "10.0.0.0/8, ::1"])
def test_proxies_are_named_by_address_or_network(trusted):
    assert ServeSettings(trust_proxy=trusted).trust_proxy == trusted


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="choose others with --host, --port"):
            serving.require_free("127.0.0.1", taken.getsockname()[1])
