"""Mosaics: four training pictures in one, each with its caption, so that maps learn where things are.

A caption says what is in a picture, not where. In a mosaic of 2 x 2 pictures we know where: the words of one
picture's caption belong to its quadrant. The decoder has to look there to predict them, and its attention is told so
(`pointing_loss`); no box or mask is needed.

Shapes: B pictures, M = B // 4 mosaics of four pictures, N = 4 M captions, T tokens, V vocabulary, P grid cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from captioner.errors import ConfigError
from captioner.metrics.language import FUNCTION_WORDS
from captioner.tokenizer import Tokenizer

PARTS = 4
# A share of 0 has no logarithm; attention in 16 bits can come to it.
_LEAST_SHARE = 1e-4


def make_mosaics(pictures_B3SS: Tensor, order_B: Tensor) -> Tensor:
    """Lay four pictures at half their side out as one.

    Args:
        pictures_B3SS: pixels.
        order_B: int64, a permutation of the pictures; each four of it become a mosaic, and a rest is left out.

    Returns:
        [M, 3, S, S]; the quadrants from top left to bottom right, row by row, in the given order.

    Raises:
        ConfigError: for pictures of an odd side, which has no half.
    """
    side_px = pictures_B3SS.shape[-1]
    if side_px % 2:
        raise ConfigError(f"mosaics need pictures of an even side, got {side_px} px; change data.preprocessing.side_px")
    count = len(order_B) // PARTS
    small = avg_pool2d(pictures_B3SS[order_B[: count * PARTS]], 2)
    small = small.reshape(count, PARTS, *small.shape[1:])
    rows = [torch.cat([small[:, 2 * row], small[:, 2 * row + 1]], dim=-1) for row in range(2)]
    return torch.cat(rows, dim=-2)


def quadrant_shares(grid_hw: tuple[int, int]) -> Tensor:
    """Return how much of each grid cell lies in each quadrant of the picture.

    Args:
        grid_hw: rows and columns.

    Returns:
        float32 [4, P]; each column sums to 1, the quadrants in the order of `make_mosaics`.
    """

    def second_half(cells: int) -> Tensor:
        return (torch.arange(cells, dtype=torch.float32) + 1 - cells / 2).clamp(0, 1)

    down, across = second_half(grid_hw[0]), second_half(grid_hw[1])
    rows, columns = torch.stack([1 - down, down]), torch.stack([1 - across, across])
    return torch.stack([rows[part // 2][:, None] * columns[part % 2] for part in range(PARTS)]).flatten(1)


def content_words(tokenizer: Tokenizer) -> Tensor:
    """Return which tokens are words with a content of their own: things, kinds, colours, doings.

    Args:
        tokenizer: of the model.

    Returns:
        bool [V]; False for special tokens and for `FUNCTION_WORDS`.
    """
    special = {tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unknown_id}
    return torch.tensor(
        [
            token_id not in special and has_content(tokenizer.word(token_id))
            for token_id in range(tokenizer.vocabulary_size)
        ]
    )


def pointing_loss(attention_NTP: Tensor, targets_NT: Tensor, shares_4P: Tensor, content_V: Tensor) -> Tensor:
    """Return how far the attention of content words is from their quadrant: -log of the share that falls in it.

    Args:
        attention_NTP: of any decoder, one row of P weights for each step; the captions of a mosaic side by side, in
            the order of its quadrants.
        targets_NT: int64, what each step predicts, then padding.
        shares_4P: of `quadrant_shares`.
        content_V: of `content_words`.

    Returns:
        float32 scalar, the mean over all content words; 0 where there is none.
    """
    quadrant_N = torch.arange(len(targets_NT), device=targets_NT.device) % PARTS
    share_NT = (attention_NTP.float() * shares_4P[quadrant_N][:, None]).sum(dim=2)
    content_NT = content_V[targets_NT]
    surprise_NT = -share_NT.clamp(min=_LEAST_SHARE).log()
    return torch.where(content_NT, surprise_NT, 0.0).sum() / content_NT.sum().clamp(min=1)


def one_caption_each(tokens_NT: Tensor, order_B: Tensor, chosen_B: Tensor, *, pictures: int) -> Tensor:
    """Return one caption for each picture of the mosaics.

    Args:
        tokens_NT: the captions of a batch, R side by side for each picture.
        order_B: of `make_mosaics`.
        chosen_B: int64, which of the R captions of each picture, in the batch's order.
        pictures: B.

    Returns:
        int64 [4 M, T].
    """
    captions_BRT = tokens_NT.reshape(pictures, -1, tokens_NT.shape[1])
    used = order_B[: len(order_B) // PARTS * PARTS]
    return captions_BRT[used, chosen_B[used]]


def has_content(word: str) -> bool:
    """Return whether a word says something of its own: it is none of `FUNCTION_WORDS`, whatever its capitals."""
    return word.lower() not in FUNCTION_WORDS
