"""Laws of the whole model: encoder and decoder together."""

import pytest
import torch
from models import DECODERS
from torch import nn

from captioner.config import EncoderConfig, ModelConfig, MultiheadConfig, PreprocessingConfig, RecurrentConfig
from captioner.decoders import AdditiveDecoder, MeanDecoder, MultiheadDecoder
from captioner.errors import CheckpointError, ConfigError
from captioner.model import build_model

SETTINGS = {
    "mean": RecurrentConfig(embedding_dim=10, state_dim=14, attention_dim=9),
    "additive": RecurrentConfig(embedding_dim=10, state_dim=14, attention_dim=9),
    "multihead": MultiheadConfig(dim=16, layers=2, heads=4, feedforward_dim=24),
}
VOCABULARY, MAX_TOKENS = 11, 9


@pytest.fixture(autouse=True)
def _own_random_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _config(decoder, *, backbone="resnet18", stride=32, side_px=64):
    return ModelConfig(
        decoder=decoder,
        vocabulary_size=VOCABULARY,
        max_tokens=MAX_TOKENS,
        preprocessing=PreprocessingConfig(side_px=side_px),
        encoder=EncoderConfig(backbone=backbone, stride=stride),
        decoder_settings=SETTINGS[decoder],
    )


def _batch(pictures=2, rows=3, side_px=64):
    tokens = torch.randint(VOCABULARY, (pictures * rows, 6))
    return torch.randn(pictures, 3, side_px, side_px), tokens


def _gradients(model):
    pixels, tokens = _batch()
    logits, _ = model(pixels, tokens[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: (value.requires_grad, value.grad) for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("last_stages", [0, 2, None])
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_does(kind, last_stages):
    model = build_model(_config(kind)).train()
    model.encoder.set_trainable(last_stages)
    gradients = _gradients(model)
    frozen = {name for name, (trainable, _) in gradients.items() if not trainable}
    stages = len(model.encoder.stages)
    first = 0 if last_stages is None else stages - last_stages
    assert frozen == {
        name for name in gradients if name.startswith(tuple(f"encoder.stages.{stage}." for stage in range(first)))
    }
    for name, (trainable, gradient) in gradients.items():
        if not trainable:
            assert gradient is None, name
            continue
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        # A bias may have a gradient of zero by right: that of the keys shifts all scores of a softmax alike.
        if gradient.ndim > 1:
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("kind", DECODERS)
def test_training_changes_the_statistics_of_trained_stages_alone(kind):
    model = build_model(_config(kind)).train()
    model.encoder.set_trainable(2)
    before = {name: value.clone() for name, value in model.encoder.named_buffers() if "running" in name}
    model.train()  # as Lightning does after every validation
    model(*_batch())
    for name, value in model.encoder.named_buffers():
        if "running" in name:
            assert torch.equal(value, before[name]) is (int(name.split(".")[1]) < 3), name


@pytest.mark.parametrize("kind", DECODERS)
def test_a_model_runs_from_pixels_to_logits_and_maps(kind):
    model = build_model(_config(kind)).eval()
    pixels, tokens = _batch()
    with torch.no_grad():
        logits, attention = model(pixels, tokens)
        grid = model.encoder(pixels)
        expected_logits, expected_attention = model.decoder(grid, tokens)
    assert grid.shape == (2, 4, 512)
    assert logits.shape == (6, 6, VOCABULARY)
    assert attention.shape == (6, 6, 4)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(attention, expected_attention)


@pytest.mark.parametrize(
    ("kind", "decoder"), [("mean", MeanDecoder), ("additive", AdditiveDecoder), ("multihead", MultiheadDecoder)]
)
@pytest.mark.parametrize(
    ("backbone", "stride", "side_px", "grid_hw"),
    [("mobilenet_v3_small", 32, 96, (3, 3)), ("resnet18", 16, 64, (4, 4))],
)
def test_a_model_is_what_its_config_says(kind, decoder, backbone, stride, side_px, grid_hw):
    config = _config(kind, backbone=backbone, stride=stride, side_px=side_px)
    model = build_model(config)
    assert model.config == config
    assert type(model.decoder) is decoder
    assert model.decoder.max_tokens == MAX_TOKENS
    assert (model.encoder.backbone, model.encoder.stride, model.encoder.grid_hw) == (backbone, stride, grid_hw)
    assert model.training
    with torch.no_grad():
        attention = model.eval()(torch.randn(1, 3, side_px, side_px), torch.ones(1, 2, dtype=torch.int64))[1]
    assert attention.shape == (1, 2, grid_hw[0] * grid_hw[1])


@pytest.mark.parametrize("kind", DECODERS)
def test_weights_of_one_model_fit_another_of_the_same_config(kind):
    first, second = (build_model(_config(kind)).eval() for _ in range(2))
    second.encoder.set_trainable(1)  # what is trained leaves the names alone
    second.load_state_dict(first.state_dict(), strict=True)
    pixels, tokens = _batch()
    with torch.no_grad():
        for one, other in zip(first(pixels, tokens), second(pixels, tokens), strict=True):
            assert torch.equal(one, other)


def test_a_config_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="did you mean"):
        build_model(_config("mean", backbone="resnet19"))
    with pytest.raises(ConfigError, match="no stride of 16"):
        build_model(_config("mean", backbone="densenet121", stride=16))


def test_encoder_weights_that_are_missing_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.safetensors: no such weights file"):
        build_model(_config("mean"), encoder_weights=tmp_path / "none.safetensors")
