"""Independent samples of whole captions for self-critical training, and the draw of one token.

`captioner.search` is for readers: it drops captions that repeat another, writes at least one word and breaks off
with an end. REINFORCE needs the draws as they fall, repetitions and unfinished sentences included.

Shapes: B pictures, S samples of each, N = B x S rows side by side, T tokens, V vocabulary, A permitted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.decoders.protocol import Decoder
from captioner.errors import ConfigError, SearchError
from captioner.search import SearchVocabulary


def permitted_ids(size: int, never_ids: Sequence[int], *, device: torch.device) -> Tensor:
    """Return the tokens that may be drawn.

    Args:
        size: of the vocabulary.
        never_ids: tokens that are never drawn.
        device: for the result.

    Returns:
        int64 [A], ascending.
    """
    permitted_V = torch.ones(size, dtype=torch.bool)
    permitted_V[list(never_ids)] = False
    return permitted_V.nonzero()[:, 0].to(device)


def draw(logits_NV: Tensor, permitted_A: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one permitted token per row from the softmax over the permitted tokens.

    By inversion of the cumulated probabilities, one random number per row: ten times as fast on a CPU as the
    Gumbel-max trick, which needs one per row and token.

    Args:
        logits_NV: unnormalised.
        permitted_A: int64, from `permitted_ids`. Others cannot come out, whatever the rounding.
        generator: of the logits' device; None: the global one.

    Returns:
        int64 [N]; for a row with NaN, any permitted token.
    """
    bias_V = logits_NV.new_full(logits_NV.shape[1:], -torch.inf, dtype=torch.float32).index_fill_(0, permitted_A, 0.0)
    # To add to all is several times as fast on a CPU as to select the permitted columns.
    cumulated_NV = (logits_NV + bias_V).softmax(dim=1).cumsum(dim=1)
    level_N1 = torch.rand(len(logits_NV), 1, generator=generator, device=logits_NV.device) * cumulated_NV[:, -1:]
    # With right=True the first sum above the level: a token without probability adds nothing and is passed over.
    place_N = torch.searchsorted(cumulated_NV, level_N1, right=True)[:, 0]
    # Where rounding leaves no sum above it, or there is NaN: the permitted token before, or else the first.
    return permitted_A[(torch.searchsorted(permitted_A, place_N, right=True) - 1).clamp_(min=0)]


def sample(
    decoder: Decoder,
    grid_BPC: Tensor,
    *,
    vocabulary: SearchVocabulary,
    samples: int,
    max_tokens: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw captions from the model itself: each word from its softmax without the tokens that are never written.

    Those of one picture are independent draws, so that some may be equal. A caption may consist of the end alone,
    and has no end where `max_tokens` came first. No gradient is recorded. Whether dropout is on is the decoder's
    own affair: in evaluation mode `word_log_probabilities` of a teacher-forced pass are those of the draws.

    Args:
        decoder: any decoder.
        grid_BPC: features of the pictures; keys and values are computed once per picture.
        vocabulary: its `never_ids` must name the start token and padding.
        samples: captions per picture, S.
        max_tokens: most tokens of a caption, end included.
        pad_id: fills up behind the end.
        generator: of the grid's device; None: the global one.

    Returns:
        int64 [B x S, T], the captions of a picture side by side, without start; T is the longest.

    Raises:
        ConfigError: for no sample, a vocabulary that permits start or padding, or more tokens than the decoder
            writes.
        SearchError: when the model gives NaN.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}")
    if not {vocabulary.start_id, pad_id} <= set(vocabulary.never_ids):
        raise ConfigError(
            f"never_ids must name start and padding, {vocabulary.start_id} and {pad_id}, got {vocabulary.never_ids}"
        )
    with torch.inference_mode():
        tokens_NT = _sample(decoder, grid_BPC, vocabulary, samples, max_tokens, pad_id, generator)
    # Autograd refuses tensors of inference mode; a clone made outside of it is an ordinary one.
    return tokens_NT.clone()


def _sample(
    decoder: Decoder,
    grid_BPC: Tensor,
    vocabulary: SearchVocabulary,
    samples: int,
    max_tokens: int,
    pad_id: int,
    generator: torch.Generator | None,
) -> Tensor:
    pictures, device = len(grid_BPC), grid_BPC.device
    permitted_A = permitted_ids(vocabulary.size, vocabulary.never_ids, device=device)
    state = decoder.start(grid_BPC, max_tokens=max_tokens)
    logits_BV, _, state = decoder.step(torch.full((pictures,), vocabulary.start_id, device=device), state)
    # The first step is the same for all samples of a picture; from here on each has a row of its own.
    row_N = torch.arange(pictures, device=device).repeat_interleave(samples)
    logits_NV, state = logits_BV[row_N], state.select(row_N)
    ended_N = torch.zeros(len(row_N), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    while True:
        token_N = draw(logits_NV, permitted_A, generator=generator).masked_fill(ended_N, pad_id)
        columns.append(token_N)
        ended_N = ended_N | (token_N == vocabulary.end_id)
        # The one wait for the device in a step.
        broken, over = torch.stack([logits_NV.amax().isnan(), ended_N.all()]).tolist()
        if broken:
            raise SearchError(
                f"the model gave NaN for word {len(columns)} of a sample: the training has diverged; "
                "lower the learning rate"
            )
        if over or len(columns) == max_tokens:
            return torch.stack(columns, dim=1)
        logits_NV, _, state = decoder.step(token_N, state)
