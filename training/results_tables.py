"""The rows of the results, and the Markdown that shows them: protocol, table, published rows, maps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from captioner.config import DECODER_CONFIGS, SearchOptions
from captioner.metrics import Evaluation, Interval
from training.pointing import CHANCE
from training.results_measure import SPEED_BATCH, SPEED_PASSES, SPEED_PICTURES, Measured, Protocol
from training.results_runs import FROZEN, SCST, TUNED, Trained

_SCORES = ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-L")
_KINDS = (FROZEN, TUNED, SCST)
_NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The seeds of one recipe and decoder at the end of one stage.

    Args:
        seeds: runs and what was found of them, by seed; at least one.
    """

    seeds: Sequence[tuple[Trained, Measured]]

    @property
    def decoder(self) -> str:
        """Kind of the decoder."""
        return self.seeds[0][0].decoder

    @property
    def training(self) -> str:
        """What was trained, with the label of the recipe where it has one."""
        first = self.seeds[0][0]
        return f"{first.kind} ({first.label})" if first.label else first.kind

    @property
    def first(self) -> Measured:
        """What was found of the first seed."""
        return self.seeds[0][1]

    @property
    def found(self) -> list[Measured]:
        """What was found of each seed."""
        return [measured for _, measured in self.seeds]


def make_rows(trained: Sequence[Trained], measured: Sequence[Measured]) -> list[Row]:
    """Join the seeds of one recipe.

    Args:
        trained: the ends of stages of all runs.
        measured: what was found of each.

    Returns:
        Rows by label, kind of training and decoder.
    """
    groups: dict[tuple[str, str, str], list[tuple[Trained, Measured]]] = {}
    for pair in zip(trained, measured, strict=True):
        groups.setdefault((pair[0].label, pair[0].kind, pair[0].decoder), []).append(pair)

    def place(key: tuple[str, str, str]) -> tuple[str, int, str, int]:
        label, kind, decoder = key
        return label, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind, [*DECODER_CONFIGS].index(decoder)

    return [
        Row(seeds=sorted(groups[key], key=lambda pair: (pair[0].seed is None, pair[0].seed or 0)))
        for key in sorted(groups, key=place)
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay text out as a Markdown table.

    Args:
        header: names of the columns.
        rows: cells.

    Returns:
        Lines, without a last line break.
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float, interval: Interval | None) -> str:
    """Return a difference with its interval, and whether it can be told from nothing.

    Args:
        value: the difference.
        interval: of it; None where there is none.

    Returns:
        Such as "+1.2 (+0.3 to +2.1)".
    """
    if interval is None:
        return f"{value:+.1f} (too few pictures for an interval)"
    text = f"{value:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"
    # As it is printed: what holds +0.0 for the reader holds it here.
    return text if round(interval.low, 1) > 0 or round(interval.high, 1) < 0 else f"{text}, not distinguishable"


def protocol_card(rows: Sequence[Row], protocol: Protocol, *, data: str) -> str:
    """Return how all numbers of the file came about.

    Args:
        rows: of the table.
        protocol: how the models were measured.
        data: format of the data.

    Returns:
        Markdown.
    """
    card, found = rows[0].first.evaluation.card, [m for row in rows for m in row.found]
    trained = [t for row in rows for t, _ in row.seeds]
    search = {k: v for k, v in protocol.search.to_dict().items() if v != getattr(SearchOptions(), k)}
    search = {"method": protocol.search.method, "beam_size": protocol.search.beam_size} | search
    lines = {
        "split": f"dev, of {data} data; it was watched during training, so scores lean a little to the good side",
        "pictures": f"{card.pictures}",
        "references": f"{card.references}, SHA-256 {card.references_sha256}",
        "data of all runs": f"SHA-256 of names and captions of all splits {trained[0].facts['data_sha256']}",
        "scorers": max((m.evaluation.card.scorers for m in found), key=len),
        "tokenizer": card.tokenizer,
        "document frequencies": card.document_frequencies,
        "intervals": card.interval,
        "search": ", ".join(f"{k} {v}" for k, v in search.items()) + "; all else as by default",
        "encoder": rows[0].first.encoder,
        "vocabulary": f"{rows[0].first.vocabulary_size} tokens",
        "trained with": _versions([t.versions for t in trained], ("captioner", "torch", "lightning")),
        "measured with": _versions([m.versions for m in found], ("captioner", "torch")),
        "captions per second": f"batches of {SPEED_BATCH} from decoded pictures, median of {SPEED_PASSES} passes over "
        f"{min(SPEED_PICTURES, len(protocol.pictures))} dev pictures; on "
        + " and ".join(dict.fromkeys(m.speed.machine for m in found)),
        "pointing share": f"{protocol.mosaics} mosaics of 2 x 2 dev photos, a true caption of one of them scored; the "
        f"part of the attention of its content words within its quadrant; chance is {CHANCE:.0%}",
    }
    return table(("protocol", ""), [*lines.items()])


def main_table(rows: Sequence[Row]) -> str:
    """Return the table of all rows.

    Args:
        rows: in order.

    Returns:
        Markdown.
    """
    meteor = any("METEOR" in measured.evaluation.scores for row in rows for measured in row.found)
    scores = [name for name in _SCORES if meteor or name != "METEOR"]
    header = ["decoder", "training", "seeds", *scores, "CIDEr-D (95 % interval)", *_FIGURES, "training time", "machine"]
    return table(
        header,
        [
            [
                row.decoder,
                row.training,
                f"{len(row.seeds)}",
                *(_score(row.found, name) for name in scores),
                _cider(row),
                *(_spread([figure(m) for m in row.found], style) for figure, style in _FIGURES.values()),
                _training_time(row),
                " / ".join(dict.fromkeys(trained.machine for trained, _ in row.seeds)),
            ]
            for row in rows
        ],
    )


def models_table(models: Mapping[str, Measured]) -> str:
    """Return the table of model folders, which need not share encoder and vocabulary with the rows of the runs.

    Args:
        models: by label.

    Returns:
        Markdown.
    """
    meteor = any("METEOR" in measured.evaluation.scores for measured in models.values())
    scores = [name for name in _SCORES if meteor or name != "METEOR"]
    return table(
        ["model", "decoder", "encoder", "vocabulary", *scores, "CIDEr-D (95 % interval)", *_FIGURES],
        [
            [
                label,
                found.decoder,
                found.encoder,
                f"{found.vocabulary_size}",
                *(_score([found], name) for name in scores),
                _with_interval(found.evaluation),
                *(_spread([figure(found)], style) for figure, style in _FIGURES.values()),
            ]
            for label, found in models.items()
        ],
    )


def maps_table(named: Mapping[str, Measured]) -> str:
    """Return where the attention of content words falls, by quadrant, layer and head.

    Args:
        named: what was found, by the name of the row.

    Returns:
        Markdown.
    """
    rows = []
    for name, found in named.items():
        score = found.pointing
        heads = [(share, at, head) for at, layer in enumerate(score.by_head) for head, share in enumerate(layer)]
        best = max(heads)
        rows.append(
            [
                name,
                f"{score.share:.1%} ({score.interval.low:.1%} to {score.interval.high:.1%})",
                f"{score.words}",
                " ".join(f"{share:.1%}" for share in score.by_quadrant),
                " ".join(f"{share:.1%}" for share in score.by_layer),
                ", ".join(map(str, score.map_layers)) or _NONE,
                f"{best[0]:.1%} (layer {best[1]}, head {best[2]})" if len(heads) > 1 else _NONE,
            ]
        )
    return table(
        [
            "row",
            "share in the right quadrant (95 % interval)",
            "words",
            "caption of quadrant 1 2 3 4",
            "mean over heads of layer 0 1 ...",
            "layers of the map",
            "best head",
        ],
        rows,
    )


# --- Cells ---

_FIGURES: dict[str, tuple[Callable[[Measured], float], str]] = {
    "distinct captions": (lambda m: m.evaluation.language.distinct, ".1%"),
    "repeated phrase": (lambda m: m.evaluation.language.repeated, ".1%"),
    "unfinished": (lambda m: m.evaluation.language.unfinished, ".1%"),
    "pointing share": (lambda m: m.pointing.share, ".1%"),
    "parameters (M)": (lambda m: m.parameters / 1e6, ".2f"),
    "captions per second": (lambda m: m.speed.per_second, ".1f"),
}


def _spread(values: Sequence[float], style: str) -> str:
    mean = format(statistics.fmean(values), style)
    if len(values) < 2:
        return mean
    deviation = format(statistics.stdev(values), style)
    return mean if not any(digit in deviation for digit in "123456789") else f"{mean} ± {deviation}"


def _score(found: Sequence[Measured], name: str) -> str:
    values = [m.evaluation.scores[name] for m in found if name in m.evaluation.scores]
    return _spread(values, ".1f") if len(values) == len(found) else _NONE


def _with_interval(evaluation: Evaluation) -> str:
    interval = evaluation.intervals["CIDEr-D"]
    return f"{evaluation.scores['CIDEr-D']:.1f} ({interval.low:.1f} to {interval.high:.1f})"


def _cider(row: Row) -> str:
    of_first = _with_interval(row.first.evaluation)
    if len(row.seeds) < 2:
        return of_first
    return f"{_score(row.found, 'CIDEr-D')}; seed {row.seeds[0][0].seed}: {of_first}"


def _training_time(row: Row) -> str:
    times = [trained.duration for trained, _ in row.seeds]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return "not recorded"
    text = _minutes(statistics.fmean(time.seconds for time in known))
    return f"at least {text}" if any(time.at_least for time in known) else text


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _versions(found: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> str:
    texts = [", ".join(f"{name} {versions.get(name) or 'not installed'}" for name in names) for versions in found]
    return "; ".join(dict.fromkeys(texts))


# --- What others have published ---


@dataclass(frozen=True, kw_only=True)
class _Published:
    """A row of the literature on Flickr8k's official test split; scores as printed there."""

    model: str
    bleu: str
    meteor: str
    source: str
    encoder: str
    encoder_trained: str
    picture: str
    beam: str
    text: str


_NOT_STATED = "not stated"
_XU = {
    "source": "Xu et al. 2015, table 1 (arXiv 1502.03044)",
    "encoder": "VGG, convolutional features of 14 x 14 cells",
    "encoder_trained": "no",
    "picture": "224 x 224 from the centre, not squashed",
    "beam": _NOT_STATED,
    "text": "BLEU without a brevity penalty; tokenizer not stated",
}
PUBLISHED = (
    _Published(
        model="Show and Tell",
        bleu="63 / 41 / 27 / –",
        meteor=_NONE,
        source="BLEU-1: Vinyals et al. 2015 (arXiv 1411.4555); BLEU-2 and -3: as quoted for it by Xu et al. 2015, "
        "table 1, which marks the row as an ensemble and of another split",
        encoder="GoogLeNet, one vector",
        encoder_trained="no",
        picture=_NOT_STATED,
        beam="20",
        text="basic tokenization; words that occur at least 5 times",
    ),
    _Published(
        model="Karpathy and Fei-Fei",
        bleu="57.9 / 38.3 / 24.5 / 16.0",
        meteor=_NONE,
        source="Karpathy and Fei-Fei 2015, full-image table (arXiv 1412.2306)",
        encoder="VGG, one vector",
        encoder_trained=_NOT_STATED,
        picture=_NOT_STATED,
        beam="not stated for these figures",
        text="lower case, letters and digits only; words that occur at least 5 times; coco-caption's scorers",
    ),
    _Published(model="Show, Attend and Tell, soft", bleu="67 / 44.8 / 29.9 / 19.5", meteor="18.93", **_XU),
    _Published(model="Show, Attend and Tell, hard", bleu="67 / 45.7 / 31.4 / 21.3", meteor="20.30", **_XU),
)


def published_table() -> str:
    """Return the rows of the literature, with what differs in protocol.

    Returns:
        Markdown.
    """
    header = (
        "published model",
        "BLEU-1 / 2 / 3 / 4",
        "METEOR",
        "source",
        "encoder",
        "encoder trained",
        "picture",
        "beam",
        "text",
    )
    return table(header, [[*asdict(row).values()] for row in PUBLISHED])
