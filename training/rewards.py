"""Rewards of self-critical sequence training (Rennie et al. 2017) and what is left of them over a baseline.

The end token is a word of references and samples alike. Without it a reward of n-grams is highest for sentences that
break off ("a man riding a horse on a"), for every n-gram counts and none says that the sentence is whole.

Shapes: H captions; B pictures with S samples each; 4 orders of n-grams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from captioner.errors import ConfigError, DataError, MetricError
from captioner.metrics import CiderD
from captioner.metrics import tokenize as ptb_tokenize
from captioner.metrics.bleu import MAX_ORDER
from captioner.tokenizer import END, Tokenizer
from training.mosaics import has_content

Floats = NDArray[np.float64]
Baseline = Literal["mean_of_others", "greedy"]
BASELINES: tuple[str, ...] = get_args(Baseline)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What self-critical training rewards: a weighted sum of scores, less what is said twice.

    Args:
        cider: weight of CIDEr-D, which runs from 0 to 10; a good captioner is near 1.
        bleu4: weight of the smoothed BLEU-4 of the sentence, which runs from 0 to 1; see `SentenceBleu`.
        overlap: weight of METEOR's F over single words, which runs from 0 to 1 and counts what is missing more than
            what is too much, so that captions do not get shorter and shorter; see `SentenceOverlap`.
        repeats: what every content word costs that is said more often than in any reference ("a sink and a sink").
        baseline: what a reward is compared with: "mean_of_others", the other samples of the picture (Luo 2020), or
            "greedy", the caption of greedy search (Rennie et al. 2017).
        samples: captions drawn for each picture.

    Raises:
        ConfigError: for a value out of its range, or `mean_of_others` with fewer than two samples.
    """

    cider: float = 1.0
    bleu4: float = 0.0
    overlap: float = 0.0
    repeats: float = 0.0
    baseline: Baseline = "mean_of_others"
    samples: int = 5

    def __post_init__(self) -> None:
        for name in ("cider", "bleu4", "overlap", "repeats"):
            weight = getattr(self, name)
            if not 0.0 <= weight < math.inf:
                raise ConfigError(f"rewards.{name} must be a finite number, at least 0, got {weight!r}")
        if self.cider == self.bleu4 == self.overlap == 0:
            raise ConfigError(
                "rewards.cider, rewards.bleu4 and rewards.overlap are all 0: nothing is rewarded; raise one of them"
            )
        if self.baseline not in BASELINES:
            raise ConfigError(f"rewards.baseline must be one of {', '.join(BASELINES)}, got {self.baseline!r}")
        least = 2 if self.baseline == "mean_of_others" else 1
        if self.samples < least:
            raise ConfigError(
                f"rewards.samples must be at least {least} with baseline {self.baseline!r}, got {self.samples}"
            )


class CaptionReward:
    """Scores captions as they come from the model against references that are prepared once.

    Captions and references become tokens as in `captioner evaluate`, then the end token is added: to every
    reference, and to the captions that have it. Document frequencies are those of the given references, the end
    token included. Make one in each process: it cannot be pickled to another.

    Args:
        references: the captions of each picture of the training set by its name.
        tokenizer: of the model.
        config: which scores, with which weights.
        tokenize: text to words; default: PTB tokens, as for the reported scores.

    Raises:
        DataError: for no pictures, or a picture without captions.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        *,
        tokenizer: Tokenizer,
        config: RewardConfig,
        tokenize: Callable[[str], list[str]] = ptb_tokenize,
    ) -> None:
        if not references:
            raise DataError("rewards: no reference captions at all; give those of the training set")
        for name, captions in references.items():
            if not captions:
                raise DataError(f"rewards: {name} has no reference captions; give at least one or leave it out")
        self._config = config
        self._tokenizer = tokenizer
        self._tokenize = tokenize
        self._index = {name: index for index, name in enumerate(references)}
        tokens = [[[*tokenize(text), END] for text in captions] for captions in references.values()]
        self._cider = CiderD(tokens) if config.cider > 0 else None
        self._bleu = [SentenceBleu(sentences) for sentences in tokens] if config.bleu4 > 0 else []
        self._overlap = [SentenceOverlap(sentences) for sentences in tokens] if config.overlap > 0 else []
        self._most = [most_often(sentences) for sentences in tokens] if config.repeats > 0 else []

    def score(self, names: Sequence[str], captions: Sequence[Sequence[int]]) -> Floats:
        """Return the reward of each caption.

        Args:
            names: the picture of each caption; one may be named often.
            captions: ids as the model writes them: words, the end token where the sentence ended, then padding.

        Returns:
            float64 [H].

        Raises:
            MetricError: for a picture without references, or another number of names than of captions.
        """
        if len(names) != len(captions):
            raise MetricError(f"rewards: {len(captions)} captions for {len(names)} names; give one each")
        unknown = next((name for name in names if name not in self._index), None)
        if unknown is not None:
            raise MetricError(f"rewards: {unknown} has no references; give those of every training picture")
        indices = [self._index[name] for name in names]
        words = [self._words(caption) for caption in captions]
        rewards = np.zeros(len(words))
        if self._cider is not None:
            rewards += self._config.cider * self._cider.score(words, indices)
        if self._config.bleu4 > 0:
            bleu4 = [self._bleu[index].score(found) for found, index in zip(words, indices, strict=True)]
            rewards += self._config.bleu4 * np.array(bleu4, dtype=np.float64)
        if self._config.overlap > 0:
            overlap = [self._overlap[index].score(found) for found, index in zip(words, indices, strict=True)]
            rewards += self._config.overlap * np.array(overlap, dtype=np.float64)
        if self._config.repeats > 0:
            repeats = [said_too_often(found, self._most[index]) for found, index in zip(words, indices, strict=True)]
            rewards -= self._config.repeats * np.array(repeats, dtype=np.float64)
        return rewards

    def _words(self, caption: Sequence[int]) -> list[str]:
        ids = list(takewhile(lambda token_id: token_id not in (Tokenizer.end_id, Tokenizer.pad_id), caption))
        finished = list(caption[len(ids) : len(ids) + 1]) == [Tokenizer.end_id]
        return self._tokenize(self._tokenizer.sentence(ids)) + [END] * finished


class SentenceBleu:
    """BLEU-4 of single sentences against the references of one picture, which are counted once.

    With the smoothing of Lin & Och (2004): one is added to the matches and to the number of n-grams of the orders 2
    to 4, so that a sentence without a matching 4-gram still tells better from worse. The reference length is the
    closest one, of two the shorter, as in coco-caption.

    Args:
        references: tokenised; at least one.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._lengths = sorted({len(reference) for reference in references})
        # Each n-gram with its count in the reference that has most of it.
        self._most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            self._most |= Counter(_grams(reference))

    def score(self, tokens: Sequence[str]) -> float:
        """Return the score of a sentence, 0 to 1; 0 where no word matches."""
        matches = [0] * MAX_ORDER
        for gram, count in Counter(_grams(tokens)).items():
            matches[len(gram) - 1] += min(count, self._most[gram])
        if matches[0] == 0:
            return 0.0
        written = [max(0, len(tokens) - order) for order in range(MAX_ORDER)]
        precisions = [matches[0] / written[0]]
        precisions += [(matches[order] + 1) / (written[order] + 1) for order in range(1, MAX_ORDER)]
        closest = min(self._lengths, key=lambda length: abs(length - len(tokens)))
        brevity = min(0.0, 1.0 - closest / len(tokens))
        return math.exp(brevity + math.fsum(map(math.log, precisions)) / MAX_ORDER)


class SentenceOverlap:
    """The words that a sentence shares with the references of one picture: the F of METEOR 1.5 for exact matches.

    P and R are the shares of the sentence's and the reference's words that match, words of content three times as
    heavy as others (0.75 and 0.25); F = P R / (0.85 P + 0.15 R); the best reference counts (Denkowski & Lavie 2014,
    sec. 3, the parameters for English). Stems, synonyms, paraphrases and the order of words are left out.

    Args:
        references: tokenised; at least one.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = [Counter(reference) for reference in references]

    def score(self, tokens: Sequence[str]) -> float:
        """Return the score of a sentence, 0 to 1; 0 where no word matches."""
        found = Counter(tokens)
        return max(self._f(found, reference) for reference in self._references)

    @staticmethod
    def _f(found: Counter[str], reference: Counter[str]) -> float:
        matched = _weight(found & reference)
        if matched == 0:
            return 0.0
        precision, recall = matched / _weight(found), matched / _weight(reference)
        return precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)


_ALPHA, _CONTENT, _FUNCTION = 0.85, 0.75, 0.25


def _weight(words: Counter[str]) -> float:
    return sum(count * (_CONTENT if has_content(word) else _FUNCTION) for word, count in words.items())


def most_often(references: Sequence[Sequence[str]]) -> Counter[str]:
    """Return each word of the references with its count in the one that says it most often."""
    most: Counter[str] = Counter()
    for reference in references:
        most |= Counter(reference)
    return most


def said_too_often(tokens: Sequence[str], most: Counter[str]) -> int:
    """Return how many content words repeat one that no reference repeats as often.

    Args:
        tokens: of a sentence.
        most: of the references, `most_often`; a word that is in none may be said once.

    Returns:
        The number of words too many.
    """
    counts = Counter(filter(has_content, tokens))
    return sum(max(0, count - max(1, most[word])) for word, count in counts.items())


def _grams(tokens: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for order in range(1, MAX_ORDER + 1):
        yield from zip(*(tokens[i:] for i in range(order)), strict=False)


def advantages(rewards_BS: Floats, *, baseline: Baseline, greedy_B: Floats | None = None) -> Floats:
    """Return how much better each sample is than its baseline, which does not depend on the sample itself.

    Args:
        rewards_BS: of the samples of each picture.
        baseline: "mean_of_others": the mean reward of the other samples of the picture (Luo 2020); the advantages of
            a picture then sum to zero. "greedy": the reward of greedy search (Rennie et al. 2017).
        greedy_B: the rewards of greedy search; with that baseline alone.

    Returns:
        float64 [B, S].

    Raises:
        ConfigError: for an unknown baseline, one sample where others are needed, or greedy rewards that are missing,
            not asked for, or not one per picture.
    """
    pictures, samples = rewards_BS.shape
    if baseline == "greedy":
        if greedy_B is None or greedy_B.shape != (pictures,):
            shape = None if greedy_B is None else greedy_B.shape
            raise ConfigError(f"baseline 'greedy' needs one greedy reward for each of {pictures} pictures, got {shape}")
        return np.asarray(rewards_BS - greedy_B[:, None], dtype=np.float64)
    if baseline != "mean_of_others":
        raise ConfigError(f"baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
    if greedy_B is not None:
        raise ConfigError("baseline 'mean_of_others' takes no greedy rewards; leave greedy_B out")
    if samples < 2:
        raise ConfigError(f"baseline 'mean_of_others' needs at least 2 samples, got {samples}")
    # The mean difference from the others, not the difference from their mean: equal rewards give exactly zero.
    return np.asarray((rewards_BS[:, :, None] - rewards_BS[:, None, :]).sum(axis=2) / (samples - 1))
