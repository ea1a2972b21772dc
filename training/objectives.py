"""What training minimises, and what it feeds the decoder instead of the true words: pure functions.

Shapes: N caption rows, T tokens, V vocabulary, P grid cells. R of the N x T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from captioner.errors import ConfigError
from captioner.tokenizer import Tokenizer
from training.sampling import draw, permitted_ids

# Logits at a time on a CPU: 2 MiB of float32 stay in the cache. At N=160, T=16, V=2540 with bfloat16 logits, loss and
# gradient take 12 ms on one thread, all at once 36 ms; picking out the positions that are no padding first, 28 ms.
_AT_ONCE = 1 << 19
# PyTorch's own mark for "no target".
_IGNORED = -100


def _probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} must be from 0 to 1, got {value!r}")


def _pieces(logits_NTV: Tensor, ids_NT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [R, V] in float32 and their ids [R], piece by piece on a CPU, else all at once."""
    logits_RV, ids_R = logits_NTV.flatten(0, 1), ids_NT.flatten()
    rows = max(1, _AT_ONCE // logits_RV.shape[1]) if logits_RV.device.type == "cpu" else max(1, len(logits_RV))
    for logits, ids in zip(torch.split(logits_RV, rows), torch.split(ids_R, rows), strict=True):
        yield logits.float(), ids


def _is_any(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in ids:  # one by one, so that no list has to go to the device
        found |= tokens == token_id
    return found


def caption_cross_entropy(logits_NTV: Tensor, targets_NT: Tensor, *, label_smoothing: float) -> Tensor:
    """Return the mean cross-entropy over all targets that are not padding.

    Equal to PyTorch's `cross_entropy` with `ignore_index`, in float32 whatever the logits are.

    Args:
        logits_NTV: unnormalised.
        targets_NT: int64, the words, the end, then padding.
        label_smoothing: share of the target that is spread over the vocabulary (Szegedy et al. 2016), 0 to 1.

    Returns:
        float32 scalar; NaN where all is padding.

    Raises:
        ConfigError: for a `label_smoothing` outside 0 to 1.
    """
    _probability("label_smoothing", label_smoothing)
    sums = [
        cross_entropy(logits, targets, ignore_index=Tokenizer.pad_id, label_smoothing=label_smoothing, reduction="sum")
        for logits, targets in _pieces(logits_NTV, targets_NT)
    ]
    return torch.stack(sums).sum() / (targets_NT != Tokenizer.pad_id).sum()


def attention_regulariser(attention_NTP: Tensor, targets_NT: Tensor) -> Tensor:
    """Return the doubly stochastic regulariser of Show, Attend and Tell (Xu et al. 2015, eq. 14).

    A caption as a whole should look at each cell about once: (1 - sum over its steps of the attention)², here as
    the mean over captions and cells. The paper sums over the P cells: its weight is P times this one's. Only steps
    that predict a word or the end count, and rows that are nothing but padding do not.

    Args:
        attention_NTP: of any decoder, one row of P weights per step.
        targets_NT: int64, what each step predicts, then padding.

    Returns:
        float32 scalar, unweighted; NaN where all is padding.
    """
    real_NT = targets_NT != Tokenizer.pad_id
    # float32 sums: in bfloat16 a sum near 1 has three digits left.
    looked_NP = torch.where(real_NT[:, :, None], attention_NTP.float(), 0.0).sum(dim=1)
    real_N = real_NT.any(dim=1)
    return ((1.0 - looked_NP).square().mean(dim=1) * real_N).sum() / real_N.sum()


def drop_words(
    tokens_NT: Tensor,
    *,
    probability: float,
    unknown_id: int,
    special_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the decoder's input with some words replaced by the unknown token (Bowman et al. 2016).

    The less the decoder can lean on the words before, the more it has to look at the picture.

    Args:
        tokens_NT: int64, start, words, end, padding. The targets are to stay as they are.
        probability: of a word to be dropped, each on its own.
        unknown_id: what takes its place.
        special_ids: tokens that are never dropped: padding, start, end.
        generator: of the tokens' device; None: the global one.

    Returns:
        int64 [N, T]; the tokens themselves are not changed.

    Raises:
        ConfigError: for a probability outside 0 to 1.
    """
    _probability("the probability of dropping a word", probability)
    dropped_NT = torch.rand(tokens_NT.shape, generator=generator, device=tokens_NT.device) < probability
    return tokens_NT.masked_fill(dropped_NT & ~_is_any(tokens_NT, special_ids), unknown_id)


def scheduled_inputs(
    tokens_NT: Tensor,
    logits_NTV: Tensor,
    *,
    probability: float,
    special_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the decoder's input with some words replaced by what the model itself would say there.

    Scheduled sampling (Bengio et al. 2015) in two passes over whole captions (Mihaylova & Martins 2019): the first,
    teacher-forced and without gradient, gives the logits; each replaced word is a draw from the model's prediction
    for its position, with the true words before it; the second pass reads the result.

    Args:
        tokens_NT: int64, the input of the first pass: start, words, end, padding.
        logits_NTV: of the first pass; those of position t predict the token of position t + 1.
        probability: of a word to be replaced, each on its own.
        special_ids: padding, start and end: neither replaced nor drawn, for in use they are never read after the
            first step. With the unknown token among them, unknown words stay too.
        generator: of the tokens' device; None: the global one.

    Returns:
        int64 [N, T], without gradient; the tokens themselves are not changed.

    Raises:
        ConfigError: for a probability outside 0 to 1.
    """
    _probability("the probability of scheduled sampling", probability)
    chosen_NT = torch.rand(tokens_NT.shape, generator=generator, device=tokens_NT.device) < probability
    chosen_NT &= ~_is_any(tokens_NT, special_ids)
    chosen_NT[:, :1] = False  # nothing predicts the first token
    permitted_A = permitted_ids(logits_NTV.shape[2], special_ids, device=tokens_NT.device)
    # Only the chosen are drawn: the draw costs as much as the loss.
    logits_RV = logits_NTV.detach()[:, :-1][chosen_NT[:, 1:]]
    inputs_NT = tokens_NT.clone()
    inputs_NT[chosen_NT] = draw(logits_RV, permitted_A, generator=generator)
    return inputs_NT


def word_log_probabilities(logits_NTV: Tensor, tokens_NT: Tensor, *, never_ids: Sequence[int] = ()) -> Tensor:
    """Return the log-probability of each token under the logits of its position.

    Args:
        logits_NTV: those of position t predict token t: the input was the start, then the tokens but the last.
        tokens_NT: int64, words and end, then padding.
        never_ids: tokens that the sampler never draws, padding among them. They are left out of the softmax, which
            makes it the distribution that the sample came from, and get 0 and no gradient.

    Returns:
        float32 [N, T].
    """
    never_V = _is_any(torch.arange(logits_NTV.shape[2], device=logits_NTV.device), never_ids)
    drawn_NT = tokens_NT.masked_fill(_is_any(tokens_NT, never_ids), _IGNORED)
    surprise = [
        cross_entropy(logits_RV.masked_fill(never_V, -torch.inf), drawn_R, ignore_index=_IGNORED, reduction="none")
        for logits_RV, drawn_R in _pieces(logits_NTV, drawn_NT)
    ]
    return -torch.cat(surprise).view(tokens_NT.shape)


def self_critical_loss(log_probabilities_NT: Tensor, mask_NT: Tensor, advantages_N: Tensor) -> Tensor:
    """Return the loss of REINFORCE with a baseline (Williams 1992; Rennie et al. 2017).

    Its gradient is an estimate of that of the negative expected reward, scaled: like Luo (2020) and his
    self-critical.pytorch, it is the mean over the tokens of the batch, not over its captions, hence smaller by the
    mean length. A long caption thus weighs as much as its tokens.

    Args:
        log_probabilities_NT: of the tokens of the samples, with gradient.
        mask_NT: bool, True at words and end, False behind.
        advantages_N: reward less baseline of each sample; no gradient flows into it.

    Returns:
        float32 scalar; NaN where all is padding.
    """
    gain_NT = advantages_N.detach().to(log_probabilities_NT.dtype)[:, None] * log_probabilities_NT
    # Not a product with the mask: what lies behind the end may be infinite.
    return -torch.where(mask_NT, gain_NT, 0.0).sum() / mask_NT.sum()
