"""On what share of texts the tokens differ from those of the Stanford tokenizer, as pycocoevalcap calls it.

python benchmarks/ptb.py [--captions Flickr8k.token.txt] [--lines 20000] [--seed 0] [--show 5] 2>/dev/null

Needs Java and pycocoevalcap; the jar warns on standard error of every character that it drops. The lines of a
captions file go to the jar as they are, all in one run, as coco-caption does it. Generated and fuzzed ones go with
a neutral line between two, since the jar looks beyond the end of a line. Tokens are compared as coco-caption's
scorers read them. The generators are those of the tests.
"""

from __future__ import annotations

import argparse
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from captioner.metrics import read_references, tokenize

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import metrics_texts as generate

Lines = list[str]


def classes(captions: Lines, lines: int, seed: int) -> dict[str, Callable[[], Lines]]:
    """Name the classes of generated and fuzzed text.

    Args:
        captions: what is mutated.
        lines: of every class.
        seed: of the generators.

    Returns:
        What makes the lines, by class.
    """

    def sentences(kind: str) -> Callable[[], Lines]:
        return lambda: generate.sentences(kind, seed, lines)

    def mutated(alphabet: Lines) -> Callable[[], Lines]:
        return lambda: generate.mutated(captions, alphabet, seed, lines)

    def noise(alphabet: Lines) -> Callable[[], Lines]:
        return lambda: generate.random_texts(alphabet, seed, lines)

    pieces = generate.texts(seed + 1, lines)
    capitals = [text.upper() for text in pieces]
    return {
        **{f"captions with {kind}": sentences(kind) for kind in generate.PIECES_OF},
        "pieces of all kinds": lambda: generate.texts(seed, lines),
        "pieces, ASCII put in": lambda: generate.mutated(pieces, generate.ASCII, seed, lines),
        "pieces in capitals, ASCII put in": lambda: generate.mutated(capitals, generate.ASCII, seed, lines),
        "captions, punctuation put in": mutated(generate.PUNCTUATION),
        "captions, ASCII put in": mutated(generate.ASCII),
        "captions, Unicode put in": mutated(generate.UNICODE_16),
        "random ASCII": noise(generate.ASCII),
        "random Unicode, 16 bits": noise(generate.UNICODE_16),
        "random Unicode": noise(generate.UNICODE),
    }


def measure(name: str, lines: Lines, *, apart: bool, show: int) -> tuple[int, int]:
    """Tokenise lines with both, and print the share that differs.

    Args:
        name: of the class.
        lines: one text each.
        apart: whether the jar gets a neutral line between two.
        show: how many that differ to print.

    Returns:
        How many lines differ, of how many.
    """
    expected = generate.jar_tokens(lines, apart=apart)
    pairs = zip(lines, expected, strict=True)
    different = [(line, tokens) for line, tokens in pairs if generate.words(tokenize(line)) != tokens]
    print(f"{name:<32} {len(lines):>7} {len(different):>7} {len(different) / len(lines):>9.4%}", flush=True)
    for line, tokens in different[:show]:
        print(f"  {line!a}\n    jar  {tokens!a}\n    here {generate.words(tokenize(line))!a}")
    return len(different), len(lines)


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="references as `captioner evaluate` reads them; also mutated")
    parser.add_argument("--split", help="of a Karpathy JSON")
    parser.add_argument("--lines", type=int, default=20000, help="of every generated class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="of the lines of each class that differ")
    given = parser.parse_args()
    lack = generate.lacks_the_jar()
    if lack is not None:
        parser.error(lack)
    rng = random.Random(given.seed)
    captions = [generate.caption(rng) for _ in range(1000)]
    began = time.process_time()
    said = subprocess.run(["java", "-version"], check=True, capture_output=True, text=True).stderr
    java = next(line for line in said.splitlines() if "version" in line)
    print(f"Python {platform.python_version()}, {java}, seed {given.seed}")
    print(f"{'class':<32} {'lines':>7} {'differ':>7} {'share':>9}")
    if given.captions is not None:
        references = read_references(given.captions, split=given.split).captions
        captions = [caption for many in references.values() for caption in many]
        measure(given.captions.name, captions, apart=False, show=given.show)
    found = [
        measure(name, make(), apart=True, show=given.show)
        for name, make in classes(captions, given.lines, given.seed).items()
    ]
    differ, total = (sum(column) for column in zip(*found, strict=True))
    print(f"{'generated and fuzzed, together':<32} {total:>7} {differ:>7} {differ / total:>9.4%}")
    print(f"{time.process_time() - began:.0f} s of CPU time, the jar's not counted")


if __name__ == "__main__":
    main()
