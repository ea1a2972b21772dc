"""METEOR and SPICE, which exist as Java programs: run by pycocoevalcap where both are, never downloaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from captioner.errors import MetricError

Tokens = Sequence[str]

# What the protocol card calls the programs.
PROGRAMS = {"METEOR": "METEOR 1.5 of pycocoevalcap", "SPICE": "SPICE 1.0 of pycocoevalcap"}

_PACKAGE = "pycocoevalcap"
_NEEDED = {
    "METEOR": ["meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz"],
    "SPICE": [
        "spice/spice-1.0.jar",
        "spice/lib/stanford-corenlp-3.6.0.jar",
        "spice/lib/stanford-corenlp-3.6.0-models.jar",
    ],
}


def missing(metric: str) -> str | None:
    """Tell what a metric lacks on this machine.

    Args:
        metric: "METEOR" or "SPICE".

    Returns:
        What is missing and how to get it; None if the metric can run.
    """
    program = shutil.which("java")
    if program is None:
        return "no java on the PATH; install a Java runtime"
    if not _runs(program):
        return f"`{program} -version` fails; install a Java runtime"
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return f"the package {_PACKAGE} is not installed; pip install {_PACKAGE}"
    folder = Path(spec.submodule_search_locations[0])
    for name in _NEEDED[metric]:
        if not (folder / name).is_file():
            remedy = "fetch Stanford CoreNLP 3.6.0 with its models" if metric == "SPICE" else f"reinstall {_PACKAGE}"
            return f"{folder / name} is missing; {remedy} (nothing is downloaded on its own)"
    return None


@cache
def _runs(program: str) -> bool:
    # On a Mac without Java there is a program of that name, which only says that there is none.
    try:
        done = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def meteor(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Score a set with METEOR 1.5.

    Args:
        predictions: one tokenised caption per picture.
        references: the tokenised references of each picture, in the same order.

    Returns:
        The score of the set, 0..1.

    Raises:
        MetricError: Java or pycocoevalcap is missing, or the program failed.
    """
    _require("METEOR")
    from pycocoevalcap.meteor.meteor import Meteor

    return _run("METEOR", Meteor, predictions, references)


def spice(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Score a set with SPICE 1.0.

    Args:
        predictions: one tokenised caption per picture.
        references: the tokenised references of each picture, in the same order.

    Returns:
        The mean F score, 0..1.

    Raises:
        MetricError: Java, pycocoevalcap or the models are missing, or the program failed.
    """
    _require("SPICE")
    from pycocoevalcap.spice.spice import Spice

    return _run("SPICE", Spice, predictions, references)


def _require(metric: str) -> None:
    lack = missing(metric)
    if lack is not None:
        raise MetricError(f"{metric} cannot run: {lack}")


def _run(metric: str, scorer: Any, predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    result: Mapping[int, list[str]] = {i: [" ".join(p)] for i, p in enumerate(predictions)}
    truth: Mapping[int, list[str]] = {i: [" ".join(r) for r in many] for i, many in enumerate(references)}
    # Java takes the locale's encoding for its pipes: words beyond ASCII would be lost under the C locale.
    before = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Dfile.encoding=UTF-8".strip()
    try:
        score, _ = scorer().compute_score(truth, result)
    except Exception as err:  # the wrapped program fails in many ways: pipes, parsing, exit status
        raise MetricError(f"{metric} failed in {_PACKAGE}: {err!r}; check that `java -version` runs") from err
    finally:
        if before is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = before
    return float(score)
