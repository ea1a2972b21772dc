"""The installed package: a wheel holds all that `captioner serve` needs, and serves it from any folder."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile

import pytest
from pictures import encode, gradient
from served import API, HTTP, ROOT, Process, ask, upload

SOURCES = ("app.py", "captioner", "examples", "training", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what is in the wheel."""
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 builds the wheel, and is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_every_file_of_the_packages(installed):
    def files(folder):
        return {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    for package in ("captioner", "training"):
        kept = {name for name in files(installed / package) if not name.startswith("examples/")}
        assert kept == files(ROOT / package)
    assert files(installed / "captioner" / "examples") == files(ROOT / "examples")


def test_it_is_served_from_a_folder_that_has_an_app_and_examples_of_its_own(installed, tmp_path):
    (tmp_path / "app.py").write_text("raise SystemExit('another app')\n")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "stranger.jpg").write_bytes(encode(gradient(), "JPEG"))
    with Process(tmp_path, PYTHONPATH=str(installed)) as page:
        config = HTTP.get(f"{page.url}/config").text
        assert "astronaut" in config
        assert "stranger" not in config
        answer = ask(page.url, "caption", image={"path": upload(page.url, encode(gradient(), "PNG"))})
        assert answer.value[0]["caption"]
        assert HTTP.get(f"{page.url}{API}/info").json()["named_endpoints"].keys() >= {"/caption", "/explain"}
        assert page.stop() == 0
        assert page.errors() == ""
