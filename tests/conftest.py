"""What the tests share: the bundled model, loaded once, the example photos, and tiny models of every kind."""

import os

# Before torch is imported, here and in the processes that tests start: several workers with as many threads each as
# there are cores wait for one another more than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from pictures import EXAMPLES

# A machine that is busy with something else is no reason to fail.
settings.register_profile("captioner", deadline=None)
settings.load_profile("captioner")

TINY_WORDS = ("a", "dog", "man", "red", "ball", "runs", "with", "the", "on", "grass", "'s", "t-shirt")
TINY_DECODERS = {
    "mean": {"embedding_dim": 8, "state_dim": 12},
    "additive": {"embedding_dim": 8, "state_dim": 12, "attention_dim": 10},
    "multihead": {"dim": 16, "layers": 2, "heads": 2, "feedforward_dim": 24},
}


@pytest.fixture(scope="module", params=("numpy", "torch"))
def array_kind(request):
    """Have `toy_decoders` search with NumPy arrays, then with torch tensors; not for one test, for hypothesis' sake."""
    import toy_decoders

    toy_decoders.use(request.param)
    yield request.param
    toy_decoders.use("torch")


@pytest.fixture(scope="session")
def captioner():
    """The bundled model, on the CPU."""
    from captioner import Captioner

    return Captioner.load(device="cpu")


@pytest.fixture(scope="session")
def example_photos():
    """The example photos, sorted by name."""
    assert EXAMPLES, "examples/ holds no photo"
    return EXAMPLES


def discriminate(model):
    """Make a random model tell pictures and places apart, as a trained one does.

    Fresh weights are so small that features hardly differ: what mixed up two pictures, or two rows of maps, would pass
    every test. So batch norms get the statistics of real features, and the decoder weights of order 1.
    """
    import torch
    from torch import nn

    norms = [module for module in model.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    side_px = model.config.preprocessing.side_px
    # Like photos in this: they differ in colour, in large things and in small ones.
    coarse_to_fine = [torch.randn(64, 3, side, side) for side in (1, 4, side_px)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model.encoder.train()
        model.encoder(sum(nn.functional.interpolate(noise, size=(side_px, side_px)) for noise in coarse_to_fine))
        norms[-1].weight.fill_(3.0)
        for parameter in model.decoder.parameters():
            matrix = parameter.ndim > 1
            parameter.add_(torch.randn_like(parameter), alpha=parameter.shape[-1] ** -0.5 if matrix else 0.3)
            parameter.mul_(2.0 if matrix else 1.0)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """Make a tiny model with random weights that tells pictures apart; the same seed gives the same weights."""
    import torch

    from captioner.checkpoint import Checkpoint
    from captioner.config import EncoderConfig, ModelConfig, PreprocessingConfig
    from captioner.model import build_model
    from captioner.tokenizer import Tokenizer

    def make(decoder="multihead", *, seed=0, card="# A tiny model\n", max_tokens=24):
        tokenizer = Tokenizer.train([" ".join(TINY_WORDS)], min_count=1)
        config = ModelConfig(
            decoder=decoder,
            vocabulary_size=tokenizer.vocabulary_size,
            max_tokens=max_tokens,
            preprocessing=PreprocessingConfig(side_px=64),
            encoder=EncoderConfig(backbone="mobilenet_v3_small"),
            decoder_settings=TINY_DECODERS[decoder],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Checkpoint(discriminate(build_model(config)), tokenizer, card)

    return make


@pytest.fixture(scope="session")
def tiny_captioner(tiny_checkpoint):
    """A captioner of a few thousand weights: for whatever does not depend on what a caption says."""
    from captioner import Captioner

    return Captioner(tiny_checkpoint("multihead"), device="cpu")
