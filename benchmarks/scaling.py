"""Figure 4: what a caption costs against the number of pictures, words and beams: a table, exponents and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contestants import load_captioner
from benchmarks.figure import Figure, Settings, Value
from benchmarks.pictures import photo_files
from benchmarks.timing import exponent, take_turns
from captioner import Captioner
from captioner.api import search_vocabulary
from captioner.search import search

TITLE = "4. Cost against pictures, words and beams"
PICTURES = (1, 2, 4, 8, 16, 32, 64)
WORDS = (4, 8, 12, 16, 20)
BEAMS = (1, 2, 3, 4, 5)
# Of the two other sweeps, and what is kept while another is changed.
BATCH, WORD_COUNT, BEAM_COUNT = 16, 12, 3
LINEAR = 1.1  # a fit to noisy times is not exactly 1
SWEEPS = ("pictures", "words", "beams")


class Point(NamedTuple):
    """One setting of a sweep."""

    pictures: int
    words: int
    beams: int


def sweep_points(settings: Settings) -> dict[str, list[Point]]:
    """Return the settings of each sweep."""
    batch = settings.pick(BATCH, 2)
    pictures, words, beams = (values[:2] if settings.quick else values for values in (PICTURES, WORDS, BEAMS))
    return {
        "pictures": [Point(size, WORD_COUNT, BEAM_COUNT) for size in pictures],
        "words": [Point(batch, size, BEAM_COUNT) for size in words],
        "beams": [Point(batch, WORD_COUNT, size) for size in beams],
    }


def options_of(point: Point) -> dict[str, Any]:
    """Return the search options of a setting: every caption has the same number of words."""
    return {"method": "beam", "beam_size": point.beams, "min_words": point.words, "max_words": point.words}


def caption_all(captioner: Captioner, photos: Sequence[Path], point: Point) -> None:
    """Caption files in one batch."""
    list(captioner.caption_batch(photos[: point.pictures], batch_size=point.pictures, **options_of(point)))


def search_alone(captioner: Captioner, grid_BPC: Any, point: Point) -> None:
    """Write the words of pictures that were decoded and encoded before."""
    options = captioner.search_options(**options_of(point))
    search(captioner.runtime.decoder, grid_BPC, vocabulary=search_vocabulary(captioner.tokenizer), options=options)


def measure(settings: Settings) -> Figure:
    """Measure all sweeps, fit their exponents and draw them.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    captioner = load_captioner(settings)
    sweeps = sweep_points(settings)
    batch = sweeps["words"][0].pictures
    points = sorted({point for sweep in sweeps.values() for point in sweep})
    searched = sorted({point for key in ("words", "beams") for point in sweeps[key]})
    with photo_files(max(point.pictures for point in points)) as photos:
        squares = [captioner.prepare(photo).pixels_u8 for photo in photos[:batch]]
        grid_BPC = captioner.runtime.encode(np.stack(squares))
        series = take_turns(
            {
                **{_name(point): partial(caption_all, captioner, photos, point) for point in points},
                **{_search_name(point): partial(search_alone, captioner, grid_BPC, point) for point in searched},
            },
            repetitions=settings.pick(7, 1),
            least_s=0.0 if settings.quick else 0.1,
        )
    whole = {key: [series[_name(point)].median_s for point in sweep] for key, sweep in sweeps.items()}
    sizes = {key: [getattr(point, key) for point in sweep] for key, sweep in sweeps.items()}
    writing = {key: [series[_search_name(point)].median_s for point in sweeps[key]] for key in ("words", "beams")}
    plot = settings.results / "scaling.png"
    draw(plot, sizes, whole, title=f"Captioner ({captioner.runtime.name}), {settings.threads} threads")
    return Figure(
        title=TITLE,
        values=(
            Value(
                name="exponent of pictures", value=exponent(sizes["pictures"], whole["pictures"]), unit="", most=LINEAR
            ),
            Value(
                name="exponent of words, search alone",
                value=exponent(sizes["words"], writing["words"]),
                unit="",
                most=LINEAR,
            ),
            Value(
                name="exponent of beams, search alone",
                value=exponent(sizes["beams"], writing["beams"]),
                unit="",
                most=1,
            ),
            Value(name="exponent of words", value=exponent(sizes["words"], whole["words"]), unit=""),
            Value(name="exponent of beams", value=exponent(sizes["beams"], whole["beams"]), unit=""),
        ),
        series=series,
        notes=(
            "cost ~ size ** exponent, least squares of the logarithms of the medians: 1 is linear, less is cheaper",
            f"words and beams in one batch of {batch} files; 'search alone' is of pictures encoded before",
            f"plot: {plot.name}",
        ),
    )


def _name(point: Point) -> str:
    return f"{point.pictures} pictures, {point.words} words, {point.beams} beams"


def _search_name(point: Point) -> str:
    return f"search alone: {_name(point)}"


def draw(path: Path, sizes: dict[str, list[int]], seconds: dict[str, list[float]], *, title: str) -> None:
    """Draw the sweeps, both axes logarithmic, each beside a line of exponent 1.

    Args:
        path: of the picture.
        sizes: by sweep.
        seconds: by sweep.
        title: above.
    """
    from matplotlib.figure import Figure as Drawing
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    drawing = Drawing(figsize=(12, 4), layout="constrained")
    drawing.suptitle(title)
    for axes, key in zip(drawing.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        times_ms = [1000 * taken for taken in seconds[key]]
        axes.loglog(sizes[key], times_ms, "o-", label=f"measured, exponent {exponent(sizes[key], seconds[key]):.2f}")
        linear = [times_ms[-1] * size / sizes[key][-1] for size in sizes[key]]
        axes.loglog(sizes[key], linear, ":", color="grey", label="linear")
        axes.set_xlabel(key)
        axes.set_ylabel("milliseconds")
        axes.set_xticks(sizes[key])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=100)
