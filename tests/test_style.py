"""Style, types and architecture are tests like any other."""

import shutil
import subprocess
import sys
from pathlib import Path

import docstring_parser.common
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports", "--no-cache"],
    "pydoclint": ["pydoclint", "captioner", "training", "app.py"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_code_passes(check):
    name, *arguments = CHECKS[check]
    tool = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if tool is None:
        pytest.skip(f"{name} is not installed; it comes with pip install -e '.[dev]'")
    if check == "pydoclint" and not hasattr(docstring_parser.common, "DocstringYields"):
        pytest.skip(
            "docstring-parser lies over its fork: pip install --force-reinstall --no-deps docstring-parser-fork"
        )
    done = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_packages_are_listed_for_the_wheel():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in ("captioner", "training")
        for init in (ROOT / top).rglob("__init__.py")
    }
    elsewhere = settings["tool"]["setuptools"]["package-dir"]  # folders that are installed under another name
    assert listed - set(elsewhere) == found
    assert all((ROOT / folder).is_dir() for folder in elsewhere.values())
