"""Importing the library is light, and nothing happens at import."""

import json
import os
import subprocess
import sys

import pytest

import captioner

HEAVY = {
    "torch",
    "gradio",
    "lightning",
    "ray",
    "matplotlib",
    "transformers",
    "torchvision",
    "huggingface_hub",
    "typer",
}


def modules_after(code):
    """The names of the top-level modules that a fresh process has loaded after some code."""
    program = f"{code}\nimport json, sys\nprint(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_captioner_loads_nothing_heavy():
    loaded = modules_after("import captioner, captioner.cli")
    assert "captioner" in loaded  # the question was understood
    assert loaded.isdisjoint(HEAVY - {"typer"})


def test_the_batch_module_is_there_without_an_import_of_its_own():
    assert "captioner" in modules_after("import captioner; captioner.batch.run")


def test_the_first_use_of_a_model_loads_nothing_heavy():
    assert modules_after("from captioner import Captioner").isdisjoint(HEAVY)


def test_every_public_name_is_there_and_listed():
    assert {name for name in captioner.__all__ if getattr(captioner, name, None) is None} == set()
    assert set(captioner.__all__) <= set(dir(captioner))
    with pytest.raises(AttributeError, match="no attribute 'Captoiner'"):
        _ = captioner.Captoiner


def test_captioning_loads_no_page_no_training_and_no_drawing():
    picture = "captioner.Captioner.load(device='cpu').caption(__import__('numpy').zeros((9, 9, 3), 'uint8'))"
    loaded = modules_after(f"import captioner\n{picture}")
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_captioning_leaves_nothing_in_the_home_folder_and_tells_nobody(tmp_path):
    """ONNX Runtime keeps the identifier and the queue of what it sends to its maker in the home folder."""
    silencing = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    away = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", *silencing)
    environment = {name: value for name, value in os.environ.items() if name not in away}
    code = "import captioner; captioner.Captioner.load(device='cpu')"
    code += ".caption(__import__('numpy').zeros((9, 9, 3), 'uint8'))"
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == []


def test_captioning_in_pytorch_loads_no_page_no_training_and_no_drawing():
    picture = "captioner.Captioner.load(runtime='torch').caption(__import__('numpy').zeros((9, 9, 3), 'uint8'))"
    loaded = modules_after(f"import captioner\n{picture}")
    assert "torchvision" in loaded
    assert loaded.isdisjoint(HEAVY - {"torch", "torchvision"})


def test_importing_the_command_line_runs_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import captioner.__main__, captioner.cli, captioner.overlay"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
