"""How long one CIDEr-D call of self-critical training takes, beside coco-caption's scorer on the same batch.

python benchmarks/cider.py [--pictures 5000] [--batch 128] [--samples 5] [--calls 40]

The sentences are generated: every picture has a scene, and references and samples are ways to tell it. Each
call has a batch of its own, as in training, and the calls of the two scorers take turns. coco-caption's takes its
document frequencies from the batch, this one from all references; that the scores are equal where those are is
checked at the end. Times are CPU time of this process, which is one thread, so that other programs count little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from pycocoevalcap.cider.cider import Cider

from captioner.metrics import CiderD

Sentence = list[str]
Batch = tuple[list[Sentence], list[int]]

FREQUENT = [
    "a",
    "a",
    "a",
    "the",
    "two",
    "in",
    "on",
    "with",
    "of",
    "and",
    "is",
    "while",
    "near",
    "through",
    "at",
    "an",
]
# One object per word, like the vocabulary of a tokenizer.
RARE = [f"word{i}" for i in range(4000)]


def word(rng: random.Random) -> str:
    """Return a content word; like in any text, the k-th most frequent has a share in proportion to 1 / k.

    Args:
        rng: source of chance.

    Returns:
        The word.
    """
    return RARE[int(len(RARE) ** rng.random()) - 1]


def telling(scene: Sentence, rng: random.Random) -> Sentence:
    """Tell a scene: most of its words in their order, each with a chance of another, between frequent words.

    Args:
        scene: content words.
        rng: source of chance.

    Returns:
        A sentence of about eleven words.
    """
    sentence = []
    for own in scene:
        if rng.random() < 0.85:
            sentence += [rng.choice(FREQUENT), own if rng.random() < 0.7 else word(rng)]
    return sentence or ["a", scene[0]]


def make_batch(scenes: list[Sentence], pictures: int, samples: int, rng: random.Random) -> Batch:
    """Sample hypotheses.

    Args:
        scenes: of all pictures.
        pictures: how many of them.
        samples: hypotheses for each.
        rng: source of chance.

    Returns:
        Hypotheses, and the index of the picture of each.
    """
    chosen = [i for i in rng.sample(range(len(scenes)), pictures) for _ in range(samples)]
    return [telling(scenes[i], rng) for i in chosen], chosen


def seconds(action: Callable[[], object]) -> float:
    """Time one call.

    Args:
        action: what is timed.

    Returns:
        Seconds.
    """
    began = time.process_time()
    action()
    return time.process_time() - began


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000, help="in the training set, five references each")
    parser.add_argument("--batch", type=int, default=128, help="pictures in a call")
    parser.add_argument("--samples", type=int, default=5, help="hypotheses for each picture")
    parser.add_argument("--calls", type=int, default=40)
    given = parser.parse_args()
    rng = random.Random(0)
    scenes = [[word(rng) for _ in range(rng.randint(5, 8))] for _ in range(given.pictures)]
    references = [[telling(scene, rng) for _ in range(5)] for scene in scenes]
    began = time.process_time()
    scorer = CiderD(references)
    built_s = time.process_time() - began

    ours_s, theirs_s = [], []
    for _ in range(given.calls):
        hypotheses, pictures = make_batch(scenes, given.batch, given.samples, rng)
        truth = {i: [" ".join(s) for s in references[p]] for i, p in enumerate(pictures)}
        result = {i: [" ".join(s)] for i, s in enumerate(hypotheses)}
        ours_s.append(seconds(partial(scorer.score, hypotheses, pictures)))
        theirs_s.append(seconds(partial(Cider().compute_score, truth, result)))

    per_call = given.batch * given.samples
    ours, theirs = statistics.median(ours_s), statistics.median(theirs_s)
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}")
    print(f"{given.pictures} pictures with five references, {per_call} hypotheses a call")
    print(f"prepared once     {built_s:8.2f} s")
    print(f"CiderD.score      {1e3 * ours:8.2f} ms a call, {1e6 * ours / per_call:6.1f} us a hypothesis")
    print(f"pycocoevalcap     {1e3 * theirs:8.2f} ms a call, {1e6 * theirs / per_call:6.1f} us a hypothesis")
    print(f"ratio of medians  {theirs / ours:8.0f}, of the fastest calls {min(theirs_s) / min(ours_s):.0f}")

    hypotheses, _ = make_batch(scenes, given.pictures, 1, rng)
    order = list(range(given.pictures))
    truth = {i: [" ".join(s) for s in references[i]] for i in order}
    _, expected = Cider().compute_score(truth, {i: [" ".join(hypotheses[i])] for i in order})
    difference = np.abs(CiderD(references).score(hypotheses, order) - expected).max()
    print(f"same frequencies  {difference:8.1e} is the largest difference of {given.pictures} scores")


if __name__ == "__main__":
    main()
