"""One call from captions to scores, intervals and the protocol card that says how they came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captioner.errors import MetricError
from captioner.metrics import bleu, java, ptb
from captioner.metrics.cider import CiderD, DocumentFrequencies
from captioner.metrics.intervals import Difference, Interval, bootstrap, compare_paired
from captioner.metrics.language import Language, describe
from captioner.metrics.readers import listed
from captioner.metrics.rouge import rouge_l

Floats = NDArray[np.float64]

# All scores are printed x100: coco-caption's CIDEr 0.476 is 47.6 here, its BLEU 0.233 is 23.3.
PERCENT = 100.0
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")


@dataclass(frozen=True)
class ProtocolCard:
    """How the numbers came about; two numbers may be compared if their cards are equal.

    Attributes:
        tokenizer: that split predictions and references.
        document_frequencies: the corpus of CIDEr-D's document frequencies.
        pictures: in the set.
        references: captions they were compared with, all together.
        references_sha256: of the pictures' names and reference captions, in the order of the names.
        interval: how the intervals were made.
    """

    tokenizer: str
    document_frequencies: str
    pictures: int
    references: int
    references_sha256: str
    interval: str


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
        words = self.language
        lines += [
            "",
            f"vocabulary  {words.vocabulary} words",
            f"distinct    {words.distinct:.1%} of the captions",
            f"repeated    {words.repeated:.1%} say a phrase twice",
            f"unfinished  {words.unfinished:.1%} break off",
            f"length      {words.mean_words:.1f} words, longest {words.longest_words}",
            "",
            *_card_lines(self.card),
        ]
        return "\n".join(lines)


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
        lines = [f"{'':<8} {'first':>6} {'second':>6}  difference"]
        for name, value in self.first.scores.items():
            row = f"{name:<8} {value:6.1f} {self.second.scores[name]:6.1f}"
            if name in self.differences:
                d = self.differences[name]
                row += (
                    f"  {d.value:+.1f} [{d.interval.low:+.1f}, {d.interval.high:+.1f}], p = {d.p_value:.3g}"
                )
            lines.append(row)
        return "\n".join([*lines, "", *_card_lines(self.first.card)])


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

    Returns:
        The scores.

    Raises:
        MetricError: a picture has no prediction, no reference or one side only; or METEOR or SPICE cannot run.
    """
    names = _names(predictions, references)
    for metric, wanted in (("METEOR", meteor), ("SPICE", spice)):
        lack = java.missing(metric) if wanted else None
        if lack is not None:
            raise MetricError(f"{metric} cannot run: {lack}")
    tokens = [ptb.tokenize(predictions[name]) for name in names]
    truth = [[ptb.tokenize(caption) for caption in references[name]] for name in names]
    statistics_PK = _statistics(tokens, truth, frequencies)
    scores = dict(
        zip(METRICS, map(float, _score_sums(statistics_PK.sum(axis=0, keepdims=True))[0]), strict=True)
    )
    if meteor:
        scores["METEOR"] = PERCENT * java.meteor(tokens, truth)
    if spice:
        scores["SPICE"] = PERCENT * java.spice(tokens, truth)
    intervals = bootstrap(statistics_PK, _score_sums, resamples=resamples, confidence=confidence, seed=seed)
    card = ProtocolCard(
        tokenizer=ptb.NAME,
        document_frequencies="evaluated references" if frequencies is None else frequencies.name,
        pictures=len(names),
        references=sum(map(len, truth)),
        references_sha256=hash_references(references),
        interval=f"{confidence:.0%}, bootstrap over pictures, {resamples} resamples, seed {seed}",
    )
    return Evaluation(scores, dict(zip(METRICS, intervals, strict=True)), describe(tokens), card)


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

    Returns:
        Both evaluations and their differences.

    Raises:
        MetricError: as in `evaluate`.
    """
    names = _names(first, references)
    _names(second, references)
    truth = [[ptb.tokenize(caption) for caption in references[name]] for name in names]
    both = [
        _statistics([ptb.tokenize(side[name]) for name in names], truth, frequencies)
        for side in (first, second)
    ]
    differences = compare_paired(*both, _score_sums, resamples=resamples, confidence=confidence, seed=seed)
    evaluations = [
        evaluate(
            side,
            references,
            frequencies=frequencies,
            meteor=meteor,
            spice=spice,
            resamples=resamples,
            confidence=confidence,
            seed=seed,
        )
        for side in (first, second)
    ]
    return Comparison(evaluations[0], evaluations[1], dict(zip(METRICS, differences, strict=True)))


def hash_references(references: Mapping[str, Sequence[str]]) -> str:
    """Return the SHA-256 of reference captions; the order of the pictures does not matter.

    Args:
        references: captions by picture.

    Returns:
        64 hexadecimal digits.
    """
    content = [[name, list(references[name])] for name in sorted(references)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode("ascii")).hexdigest()


def _names(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> list[str]:
    missing = [name for name in references if name not in predictions]
    extra = [name for name in predictions if name not in references]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(references)} pictures have no prediction ({listed(missing)})")
    if extra:
        faults.append(f"{len(extra)} predictions are of pictures without references ({listed(extra)})")
    if faults:
        raise MetricError(f"{'; '.join(faults)}; predict exactly the pictures of the references")
    bare = [name for name in references if not references[name]]
    if bare:
        raise MetricError(
            f"{len(bare)} pictures have an empty list of references ({listed(bare)}); leave them out"
        )
    if not references:
        raise MetricError("no pictures to evaluate; give at least one prediction with its references")
    return sorted(references)


def _statistics(
    tokens: Sequence[Sequence[str]],
    truth: Sequence[Sequence[Sequence[str]]],
    frequencies: DocumentFrequencies | None,
) -> Floats:
    """Everything that the scores are sums of, one row per picture: BLEU's counts, ROUGE-L, CIDEr-D, and a one."""
    cider_P = CiderD(truth, frequencies=frequencies).score(tokens)
    columns = [rouge_l(tokens, truth)[:, None], cider_P[:, None], np.ones((len(tokens), 1))]
    return np.concatenate([bleu.count(tokens, truth).stacked(), *columns], axis=1)


def _score_sums(sums_RK: Floats) -> Floats:
    bleu_R4 = bleu.score_sums(sums_RK[:, :-3])
    means_R2 = sums_RK[:, -3:-1] / sums_RK[:, -1:]
    return PERCENT * np.concatenate([bleu_R4, means_R2], axis=1)


def _card_lines(card: ProtocolCard) -> list[str]:
    return [f"{name.replace('_', ' '):<20} {value}" for name, value in asdict(card).items()]
