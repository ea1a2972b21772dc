"""The LightningModule: cross-entropy on captions, first with a frozen encoder, then with all of it.

Shapes: B pictures, N = B * R captions, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from captioner.api import search_vocabulary
from captioner.config import DECODER_CONFIGS, EncoderConfig, ModelConfig, SearchOptions
from captioner.errors import ConfigError
from captioner.metrics import evaluate
from captioner.model import CaptionModel, build_model
from captioner.search import search
from captioner.tokenizer import Tokenizer
from training.data import Batch, Flickr8kDataModule


class CaptionModule(lightning.LightningModule):
    """A captioner in training.

    Args:
        decoder: "mean", "additive" or "multihead".
        decoder_settings: sizes of the decoder; see `captioner.config`.
        encoder: which CNN.
        encoder_weights: "torchvision", the path of a safetensors file, or None (random).
        frozen_epochs: epochs in which only the decoder is trained; -1: the encoder is never trained.
        learning_rate: highest rate of the decoder.
        encoder_learning_rate: highest rate of the encoder.
        warmup_steps: steps over which a rate rises from 0, for the encoder from its first trained step on.
        weight_decay: of AdamW, on matrices only.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016).
        search: how the dev pictures are captioned for the scores.

    Attributes:
        model: from `configure_model` on.
        tokenizer: likewise.

    Raises:
        ConfigError: for an unknown decoder, or settings that it does not have.
    """

    model: CaptionModel
    tokenizer: Tokenizer

    def __init__(
        self,
        *,
        decoder: str = "multihead",
        decoder_settings: dict[str, Any] | None = None,
        encoder: EncoderConfig | None = None,
        encoder_weights: str | None = None,
        frozen_epochs: int = 6,
        learning_rate: float = 7e-4,
        encoder_learning_rate: float = 1e-4,
        warmup_steps: int = 300,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        search: SearchOptions | None = None,
    ) -> None:
        super().__init__()
        if decoder not in DECODER_CONFIGS:
            raise ConfigError(f"decoder must be one of {', '.join(DECODER_CONFIGS)}, got {decoder!r}")
        self.decoder_settings = DECODER_CONFIGS[decoder].from_dict(decoder_settings or {})
        self.save_hyperparameters()
        self.encoder_config = encoder or EncoderConfig()
        self.search_options = search or SearchOptions()
        self._captions: dict[str, str] = {}

    @property
    def _data(self) -> Flickr8kDataModule:
        return cast(Flickr8kDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Build the model once the data has given the vocabulary; Lightning calls it."""
        if hasattr(self, "model"):
            return
        self.tokenizer = cast(Tokenizer, self._data.tokenizer)
        config = ModelConfig(
            decoder=self.hparams["decoder"],
            vocabulary_size=self.tokenizer.vocabulary_size,
            max_tokens=self._data.max_tokens,
            preprocessing=self._data.preprocessing,
            encoder=self.encoder_config,
            decoder_settings=self.decoder_settings,
        )
        self.model = build_model(config, encoder_weights=self.hparams["encoder_weights"])
        # In bfloat16, convolutions on a CPU are up to 1.5 times as fast with channels last; on a GPU faster too.
        self.model.encoder.to(memory_format=torch.channels_last)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to export the checkpoint without the data."""
        checkpoint["captioner"] = {"model": self.model.config.to_dict(), "tokenizer": self.tokenizer.to_json()}

    def on_train_epoch_start(self) -> None:
        """Freeze or free the encoder."""
        frozen = self.hparams["frozen_epochs"]
        trained = frozen >= 0 and self.current_epoch >= frozen
        self.model.encoder.set_trainable(None if trained else 0)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self._loss(batch, smoothing=self.hparams["label_smoothing"])
        self.log("train_loss", loss, prog_bar=True, batch_size=batch.pixels.shape[0])
        return loss

    def _loss(self, batch: Batch, *, smoothing: float) -> Tensor:
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
        logits_NTV, _ = self.model(pixels, batch.tokens[:, :-1])
        return cross_entropy(
            logits_NTV.flatten(0, 1).float(),
            batch.tokens[:, 1:].flatten(),
            ignore_index=Tokenizer.pad_id,
            label_smoothing=smoothing,
        )

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log the loss and caption the pictures."""
        self.log("val_loss", self._loss(batch, smoothing=0.0), batch_size=batch.pixels.shape[0])
        with torch.autocast(self.device.type, enabled=False):
            found = search(
                self.model.decoder,
                self.model.encoder(batch.pixels.contiguous(memory_format=torch.channels_last)),
                vocabulary=search_vocabulary(self.tokenizer),
                options=self.search_options,
            )
        for name, hypotheses in zip(batch.names, found, strict=True):
            self._captions[name] = self.tokenizer.sentence(hypotheses[0].token_ids)

    def on_validation_epoch_end(self) -> None:
        """Log BLEU-4 and CIDEr-D (x100) of the captions."""
        references = {name: text for name, text in self._data.references().items() if name in self._captions}
        scores = evaluate(self._captions, references).scores
        self._captions = {}
        self.log("val_bleu4", scores["BLEU-4"], prog_bar=True)
        self.log("val_cider", scores["CIDEr-D"], prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; matrices decay, vectors and scalars do not; the encoder has a rate of its own."""
        total = int(self.trainer.estimated_stepping_batches)
        frozen = self.hparams["frozen_epochs"]
        first = total if frozen < 0 else total * frozen // max(cast(int, self.trainer.max_epochs), 1)
        groups: list[dict[str, Any]] = []
        schedules: list[Callable[[int], float]] = []
        for part, rate, begin in (
            (self.model.decoder, self.hparams["learning_rate"], 0),
            (self.model.encoder, self.hparams["encoder_learning_rate"], first),
        ):
            parameters = list(part.parameters())
            for decay, chosen in (
                (self.hparams["weight_decay"], [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
                schedules.append(WarmupCosine(begin=begin, warmup=self.hparams["warmup_steps"], total=total))
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WarmupCosine:
    """Factor of the learning rate: 0 before `begin`, a linear rise, then half a cosine down to 0 at `total`.

    A class, not a function within one, so that it can be pickled.

    Args:
        begin: first step.
        warmup: steps of the rise.
        total: last step.
    """

    def __init__(self, *, begin: int, warmup: int, total: int) -> None:
        self.begin, self.warmup, self.total = begin, warmup, total

    def __call__(self, step: int) -> float:
        """Return the factor at a step, in [0, 1]."""
        since = step - self.begin
        if since < 0:
            return 0.0
        if since < self.warmup:
            return (since + 1) / self.warmup
        share = (since - self.warmup) / max(1, self.total - self.begin - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
