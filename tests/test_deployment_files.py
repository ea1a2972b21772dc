"""The files of deployment say what the code needs: requirements, sources, ignored files, ways to start."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from captioner.service import DECODING_PIXELS, ServiceLimits
from captioner.serving import DRAIN_S

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_AS = {"pillow": "PIL"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lines(name):
    """Return the lines of a file that say something, continued ones joined."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def imported():
    """Return every top-level module that the page, or what it may import, imports."""
    found = set()
    for path in (ROOT / "app.py", *(ROOT / "captioner").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def module(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return IMPORTED_AS.get(name, name.replace("-", "_"))


def test_the_requirements_are_those_dependencies_that_serving_imports():
    modules = imported()
    needed = [each for each in PROJECT["dependencies"] if module(each) in modules]
    assert sorted(lines("requirements.txt")) == sorted(needed)
    assert len(needed) < len(PROJECT["dependencies"])  # what only training imports is left out


def copied():
    return [source for line in lines("Dockerfile") if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_what_the_image_copies_exists_and_is_not_ignored():
    assert copied()
    let_in = {line.removeprefix("!") for line in lines(".dockerignore") if line.startswith("!")}
    for source in copied():
        assert (ROOT / source).exists(), source
        assert source in let_in
    assert lines(".dockerignore")[0] == "*"


def test_the_image_has_all_that_it_installs():
    sources = set(copied())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {package.partition(".")[0] for package in settings["packages"]} <= sources
    assert {f"{name}.py" for name in settings["py-modules"]} <= sources
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= sources


def test_the_image_runs_as_a_user_of_its_own_and_starts_the_command_itself():
    said = lines("Dockerfile")
    assert any(re.fullmatch(r"USER (?!root|0)\w+", line) for line in said)
    (command,) = [line for line in said if line.startswith("CMD [")]
    # Not through a shell, which would keep SIGTERM to itself.
    assert ast.literal_eval(command.removeprefix("CMD "))[:2] == ["captioner", "serve"]


@pytest.mark.parametrize("option", ["read_only: true", 'tmpfs: ["/tmp', "cap_drop: [ALL]", "no-new-privileges:true"])
def test_the_composition_takes_rights_away(option):
    assert option in (ROOT / "compose.yaml").read_text()


def number(pattern):
    """Return the number in a line of the composition."""
    return int(re.search(pattern, (ROOT / "compose.yaml").read_text())[1])


def test_the_memory_of_the_composition_holds_all_that_may_be_there_at_once():
    uploads_mib, files_mib = number(r'"--max-uploads-mb", "(\d+)"'), number(r"/tmp:size=(\d+)m")
    assert uploads_mib < files_mib
    decoding_bytes = 20 * max(DECODING_PIXELS, ServiceLimits().max_pixels)
    at_rest_bytes = 400 * 2**20  # measured: 341 MiB with the bundled model
    assert at_rest_bytes + decoding_bytes + files_mib * 2**20 < number(r"mem_limit: (\d)g") * 2**30


def test_who_ends_the_image_waits_for_open_requests():
    for seconds in (number(r"stop_grace_period: (\d+)s"), int(re.search(r"--stop-timeout (\d+)", DOCKERFILE)[1])):
        assert seconds > DRAIN_S + 10


def test_the_port_is_published_to_this_machine_alone():
    assert re.search(r'ports: \["127\.0\.0\.1:7860:7860"\]', (ROOT / "compose.yaml").read_text())


def test_no_variable_of_the_image_is_one_that_the_page_takes_away():
    assert "GRADIO_" not in (ROOT / "Dockerfile").read_text()


def space():
    """Return the head of a Space's README, by names."""
    _, head, _ = (ROOT / "deploy" / "space.md").read_text().split("---\n", 2)
    return {name: value.strip().strip('"') for name, _, value in (line.partition(":") for line in head.splitlines())}


def test_a_space_runs_what_the_project_needs():
    head = space()
    assert head["sdk"] == "gradio"
    assert (ROOT / head["app_file"]).is_file()
    assert SpecifierSet(PROJECT["requires-python"]).contains(head["python_version"])
    (gradio,) = [Requirement(line) for line in lines("requirements.txt") if line.startswith("gradio")]
    assert gradio.specifier.contains(head["sdk_version"])
    assert len(head["short_description"]) <= 60  # more is refused


def test_the_way_to_a_space_brings_files_that_a_plain_push_may_not():
    assert "hf upload" in (ROOT / "deploy" / "space.md").read_text()
    assert "deploy/space.md" in (ROOT / "README.md").read_text()
