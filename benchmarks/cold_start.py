"""Figure 5: `captioner caption photo.jpg` from nothing: the time, the memory, and what is imported for it."""

from __future__ import annotations

import collections
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.contestants import load_captioner
from benchmarks.figure import Figure, Settings, Value
from benchmarks.pictures import photo_files
from benchmarks.timing import Series

TITLE = "5. `captioner caption photo.jpg` from a cold start"
ROOT = Path(__file__).resolve().parents[1]
HEAVY_MS = 20.0  # less is not worth a line

# A process of its own starts the command: what `getrusage` says of a child begins with the memory of the process that
# forked it, and this one holds torch and transformers.
LAUNCHER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
took = time.perf_counter() - began
if done.returncode:
    sys.exit(done.stderr.decode(errors="replace"))
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([took, peak * (1 if sys.platform == "darwin" else 1024) / 1e6]))
"""


def run_cold(arguments: list[str]) -> tuple[float, float]:
    """Run a command of Python in a fresh process.

    Args:
        arguments: of Python.

    Returns:
        Seconds until it has ended, and the most memory that it held, MB.
    """
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr}")
    took_s, peak_mb = json.loads(done.stdout)
    return took_s, peak_mb


def import_times_ms(arguments: list[str]) -> dict[str, float]:
    """Run a command of Python and see what it imports.

    Args:
        arguments: of Python.

    Returns:
        Milliseconds spent in the modules of each top-level package, the most first. Their sum is more than the command
        spends: asking costs time, too.
    """
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    spent_ms: collections.Counter[str] = collections.Counter()
    for line in done.stderr.splitlines():
        own_us, bar, name = line.removeprefix("import time:").partition("|")
        if line.startswith("import time:") and bar and own_us.strip().isdecimal():
            spent_ms[name.rpartition("|")[2].strip().partition(".")[0]] += int(own_us) / 1000  # type: ignore[assignment]
    return dict(spent_ms.most_common())


def measure(settings: Settings) -> Figure:
    """Measure time and memory of fresh processes, beside one that only imports torch.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    asked = [] if settings.model is None else ["--model", settings.model]
    if settings.runtime != "auto":
        asked += ["--runtime", settings.runtime]
    reference = "a process that imports torch, for comparison"
    with photo_files(1) as (photo,):
        caption = ["-m", "captioner", "caption", str(photo), *asked]
        commands = {"captioner caption photo.jpg": caption, reference: ["-c", "import torch"]}
        if not settings.quick:
            run_cold(caption)  # brings the files into the cache
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(settings.pick(5, 1)):
            for name, arguments in commands.items():
                runs[name].append(run_cold(arguments))
        imports = import_times_ms(caption)
    seconds, peaks = zip(*runs["captioner caption photo.jpg"], strict=True)
    heavy = ", ".join(f"{name} {spent:.0f} ms" for name, spent in imports.items() if spent >= HEAVY_MS)
    return Figure(
        title=TITLE,
        values=(
            Value(name="from start to end", value=statistics.median(seconds), unit="s", most=1.5),
            Value(name="peak memory", value=statistics.median(peaks), unit="MB", most=400),
        ),
        series={name: Series(seconds=tuple(took for took, _ in of)) for name, of in runs.items()},
        notes=(
            f"runtime: {load_captioner(settings).runtime.name}; threads as the command chooses them",
            f"spent in importing, {HEAVY_MS:g} ms and more: {heavy}",
        ),
    )
