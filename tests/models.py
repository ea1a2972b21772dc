"""Tiny decoders with random weights, and the two ways of running them, for tests.

Shapes as in `captioner.decoders.protocol`; R rows side by side for each picture.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from captioner.decoders import AdditiveDecoder, Decoder, MeanDecoder, MultiheadDecoder

DECODERS = ("mean", "additive", "multihead")
GRID_HW, CELLS, CHANNELS = (2, 3), 6, 12
VOCABULARY, MAX_TOKENS = 11, 9
# Largest difference between two orders of the same float32 sums; logits and weights here are of order 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def make_decoder(kind: str, *, seed: int = 0, **settings: object) -> Decoder:
    """Make a decoder in evaluation mode whose every parameter matters: none is zero or tiny."""
    sizes = {
        "mean": {"embedding_dim": 10, "state_dim": 14, "attention_dim": 9},
        "additive": {"embedding_dim": 10, "state_dim": 14, "attention_dim": 9},
        "multihead": {"dim": 16, "layers": 2, "heads": 4, "feedforward_dim": 24},
    }[kind]
    classes = {"mean": MeanDecoder, "additive": AdditiveDecoder, "multihead": MultiheadDecoder}
    common = {"feature_dim": CHANNELS, "grid_hw": GRID_HW, "vocabulary_size": VOCABULARY, "max_tokens": MAX_TOKENS}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        decoder = classes[kind](**{**common, **sizes, **settings}).eval()
        for parameter in decoder.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return decoder


def random_grid(pictures: int, *, seed: int = 1) -> Tensor:
    return torch.randn(pictures, CELLS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def random_tokens(rows: int, steps: int, *, seed: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(seed))


def repeated(pictures: int, rows_per_picture: int) -> Tensor:
    """Return the selection that gives each of the pictures that many rows, side by side."""
    return torch.arange(pictures).repeat_interleave(rows_per_picture)


def step_through(
    decoder: Decoder, grid_BPC: Tensor, tokens_NT: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits_NTV, attention_NTP and heads_NTLHP of T calls of `step`."""
    state = decoder.start(grid_BPC, **options)
    if len(tokens_NT) != len(grid_BPC):
        state = state.select(repeated(len(grid_BPC), len(tokens_NT) // len(grid_BPC)))
    logits, attention, heads = [], [], []
    for tokens_N in tokens_NT.unbind(dim=1):
        logits_NV, attention_NP, state = decoder.step(tokens_N, state)
        logits.append(logits_NV)
        attention.append(attention_NP)
        heads.append(state.attention_heads_BLHP)
    return torch.stack(logits, dim=1), torch.stack(attention, dim=1), torch.stack(heads, dim=1)


@st.composite
def selections(draw, picture_of_row):
    """Draw rows of a state: any at all, or one of the kinds that a search makes."""
    rows, pictures = range(len(picture_of_row)), sorted(set(picture_of_row))
    kind = draw(st.sampled_from(["any", "repeat", "drop", "beam", "permute"]))
    if kind == "any":
        return draw(st.lists(st.sampled_from(rows), min_size=1, max_size=6))
    if kind == "repeat":
        return [row for row in rows for _ in range(draw(st.integers(1, 2)))][:8]
    if kind == "permute":
        return draw(st.permutations(rows))
    kept = draw(st.sets(st.sampled_from(pictures), min_size=1)) if kind == "drop" else pictures
    width = draw(st.integers(1, 3)) if kind == "beam" else None
    chosen = []
    for picture in kept if kind == "drop" else dict.fromkeys(picture_of_row):
        own = [row for row in rows if picture_of_row[row] == picture]
        chosen += own if width is None else [draw(st.sampled_from(own)) for _ in range(width)]
    return chosen
