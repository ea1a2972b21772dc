"""Joins encoder and decoder. `build_model` is the only place that turns names into modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.decoders import AdditiveDecoder, MeanDecoder, MultiheadDecoder
from captioner.encoder import Encoder
from captioner.familiarity import Familiarity

DecoderModule = MeanDecoder | AdditiveDecoder | MultiheadDecoder
DECODERS: dict[str, type[DecoderModule]] = {
    "mean": MeanDecoder,
    "additive": AdditiveDecoder,
    "multihead": MultiheadDecoder,
}


class CaptionModel(nn.Module):
    """A CNN encoder and a decoder with the settings that made them.

    Args:
        config: the settings; kept with the weights.
        encoder: pixels → grid of features.
        decoder: grid → words.

    Attributes:
        familiarity: how strange a picture is to the model; None when it was not calibrated.
    """

    def __init__(self, *, config: ModelConfig, encoder: Encoder, decoder: DecoderModule) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        self.familiarity: Familiarity | None = None
        if config.confidence is not None:
            self.familiarity = Familiarity(feature_dim=encoder.feature_dim, directions=config.confidence.directions)

    def forward(self, pixels_B3SS: Tensor, tokens_NT: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing from pixels.

        Args:
            pixels_B3SS: normalised pixels of B pictures.
            tokens_NT: int64, the start token and what follows; N = B, or R rows side by side for each
                picture.

        Returns:
            logits_NTV and attention_NTP.
        """
        outcome: tuple[Tensor, Tensor] = self.decoder(self.encoder(pixels_B3SS), tokens_NT)
        return outcome


def build_model(config: ModelConfig, *, encoder_weights: str | Path | None = None) -> CaptionModel:
    """Make a model with random decoder weights.

    Args:
        config: shape of the model.
        encoder_weights: "torchvision", the path of a safetensors file, or None (random); see `Encoder`.

    Returns:
        The model, in training mode.

    Raises:
        ConfigError: for an unknown backbone, or a stride or side that it does not allow.
        CheckpointError: when the encoder's weights cannot be loaded.
    """
    encoder = Encoder(
        backbone=config.encoder.backbone,
        stride=config.encoder.stride,
        side_px=config.preprocessing.side_px,
        weights=encoder_weights,
    )
    decoder = DECODERS[config.decoder](
        feature_dim=encoder.feature_dim,
        grid_hw=encoder.grid_hw,
        vocabulary_size=config.vocabulary_size,
        max_tokens=config.max_tokens,
        **dataclasses.asdict(config.decoder_settings),
    )
    return CaptionModel(config=config, encoder=encoder, decoder=decoder)
