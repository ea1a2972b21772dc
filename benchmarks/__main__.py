"""Runs the figures, prints a table and writes what was found; see benchmarks/README.md.

python -m benchmarks [FIGURE...] [--quick] [--runtime RUNTIME] [--threads N] [--model FOLDER] [--results FOLDER]

Run it from a checkout, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import cold_start, gpu, gpu_training, int8, many_pictures, maps, one_picture, scaling
from benchmarks.figure import Figure, Settings
from benchmarks.machine import describe_day, describe_machine, describe_versions, usable_cores
from captioner.runtimes import RUNTIMES

FIGURES: dict[str, Callable[[Settings], Figure]] = {
    "one_picture": one_picture.measure,
    "many_pictures": many_pictures.measure,
    "maps": maps.measure,
    "scaling": scaling.measure,
    "cold_start": cold_start.measure,
    "int8": int8.measure,
    "gpu": gpu.measure,
    "gpu_training": gpu_training.measure,
}
RESULTS = Path(__file__).parent / "results"


def run(names: Iterable[str], settings: Settings) -> dict[str, Any]:
    """Run figures, one after the other, and print each as it is there.

    Args:
        names: of `FIGURES`.
        settings: how.

    Returns:
        All of it, ready for JSON.
    """
    report: dict[str, Any] = {
        **describe_day(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {
            "model": settings.model or "bundled",
            "runtime": settings.runtime,
            "threads": settings.threads,
            "quick": settings.quick,
        },
        "figures": {},
    }
    for name in names:
        began_s = time.perf_counter()
        figure = FIGURES[name](settings)
        took_s = time.perf_counter() - began_s
        print("\n".join([*figure.lines(), f"  ({name}, {took_s:.0f} s)", ""]), flush=True)
        report["figures"][name] = {**figure.to_record(), "took_s": round(took_s, 1)}
    return report


def heading(report: dict[str, Any]) -> str:
    """Return machine, versions and day of a report as text."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    load = "" if machine["load_average"] is None else f", load {machine['load_average'][0]:.1f}"
    return (
        f"{report['date']}, commit {report['commit']}{' with changes' if report['changed'] else ''}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}, {machine['memory_gib']} GiB, "
        f"{machine['gpu'] or 'no GPU'}{load}\n{versions}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, report.

    Args:
        arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"default: all of {', '.join(FIGURES)}")
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--runtime", choices=RUNTIMES, default="auto")
    parser.add_argument("--threads", type=int, default=min(2, usable_cores()), help="of every contestant")
    parser.add_argument("--quick", action="store_true", help="one repetition of few pictures: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results.json and plots")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.figures if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    settings = Settings(
        model=given.model, runtime=given.runtime, threads=given.threads, quick=given.quick, results=given.results
    )
    began_s = time.perf_counter()
    report = run(given.figures or FIGURES, settings)
    report["took_s"] = round(time.perf_counter() - began_s, 1)
    path = settings.results / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{heading(report)}\n{report['took_s']:.0f} s in all; written to {path}")


if __name__ == "__main__":
    main()
