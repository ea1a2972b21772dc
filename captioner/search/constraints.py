"""What every row of a search may write next: one mask for all options that forbid words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.search.automaton import START
from captioner.search.demands import Demands
from captioner.search.feasibility import feasible_automaton
from captioner.search.hypothesis import SearchVocabulary


@dataclass(frozen=True, eq=False)
class Progress:
    """How far every row has come.

    Args:
        state_N: int64, its state of the automaton.
        history_NT: int64, its words; only kept, and reordered, where no_repeat_ngram needs them, else without
            columns.
    """

    state_N: Tensor
    history_NT: Tensor


class Constraints:
    """The demands on the words as masks on the decoder's device.

    Args:
        demands: what is asked.
        vocabulary: which tokens there are.
        device: where the masks live.

    Raises:
        SearchError: when no caption can meet the demands, saying which exclude each other.
    """

    def __init__(self, demands: Demands, vocabulary: SearchVocabulary, *, device: torch.device) -> None:
        automaton, completable_TS = feasible_automaton(demands, vocabulary)
        self.demands = demands
        self.end_id = vocabulary.end_id
        self.banks = automaton.banks
        self.named_ids = torch.tensor(automaton.named_ids, dtype=torch.int64, device=device)
        self._class_V = automaton.class_V.to(device)
        self._next_SA = automaton.next_SA.to(device)
        self._met_S = automaton.met_S.to(device)
        self._bank_S = automaton.bank_S.to(device)
        self._completable_TS = completable_TS.to(device)
        # With the empty caption and the dead one alone all rows are in one state, and one row of the mask
        # does for all.
        self._one_state = len(automaton.met_S) == 2

    def start(self, rows: int) -> Progress:
        """Return the progress of so many empty captions."""
        state_N = torch.full((rows,), START, device=self._class_V.device)
        return Progress(state_N, state_N.new_empty(rows, 0))

    def advance(self, progress: Progress, parents_N: Tensor, tokens_N: Tensor) -> Progress:
        """Return the progress after one more word per row.

        Args:
            progress: before the word.
            parents_N: int64, which row each new row goes on from.
            tokens_N: int64, the words.

        Returns:
            The progress of the new rows.
        """
        state_N = self.state_after(progress.state_N[parents_N], tokens_N)
        history_NT = progress.history_NT[parents_N]
        if self.demands.no_repeat_ngram:
            history_NT = torch.cat([history_NT, tokens_N[:, None]], dim=1)
        return Progress(state_N, history_NT)

    def state_after(self, state: Tensor, token: Tensor) -> Tensor:
        """Return the automaton's state after a word; any shape, both alike."""
        return self._next_SA[state, self._class_V[token]]

    def bank(self, state: Tensor) -> Tensor:
        """Return which bank a state belongs to: in `banks` - 1 all required phrases have occurred."""
        return self._bank_S[state]

    def may_end(self, state: Tensor, *, words: int) -> Tensor:
        """Return where a caption of so many words meets every demand."""
        return self._met_S[state] & (words >= self.demands.min_words)

    def permitted(self, log_probs_NV: Tensor, progress: Progress, *, words: int) -> Tensor:
        """Forbid what would break a demand now or make it impossible to meet later.

        Args:
            log_probs_NV: under the model.
            progress: of each row.
            words: how many words every row has.

        Returns:
            The log-probabilities, -inf where a token is forbidden.
        """
        state_N = progress.state_N[:1] if self._one_state else progress.state_N
        allowed_NA = self._completable_TS[words + 1][self._next_SA[state_N]]
        allowed_NV = allowed_NA[:, self._class_V]
        allowed_NV[:, self.end_id] = self.may_end(state_N, words=words)
        permitted_NV = log_probs_NV.masked_fill(~allowed_NV, -torch.inf)
        ngram = self.demands.no_repeat_ngram
        if 0 < ngram <= words:
            _forbid_repeats(permitted_NV, progress.history_NT, ngram=ngram)
        return permitted_NV


def _forbid_repeats(log_probs_NV: Tensor, history_NT: Tensor, *, ngram: int) -> None:
    """Set to -inf, in place, each word that would complete an n-gram which the row already has."""
    before_NGn = history_NT.unfold(1, ngram - 1, 1) if ngram > 1 else history_NT.new_empty(*history_NT.shape, 0)
    followed_NG = history_NT[:, ngram - 1 :]
    earlier_NGn = before_NGn[:, : followed_NG.shape[1]]
    latest_N1n = history_NT[:, history_NT.shape[1] - (ngram - 1) :][:, None]
    repeats_NG = (earlier_NGn == latest_N1n).all(dim=2)
    ceiling_NG = torch.zeros_like(repeats_NG, dtype=log_probs_NV.dtype).masked_fill_(repeats_NG, -torch.inf)
    # Log-probabilities are never above 0, so the lower of the two is the word's own where nothing repeats.
    log_probs_NV.scatter_reduce_(1, followed_NG, ceiling_NG, reduce="amin")
