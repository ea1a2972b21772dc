"""What the callbacks need of a run: of its data module and of its LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import lightning
from lightning.pytorch.trainer.states import TrainerFn

from captioner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from captioner import Captioner


class Picture(Protocol):
    """A photo and its reference captions."""

    @property
    def name(self) -> str:
        """The key of the picture in every list."""

    @property
    def path(self) -> Path:
        """Of the file."""

    @property
    def captions(self) -> tuple[str, ...]:
        """As written."""


class RunData(Protocol):
    """The data module, from its `setup("fit")` on."""

    @property
    def pictures(self) -> Mapping[str, Sequence[Picture]]:
        """By split: "train", "dev" and whatever else there is."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The vocabulary that the captions are trained with; None before `setup`."""

    def references(self) -> Mapping[str, Sequence[str]]:
        """Return the reference captions of the dev pictures by name."""

    def data_hash(self) -> str:
        """Return a hash of the names and captions of all splits."""


class RunModule(Protocol):
    """The LightningModule. The first three are there from the start; a validation that ends has set the first two."""

    @property
    def captions(self) -> Mapping[str, str]:
        """What the last validation wrote, by name of the picture; on every process the same."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Of these captions, x100, by metric."""

    @property
    def bad_pictures(self) -> Sequence[tuple[str, str]]:
        """Names and faults of the pictures that could not be used so far."""

    def captioner(self) -> Captioner:
        """Return a captioner over the live model."""


@runtime_checkable
class NamedBatch(Protocol):
    """A batch that knows its pictures."""

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures."""


def data_of(trainer: lightning.Trainer) -> RunData:
    """Return the data module of a run."""
    return cast(RunData, trainer.datamodule)  # type: ignore[attr-defined]


def module_of(pl_module: lightning.LightningModule) -> RunModule:
    """Return the LightningModule as the callbacks see it."""
    return cast(RunModule, pl_module)


def in_training(trainer: lightning.Trainer) -> bool:
    """Return whether a validation belongs to a training, and is not Lightning's trial run before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
