"""One call from captions to scores, intervals and the protocol card that says how they came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from captioner.errors import MetricError
from captioner.metrics import bleu, java, ptb
from captioner.metrics.cider import CiderD
from captioner.metrics.frequencies import DocumentFrequencies
from captioner.metrics.intervals import Difference, Interval, bootstrap, compare_paired
from captioner.metrics.language import Language, describe
from captioner.metrics.readers import listed
from captioner.metrics.rouge import rouge_l

Floats = NDArray[np.float64]

# All scores are printed x100: coco-caption's CIDEr 0.476 is 47.6 here, its BLEU 0.233 is 23.3.
PERCENT = 100.0
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
SCORERS = "BLEU, ROUGE-L and CIDEr-D as in coco-caption, x100"
_PAIRED = "; differences paired, p by approximate randomisation"


@dataclass(frozen=True)
class ProtocolCard:
    """How the numbers came about; two numbers may be compared if their cards are equal.

    Attributes:
        scorers: the definitions and programs behind the scores, and their scale.
        tokenizer: that split predictions and references.
        document_frequencies: the corpus of CIDEr-D's document frequencies; a fixed one with its size and hash.
        pictures: in the set.
        references: captions they were compared with, all together.
        references_sha256: of the pictures' names and reference captions, in the order of the names.
        interval: how the intervals were made.
        source: where the references come from, if that was told; alone of all it may differ between numbers
            that are compared, since the hash tells the same references apart from others.
    """

    scorers: str
    tokenizer: str
    document_frequencies: str
    pictures: int
    references: int
    references_sha256: str
    interval: str
    source: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of predictions.

    Attributes:
        scores: by metric, x100.
        intervals: of the metrics that are sums over pictures, x100.
        language: what the scores miss.
        card: how the numbers came about.
    """

    scores: Mapping[str, float]
    intervals: Mapping[str, Interval]
    language: Language
    card: ProtocolCard

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)

    def table(self) -> str:
        """Return everything as plain text.

        Returns:
            Lines, without a last line break.
        """
        lines = []
        for name, score in self.scores.items():
            interval = self.intervals.get(name)
            span = "" if interval is None else f"  [{interval.low:.1f}, {interval.high:.1f}]"
            lines.append(f"{name:<8} {score:6.1f}{span}")
        figures = [f"{name:<11} {value} {meaning}" for name, value, meaning in _figures(self.language)]
        return "\n".join([*lines, "", *figures, "", *_card_lines(self.card)])


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions for the same pictures.

    Attributes:
        first: scores of the first.
        second: scores of the second.
        differences: first minus second by metric, x100, with interval and p-value.
    """

    first: Evaluation
    second: Evaluation
    differences: Mapping[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)

    def table(self) -> str:
        """Return the comparison as plain text.

        Returns:
            Lines, without a last line break.
        """
        lines = [f"{'':<11} {'first':>7} {'second':>7}  difference"]
        for name, value in self.first.scores.items():
            row = f"{name:<11} {value:7.1f} {self.second.scores[name]:7.1f}"
            if name in self.differences:
                d = self.differences[name]
                row += f"  {d.value:+.1f} [{d.interval.low:+.1f}, {d.interval.high:+.1f}], p = {d.p_value:.3g}"
            lines.append(row)
        both = zip(_figures(self.first.language), _figures(self.second.language), strict=True)
        figures = [f"{name:<11} {value:>7} {other:>7}  {meaning}" for (name, value, meaning), (_, other, _) in both]
        return "\n".join([*lines, "", *figures, "", *_card_lines(self.first.card)])


def evaluate(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
    meteor: bool = False,
    spice: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    source: str = "",
) -> Evaluation:
    """Score captions against references.

    Args:
        predictions: one caption per picture, untokenised.
        references: the reference captions of exactly the same pictures.
        frequencies: document frequencies of a fixed corpus for CIDEr-D; default: of these references, as
            coco-caption does.
        meteor: also METEOR; needs Java and pycocoevalcap.
        spice: also SPICE; needs Java, pycocoevalcap and the Stanford models.
        resamples: of the bootstrap over pictures.
        confidence: of the intervals.
        seed: of the bootstrap.
        source: of the references, for the card; `References.source` of a file that was read.

    Returns:
        The scores.

    Raises:
        MetricError: a picture has a prediction but no references or the reverse; or METEOR or SPICE cannot
            run.
    """
    settings = _Settings(frequencies, meteor, spice, resamples, confidence, seed, source)
    truth = _Truth.of(references, settings)
    return _evaluate(_tokenise(predictions, truth, "predictions"), truth, settings)


def compare(
    first: Mapping[str, str],
    second: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
    meteor: bool = False,
    spice: bool = False,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    source: str = "",
) -> Comparison:
    """Compare two sets of predictions for the same pictures.

    Args:
        first: one caption per picture.
        second: one caption per picture.
        references: the reference captions of exactly the same pictures.
        frequencies: as in `evaluate`.
        meteor: as in `evaluate`.
        spice: as in `evaluate`.
        resamples: of the paired bootstrap and of the randomisation.
        confidence: of the intervals.
        seed: of both.
        source: as in `evaluate`.

    Returns:
        Both evaluations and their differences.

    Raises:
        MetricError: as in `evaluate`.
    """
    settings = _Settings(frequencies, meteor, spice, resamples, confidence, seed, source)
    truth = _Truth.of(references, settings)
    truth = replace(truth, card=replace(truth.card, interval=truth.card.interval + _PAIRED))
    tokens_a, tokens_b = _tokenise(first, truth, "first predictions"), _tokenise(second, truth, "second predictions")
    differences = compare_paired(
        truth.statistics(tokens_a),
        truth.statistics(tokens_b),
        _score_sums,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    return Comparison(
        _evaluate(tokens_a, truth, settings),
        _evaluate(tokens_b, truth, settings),
        dict(zip(METRICS, differences, strict=True)),
    )


def hash_references(references: Mapping[str, Sequence[str]]) -> str:
    """Return the SHA-256 of reference captions; the order of the pictures does not matter.

    Args:
        references: captions by picture.

    Returns:
        64 hexadecimal digits.
    """
    content = [[name, list(references[name])] for name in sorted(references)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


class _Settings(NamedTuple):
    frequencies: DocumentFrequencies | None
    meteor: bool
    spice: bool
    resamples: int
    confidence: float
    seed: int
    source: str


@dataclass(frozen=True)
class _Truth:
    """The references, tokenised once: by picture in the order of the names."""

    names: list[str]
    tokens: list[list[list[str]]]
    cider: CiderD
    card: ProtocolCard

    @classmethod
    def of(cls, references: Mapping[str, Sequence[str]], settings: _Settings) -> _Truth:
        wanted = [metric for metric, on in (("METEOR", settings.meteor), ("SPICE", settings.spice)) if on]
        for metric in wanted:
            lack = java.missing(metric)
            if lack is not None:
                raise MetricError(f"{metric} cannot run: {lack}")
        bare = [name for name in references if not references[name]]
        if bare:
            raise MetricError(f"{len(bare)} pictures have an empty list of references ({listed(bare)}); leave them out")
        if not references:
            raise MetricError("no pictures to evaluate; give at least one prediction with its references")
        names = sorted(references)
        tokens = [[ptb.tokenize(caption) for caption in references[name]] for name in names]
        card = ProtocolCard(
            scorers="; ".join([SCORERS, *(java.PROGRAMS[metric] for metric in wanted)]),
            tokenizer=ptb.NAME,
            document_frequencies=settings.frequencies.describe() if settings.frequencies else "evaluated references",
            pictures=len(names),
            references=sum(map(len, tokens)),
            references_sha256=hash_references(references),
            interval=f"{settings.confidence:.0%}, bootstrap over pictures, {settings.resamples} resamples, "
            f"seed {settings.seed}",
            source=settings.source,
        )
        cider = CiderD([_words(sentences) for sentences in tokens], frequencies=settings.frequencies)
        return cls(names, tokens, cider, card)

    def statistics(self, tokens: Sequence[Sequence[str]]) -> Floats:
        """Return what the scores are sums of, by picture: BLEU's counts, ROUGE-L, CIDEr-D and a one."""
        words = _words(tokens)
        counts = bleu.count(words, [_words(sentences) for sentences in self.tokens]).stacked()
        means = [rouge_l(tokens, self.tokens), self.cider.score(words), np.ones(len(tokens))]
        return np.concatenate([counts, np.stack(means, axis=1)], axis=1)


def _words(tokens: Sequence[Sequence[str]]) -> list[list[str]]:
    # coco-caption splits at any white space for BLEU and CIDEr, at blanks alone for ROUGE-L: "1\u00a01/2" is
    # two words there and one here.
    return [" ".join(sentence).split() for sentence in tokens]


def _tokenise(predictions: Mapping[str, str], truth: _Truth, whose: str) -> list[list[str]]:
    known = set(truth.names)
    missing = [name for name in truth.names if name not in predictions]
    extra = [name for name in predictions if name not in known]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(known)} pictures have no prediction ({listed(missing)})")
    if extra:
        faults.append(f"{len(extra)} predictions are of pictures without references ({listed(extra)})")
    if faults:
        raise MetricError(f"{whose}: {'; '.join(faults)}; predict exactly the pictures of the references")
    return [ptb.tokenize(predictions[name]) for name in truth.names]


def _evaluate(tokens: list[list[str]], truth: _Truth, settings: _Settings) -> Evaluation:
    statistics_PK = truth.statistics(tokens)
    scores = dict(zip(METRICS, _score_sums(statistics_PK.sum(axis=0, keepdims=True))[0].tolist(), strict=True))
    if settings.meteor:
        scores["METEOR"] = PERCENT * java.meteor(tokens, truth.tokens)
    if settings.spice:
        scores["SPICE"] = PERCENT * java.spice(tokens, truth.tokens)
    intervals = bootstrap(
        statistics_PK,
        _score_sums,
        resamples=settings.resamples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    return Evaluation(scores, dict(zip(METRICS, intervals, strict=True)), describe(_words(tokens)), truth.card)


def _score_sums(sums_RK: Floats) -> Floats:
    bleu_R4 = bleu.score_sums(sums_RK[:, :-3])
    means_R2 = sums_RK[:, -3:-1] / sums_RK[:, -1:]
    return np.asarray(PERCENT * np.concatenate([bleu_R4, means_R2], axis=1))


def _card_lines(card: ProtocolCard) -> list[str]:
    return [f"{name.replace('_', ' '):<20} {value}" for name, value in asdict(card).items() if value != ""]


def _figures(words: Language) -> list[tuple[str, str, str]]:
    return [
        ("vocabulary", f"{words.vocabulary}", "words"),
        ("distinct", f"{words.distinct:.1%}", "of the captions"),
        ("repeated", f"{words.repeated:.1%}", "say a phrase twice"),
        ("unfinished", f"{words.unfinished:.1%}", "break off"),
        ("length", f"{words.mean_words:.1f}", "words on average"),
        ("longest", f"{words.longest_words}", "words"),
    ]
