"""Fits the confidence of a model: when is its caption a good one, and which pictures are strange to it?

A good caption is one whose CIDEr-D is above the median of the dev captions. Half of them are, so that 0.5 means "as
good as its captions usually are", and a number of the caption itself, which says nothing absolute, becomes a rank.

Shapes: M pictures, C channels, K directions, F figures of a caption.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captioner import Captioner
from captioner.caption import Caption
from captioner.checkpoint import Checkpoint
from captioner.config import ConfidenceConfig
from captioner.errors import DataError
from captioner.familiarity import Familiarity
from captioner.images import Source
from captioner.metrics import CiderD
from captioner.metrics import tokenize as ptb_tokenize
from captioner.model import CaptionModel, build_model
from training.other_worlds import other_worlds
from training.sources import CaptionedPicture

Floats = npt.NDArray[np.float64]
FEWEST_DEV, FEWEST_TRAIN = 200, 200
MOST_TRAIN = 3000
_DIRECTIONS = 64
_STRANGERS = 120
_FOLDS, _BINS, _DEALS = 10, 10, 10
# Of the dev pictures, this share is as familiar as can be; at the second quantile the confidence has fallen to 1 / e.
_FAMILIAR, _STRANGE = 0.9, 0.995
_RIDGE = 1.0


@dataclass(frozen=True)
class CalibrationReport:
    """How well the confidence does, on pictures that were not trained on.

    Args:
        pictures: of the dev split.
        error: expected calibration error (Naeini et al. 2015) over 10 bins of equal width, each caption's confidence
            from a fit without its tenth of the pictures; the mean of 10 ways to deal the pictures into tenths, of which
            one alone is off by up to 0.007 with 1,000 pictures.
        auroc_good: probability that of a good and another dev caption the good one has the higher confidence.
        auroc_strange: probability that a dev picture has a higher confidence than one of another world, see
            `training.other_worlds`.
        strangers: how many of those.
        mean_dev: mean confidence on dev.
        mean_strange: mean confidence on the pictures of other worlds.
        median_cider: above which a caption is good; x100.
    """

    pictures: int
    error: float
    auroc_good: float
    auroc_strange: float
    strangers: int
    mean_dev: float
    mean_strange: float
    median_cider: float

    def sentence(self) -> str:
        """Return the report in words, for the model card."""
        return (
            f"Confidence is the estimated probability that the caption's CIDEr-D is above the median of dev captions "
            f"({self.median_cider:.0f}), and falls for pictures unlike the training pictures. On {self.pictures} dev "
            f"pictures its expected calibration error is {self.error:.3f} (10 bins, 10-fold cross-validation, mean of "
            f"{_DEALS} deals), and it ranks good above other captions with AUROC {self.auroc_good:.2f}; dev photos "
            f"above {self.strangers} made pictures of other worlds (noise, patterns, documents, charts, drawings, "
            f"blurs) with AUROC {self.auroc_strange:.3f}. Mean confidence: dev {self.mean_dev:.2f}, other worlds "
            f"{self.mean_strange:.2f}."
        )


def calibrate(
    captioner: Captioner, *, train: Sequence[CaptionedPicture], dev: Sequence[CaptionedPicture], seed: int = 0
) -> tuple[Checkpoint, CalibrationReport]:
    """Return the model with a fitted confidence, and how good that is.

    Args:
        captioner: the model as it ships, weights rounded.
        train: what it was trained on; at most 3,000 pictures of it, drawn at random, are looked at.
        dev: pictures that it was not trained on.
        seed: of the draw and of the pictures of other worlds.

    Returns:
        A checkpoint with the same weights, and the report.

    Raises:
        DataError: for too few pictures to fit anything, or captions that all score alike.
    """
    if len(dev) < FEWEST_DEV or len(train) < FEWEST_TRAIN:
        raise DataError(
            f"confidence needs at least {FEWEST_TRAIN} training and {FEWEST_DEV} dev pictures to be fitted, got "
            f"{len(train)} and {len(dev)}"
        )
    looked_at = random.Random(seed).sample(list(train), min(MOST_TRAIN, len(train)))
    familiarity = fit_familiarity(pooled_features(captioner, [picture.path for picture in looked_at]))
    captions, strangeness_M = _captions(captioner, familiarity, [picture.path for picture in dev])
    figures_MF = _figures(captions)
    words = [[ptb_tokenize(text) for text in picture.captions] for picture in dev]
    cider_M = CiderD(words).score([ptb_tokenize(caption.text) for caption in captions], list(range(len(dev))))
    good_M = cider_M > np.median(cider_M)
    if not good_M.any():
        raise DataError("CIDEr-D tells no dev captions apart, so that none is better than others; train longer")
    config = _fit(figures_MF, good_M, strangeness_M, directions=len(familiarity.basis_KC))
    confidences_M = _confidences(config, figures_MF, strangeness_M)
    strangers = [image for _, image in other_worlds(_STRANGERS, seed=seed)]
    strange_captions, their_strangeness_S = _captions(captioner, familiarity, strangers)
    theirs_S = _confidences(config, _figures(strange_captions), their_strangeness_S)
    report = CalibrationReport(
        pictures=len(dev),
        error=_cross_validated_error(figures_MF, good_M, strangeness_M),
        auroc_good=auroc(confidences_M[good_M], confidences_M[~good_M]),
        auroc_strange=auroc(confidences_M, theirs_S),
        strangers=len(strangers),
        mean_dev=float(confidences_M.mean()),
        mean_strange=float(theirs_S.mean()),
        median_cider=100 * float(np.median(cider_M)),
    )
    return _with_confidence(captioner, config, familiarity), report


# --- Familiarity ---


@torch.inference_mode()
def pooled_features(captioner: Captioner, pictures: Sequence[Source], *, batch_size: int = 32) -> Tensor:
    """Return the mean of the grid features of pictures.

    Args:
        captioner: the model.
        pictures: of any kind that it takes.
        batch_size: pictures that go through the encoder together.

    Returns:
        float32 [M, C], on the CPU.
    """
    parts = [
        captioner.features(pictures[first : first + batch_size]).float().mean(dim=1).cpu()
        for first in range(0, len(pictures), batch_size)
    ]
    return torch.cat(parts)


def fit_familiarity(pooled_MC: Tensor) -> Familiarity:
    """Return the mean and the main directions of features, by principal component analysis.

    Args:
        pooled_MC: of training pictures.

    Returns:
        The module; its directions are rounded to float16, as they may be stored.
    """
    mean_C = pooled_MC.mean(dim=0)
    directions = min(_DIRECTIONS, len(pooled_MC) // 4)
    _, _, basis_KC = torch.linalg.svd((pooled_MC - mean_C).double(), full_matrices=False)
    familiarity = Familiarity(feature_dim=pooled_MC.shape[1], directions=directions)
    familiarity.mean_C.copy_(mean_C)
    familiarity.basis_KC.copy_(basis_KC[:directions].half().float())
    return familiarity


# --- The regression ---


def _captions(
    captioner: Captioner, familiarity: Familiarity, pictures: Sequence[Source]
) -> tuple[list[Caption], Floats]:
    found = captioner.caption_batch(pictures)
    captions = [caption for caption in found if isinstance(caption, Caption)]
    pooled_MC = pooled_features(captioner, pictures)
    strangeness_M = familiarity(pooled_MC[:, None]).double().numpy()
    return captions, strangeness_M


def _figures(captions: Sequence[Caption]) -> Floats:
    """Return what the regression reads of each caption, [M, F = 2]."""
    least = [min(np.log(max(word.probability, 1e-30)) for word in caption.words) for caption in captions]
    return np.array([[caption.score for caption in captions], least]).T


def _fit(
    figures_MF: Floats, good_M: npt.NDArray[np.bool_], strangeness_M: Floats, *, directions: int
) -> ConfidenceConfig:
    intercept, score_weight, least_weight = logistic_regression(figures_MF, good_M)
    familiar, strange = np.quantile(strangeness_M, [_FAMILIAR, _STRANGE])
    return ConfidenceConfig(
        directions=directions,
        intercept=round(float(intercept), 6),
        score_weight=round(float(score_weight), 6),
        least_weight=round(float(least_weight), 6),
        familiar=float(familiar),
        strange=float(max(strange, familiar * 1.01 + 1e-6)),
    )


def logistic_regression(figures_MF: Floats, good_M: npt.NDArray[np.bool_]) -> Floats:
    """Return the weights of a logistic regression with a small ridge penalty, by Newton's method.

    Args:
        figures_MF: what is known.
        good_M: what is to be predicted.

    Returns:
        [1 + F]: the intercept, then a weight for each figure.
    """
    middle_F, spread_F = figures_MF.mean(axis=0), figures_MF.std(axis=0) + 1e-12
    x = np.column_stack([np.ones(len(good_M)), (figures_MF - middle_F) / spread_F])
    weights = np.zeros(x.shape[1])
    penalty = np.diag([0.0, *[_RIDGE] * figures_MF.shape[1]])
    for _step in range(50):
        probability_M = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (good_M - probability_M) - penalty @ weights
        curvature = (x * (probability_M * (1 - probability_M))[:, None]).T @ x + penalty
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    plain_F = weights[1:] / spread_F
    return np.concatenate([[weights[0] - (plain_F * middle_F).sum()], plain_F])


def _confidences(config: ConfidenceConfig, figures_MF: Floats, strangeness_M: Floats) -> Floats:
    from captioner.confidence import confidence

    return np.array(
        [
            confidence(config, score=score, log_probabilities=[least], strangeness=strangeness)
            for (score, least), strangeness in zip(figures_MF.tolist(), strangeness_M.tolist(), strict=True)
        ]
    )


def _cross_validated_error(figures_MF: Floats, good_M: npt.NDArray[np.bool_], strangeness_M: Floats) -> float:
    deals = (_cross_validated(figures_MF, good_M, strangeness_M, seed=seed) for seed in range(_DEALS))
    return float(np.mean([calibration_error(confidences_M, good_M) for confidences_M in deals]))


def _cross_validated(figures_MF: Floats, good_M: npt.NDArray[np.bool_], strangeness_M: Floats, *, seed: int) -> Floats:
    fold_M = np.random.default_rng(seed).permutation(len(good_M)) % _FOLDS
    found_M = np.zeros(len(good_M))
    for fold in range(_FOLDS):
        held = fold_M == fold
        config = _fit(figures_MF[~held], good_M[~held], strangeness_M[~held], directions=1)
        found_M[held] = _confidences(config, figures_MF[held], strangeness_M[held])
    return found_M


# --- How good it is ---


def calibration_error(confidences_M: Floats, good_M: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error (Naeini et al. 2015, eq. 1 and 2): |stated - true| share, over equal bins.

    Args:
        confidences_M: stated, in [0, 1].
        good_M: what was true.

    Returns:
        In [0, 1].
    """
    bin_M = np.minimum((confidences_M * _BINS).astype(int), _BINS - 1)
    gaps = [abs(confidences_M[bin_M == k].mean() - good_M[bin_M == k].mean()) * (bin_M == k).mean() for k in set(bin_M)]
    return float(sum(gaps))


def auroc(higher: Floats, lower: Floats) -> float:
    """Return the probability that one drawn from the first is above one of the second; a tie counts half.

    Args:
        higher: numbers, at least one.
        lower: numbers, at least one.

    Returns:
        In [0, 1].
    """
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    not_above = np.searchsorted(ordered, higher, side="right")
    return float(((below + not_above) / 2).mean() / len(lower))


def _with_confidence(captioner: Captioner, config: ConfidenceConfig, familiarity: Familiarity) -> Checkpoint:
    old = captioner.model
    model: CaptionModel = build_model(dataclasses.replace(old.config, confidence=config))
    kept = {name: value for name, value in old.state_dict().items() if not name.startswith("familiarity.")}
    model.load_state_dict(
        {**kept, **{f"familiarity.{name}": value for name, value in familiarity.state_dict().items()}}
    )
    return Checkpoint(model.eval(), captioner.tokenizer, captioner.card)
