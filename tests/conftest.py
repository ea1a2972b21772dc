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


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """Make a tiny model with random weights; the same seed gives the same weights."""
    import torch

    from captioner.checkpoint import Checkpoint
    from captioner.config import EncoderConfig, ModelConfig, PreprocessingConfig
    from captioner.model import build_model
    from captioner.tokenizer import Tokenizer

    def make(decoder="multihead", *, seed=0, card="# A tiny model\n"):
        tokenizer = Tokenizer.train([" ".join(TINY_WORDS)], min_count=1)
        config = ModelConfig(
            decoder=decoder,
            vocabulary_size=tokenizer.vocabulary_size,
            max_tokens=24,
            preprocessing=PreprocessingConfig(side_px=64),
            encoder=EncoderConfig(backbone="mobilenet_v3_small"),
            decoder_settings=TINY_DECODERS[decoder],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Checkpoint(build_model(config).eval(), tokenizer, card)

    return make


@pytest.fixture(scope="session")
def tiny_captioner(tiny_checkpoint):
    """A captioner of a few thousand weights: for whatever does not depend on what a caption says."""
    from captioner import Captioner

    return Captioner(tiny_checkpoint("multihead"), device="cpu")
