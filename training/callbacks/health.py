"""Stops a run that has gone wrong, and says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from torch import Tensor

from captioner.errors import ConfigError, DataError
from captioner.metrics.readers import listed
from training.callbacks.protocols import NamedBatch, data_of, in_training, module_of


class HealthCheck(lightning.Callback):
    """Fails on a loss that is no number, on "one caption for every picture", and on a vocabulary that loses words.

    *Loss.* Whether a loss is finite is known to the processor only once it waits for the accelerator, so the losses
    are kept there and looked at together every `every_steps` batches: the batch is named exactly, the run stops up to
    that many batches late. They are also looked at before each validation and each checkpoint, so that no weights
    that come after such a loss are ever stored. With several processes, the one that met it names its own batch.

    *One caption.* The measure is the number of distinct captions that a validation wrote, against the number of
    distinct first reference captions of the same pictures: data that has few captions is not a fault. A model that
    has learned little does write one caption, so only `patience` such validations one after another are a fault.

    *Vocabulary.* The share of running words in the training captions that the vocabulary does not hold.

    Args:
        every_steps: batches between two looks at the loss.
        min_distinct: distinct captions that are expected, as a share of the distinct references; one caption for
            all is below any limit.
        patience: so many validations below the limit, one after another, are a fault.
        min_pictures: validations of fewer pictures are not judged.
        max_unknown: share of running words that may be unknown.

    Raises:
        ConfigError: for a setting out of its range.
    """

    def __init__(
        self,
        *,
        every_steps: int = 25,
        min_distinct: float = 0.02,
        patience: int = 3,
        min_pictures: int = 20,
        max_unknown: float = 0.1,
    ) -> None:
        for name, count in (("every_steps", every_steps), ("patience", patience), ("min_pictures", min_pictures)):
            if count < 1:
                raise ConfigError(f"HealthCheck: {name} must be at least 1, got {count!r}")
        for name, share in (("min_distinct", min_distinct), ("max_unknown", max_unknown)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"HealthCheck: {name} must be from 0 to 1, got {share!r}")
        self.every_steps = every_steps
        self.min_distinct = min_distinct
        self.patience = patience
        self.min_pictures = min_pictures
        self.max_unknown = max_unknown
        self._losses: list[Tensor] = []
        self._places: list[str] = []
        self._alike = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the number of validations below the limit, up to now."""
        return {"alike": self._alike}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the count of the run that is resumed."""
        self._alike = state_dict["alike"]

    # --- Vocabulary ---

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Check the vocabulary, before anything long begins.

        Args:
            trainer: of the run.
            pl_module: not used.
            stage: only "fit" is checked.

        Raises:
            DataError: when too many words of the training captions are unknown.
        """
        self._losses, self._places = [], []
        if stage != "fit":
            return
        data = data_of(trainer)
        tokenizer = data.tokenizer
        if tokenizer is None:
            raise DataError("HealthCheck: the data module has no vocabulary; setup('fit') must make it")
        captions = [caption for picture in data.pictures["train"] for caption in picture.captions]
        total = unknown = 0
        for caption in captions:
            ids = tokenizer.encode(caption)
            total += len(ids)
            unknown += ids.count(tokenizer.unknown_id)
        if unknown <= self.max_unknown * total:
            return
        counts = Counter(word for caption in captions for word in tokenizer.split(caption) if not tokenizer.knows(word))
        commonest = ", ".join(f"{word!r} {count}x" for word, count in counts.most_common(5))
        raise DataError(
            f"vocabulary: {unknown / total:.1%} of the {total:,} words in the training captions are unknown to it, "
            f"{self.max_unknown:.1%} may be ({commonest}); lower data.min_count, give more captions, "
            f"or raise HealthCheck's max_unknown"
        )

    # --- Loss ---

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss, and look at the kept ones when it is time.

        Args:
            trainer: of the run.
            pl_module: that is trained.
            outputs: the loss, alone or as "loss"; nothing for a batch that was left out.
            batch: what was trained on.
            batch_idx: number of the batch in the epoch.

        Raises:
            ConfigError: for a loss that is not finite, or manual optimisation that hands out no loss.
        """
        loss = outputs if isinstance(outputs, Tensor) else (outputs or {}).get("loss")
        if loss is None and pl_module.automatic_optimization:
            return  # training_step left the batch out
        if not isinstance(loss, Tensor):
            raise ConfigError("HealthCheck: training_step gave no loss to look at; leave HealthCheck out, or return it")
        # A copy: CUDA graphs write the next loss where this one is.
        self._losses.append(loss.detach().clone())
        place = f"epoch {trainer.current_epoch}, batch {batch_idx}, step {trainer.global_step}"
        pictures = f", of the pictures {listed(batch.names)}" if isinstance(batch, NamedBatch) else ""
        self._places.append(place + pictures)
        if len(self._losses) >= self.every_steps:
            self._look_at_losses()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the losses since the last look."""
        self._look_at_losses()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look at the losses since the last look."""
        self._look_at_losses()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look at the losses since the last look."""
        self._look_at_losses()

    def _look_at_losses(self) -> None:
        if not self._losses:
            return
        losses = torch.stack(self._losses)
        finite = losses.isfinite().tolist()  # the one wait for the accelerator
        if not all(finite):
            first = finite.index(False)
            # They are kept: a checkpoint that is tried after this would hold weights that are no numbers.
            raise ConfigError(
                f"training loss is {losses[first].item()} at {self._places[first]}; lower the learning rate, set "
                f"trainer.gradient_clip_val, or take trainer.precision bf16-mixed or 32-true, and resume from a "
                f"checkpoint before that step"
            )
        self._losses, self._places = [], []

    # --- One caption for every picture ---

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count distinct captions.

        Args:
            trainer: of the run.
            pl_module: that wrote the captions.

        Raises:
            ConfigError: when `patience` validations one after another wrote too few.
        """
        captions = module_of(pl_module).captions
        if not in_training(trainer) or len(captions) < self.min_pictures:
            return
        references = data_of(trainer).references()
        written, (commonest, times), expected = (
            len(set(captions.values())),
            Counter(captions.values()).most_common(1)[0],
            len({references[name][0] for name in captions}),
        )
        few = written == 1 or written < self.min_distinct * expected
        self._alike = self._alike + 1 if few and expected > 1 else 0
        if self._alike >= self.patience:
            raise ConfigError(
                f"one caption for every picture: {self._alike} validations one after another wrote too few distinct "
                f"captions, the last {written} for {len(captions)} pictures ({commonest!r} {times} times); lower the "
                f"learning rate, check that pictures and captions belong together, or raise HealthCheck's patience"
            )
