"""How long a caption takes: from a cold start, one picture with the model loaded, and in batches.

python benchmarks/captioning.py [--repeats 5] [PHOTO...]

Every figure is the median of the repeats; the ratio compares batches with single pictures in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from captioner import Captioner

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BATCH = 32


def median_s(action: Callable[[], object], repeats: int) -> float:
    """Return the median time of an action.

    Args:
        action: what is timed.
        repeats: how often.

    Returns:
        Seconds.
    """
    times_s = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times_s.append(time.perf_counter() - began)
    return statistics.median(times_s)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path, help="default: those of examples/")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    photos = given.photos or sorted(EXAMPLES.glob("*.jpg"))
    command = [sys.executable, "-m", "captioner", "caption", str(photos[0])]
    cold_s = median_s(lambda: subprocess.run(command, check=True, capture_output=True), given.repeats)
    captioner = Captioner.load()
    many = list(itertools.islice(itertools.cycle(photos), 2 * BATCH))
    list(captioner.caption_batch(many[:BATCH]))  # warm up
    single_s = median_s(lambda: [captioner.caption(photo) for photo in photos], given.repeats) / len(photos)
    batch_s = median_s(lambda: list(captioner.caption_batch(many)), given.repeats) / len(many)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {captioner.device}")
    print(f"cold start, `captioner caption` of one photo  {cold_s:.2f} s")
    print(f"one photo, model loaded                       {1000 * single_s:.1f} ms")
    print(f"batches of {BATCH}                                 {1 / batch_s:.1f} captions/s")
    print(f"batches over singles                          {single_s / batch_s:.2f} x")


if __name__ == "__main__":
    main()
