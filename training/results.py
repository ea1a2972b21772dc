"""Run folders → one Markdown file: the decoders under one protocol, and what attention adds.

python -m training results RUN... [--model LABEL=FOLDER] --data-root ROOT -o docs/results.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from captioner.config import DECODER_CONFIGS, SearchOptions
from captioner.errors import ConfigError, DataError
from captioner.metrics import compare
from training.callbacks.files import not_written, write_whole
from training.results_analysis import FEWEST, Bin, Floats, References, mean_of
from training.results_measure import Measured, Protocol, Subject, measure
from training.results_runs import Trained, check_comparable, read_run
from training.results_tables import (
    Row,
    main_table,
    make_rows,
    maps_table,
    models_table,
    protocol_card,
    published_table,
    signed,
    table,
)
from training.sources import CaptionedPicture, DataSource, data_hash, read_source

_SEARCH = ("beam_size", "max_words", "length_penalty", "no_repeat_ngram")


class DataPlaces(NamedTuple):
    """Where the data of the runs are now.

    Args:
        root: folder of the data.
        extra_root: folder of the extra data; None: where it was in training.
        extra_images: folder of their pictures; None: where it was in training.
    """

    root: str
    extra_root: str | None = None
    extra_images: str | None = None


def read_dev(run: Trained, places: DataPlaces) -> list[CaptionedPicture]:
    """Read the dev split of a run's data.

    Args:
        run: whose data they are.
        places: where they are.

    Returns:
        The pictures in order.

    Raises:
        ConfigError: for shards, which have no pictures in files.
        DataError: when the data cannot be read, or are not what the run was trained on.
    """
    source = {**run.source["source"], "root": places.root}
    if source.get("format") == "shards":
        raise ConfigError(f"{run.run}: trained on shards; results are made from pictures in files")
    pictures = dict(read_source(DataSource(**source)).pictures)
    if "extra" in run.source:
        moved = {"root": places.extra_root, "images": places.extra_images}
        extra = DataSource(**{**run.source["extra"], **{k: v for k, v in moved.items() if v is not None}})
        try:
            pictures["train"] = pictures["train"] + read_source(extra).pictures["train"]
        except DataError as err:
            raise DataError(f"{err} (extra data of {run.run}: see --extra-root and --extra-images)") from err
    if data_hash(pictures) != run.facts["data_sha256"]:
        options = "--data-root, --extra-root and --extra-images" if "extra" in run.source else "--data-root"
        raise DataError(f"{places.root}: not the data of {run.run}: names or captions differ; see {options}")
    return pictures["dev"]


def make_results(
    runs: Mapping[Path, str],
    models: Mapping[str, Path],
    places: DataPlaces,
    *,
    search: SearchOptions,
    mosaics: int = 400,
    speed_again: bool = False,
    notes: str = "",
) -> str:
    """Measure the models of runs and write down what was found.

    Args:
        runs: folders, with the label of their recipe or "".
        models: model folders by label, which need not share encoder and vocabulary with the runs.
        places: where the data are.
        search: how the dev pictures are captioned.
        mosaics: for the pointing of the maps.
        speed_again: time all models anew, though all else is known.
        notes: Markdown for the end.

    Returns:
        Markdown.

    Raises:
        CaptionerError: when something cannot be read, or the runs cannot be compared.
    """
    trained = [row for folder, label in runs.items() for row in read_run(folder, label=label)]
    check_comparable(trained)
    protocol = Protocol(pictures=read_dev(trained[0], places), search=search, mosaics=mosaics, speed_again=speed_again)
    subjects = [Subject.of_run(f"{row.run.name}, {row.checkpoint.name}", row.checkpoint) for row in trained]
    others = {label: Subject.of_folder(label, folder) for label, folder in models.items()}
    rows = make_rows(trained, [measure(subject, protocol) for subject in subjects])
    other = {label: measure(subject, protocol) for label, subject in others.items()}
    named = {f"{row.decoder}, {row.training}": row.first for row in rows}
    card = protocol_card(rows, protocol, data=trained[0].source["source"].get("format", "table"))
    parts = [
        "# Results",
        card,
        "Figures of several seeds are means ± standard deviations over seeds. All scores x100.",
        main_table(rows),
        *(["Other models, on the same pictures and by the same search:", models_table(other)] if other else []),
        "## Published figures",
        "On the official test split of Flickr8k (1,000 pictures), as printed in their sources; the rows above are of "
        f"the dev split ({len(protocol.pictures)} pictures), squashed whole to the model's side. So no figure here is "
        "strictly comparable with one above.",
        published_table(),
        "## Maps that point",
        "Of the first seed of each row. Quadrants from top left to bottom right, row by row; layers and heads are "
        "counted from 0; the map of a word is the mean of the named layers.",
        maps_table(named | {f"{label} (model)": found for label, found in other.items()}),
        "## What attention adds",
        *_attention(rows, protocol),
        *([notes.strip("\n")] if notes.strip() else []),
    ]
    return "\n\n".join(parts) + "\n"


# --- What attention adds ---


def _attention(rows: Sequence[Row], protocol: Protocol) -> list[str]:
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.training, {})[row.decoder] = row
    shared = {training: group for training, group in groups.items() if len(group) > 1}
    if not shared:
        return ["Left out: it needs two decoders that were trained in the same way."]
    references = References(protocol.references)
    parts = [
        "Differences of the second decoder from the first, on the same pictures, with 95 % intervals of a paired "
        "bootstrap over pictures. They tell what other pictures would change, not what another seed would. "
        '"Not distinguishable": the interval holds 0.',
        _pairs_table(shared, protocol),
        "CIDEr-D of a picture, as below, has the document frequencies of the whole dev split. A word counts as a "
        "thing if at least three in five of the picture's references share it and it is no article, pronoun, "
        "preposition, conjunction or auxiliary. That is a stand-in for a count of objects, which the data do not "
        f"have: it also counts doings, colours and numbers. Below {FEWEST} pictures no interval is given.",
    ]
    bins = {
        "mean length of the references, in thirds": references.by_length(),
        "number of things": references.by_things(),
    }
    for training, group in shared.items():
        chosen = {row.decoder: run for row, run in zip(group.values(), _same_seed([*group.values()]), strict=True)}
        cider = {decoder: references.cider(measured.captions) for decoder, (_, measured) in chosen.items()}
        parts += [f"### CIDEr-D by length and content: {training}", _seeds_line(chosen)]
        parts += [_bins_table(name, some, cider) for name, some in bins.items()]
    return parts


def _same_seed(rows: Sequence[Row]) -> list[tuple[Trained, Measured]]:
    """Return one run of each row: of the lowest seed that all have, else the first of each."""
    common = [t.seed for t, _ in rows[0].seeds if all(t.seed in [o.seed for o, _ in row.seeds] for row in rows)]
    if not common:
        return [row.seeds[0] for row in rows]
    return [next(pair for pair in row.seeds if pair[0].seed == common[0]) for row in rows]


def _seeds_line(chosen: Mapping[str, tuple[Trained, Measured]]) -> str:
    return "Of " + ", ".join(f"{decoder} with seed {trained.seed}" for decoder, (trained, _) in chosen.items()) + "."


def _pairs(decoders: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of decoders, the one with less attention first."""
    return [*combinations([decoder for decoder in DECODER_CONFIGS if decoder in decoders], 2)]


def _pairs_table(shared: Mapping[str, Mapping[str, Row]], protocol: Protocol) -> str:
    lines = []
    for training, group in shared.items():
        for before, after in _pairs([*group]):
            pair = [group[after], group[before]]
            (_, first), (_, second) = runs = _same_seed(pair)
            found = compare(first.captions, second.captions, protocol.references).differences
            seeds = " and ".join(dict.fromkeys(str(trained.seed) for trained, _ in reversed(runs)))
            lines.append(
                [
                    training,
                    f"{before} → {after}",
                    seeds,
                    *(signed(found[name].value, found[name].interval) for name in ("CIDEr-D", "BLEU-4")),
                    _means(pair),
                ]
            )
    return table(["training", "step", "seed", "CIDEr-D", "BLEU-4", "CIDEr-D, means over seeds"], lines)


def _means(pair: Sequence[Row]) -> str:
    if any(len(row.seeds) < 2 for row in pair):
        return "–"
    after, before = (np.mean([m.evaluation.scores["CIDEr-D"] for m in row.found]) for row in pair)
    return f"{after - before:+.1f} ({len(pair[1].seeds)} and {len(pair[0].seeds)} seeds)"


def _bins_table(name: str, bins: Sequence[Bin], cider: Mapping[str, Floats]) -> str:
    decoders, pairs = [decoder for decoder in DECODER_CONFIGS if decoder in cider], _pairs([*cider])
    lines = []
    for some in bins:
        inside = {decoder: values[[*some.pictures]] for decoder, values in cider.items()}
        differences = [mean_of(inside[after] - inside[before]) for before, after in pairs]
        lines.append(
            [
                some.name,
                f"{len(some.pictures)}",
                *(f"{inside[decoder].mean():.1f}" for decoder in decoders),
                *(signed(difference.value, difference.interval) for difference in differences),
            ]
        )
    return table([name, "pictures", *decoders, *(f"{before} → {after}" for before, after in pairs)], lines)


# --- The command ---


def main(arguments: Sequence[str]) -> int:
    """Run `python -m training results`.

    Args:
        arguments: after the word results.

    Returns:
        The exit status.

    Raises:
        CaptionerError: when something cannot be read, compared or written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training results",
        description="Measure the models of runs on the dev split, and write one Markdown file.",
    )
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="run folder; a label tells recipes apart")
    parser.add_argument("--model", action="append", default=[], metavar="LABEL=FOLDER", help="model folder to add")
    parser.add_argument("--data-root", required=True, help="folder of the data")
    parser.add_argument("--extra-root", help="folder of the extra data, if it is not where it was in training")
    parser.add_argument("--extra-images", help="folder of the extra pictures, if it is not where it was in training")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, such as docs/results.md")
    parser.add_argument("--beam-size", type=int, default=SearchOptions().beam_size)
    parser.add_argument("--max-words", type=int, default=SearchOptions().max_words)
    parser.add_argument("--length-penalty", type=float, default=SearchOptions().length_penalty)
    parser.add_argument("--no-repeat-ngram", type=int, default=SearchOptions().no_repeat_ngram)
    parser.add_argument("--mosaics", type=int, default=400, help="for the pointing of the maps (default: %(default)s)")
    parser.add_argument("--speed-again", action="store_true", help="time all models anew, though all else is known")
    parser.add_argument("--notes", type=Path, help="Markdown file that is appended as it is")
    given = parser.parse_args(arguments)
    _check_output(given.output)
    text = make_results(
        _runs(given.runs),
        _models(given.model),
        DataPlaces(given.data_root, given.extra_root, given.extra_images),
        search=SearchOptions(**{name: getattr(given, name) for name in _SEARCH}),
        mosaics=given.mosaics,
        speed_again=given.speed_again,
        notes=_notes(given.notes),
    )
    data = text.encode("utf-8", "backslashreplace")
    try:
        write_whole(given.output, data)
    except OSError as err:
        raise not_written(given.output, len(data), err, remedy="make room, or choose another place") from err
    sys.stdout.write(f"The results are in {given.output}\n")
    return 0


def _runs(given: Sequence[str]) -> dict[Path, str]:
    runs: dict[Path, str] = {}
    for text in given:
        label, equals, folder = text.partition("=")
        labelled = bool(equals) and "/" not in label and not Path(text).is_dir()  # a folder may have = in its name
        path = Path(folder if labelled else text)
        if any(path.absolute() == other.absolute() for other in runs):
            raise ConfigError(f"{path}: named twice; name every run once")
        runs[path] = label if labelled else ""
    return runs


def _models(given: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in given:
        label, equals, folder = text.partition("=")
        if not equals or not label or not folder:
            raise ConfigError(f"--model {text}: expected LABEL=FOLDER, such as shipped=captioner/bundled")
        if label in models:
            raise ConfigError(f"--model {text}: the label {label!r} is taken; choose another one")
        models[label] = Path(folder)
    return models


def _notes(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        raise DataError(f"--notes {path}: cannot be read: {getattr(err, 'strerror', None) or err}") from err


def _check_output(path: Path) -> None:
    """Refuse a file that could not be written after the work."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"--output {path}: cannot be written there; choose another file")
