"""The LightningModule: stages of cross-entropy and self-critical training over one model.

Shapes: B pictures, R captions of each, N = B * R rows, T tokens, V vocabulary, P grid cells, S samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, cast

import lightning
import torch
from torch import Tensor

from captioner import Captioner
from captioner.api import search_vocabulary
from captioner.checkpoint import Checkpoint, load_checkpoint
from captioner.config import DECODER_CONFIGS, EncoderConfig, ModelConfig, SearchOptions
from captioner.decoders import MultiheadDecoder
from captioner.decoders.multihead import stretched
from captioner.encoder import Encoder
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.metrics import evaluate
from captioner.model import CaptionModel, build_model
from captioner.search import search
from captioner.tokenizer import Tokenizer
from training.batches import Batch, stateless_seed
from training.data import CaptionData, batches_done
from training.depthwise import learn_depthwise_in_float32
from training.mosaics import content_words, make_mosaics, one_caption_each, pointing_loss, quadrant_shares
from training.objectives import (
    attention_regulariser,
    caption_cross_entropy,
    drop_words,
    scheduled_inputs,
    self_critical_loss,
    word_log_probabilities,
)
from training.rewards import CaptionReward, RewardConfig, advantages
from training.sampling import sample
from training.sources import BadPicture
from training.stages import Stage, StagePlan

_SCORES = {"BLEU-4": "val_bleu4", "CIDEr-D": "val_cider", "ROUGE-L": "val_rouge"}


@dataclasses.dataclass
class _Found:
    """What a validation has found in one process: captions and bad pictures by name, summed loss, number of words."""

    captions: dict[str, str] = dataclasses.field(default_factory=dict)
    bad: dict[str, BadPicture] = dataclasses.field(default_factory=dict)
    loss: float = 0.0
    words: int = 0


class CaptionModule(lightning.LightningModule):
    """A captioner in training.

    Args:
        stages: what is trained, one after another; their epochs are the run's.
        init_from: start from this model: "bundled", a model folder or a hub id; its vocabulary is extended by new
            words. None: the decoder starts from random weights.
        decoder: "mean", "additive" or "multihead"; None: that of `init_from`, else "multihead".
        decoder_settings: sizes of the decoder; see `captioner.config`.
        encoder: which CNN; None: that of `init_from`, else MobileNetV2.
        encoder_weights: "torchvision", the path of a safetensors file, a package (see `Encoder`), or None (random); not
            with `init_from`.
        weight_decay: of AdamW, on matrices only.
        compile_decoder: compile the decoder's teacher-forced pass with `torch.compile`.
        search: how the dev pictures are captioned for the scores.
        export_stages: stages, counted from 1, of whose last weights `--export` takes the mean; None: the branches at
            the end of the run, or else the epoch with the best CIDEr-D.
        seed: of everything that is random on the device: dropout, samples.

    Attributes:
        model: from `configure_model` on.
        tokenizer: likewise.
        captions: of the dev pictures, by name, after a validation.
        scores: of these captions, x100.

    Raises:
        ConfigError: for an unknown decoder, settings that it does not have, or options that exclude each other.
    """

    model: CaptionModel
    tokenizer: Tokenizer

    def __init__(
        self,
        *,
        stages: list[Stage],
        init_from: str | None = None,
        decoder: str | None = None,
        decoder_settings: dict[str, Any] | None = None,
        encoder: EncoderConfig | None = None,
        encoder_weights: str | None = None,
        weight_decay: float = 0.05,
        compile_decoder: bool = False,
        search: SearchOptions | None = None,
        export_stages: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plan = StagePlan(stages, export_stages=export_stages or ())
        if decoder is not None and decoder not in DECODER_CONFIGS:
            raise ConfigError(f"model.decoder must be one of {', '.join(DECODER_CONFIGS)}, got {decoder!r}")
        if init_from is not None and encoder_weights is not None:
            raise ConfigError("model.encoder_weights and model.init_from exclude each other; leave one of them out")
        if init_from is None:
            DECODER_CONFIGS[decoder or "multihead"].from_dict(decoder_settings or {})  # checked before long work
        self.init_from, self.decoder, self.decoder_settings = init_from, decoder, decoder_settings
        self.encoder_config, self.encoder_weights = encoder, encoder_weights
        self.weight_decay, self.compile_decoder, self.seed = weight_decay, compile_decoder, seed
        self.search_options = search or SearchOptions()
        self.captions: dict[str, str] = {}
        self.scores: dict[str, float] = {}
        self._found = _Found()
        self._entered = -1
        # Folded copies, in tuples, for they are no parts of the model: its state holds these weights once.
        self._frozen: tuple[torch.nn.Sequential, ...] = ()
        self._in_use: tuple[Encoder, ...] = ()
        self._resumed_epoch = 0
        self._grid_hw = (0, 0)
        self._rewards: dict[RewardConfig, CaptionReward] = {}
        self._tables: tuple[Tensor, Tensor] | None = None

    @property
    def _data(self) -> CaptionData:
        return cast(CaptionData, self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def bad_pictures(self) -> Sequence[tuple[str, str]]:
        """Names and faults of the pictures that could not be used so far."""
        return [(bad.name, bad.message) for bad in self._data.bad.values()]

    def captioner(self) -> Captioner:
        """Return a captioner over the live model."""
        return Captioner(Checkpoint(self.model, self.tokenizer), device=str(self.device))

    # --- The model ---

    def configure_model(self) -> None:
        """Build the model once the data has given the vocabulary; Lightning calls it."""
        if hasattr(self, "model"):
            return
        self.tokenizer = cast(Tokenizer, self._data.tokenizer)
        if self._data.init_from != self.init_from:
            raise ConfigError(
                f"data.init_from={self._data.init_from} and model.init_from={self.init_from} differ; give both the same"
            )
        self.model = build_model(self._model_config(), encoder_weights=self.encoder_weights)
        for stage in self.plan.stages:  # what the encoder does not have or allow is found before long work
            self.model.encoder.set_trainable(stage.encoder_stages)
            if stage.side_px is not None:
                self.model.encoder.grid_hw_of(stage.side_px)
        self.model.encoder.set_trainable(None)
        if self.init_from is not None:
            start_from(self.model, load_checkpoint(None if self.init_from == "bundled" else self.init_from))
        # In bfloat16, convolutions on a CPU are up to 1.5 times as fast with channels last; on a GPU faster too.
        self.model.encoder.to(memory_format=torch.channels_last)
        learn_depthwise_in_float32(self.model.encoder)
        if self.compile_decoder:
            self.model.decoder.compile(dynamic=True)

    def _model_config(self) -> ModelConfig:
        base, size = self._data.base, self.tokenizer.vocabulary_size
        if base is None:
            decoder = self.decoder or "multihead"
            return ModelConfig(
                decoder=decoder,
                vocabulary_size=size,
                max_tokens=self._data.max_tokens,
                preprocessing=self._data.preprocessing,
                encoder=self.encoder_config or EncoderConfig(),
                decoder_settings=DECODER_CONFIGS[decoder].from_dict(self.decoder_settings or {}),
            )
        settings = base.decoder_settings.to_dict()
        for name, given, own in (
            ("decoder", self.decoder, base.decoder),
            ("encoder", self.encoder_config, base.encoder),
            ("decoder_settings", {**settings, **(self.decoder_settings or {})}, settings),
        ):
            if given not in (None, own):
                raise ConfigError(
                    f"model.{name}={given} differs from that of the model {self.init_from!r}, {own}; leave it out"
                )
        preprocessing = self._data.preprocessing
        # Its confidence was fitted to its weights, which change.
        return dataclasses.replace(base, vocabulary_size=size, preprocessing=preprocessing, confidence=None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is needed to export the checkpoint without the data."""
        checkpoint["captioner"] = {
            "model": self.model.config.to_dict(),
            "tokenizer": self.tokenizer.to_json(),
            "command": " ".join(["python -m training", *sys.argv[1:]]),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model.

        Args:
            checkpoint: of Lightning.

        Raises:
            CheckpointError: when it was not written by this module, or has another shape or vocabulary.
            DataError: when it was trained on other data.
            ConfigError: when an option has changed that fixes the order of the data.
        """
        stored = checkpoint.get("captioner")
        if stored is None:
            raise CheckpointError("--ckpt_path: not a checkpoint of `python -m training fit`")
        # First, for other data have another vocabulary too. Lightning would come to it last.
        self._data.load_state_dict(checkpoint["CaptionData"])
        own = self.model.config.to_dict()
        different = [name for name, value in own.items() if stored["model"].get(name) != value]
        if different:
            name = different[0]
            raise CheckpointError(
                f"--ckpt_path: the checkpoint has {name} {stored['model'].get(name)}, the config {own[name]}; resume "
                "with the config of that run, or start from it with model.init_from after an export"
            )
        if stored["tokenizer"] != self.tokenizer.to_json():
            raise CheckpointError(
                "--ckpt_path: the checkpoint has another vocabulary; resume with data.min_count and model.init_from "
                "of that run"
            )
        self._resumed_epoch = checkpoint["epoch"]

    # --- Training ---

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Enter the epoch's stage, and seed what is random: a resumed run draws what an unbroken one would."""
        if self._entered != self.current_epoch:
            self._entered = self.current_epoch
            stage = self.plan.at(self.current_epoch).stage
            if stage.encoder == "frozen":
                self.model.encoder.set_trainable(0)
            else:
                self.model.encoder.set_trainable(stage.encoder_stages, batch_norm=stage.encoder_batch_norm)
            side_px, encoder = stage.side_px, self.model.encoder
            self._grid_hw = encoder.grid_hw if side_px is None else encoder.grid_hw_of(side_px)
            self._tables = None
            self._frozen = (self.model.encoder.folded_frozen_stages().to(memory_format=torch.channels_last),)
        torch.manual_seed(stateless_seed(self.seed, batches_done(self.trainer), self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        if batch.bad:
            self._data.note_bad(batch.bad)
        stage = self.plan.at(self.current_epoch).stage
        if not batch.names:  # every picture was bad: nothing to learn, and all processes go on together
            for _ in range(2 if stage.cross_entropy_weight else 1):
                self._share(batch.tokens)
            return torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum() * 0
        with self._over_grid():
            grid_BPC = self._grid(batch, train=stage.encoder == "finetune")
            if stage.objective == "self_critical":
                loss = self._self_critical(grid_BPC, batch, stage)
            else:
                loss = self._cross_entropy(grid_BPC, batch, stage)
            if stage.mosaics:
                loss = loss + stage.mosaics * self._mosaics(batch, stage)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch.names))
        for group in self.trainer.optimizers[0].param_groups[::2]:  # with and without decay the rate is the same
            self.log(f"rate_{group['name']}", group["lr"], batch_size=len(batch.names))
        return loss

    def _over_grid(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the decoder reads pictures of the stage's side."""
        decoder = self.model.decoder
        if not isinstance(decoder, MultiheadDecoder):  # the others have no positions
            return contextlib.nullcontext()
        return decoder.over_grid(self._grid_hw)

    def _grid(self, batch: Batch, *, train: bool) -> Tensor:
        if batch.cached:
            return batch.pictures.float()
        pixels_B3SS = batch.pictures.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            maps_BCHW = self._frozen[0](pixels_B3SS)
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            return self.model.encoder.forward_trained(maps_BCHW)

    def _cross_entropy(self, grid_BPC: Tensor, batch: Batch, stage: Stage) -> Tensor:
        decoder, inputs_NT, targets_NT = self.model.decoder, batch.tokens[:, :-1], batch.tokens[:, 1:]
        special = (Tokenizer.pad_id, Tokenizer.start_id, Tokenizer.end_id)
        probability = self._scheduled(stage)
        if probability:
            with torch.no_grad():
                logits_NTV, _ = decoder(grid_BPC.detach(), inputs_NT)
            inputs_NT = scheduled_inputs(
                inputs_NT, logits_NTV, probability=probability, special_ids=(*special, Tokenizer.unknown_id)
            )
        if stage.drop_words:
            inputs_NT = drop_words(
                inputs_NT, probability=stage.drop_words, unknown_id=Tokenizer.unknown_id, special_ids=special
            )
        if stage.attention_regularisation:
            logits_NTV, attention_NTP = decoder(grid_BPC, inputs_NT)
            loss = caption_cross_entropy(logits_NTV, targets_NT, label_smoothing=stage.label_smoothing)
            # A mean over captions, of which all processes have the same number.
            regulariser = stage.attention_regularisation * attention_regulariser(attention_NTP, targets_NT)
            return loss * self._share(targets_NT) + regulariser
        logits_NTV, targets = self._predict(grid_BPC, inputs_NT, targets_NT)
        loss = caption_cross_entropy(logits_NTV, targets, label_smoothing=stage.label_smoothing)
        return loss * self._share(targets_NT)

    def _mosaics(self, batch: Batch, stage: Stage) -> Tensor:
        """Return the loss of the batch's pictures as mosaics, one caption of each."""
        pictures, captions = len(batch.names), len(batch.tokens) // len(batch.names)
        order_B = torch.randperm(pictures)
        chosen_B = torch.randint(captions, (pictures,))
        mosaics = Batch(
            make_mosaics(batch.pictures, order_B.to(self.device)),
            one_caption_each(batch.tokens, order_B, chosen_B, pictures=pictures),
            (),
        )
        if not len(mosaics.tokens):  # fewer than four pictures
            return batch.pictures.new_zeros(())
        inputs_NT, targets_NT = mosaics.tokens[:, :-1], mosaics.tokens[:, 1:]
        with self.model.encoder.statistics_kept():  # which are to be those of whole pictures
            grid_MPC = self._grid(mosaics, train=stage.encoder == "finetune")
        logits_NTV, attention_NTP = self.model.decoder(grid_MPC, inputs_NT)
        loss = caption_cross_entropy(logits_NTV, targets_NT, label_smoothing=stage.label_smoothing)
        if stage.pointing:
            pointing = pointing_loss(attention_NTP, targets_NT, *self._pointing_tables())
            self.log("train_pointing", pointing.detach(), batch_size=pictures)
            loss = loss + stage.pointing * pointing
        return loss

    def _pointing_tables(self) -> tuple[Tensor, Tensor]:
        if self._tables is None:
            shares_4P = quadrant_shares(self._grid_hw).to(self.device)
            self._tables = (shares_4P, content_words(self.tokenizer).to(self.device))
        return self._tables

    def _predict(self, grid_BPC: Tensor, inputs_NT: Tensor, targets_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and their targets; where that saves time, those of the positions that are no padding alone."""
        decoder = self.model.decoder
        # A GPU would be waited for to count the positions, and a compiled decoder is compiled for its forward alone.
        if not isinstance(decoder, MultiheadDecoder) or self.compile_decoder or inputs_NT.device.type != "cpu":
            return decoder(grid_BPC, inputs_NT)[0], targets_NT
        real_NT = targets_NT != Tokenizer.pad_id
        return decoder.logits_at(grid_BPC, inputs_NT, real_NT)[None], targets_NT[real_NT][None]

    def _share(self, targets_NT: Tensor) -> Tensor | float:
        """Return this process's share of all targets, times the processes: their mean loss is then that of one."""
        if self.trainer.world_size == 1:
            return 1.0
        own = (targets_NT != Tokenizer.pad_id).sum().float()
        everybody = own.clone()
        torch.distributed.all_reduce(everybody)
        return own * self.trainer.world_size / everybody.clamp(min=1)

    def _scheduled(self, stage: Stage) -> float:
        epochs = batches_done(self.trainer) / self.trainer.num_training_batches
        return stage.scheduled_sampling * (epochs - self.plan.at(self.current_epoch).first_epoch) / stage.epochs

    def _self_critical(self, grid_BPC: Tensor, batch: Batch, stage: Stage) -> Tensor:
        decoder, config = self.model.decoder, stage.reward
        vocabulary = search_vocabulary(self.tokenizer)
        decoder.eval()  # no dropout: what draws is the model that will be used
        try:
            tokens_NT = sample(
                decoder,
                grid_BPC.detach(),
                vocabulary=vocabulary,
                samples=config.samples,
                max_tokens=self._data.max_tokens,
                pad_id=Tokenizer.pad_id,
            )
            greedy = self._greedy(grid_BPC) if config.baseline == "greedy" else None
            decoder.train(stage.dropout)
            start_N1 = torch.full_like(tokens_NT[:, :1], Tokenizer.start_id)
            logits_NTV, _ = decoder(grid_BPC, torch.cat([start_N1, tokens_NT[:, :-1]], dim=1))
        finally:
            decoder.train()
        reward = self._reward(config)
        names = [name for name in batch.names for _ in range(config.samples)]
        rewards_BS = reward.score(names, tokens_NT.tolist()).reshape(-1, config.samples)
        greedy_B = None if greedy is None else reward.score(batch.names, greedy)
        self.log("train_reward", float(rewards_BS.mean()), prog_bar=True, batch_size=len(batch.names))
        gain_N = torch.as_tensor(
            advantages(rewards_BS, baseline=config.baseline, greedy_B=greedy_B), dtype=torch.float32
        ).flatten()
        mask_NT = tokens_NT != Tokenizer.pad_id
        log_probabilities_NT = word_log_probabilities(logits_NTV, tokens_NT, never_ids=vocabulary.never_ids)
        loss = self_critical_loss(log_probabilities_NT, mask_NT, gain_N.to(self.device)) * self._share(tokens_NT)
        weight = stage.cross_entropy_weight
        return loss if not weight else (1 - weight) * loss + weight * self._cross_entropy(grid_BPC, batch, stage)

    def _greedy(self, grid_BPC: Tensor) -> list[list[int]]:
        """Return what greedy search writes: words, then the end where the sentence came to one."""
        found = search(
            self.model.decoder,
            grid_BPC.detach(),
            vocabulary=search_vocabulary(self.tokenizer),
            options=SearchOptions(method="greedy", max_words=self._data.max_tokens - 1),
        )
        best = [hypotheses[0] for hypotheses in found]
        return [[*h.token_ids, *([Tokenizer.end_id] if h.finished else [])] for h in best]

    def _reward(self, config: RewardConfig) -> CaptionReward:
        if config not in self._rewards:
            references = {picture.name: picture.captions for picture in self._data.pictures["train"]}
            self._rewards[config] = CaptionReward(references, tokenizer=self.tokenizer, config=config)
        return self._rewards[config]

    # --- Validation ---

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss and caption the pictures."""
        self._found.bad |= {bad.name: bad for bad in batch.bad}
        if not batch.names:
            return
        if not self._in_use:
            self._in_use = (self.model.encoder.folded().to(memory_format=torch.channels_last),)
        targets_NT = batch.tokens[:, 1:]
        with torch.autocast(self.device.type, enabled=False):  # float32, as in use
            grid_BPC = self._in_use[0](batch.pictures.contiguous(memory_format=torch.channels_last))
        logits_NTV, _ = self.model.decoder(grid_BPC, batch.tokens[:, :-1])
        words = int((targets_NT != Tokenizer.pad_id).sum())
        self._found.loss += words * float(caption_cross_entropy(logits_NTV, targets_NT, label_smoothing=0.0))
        self._found.words += words
        with torch.autocast(self.device.type, enabled=False):
            found = search(
                self.model.decoder,
                grid_BPC,
                vocabulary=search_vocabulary(self.tokenizer),
                options=self.search_options,
            )
        for name, hypotheses in zip(batch.names, found, strict=True):
            self._found.captions[name] = self.tokenizer.sentence(hypotheses[0].token_ids)

    def on_validation_epoch_end(self) -> None:
        """Score the captions of all processes; log the mean loss of a word, BLEU-4, CIDEr-D and ROUGE-L (x100)."""
        self._in_use = ()
        parts = [self._found]
        if self.trainer.world_size > 1:
            parts = [_Found()] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._found)
        self._found = _Found()
        self._data.note_bad([bad for part in parts for bad in part.bad.values()])
        self.captions = {name: caption for part in parts for name, caption in part.captions.items()}
        references = {name: texts for name, texts in self._data.references().items() if name in self.captions}
        if not references:
            raise DataError("no dev picture could be read; see bad_pictures.txt in the run's folder")
        self.log("val_loss", sum(part.loss for part in parts) / sum(part.words for part in parts), sync_dist=True)
        self.scores = dict(evaluate(self.captions, references).scores)
        for metric, name in _SCORES.items():
            self.log(name, self.scores[metric], prog_bar=metric != "ROUGE-L", sync_dist=True)

    # --- Optimiser ---

    def configure_optimizers(self) -> Any:
        """AdamW; matrices decay, vectors and scalars do not; each stage has its rates."""
        self._data.use_sides(self.plan.sides_px)
        if self._resumed_epoch < self.plan.cached_epochs:
            self._data.use_cache(self.model.encoder, epochs=self.plan.cached_epochs)
        steps = math.ceil(self._data.train_batches() / self.trainer.accumulate_grad_batches)
        groups: list[dict[str, Any]] = []
        rates: list[Any] = []
        for part in ("decoder", "encoder"):
            parameters = list(getattr(self.model, part).parameters())
            for decay, chosen in (
                (self.weight_decay, [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                groups.append({"params": chosen, "lr": 1.0, "weight_decay": decay, "name": part})
                # A partial object: the scheduler's state, which is stored, then holds nothing of ours.
                rates.append(functools.partial(self.plan.rate, steps_per_epoch=steps, part=part))
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


_GRID_POSITIONS = ("decoder.grid_row", "decoder.grid_column")


def start_from(model: CaptionModel, base: Checkpoint) -> None:
    """Copy the weights of a model into one with the same shape and the same or a longer vocabulary.

    A new word starts at the unknown word's place, where words that the base did not know were read. For pictures of
    another side the positions of the grid's rows and columns are interpolated, as for a larger picture in ViT
    (Dosovitskiy et al. 2021, section 3.2).

    Args:
        model: filled in place.
        base: where the weights come from; its words are the first of the model's.

    Raises:
        CheckpointError: when the shapes do not go together.
    """
    old, unknown = base.model.state_dict(), Tokenizer.unknown_id
    size, larger = base.model.config.vocabulary_size, model.config.vocabulary_size
    filled = {}
    for name, value in model.state_dict().items():
        given = old.get(name)
        if given is not None and given.shape == value.shape:
            filled[name] = given
        elif given is not None and given.shape[1:] == value.shape[1:] and (len(given), len(value)) == (size, larger):
            filled[name] = torch.cat([given, given[unknown].expand_as(value[size:])])
        elif given is not None and name in _GRID_POSITIONS and given.shape[-1:] == value.shape[-1:]:
            filled[name] = stretched(given.flatten(0, 1), max(value.shape[:2])).reshape_as(value)
        else:
            shape = None if given is None else tuple(given.shape)
            raise CheckpointError(f"model.init_from: {name} has shape {shape}, the config needs {tuple(value.shape)}")
    model.load_state_dict(filled)
