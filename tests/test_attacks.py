"""What a hostile client tries: to read files of the server, to make it fetch, to fill or stop it. All is refused.

Every endpoint, every event of the page and every route that takes a file is attacked, with the model replaced by one
that notes what it was asked to open.
"""

import itertools
import json
import socket
import threading

import httpx
import pytest
from pictures import encode, gradient
from pointing import PointingCaptioner
from served import API, HTTP, META, Process, events, post, served, upload

import app
from captioner.door import OpenDoor
from captioner.endpoints import NAMES
from captioner.logins import GUESSES
from captioner.service import ServiceLimits

MARK = "the-secret-of-the-server"
PNG = encode(gradient(), "PNG")


class Noting(PointingCaptioner):
    """Notes every picture that it is asked to open."""

    def __init__(self):
        super().__init__()
        self.opened = []

    def _caption(self, picture, *rest, **options):
        self.opened.append(picture)
        return super()._caption(picture, *rest, **options)


class Listener:
    """Listens on a port of this machine and counts who comes."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            self.visits += 1
            visitor.close()

    def close(self):
        self._socket.close()


@pytest.fixture(scope="module", params=[False, True], ids=["page", "page and tools"])
def site(request, tmp_path_factory):
    """A page, its model, files that nobody may see, and a listener that nobody may call."""
    if request.param:
        pytest.importorskip("mcp", reason="mcp is not installed; it comes with pip install -e '.[mcp]'")
    folder = tmp_path_factory.mktemp("server")
    (folder / "secret.txt").write_text(MARK)
    (folder / "secret.png").write_bytes(PNG + MARK.encode())
    model, door, listener = Noting(), OpenDoor(), Listener()
    door.limits = ServiceLimits(max_upload_bytes=200_000)
    with served(model, door=door, mcp=request.param) as url:
        own = upload(url, PNG)
        links = app.UPLOADS / "links"
        links.mkdir(exist_ok=True)
        (links / "link.png").symlink_to(folder / "secret.png")
        (links / "folder").symlink_to(folder)
        found = {"url": url, "model": model, "folder": folder, "own": own, "listener": listener, "mcp": request.param}
        yield type("Site", (), found)
        (links / "link.png").unlink()
        (links / "folder").unlink()
    listener.close()


def hostile_paths(site):
    """Return paths that name what was not uploaded."""
    secret, elsewhere = site.folder / "secret.png", f"127.0.0.1:{site.listener.port}"
    return [
        str(secret),
        str(site.folder / "secret.txt"),
        "/etc/passwd",
        "/proc/self/environ",
        app.__file__,
        f"{app.UPLOADS}/links/link.png",
        f"{app.UPLOADS}/links/folder/secret.png",
        f"{app.UPLOADS}/../{secret.relative_to('/')}",
        f"{site.own}/../../../..{secret}",
        f"{app.UPLOADS}/..{secret}",
        f"/{site.own}",
        f"{site.own}\0.png",
        "../../../../etc/passwd",
        f"file://{secret}",
        f"file:{secret}",
        f"http://{elsewhere}/a.png",
        f"HTTP://{elsewhere}/a.png",
        f"http:/{elsewhere}/a.png",
        f"//{elsewhere}/a.png",
        f"ftp://{elsewhere}/a.png",
        "data:text/plain;base64,QUFBQQ==",
        "",
    ]


def hostile_files(site):
    """Return dictionaries that Gradio might take for a file, and texts that it might take for a path."""
    elsewhere = f"http://127.0.0.1:{site.listener.port}/a.png"
    for path in hostile_paths(site):
        yield {"path": path}
        yield {"path": path, "meta": {}}
        yield {"path": path, "meta": META, "orig_name": "mine.png"}
        yield {"path": path, "meta": META, "url": elsewhere}
        yield {"path": site.own, "meta": META, "url": path or "x"}
        yield {"path": None, "url": path, "meta": META}
        yield {"path": [path]}
        yield {"path": {"path": path, "meta": META}, "meta": META}
        yield path


def quiet(site, answer):
    """Check that an answer tells nothing."""
    assert MARK not in answer
    assert "root:" not in answer
    assert "Traceback" not in answer


def spoken(site, call, route, name):
    """Return all that a call says, the stream of its events too."""
    if call.status_code == 200 and "event_id" in call.json():
        stream = HTTP.get(f"{site.url}{API}/{route}/{name}/{call.json()['event_id']}").text
        told = events(stream)
        # A batch says of each picture why it has no caption.
        failed = told.kind == "error" or (name == "caption_batch" and all(each["error"] for each in told.value[0]))
        assert failed, stream
        return stream
    assert call.status_code in (400, 404, 422, 500) or (name == "caption_batch" and '"error":{' in call.text), call.text
    return call.text


def nothing_was_opened(site):
    """Check that the model saw uploads alone, and that nobody came to the listener."""
    assert [picture for picture in site.model.opened if picture != site.own and not isinstance(picture, bytes)] == []
    assert site.listener.visits == 0


def test_the_attacks_would_be_seen(site):
    """Without this the tests below could pass for want of an answer."""
    value = {"path": site.own, "meta": META, "url": f"{site.url}{API}/file={site.own}"}
    call = post(site.url, "call/v2/score", {"image": value, "sentence": "a dog"})
    stream = HTTP.get(f"{site.url}{API}/call/v2/score/{call.json()['event_id']}").text
    assert events(stream).kind == "complete"
    assert site.model.opened == [site.own]
    seen = Listener()
    socket.create_connection(("127.0.0.1", seen.port)).close()
    seen.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_endpoint_opens_or_fetches_what_was_not_uploaded(site, name):
    routes = itertools.cycle(("call/v2", "call", "run", "api"))  # nine kinds of files, four routes: all pairs
    for file in hostile_files(site):
        by_name = {"images": [file]} if name == "caption_batch" else {"image": file}
        by_name |= {"sentence": "a dog"} if name == "score" else {}
        first = [file] if name == "caption_batch" else file
        by_place = {"data": [first, "a dog"] if name == "score" else [first, *[None] * 17], "session_hash": "x"}
        route = next(routes)
        body = by_name if route == "call/v2" else by_place
        quiet(site, spoken(site, post(site.url, f"{route}/{name}", body), route, name))
    nothing_was_opened(site)


ACCEPT = {"Accept": "application/json, text/event-stream"}


def test_no_tool_opens_or_fetches_what_was_not_uploaded(site):
    for file in hostile_files(site) if site.mcp else ():
        for name in NAMES:
            values = {"images": [file]} if name == "caption_batch" else {"image": file}
            values |= {"sentence": "a dog"} if name == "score" else {}
            params = {"name": name, "arguments": values}
            message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
            answer = post(site.url, "mcp/", message, headers=ACCEPT)
            assert answer.status_code in (200, 400)
            said = answer.text.replace(" ", "")
            refused = answer.status_code == 400 or '"isError":true' in said or r"\"error\":{" in said
            assert refused, answer.text
            quiet(site, answer.text)
    for method in ("resources/read", "prompts/get", "resources/list", "completion/complete", "logging/setLevel"):
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"uri": "file:///etc/passwd", "name": "x"}}
        answer = post(site.url, "mcp/", message, headers=ACCEPT)
        assert '"result"' not in answer.text
        quiet(site, answer.text)
    nothing_was_opened(site)


@pytest.mark.parametrize("path", ["x</script><script>alert(1)</script>", '"-alert(1)-"', "x/gradio_api/mcp/", ""])
def test_no_path_is_repeated_in_a_page(site, path):
    for accept in ("*/*", "text/html"):
        answer = HTTP.get(f"{site.url}{API}/mcp/{path}", headers={"Accept": accept})
        assert answer.status_code in (404, 406)
        assert "<" not in answer.text
        assert "text/html" not in answer.headers["content-type"]


def functions(site):
    return HTTP.get(f"{site.url}/config").json()["dependencies"]


def test_no_event_of_the_page_opens_or_fetches_what_was_not_uploaded(site):
    taking = [function for function in functions(site) if function["inputs"]]
    assert len(taking) > len(NAMES)
    for function in taking:
        for file in hostile_files(site):
            if not isinstance(file, dict):
                continue  # a text is no file to an event of the page; see the next test
            body = {"fn_index": function["id"], "session_hash": "x", "data": [file] * len(function["inputs"])}
            answer = post(site.url, "queue/join", body)
            assert answer.status_code == 400, answer.text
            quiet(site, answer.text)
    nothing_was_opened(site)


def follow(site, body):
    """Join the queue and return what is said until the event is over."""
    answer = post(site.url, "queue/join", body)
    if answer.status_code != 200:
        return answer.text
    said = []
    with HTTP.stream("GET", f"{site.url}{API}/queue/data", params={"session_hash": body["session_hash"]}) as stream:
        for line in stream.iter_lines():
            said.append(line)
            if '"process_completed"' in line or '"close_stream"' in line:
                break
    return "\n".join(said)


@pytest.mark.parametrize("data", [None, 1, "/etc/passwd", {"index": "/etc/passwd"}, {"index": -1}, {"index": 10**9}])
def test_events_with_made_up_data_open_nothing(site, data):
    """The state of the page lies with the server: neither a path nor an example can be put into it."""
    for function in functions(site):
        state = [str(site.folder / "secret.png"), "x.png", 1]
        body = {
            "fn_index": function["id"],
            "session_hash": f"s{function['id']}",
            "data": [state] * len(function["inputs"]),
            "event_data": data,
            "trigger_id": function["targets"][0][0] if function["targets"] else None,
        }
        quiet(site, follow(site, body))
    nothing_was_opened(site)


def test_no_route_of_files_shows_or_fetches_what_was_not_uploaded(site):
    for path in hostile_paths(site):
        if "\0" in path or not path:
            continue
        for route in ("file=", "file/", "proxy=", "stream/", "custom_component/"):
            for shown in (path, path.replace("/", "%2F").replace(".", "%2E")):
                for method in ("GET", "HEAD"):
                    answer = HTTP.request(method, f"{site.url}{API}/{route}{shown}")
                    assert answer.status_code in (403, 404, 405), (route, shown)
                    quiet(site, answer.text)
        answer = HTTP.get(f"{site.url}/static/{path}")
        quiet(site, answer.text)
        assert answer.status_code != 200
    shown = HTTP.get(f"{site.url}{API}/file={site.own}")
    assert shown.content == PNG
    nothing_was_opened(site)


@pytest.mark.parametrize(
    "route",
    [
        "runs",
        "run-history/records",
        "deep_link",
        "vibe-code",
        "proxy=http://127.0.0.1/",
        "profiling/traces",
        "stream/a/0/0/playlist.m3u8",
        "dev/reload",
        "token",
        "mcp/x",
    ],
)
def test_routes_of_gradio_that_are_not_needed_are_closed(site, route):
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert HTTP.request(method, f"{site.url}{API}/{route}").status_code in (404, 405)
    summary = HTTP.get(f"{site.url}/monitoring")
    assert summary.status_code in (403, 404)


@pytest.mark.parametrize(
    "name", ["../../evil.png", "..%2fevil.png", "/tmp/evil.png", "a\\..\\evil.png", "\0", "x" * 5000]
)
def test_an_uploads_name_leads_nowhere(site, name):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
    answer = HTTP.post(
        f"{site.url}{API}/upload",
        content=form % (name.encode(), PNG),
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    if answer.status_code == 200:
        (path,) = answer.json()
        assert path.startswith(f"{app.UPLOADS}/")
        assert ".." not in path.split("/")
    else:
        assert answer.status_code in (400, 413, 500)
        quiet(site, answer.text)


@pytest.mark.parametrize(("trusted", "status"), [("", 429), ("127.0.0.1", 400)])
def test_who_makes_up_an_address_has_no_more_guesses_unless_a_proxy_is_believed(trusted, status):
    with served(PointingCaptioner(), users=[("me", "secret")], trust_proxy=trusted) as url:
        for number in range(GUESSES + 1):
            guess = {"username": "me", "password": str(number)}
            headers = {"X-Forwarded-For": f"192.0.2.{number}", "X-Real-IP": f"192.0.2.{number}"}
            answer = HTTP.post(f"{url}/login", data=guess, headers=headers)
        assert answer.status_code == status


def test_huge_bodies_are_refused(site):
    large = bytes(300_000)
    answer = HTTP.post(f"{site.url}{API}/upload", files={"files": ("a.png", large)})
    assert answer.status_code == 413
    for route in ("call/v2/caption", "run/caption", "queue/join"):
        assert post(site.url, route, {"image": "a" * 3_000_000}).status_code == 413

    def endless():
        for _ in range(100):
            yield bytes(100_000)

    with httpx.Client(timeout=180) as client:
        try:
            status = client.post(f"{site.url}{API}/call/v2/caption", content=endless()).status_code
        except httpx.TransportError:  # the answer came, and the connection was closed, before all was sent
            status = 413
    assert status == 413
    assert HTTP.get(f"{site.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/xml", "application/x-www-form-urlencoded", "", "x"]
)
def test_what_is_no_json_is_no_way_around_the_checks(site, content_type):
    body = {"image": {"path": str(site.folder / "secret.png"), "meta": META}}
    for content in (json.dumps(body), "image=/etc/passwd", "<x/>", "[" * 50_000):
        for route in ("call/v2/caption", "call/caption", "run/caption", "queue/join"):
            answer = HTTP.post(f"{site.url}{API}/{route}", content=content, headers={"Content-Type": content_type})
            assert answer.status_code == 400
            quiet(site, answer.text)
    nothing_was_opened(site)


def test_variables_of_gradio_open_nothing(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text(MARK)
    hostile = {
        "SHARE": "True",
        "ALLOWED_PATHS": str(tmp_path),
        "ANALYTICS_ENABLED": "True",
        "RUN_HISTORY": "True",
        "MCP_SERVER": "True",
        "VIBE_MODE": "1",
        "WATCH_DIRS": str(tmp_path),
        "WATCH_DEMO_PATH": str(secret),
        "NUM_WORKERS": "2",
        "SSR_MODE": "True",
        "PROFILING": "1",
        "TEMP_DIR": str(tmp_path),
    }
    with Process(tmp_path, **{f"GRADIO_{name}": value for name, value in hostile.items()}) as page:
        for route in (
            f"file={secret}",
            "runs",
            "vibe-code",
            "mcp/",
            "mcp/schema",
            "profiling/summary",
            f"file={page.log}",
        ):
            answer = HTTP.get(f"{page.url}{API}/{route}")
            assert answer.status_code in (404, 405, 406), route
            assert MARK not in answer.text
        config = HTTP.get(f"{page.url}/config").json()
        assert not config.get("mcp_server")
        assert not config.get("vibe_mode")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", page.port + 1), timeout=5).close()
        assert upload(page.url, PNG).startswith(str(page.uploads()[0]))
