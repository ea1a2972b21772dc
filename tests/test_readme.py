"""The README's examples of the service do what they say, to the letter but for the address."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from served import events, served

from captioner.service import Service

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "http://127.0.0.1:7860"


def block(name):
    """Return the first code block behind a marker of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- command: {name} -->.*?```\w+\n(.*?)```", text, re.DOTALL)
    assert found, f"README.md has no command {name!r}"
    assert ADDRESS in found[1]
    return found[1]


@pytest.fixture(scope="module")
def url(captioner):
    with Service(captioner) as service, served(service, door=service) as url:
        yield url


def test_the_example_of_curl_captions_a_photo(url, captioner):
    missing = [name for name in ("bash", "curl", "jq") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block("service-curl").replace(ADDRESS, url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = events(done.stdout)
    assert answer.kind == "complete", done.stdout
    wanted = captioner.caption(ROOT / "examples" / "cat.jpg", beam_size=5, n_best=3).to_record("cat.jpg")
    assert answer.value[0]["caption"] == wanted["caption"]
    assert len(answer.value[0]["alternatives"]) == 2


def test_the_example_of_python_asks_every_endpoint(url, captioner, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(block("service-python").replace(ADDRESS, url), "README.md", "exec"), names)
    wanted = captioner.caption("examples/cat.jpg", n_best=3)
    assert names["record"]["caption"] == wanted.text
    assert [each["caption"] for each in names["records"]] == [
        found.text for found in captioner.caption_batch(["examples/cat.jpg", "examples/coffee.jpg"])
    ]
    scored = captioner.score("examples/cat.jpg", "a brown cat")
    assert names["own"]["score"] == pytest.approx(scored.score, abs=1e-4)
    attention = np.array(names["found"]["words"][1]["attention"])
    assert attention.shape == scored.words[1].attention.shape
    assert attention.sum() == pytest.approx(1, abs=1e-3)
    assert json.dumps(names["found"])
