"""What the service behind the page does under load, and what it costs one who is alone.

python benchmarks/service.py throughput [--users 16] [--seconds 10] [--runtime torch]
python benchmarks/service.py load [--clients 64] [--seconds 60] [--url http://127.0.0.1:7860 --pid PID]

`throughput` compares many users with one at a time in the same run. `load` mixes good and bad pictures and checks that
every answer belongs to its picture; with --url it asks a page that runs, in place of a service in this process. The
page must serve the same model.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from captioner import Captioner, CaptionerError, ServiceBusyError
from captioner.runtimes import RUNTIMES
from captioner.service import Service, ServiceLimits
from captioner.telemetry import Telemetry

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BAD = "error"
SCORE_TOLERANCE = 1e-3


class BusyError(Exception):
    """The service was full.

    Args:
        retry_after_s: when to try again.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


Ask = Callable[[bytes], tuple[str, float | None]]
"""The bytes of a picture in; its caption and score out, or `BAD` and None. May raise `BusyError`."""


# --- Pictures, and what is true of them ---


def make_pictures(photos: list[Path], *, variants: int) -> list[bytes]:
    """Return parts of photos as files, and files that are no picture, about one in six.

    Args:
        photos: to cut from.
        variants: how many parts.

    Returns:
        The files' bytes.
    """
    draw = random.Random(0)
    files = []
    for photo in itertools.islice(itertools.cycle(photos), variants):
        with Image.open(photo) as opened:
            image = opened.convert("RGB")
        width, height = (round(side * draw.uniform(0.4, 0.9)) for side in image.size)
        left, top = draw.randrange(image.width - width), draw.randrange(image.height - height)
        file = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    bad = [b"no picture", b"", files[0][:200], b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(99)]
    return files + bad[: max(1, variants // 5)]


def truth(captioner: Captioner, file: bytes) -> tuple[str, float | None]:
    """Caption a picture alone.

    Args:
        captioner: the model.
        file: bytes of the picture.

    Returns:
        Caption and score, or `BAD` and None.
    """
    try:
        caption = captioner.caption(file)
    except CaptionerError:
        return BAD, None
    return caption.text, caption.score


# --- Two ways to ask ---


def in_process(service: Service) -> Ask:
    """Return how to ask a service of this process.

    Args:
        service: to ask.

    Returns:
        The way.
    """

    def ask(file: bytes) -> tuple[str, float | None]:
        try:
            caption = service.caption(file)
        except ServiceBusyError as err:
            raise BusyError(err.retry_after_s) from err
        except CaptionerError as err:
            if type(err).__name__.startswith("Service"):
                raise
            return BAD, None
        return caption.text, caption.score

    return ask


def over_http(url: str, *, endpoint: str, argument: str) -> Ask:
    """Return how to ask a page: upload, call, wait for the answer.

    Args:
        url: of the page.
        endpoint: name of the API endpoint; it answers with a record as `Caption.to_record` gives it.
        argument: name of its picture.

    Returns:
        The way.
    """
    api = f"{url.rstrip('/')}/gradio_api"

    def fetch(address: str, body: bytes | None, content_type: str) -> bytes:
        request = urllib.request.Request(address, body, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as err:
            if err.code == 503:
                raise BusyError(float(err.headers.get("Retry-After") or 1)) from err
            raise

    def ask(file: bytes) -> tuple[str, float | None]:
        head = b'--part\r\nContent-Disposition: form-data; name="files"; filename="photo.jpg"\r\n\r\n'
        form = head + file + b"\r\n--part--\r\n"
        (path,) = json.loads(fetch(f"{api}/upload", form, "multipart/form-data; boundary=part"))
        body = {argument: {"path": path, "meta": {"_type": "gradio.FileData"}}}
        event = json.loads(fetch(f"{api}/call/v2/{endpoint}", json.dumps(body).encode(), "application/json"))
        return _answer(fetch(f"{api}/call/v2/{endpoint}/{event['event_id']}", None, "application/json").decode())

    return ask


def _answer(events: str) -> tuple[str, float | None]:
    """Read the last of the server-sent events."""
    kind, data = "", "null"
    for line in events.splitlines():
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            data = value
    if kind != "complete":
        return BAD, None
    record: Any = json.loads(data)[0]
    if isinstance(record, str):
        return record, None
    return (BAD, None) if record.get("error") else (record["caption"], record["score"])


# --- Users ---


@dataclass
class Tally:
    """What happened to the requests.

    Args:
        seconds: of each that was answered.
        asked: all.
        busy: refused, and asked again later.
        mixed_up: answers that are not those of their pictures.
        lost: requests without an answer, and why.
    """

    seconds: list[float] = field(default_factory=list)
    asked: int = 0
    busy: int = 0
    mixed_up: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def run_users(
    ask: Ask, files: list[bytes], answers: list[tuple[str, float | None]] | None, users: int, seconds: float
) -> Tally:
    """Let users ask, each one picture after the other, for some time.

    Args:
        ask: how.
        files: what they ask about, in an order of their own.
        answers: what is true of them; None checks nothing.
        users: how many.
        seconds: for how long; what has begun is finished.

    Returns:
        What happened.
    """
    tally, lock = Tally(), threading.Lock()
    end_s = time.perf_counter() + seconds

    def one(user: int) -> None:
        draw = random.Random(user)
        while time.perf_counter() < end_s:
            index = draw.randrange(len(files))
            began_s = time.perf_counter()
            with lock:
                tally.asked += 1
            try:
                got = ask(files[index])
            except BusyError as err:
                with lock:
                    tally.busy += 1
                time.sleep(min(err.retry_after_s, max(0.0, end_s - time.perf_counter())))
                continue
            except Exception as err:  # whatever it was, the request has no answer
                with lock:
                    tally.lost.append(repr(err)[:200])
                continue
            took_s = time.perf_counter() - began_s
            with lock:
                tally.seconds.append(took_s)
                if answers is not None and not _same(got, answers[index]):
                    tally.mixed_up.append(f"{got} in place of {answers[index]}")

    threads = [threading.Thread(target=one, args=(user,)) for user in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def _same(got: tuple[str, float | None], wanted: tuple[str, float | None]) -> bool:
    if got[1] is None or wanted[1] is None:
        return got[0] == wanted[0]
    return got[0] == wanted[0] and abs(got[1] - wanted[1]) <= SCORE_TOLERANCE


def rss_mib(pid: int) -> float:
    """Return the memory that a process holds.

    Args:
        pid: of the process.

    Returns:
        MiB; NaN where the system does not say.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return float("nan")


# --- The two runs ---


def throughput(users: int, seconds: float, *, max_wait_ms: float, runtime: str = "auto") -> None:
    """Print what many users get in all, and one alone; both in this process, from the file to the caption."""
    photos = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.jpg"))]
    log = io.StringIO()
    with Service(
        Captioner.load(runtime=runtime),
        limits=ServiceLimits(max_batch=max(32, users), max_wait_ms=max_wait_ms),
        telemetry=Telemetry(log=log),
    ) as service:
        ask = in_process(service)
        run_users(ask, photos, None, users, min(2.0, seconds))  # warm up
        log.seek(0)
        log.truncate()
        cpu_s = [time.process_time()]
        lone = run_users(ask, photos, None, 1, seconds)
        cpu_s.append(time.process_time())
        waits_ms = [json.loads(line)["wait_milliseconds"] for line in log.getvalue().splitlines()]
        batches = service.telemetry.batch_size.count()
        many = run_users(ask, photos, None, users, seconds)
        cpu_s.append(time.process_time())
        batch = len(many.seconds) / (service.telemetry.batch_size.count() - batches)
    lone_rate = 1 / statistics.mean(lone.seconds)
    many_rate = users / statistics.mean(many.seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {len(photos)} photos")
    print(f"one user        {lone_rate:6.1f} captions/s, median {1000 * statistics.median(lone.seconds):.0f} ms")
    median_ms = 1000 * statistics.median(many.seconds)
    print(f"{users} users        {many_rate:6.1f} captions/s, median {median_ms:.0f} ms, {batch:.1f} a batch")
    print(f"{users} users over one {many_rate / lone_rate:5.2f} x")
    lone_ms, many_ms = (
        1000 * (after - before) / len(tally.seconds)
        for before, after, tally in zip(cpu_s[:2], cpu_s[1:], (lone, many), strict=True)
    )
    # Less at the mercy of what else runs on the machine than the time by the clock.
    print(f"processor time of a caption, one user {lone_ms:.0f} ms, {users} users {many_ms:.0f} ms")
    print(f"wait of one who is alone, median {statistics.median(waits_ms):.1f} ms, of {len(waits_ms)}")


def load(clients: int, seconds: float, *, url: str | None, pid: int, endpoint: str, argument: str) -> bool:
    """Print how requests fared under load; return whether every one was answered, with its own answer."""
    captioner = Captioner.load()
    files = make_pictures(sorted(EXAMPLES.glob("*.jpg")), variants=24)
    answers = [truth(captioner, file) for file in files]
    service = None if url else Service(captioner)
    ask = in_process(service) if service else over_http(str(url), endpoint=endpoint, argument=argument)
    run_users(ask, files, answers, clients, min(3.0, seconds))  # warm up: caches and threads are no leak
    before_mib = rss_mib(pid)
    began_s = time.perf_counter()
    tally = run_users(ask, files, answers, clients, seconds)
    took_s = time.perf_counter() - began_s
    after_mib = rss_mib(pid)
    if service:
        service.close()
    answered = len(tally.seconds)
    cuts_ms = [1000 * cut for cut in statistics.quantiles(tally.seconds, n=100)] if answered > 1 else [0.0] * 99
    bad = sum(answer[0] == BAD for answer in answers)
    print(f"{clients} clients, {took_s:.0f} s, {len(files)} pictures, {bad} of them bad, {url or 'in this process'}")
    print(f"asked {tally.asked}, answered {answered}, refused as busy {tally.busy}, lost {len(tally.lost)}")
    print(f"mixed up {len(tally.mixed_up)}")
    print(
        f"{answered / took_s:.1f} answers/s, "
        f"p50 {cuts_ms[49]:.0f} ms, p95 {cuts_ms[94]:.0f} ms, p99 {cuts_ms[98]:.0f} ms"
    )
    print(f"memory of process {pid}: {before_mib:.0f} MiB before, {after_mib:.0f} MiB after")
    for line in [*tally.lost[:5], *tally.mixed_up[:5]]:
        print(f"  {line}")
    return tally.asked == answered + tally.busy and not tally.mixed_up


def main() -> None:
    """Run what was asked for; status 1 when an answer was lost or mixed up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=["throughput", "load"])
    parser.add_argument("--users", type=int, default=16, help="of throughput")
    parser.add_argument("--max-wait-ms", type=float, default=3.0, help="of throughput; see ServiceLimits")
    parser.add_argument("--runtime", choices=RUNTIMES, default="auto", help="of throughput")
    parser.add_argument("--clients", type=int, default=64, help="of load")
    parser.add_argument("--seconds", type=float, help="default: 10 for throughput, 60 for load")
    parser.add_argument("--url", help="of a page that runs; default: a service in this process")
    parser.add_argument("--pid", type=int, default=os.getpid(), help="whose memory is watched; default: this process")
    parser.add_argument("--endpoint", default="caption", help="of the page's API")
    parser.add_argument("--argument", default="image", help="name of the endpoint's picture")
    given = parser.parse_args()
    if given.run == "throughput":
        throughput(given.users, given.seconds or 10.0, max_wait_ms=given.max_wait_ms, runtime=given.runtime)
        return
    well = load(
        given.clients,
        given.seconds or 60.0,
        url=given.url,
        pid=given.pid,
        endpoint=given.endpoint,
        argument=given.argument,
    )
    parser.exit(0 if well else 1)


if __name__ == "__main__":
    main()
