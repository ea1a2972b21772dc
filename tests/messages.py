"""What stands before and behind the middleware in tests: a door that lets everyone in, and apps that answer."""

from types import SimpleNamespace

from captioner.requests import Place
from captioner.telemetry import Telemetry

META = {"_type": "gradio.FileData"}


def door(limits, log=None):
    """A door that lets everyone in."""
    telemetry = Telemetry(log=log)
    return SimpleNamespace(
        ready=True, refusal=lambda: None, reserve=lambda count: Place(), limits=limits, telemetry=telemetry
    )


class EchoApp:
    """Answers with the body that it was given; remembers whether it was asked."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def call(value, *, route="call/caption"):
    return "POST", f"/gradio_api/{route}", {"data": [value]}


def answering(*messages, until=None):
    """An app that reads its request, sends these messages, and waits for the client's leaving."""

    async def run(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        for message in messages:
            await send({"type": "http.response.start", "status": 200, "headers": []} if message == "start" else message)
        if until:
            while (await receive())["type"] != until:
                pass

    return run


PART = {"type": "http.response.body", "body": b"...", "more_body": True}
END = {"type": "http.response.body", "body": b""}
GONE = "http.disconnect"
