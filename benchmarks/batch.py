"""How fast a batch run is from files to records, against the model's own rate on pictures in memory; and its memory.

python benchmarks/batch.py [--pictures 512] [--repeats 5] [--workers N] [--model FOLDER] [PHOTO...]
python benchmarks/batch.py --memory 20000 [--model FOLDER]

The two rates are taken in turns, and each figure is the median of the repeats. Memory is the resident memory of the run
and of the processes that decode for it, in the course of a run over that many small pictures (Linux).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioner import Captioner
from captioner.batch import Progress, run
from captioner.decoding import default_workers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it may be run as a file
from benchmarks.pictures import EXAMPLES
from benchmarks.timing import seconds_of

BATCH = 32
MIB = 2**20


def rates(captioner: Captioner, photos: list[Path], count: int, repeats: int, workers: int) -> None:
    """Print the rate of the model, that of the run, and their ratio.

    Args:
        captioner: with which.
        photos: copied over and over into the folder that is captioned.
        count: pictures of a run.
        repeats: runs.
        workers: processes that decode.
    """
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        source.mkdir()
        for index, photo in enumerate(itertools.islice(itertools.cycle(photos), count)):
            shutil.copy(photo, source / f"{index:06}{photo.suffix}")
        prepared = [captioner.prepare(path) for path in sorted(source.iterdir())]
        list(captioner.caption_batch(prepared[:BATCH], batch_size=BATCH))  # warm up
        model: list[float] = []
        whole: list[float] = []
        for repeat in range(repeats):
            output = Path(name, f"{repeat}.jsonl")
            model.append(count / seconds_of(lambda: list(captioner.caption_batch(prepared, batch_size=BATCH))))
            whole.append(count / seconds_of(partial(_run_checked, source, output, captioner, count, workers)))
    print(f"model alone, pictures in memory   {statistics.median(model):.1f} captions/s")
    print(f"run, from {photos[0].suffix} files to records    {statistics.median(whole):.1f} captions/s, start included")
    ratios = [b / a for a, b in zip(model, whole, strict=True)]
    print(f"run over model                    {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _run_checked(source: Path, output: Path, captioner: Captioner, count: int, workers: int) -> None:
    summary = run([source], output, captioner=captioner, batch_size=BATCH, workers=workers)
    assert summary.captioned == count, summary


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and those it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def memory(captioner: Captioner, count: int, workers: int) -> None:
    """Print how much memory a run takes in its course.

    Args:
        captioner: with which.
        count: pictures.
        workers: processes that decode.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        for index in range(count):
            path = source / f"{index // 1000:04}" / f"{index:07}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64)).save(path)
        at: dict[int, int] = {}

        def note(progress: Progress) -> None:
            tenth = 10 * progress.captioned // count
            if tenth not in at:
                at[tenth] = resident_bytes(os.getpid())
                print(f"{progress.captioned:9} pictures  {at[tenth] / MIB:8.1f} MiB", flush=True)

        options: dict[str, Any] = {"method": "greedy", "max_words": 4}
        run([source], Path(name, "out.jsonl"), captioner=captioner, workers=workers, progress=note, **options)
        growth = (at[10] - at[1]) / (0.9 * count)
        print(f"from a tenth to the end           {growth:.0f} bytes for each picture")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="default: those of examples/")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--memory", type=int, metavar="PICTURES", help="measure memory instead")
    given = parser.parse_args()
    captioner = Captioner.load(given.model)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {captioner.device}, "
        f"{given.workers} processes that decode"
    )
    if given.memory:
        memory(captioner, given.memory, given.workers)
    else:
        rates(captioner, given.photos or sorted(EXAMPLES.glob("*.jpg")), given.pictures, given.repeats, given.workers)


if __name__ == "__main__":
    main()
