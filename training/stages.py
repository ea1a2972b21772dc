"""What is trained, on what and how fast, stage after stage of one run.

    frozen encoder, cached features ──▶ encoder fine-tuned ──▶ self-critical on CIDEr-D

Every epoch of a run has the same number of batches, so a step says which epoch and stage it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from captioner.errors import ConfigError
from training.rewards import RewardConfig

ENCODER_MODES = ("frozen", "finetune")
OBJECTIVES = ("cross_entropy", "self_critical")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"stage: {message}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        epochs: how long it lasts.
        encoder: "frozen", or "finetune" to train it too.
        encoder_stages: how many stages of the encoder, counted from its output, are trained; None: all.
            Only for "finetune".
        encoder_batch_norm: whether the statistics of the encoder's batch norms follow the training pictures; they
            keep still for small batches and small data. Only for "finetune".
        cached: read the grid features of the frozen encoder from the cache instead of the pictures.
        side_px: side of the squares that are learned from, where it is not the model's: smaller pictures take less
            time. Positions of the grid are interpolated, see `MultiheadDecoder.over_grid`; dev pictures are captioned
            at the model's side. None: the model's.
        objective: "cross_entropy" (teacher forcing), or "self_critical" (Rennie et al. 2017).
        learning_rate: highest rate of the decoder.
        encoder_learning_rate: highest rate of the encoder. Only for "finetune".
        warmup_steps: optimiser steps over which the rates rise from 0.
        final_share: the rates fall along half a cosine to this share of the highest.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
        attention_regularisation: weight of the doubly stochastic regulariser (Xu et al. 2015, eq. 14).
        drop_words: probability that a word the decoder reads is replaced by the unknown one (Bowman et al. 2016).
        mosaics: weight of the loss of mosaics: each batch is laid out once more as mosaics of 2 x 2 of its pictures,
            of which the captions are learned too, see `training.mosaics`; 0: none. They are made of pixels, not of
            cached features.
        pointing: weight, within the loss of mosaics, of what tells the attention of a word to fall into the quadrant
            of its picture.
        scheduled_sampling: probability, at the stage's end, that the decoder reads a word of its own instead of
            the reference's (Bengio et al. 2015); it rises linearly from 0.
        reward: of a self-critical stage.
        cross_entropy_weight: share of cross-entropy in the loss of a self-critical stage.
        dropout: whether a self-critical stage learns with dropout on, against learning its pictures by heart;
            without, what is made more probable is exactly the model that drew. Cross-entropy always has it.
        from_stage: the stage, counted from 1, with whose last weights (their averages, where they are averaged) this
            one begins, with a new optimiser; None: it goes on from the stage before. Several stages from one are
            branches that differ by chance; at the end of a run `--export` takes the mean of their weights, which
            generalises better than each of them (model soups, Wortsman et al. 2022). Several numbers, of branches
            from one stage: it begins with their mean, so that a round of branches follows another (Rame et al. 2024,
            arXiv 2406.16768, "iterative" weight averaging).

    Raises:
        ConfigError: for a value out of range, or two that exclude each other.
    """

    epochs: int
    encoder: str = "frozen"
    encoder_stages: int | None = None
    encoder_batch_norm: bool = True
    cached: bool = False
    side_px: int | None = None
    objective: str = "cross_entropy"
    learning_rate: float = 7e-4
    encoder_learning_rate: float = 1e-4
    warmup_steps: int = 0
    final_share: float = 0.0
    label_smoothing: float = 0.0
    attention_regularisation: float = 0.0
    drop_words: float = 0.0
    mosaics: float = 0.0
    pointing: float = 0.0
    scheduled_sampling: float = 0.0
    reward: RewardConfig = field(default_factory=RewardConfig)
    cross_entropy_weight: float = 0.0
    dropout: bool = False
    from_stage: int | tuple[int, ...] | None = None

    @property
    def origins(self) -> tuple[int, ...]:
        """The stages with the mean of whose weights it begins, counted from 1; none where it goes on."""
        if self.from_stage is None:
            return ()
        return (self.from_stage,) if isinstance(self.from_stage, int) else self.from_stage

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"epochs must be at least 1, got {self.epochs}")
        _require(self.encoder in ENCODER_MODES, f"encoder must be frozen or finetune, got {self.encoder!r}")
        _require(
            self.objective in OBJECTIVES, f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
        )
        _require(self.side_px is None or self.side_px >= 1, f"side_px must be at least 1, got {self.side_px}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be at least 0, got {self.warmup_steps}")
        for name in ("learning_rate", "encoder_learning_rate", "attention_regularisation", "mosaics", "pointing"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")
        for name in ("final_share", "label_smoothing", "drop_words", "scheduled_sampling", "cross_entropy_weight"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be from 0 to 1, got {value}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        _require(
            not (self.cached and self.encoder == "finetune"),
            "cached features are those of a frozen encoder; use cached: false, or encoder: frozen",
        )
        _require(
            self.encoder_stages is None or self.encoder == "finetune",
            f"encoder_stages={self.encoder_stages} needs encoder: finetune",
        )
        _require(
            not (self.cached and self.mosaics),
            "mosaics are made of pictures, not of cached features; use cached: false, or mosaics: 0",
        )
        _require(
            not self.mosaics or self.side_px is None or self.side_px % 2 == 0,
            f"mosaics need pictures of an even side, got side_px={self.side_px}",
        )
        _require(bool(self.mosaics) or not self.pointing, f"pointing={self.pointing} needs mosaics above 0")
        if self.objective == "self_critical":
            for name in ("label_smoothing", "attention_regularisation", "drop_words", "scheduled_sampling"):
                _require(not getattr(self, name), f"{name} belongs to cross_entropy; leave it out of self_critical")
        else:
            _require(not self.cross_entropy_weight, "cross_entropy_weight belongs to objective: self_critical")
            _require(not self.dropout, "dropout: true belongs to objective: self_critical; cross_entropy always has it")


@dataclass(frozen=True)
class Position:
    """Where in the run an epoch is.

    Args:
        stage: the settings.
        index: of the stage.
        first_epoch: of the stage.
    """

    stage: Stage
    index: int
    first_epoch: int


class StagePlan:
    """The stages of one run.

    Args:
        stages: in order; at least one.
        export_stages: those, counted from 1, of whose last weights the run's model is the mean; empty: the branches at
            its end, where there are any.

    Raises:
        ConfigError: for no stage, an `export_stages` that names none or one twice, or cached features after the encoder
            has been trained: the cache is made once, at the start; or cached stages of several sides.
    """

    def __init__(self, stages: Sequence[Stage], *, export_stages: Sequence[int] = ()) -> None:
        if not stages:
            raise ConfigError("model.stages is empty; name at least one stage, such as [{epochs: 10}]")
        self.stages = tuple(stages)
        tuned = [index for index, stage in enumerate(self.stages) if stage.encoder == "finetune"]
        late = [index for index, stage in enumerate(self.stages) if stage.cached and tuned and index > tuned[0]]
        if late:
            raise ConfigError(
                f"stage {late[0] + 1} reads cached features, but stage {tuned[0] + 1} has trained the encoder; "
                "cached stages come first"
            )
        if len(set(self.sides_px[: self.cached_epochs])) > 1:
            raise ConfigError("cached stages share one cache, of pictures of one side; give them all the same side_px")
        for index, stage in enumerate(self.stages):
            self._check_origins(stage, index)
        for number in export_stages:
            if not 1 <= number <= len(self.stages):
                raise ConfigError(f"model.export_stages names stage {number}, and there are {len(self.stages)}")
        if len(set(export_stages)) < len(export_stages):
            raise ConfigError(f"model.export_stages names a stage twice, got {list(export_stages)}")
        self.exported = tuple(export_stages) or self.branches

    def _check_origins(self, stage: Stage, index: int) -> None:
        who, origins = f"stage {index + 1}: from_stage", stage.origins
        if stage.from_stage is not None and not origins:
            raise ConfigError(f"{who} names no stage; leave it out to go on from the stage before")
        for number in origins:
            if not 1 <= number <= index:
                raise ConfigError(f"{who} must name an earlier stage, got {number}")
        if len(set(origins)) < len(origins):
            raise ConfigError(f"{who} names a stage twice, got {list(origins)}")
        if len(origins) > 1:
            begun = {self.stages[number - 1].from_stage for number in origins}
            if len(begun) > 1 or None in begun:
                raise ConfigError(
                    f"{who} takes the mean of branches from one stage, and stages {list(origins)} are none; name one"
                )

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def branches(self) -> tuple[int, ...]:
        """The stages at the end of the run, counted from 1, that begin with one and the same; fewer than two: none."""
        base = self.stages[-1].from_stage
        count = len(list(takewhile(lambda stage: stage.from_stage == base, reversed(self.stages))))
        if base is None or count < 2:
            return ()
        return tuple(range(len(self.stages) - count + 1, len(self.stages) + 1))

    @property
    def cached_epochs(self) -> int:
        """How many epochs, counted from the first, read cached features."""
        return max((self.at(epoch).first_epoch + self.at(epoch).stage.epochs for epoch in self._cached()), default=0)

    def _cached(self) -> list[int]:
        return [epoch for epoch in range(self.epochs) if self.at(epoch).stage.cached]

    @property
    def sides_px(self) -> tuple[int | None, ...]:
        """Side of the pictures that each epoch learns from; None: the model's."""
        return tuple(self.at(epoch).stage.side_px for epoch in range(self.epochs))

    def at(self, epoch: int) -> Position:
        """Return the stage of an epoch; after the last epoch the last stage."""
        first = 0
        for index, stage in enumerate(self.stages):
            if epoch < first + stage.epochs or index == len(self.stages) - 1:
                return Position(stage, index, first)
            first += stage.epochs
        raise AssertionError("a plan has at least one stage")

    def rate(self, step: int, steps_per_epoch: int, *, part: str) -> float:
        """Return the learning rate of a part at an optimiser step.

        Args:
            step: counted from the start of the run.
            steps_per_epoch: optimiser steps of one epoch.
            part: "decoder" or "encoder".

        Returns:
            The rate; 0 for a frozen encoder.
        """
        position = self.at(step // max(1, steps_per_epoch))
        stage = position.stage
        if part == "encoder" and stage.encoder == "frozen":
            return 0.0
        peak = stage.learning_rate if part == "decoder" else stage.encoder_learning_rate
        since = step - position.first_epoch * steps_per_epoch
        length = stage.epochs * steps_per_epoch
        return peak * warmup_cosine(since, warmup=stage.warmup_steps, length=length, final_share=stage.final_share)


def warmup_cosine(step: int, *, warmup: int, length: int, final_share: float = 0.0) -> float:
    """Return the factor of a learning rate: a linear rise, then half a cosine down (Loshchilov & Hutter 2017, eq. 5).

    Args:
        step: counted from the stage's start.
        warmup: steps of the rise.
        length: steps of the stage.
        final_share: the factor at its end.

    Returns:
        In [0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, length - warmup))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * share))
