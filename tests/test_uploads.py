"""Laws of the folder of uploads: it never holds more than it may, and nothing half is left in it."""

import errno
import json
import os
import secrets
import time

import loops
import pytest

from captioner.exchange import Refusal
from captioner.service import ServiceLimits
from captioner.uploads import FILE_BYTES, UploadSpace

pytest_plugins = ("asked",)
HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'


@pytest.fixture
def keep(uploads):
    """An app that writes what it is sent as Gradio does: first in part, then as a whole, in a folder of its own."""

    async def keep(scope, receive, send):
        part = uploads / f"tmp{secrets.token_hex(8)}"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
            part.write_bytes(body)
        (uploads / part.name.replace("tmp", "sha")).mkdir()
        part.rename(uploads / part.name.replace("tmp", "sha") / "a.png")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return keep


def limit(ask, uploads, most_bytes, *, kept_s=3600.0):
    ask.middleware.space = UploadSpace(uploads, most_bytes=most_bytes, kept_s=kept_s)


def files(uploads):
    return sorted(path for path in uploads.rglob("*") if path.is_file())


def make_old(uploads):
    for path in files(uploads):
        os.utime(path, (time.time() - 7200,) * 2)


def test_an_upload_without_room_is_refused_before_it_is_read(ask, keep, uploads):
    before = files(uploads)
    limit(ask, uploads, 2 * FILE_BYTES + 500)
    answer = ask("POST", "/gradio_api/upload", HEAD, bytes(1000), inner=keep)
    assert (answer.status, answer.left) == (507, 3)
    assert int(answer.headers[b"retry-after"]) >= 1
    assert json.loads(answer.body)["error"]["type"] == "StorageFull"
    assert files(uploads) == before


def test_many_small_files_in_one_upload_count_as_what_they_take(ask, keep, uploads):
    before = files(uploads)
    limit(ask, uploads, 20 * FILE_BYTES)
    assert ask("POST", "/gradio_api/upload", HEAD * 30, inner=keep).status == 507
    assert files(uploads) == before


def test_the_count_runs_over_all_uploads(ask, keep, uploads):
    limit(ask, uploads, 10 * FILE_BYTES)
    statuses = [ask("POST", "/gradio_api/upload", HEAD, bytes(1000), inner=keep).status for _ in range(20)]
    assert statuses == sorted(statuses)
    assert set(statuses) == {200, 507}
    assert sum(path.stat().st_size for path in files(uploads)) <= 10 * FILE_BYTES


def test_the_oldest_files_make_room_and_new_ones_are_safe(ask, keep, uploads):
    (old,) = files(uploads)
    make_old(uploads)
    limit(ask, uploads, 3 * FILE_BYTES)
    statuses = [ask("POST", "/gradio_api/upload", HEAD, bytes(1000), inner=keep).status for _ in range(4)]
    assert statuses == [200, 200, 507, 507]
    assert not old.exists()
    assert not old.parent.exists()
    assert len(files(uploads)) == 2


def test_an_upload_that_breaks_off_leaves_nothing(ask, uploads):
    before = files(uploads)

    async def failing(scope, receive, send):
        (uploads / "tmpabc").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask("POST", "/gradio_api/upload", HEAD, inner=failing)
    assert files(uploads) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_without_a_trace(ask, number):
    async def full(scope, receive, send):
        raise OSError(number, os.strerror(number))

    answer = ask("POST", "/gradio_api/upload", HEAD, inner=full)
    assert answer.status == 507
    assert json.loads(answer.body)["error"]["type"] == "StorageFull"


def test_parts_of_uploads_that_are_still_open_are_left_alone(uploads):
    space = UploadSpace(uploads, most_bytes=10**6, kept_s=1)

    class Asked:
        status = None

        def header(self, name):
            return ""

    async def run():
        async with space.upload(Asked(), 1):
            (uploads / "tmpopen").write_bytes(b"half")
            with pytest.raises(Refusal):
                async with space.upload(Asked(), 1):
                    raise Refusal(413, "TooLarge", "too large")
            assert (uploads / "tmpopen").exists()
        assert not (uploads / "tmpopen").exists()

    loops.run(run())


def test_the_uploads_hold_one_file_at_least():
    with pytest.raises(Exception, match="max_uploads_bytes must be at least"):
        ServiceLimits(max_upload_bytes=1000, max_uploads_bytes=999)
