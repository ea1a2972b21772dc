"""What every row of a search may write next: one mask for all options that forbid words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from captioner.arrays import Array, Bools, Ints, namespace, send
from captioner.search.automaton import END, START
from captioner.search.demands import Demands
from captioner.search.feasibility import feasible_automaton
from captioner.search.hypothesis import SearchVocabulary


@dataclass(frozen=True, eq=False)
class Progress:
    """How far every row has come.

    Args:
        state_N: its state of the automaton; one entry for all rows where they can only be in one state.
        history_NT: its words; only kept, and reordered, where no_repeat_ngram needs them, else without columns.
    """

    state_N: Ints
    history_NT: Ints


class Constraints:
    """The demands on the words: tables on the host, masks over the vocabulary on the decoder's device.

    Args:
        demands: what is asked.
        vocabulary: which tokens there are.
        like: an array of the decoder, for the kind and the device of the masks.

    Raises:
        SearchError: when no caption can meet the demands, saying which exclude each other.
    """

    def __init__(self, demands: Demands, vocabulary: SearchVocabulary, *, like: Array) -> None:
        self._automaton, self._completable_TS = feasible_automaton(demands, vocabulary)
        self._like = like
        self._ceilings: dict[bytes, Array] = {}
        # With the empty caption and the dead one alone all rows are in one state, and one row of the mask
        # does for all.
        self._one_state = len(self._automaton.met_S) == 2
        self._class_V = None if self._one_state else send(self._automaton.class_V, like)
        self.demands = demands
        self.banks = self._automaton.banks
        self.named_ids = np.array(self._automaton.named_ids, dtype=np.int64)

    def start(self, rows: int) -> Progress:
        """Return the progress of so many empty captions."""
        state_N = np.full(1 if self._one_state else rows, START, dtype=np.int64)
        return Progress(state_N, np.empty((rows, 0), dtype=np.int64))

    def advance(self, progress: Progress, parents_N: Ints, tokens_N: Ints) -> Progress:
        """Return the progress after one more word per row.

        Args:
            progress: before the word.
            parents_N: which row each new row goes on from.
            tokens_N: the words.

        Returns:
            The progress of the new rows.
        """
        state_N, history_NT = progress.state_N, progress.history_NT
        if not self._one_state:
            state_N = self.state_after(state_N[parents_N], tokens_N)
        if self.demands.no_repeat_ngram:
            history_NT = np.concatenate([history_NT[parents_N], tokens_N[:, None]], axis=1)
        return Progress(state_N, history_NT)

    def state_after(self, state: Ints, token: Ints) -> Ints:
        """Return the automaton's state after a word; any shape, both alike."""
        after: Ints = self._automaton.next_SA[state, self._automaton.class_V[token]]
        return after

    def bank(self, state: Ints) -> Ints:
        """Return which bank a state belongs to: in `banks` - 1 all required phrases have occurred."""
        return self._automaton.bank_S[state]

    def may_end(self, progress: Progress, *, words: int) -> Bools:
        """Return where a caption of so many words meets every demand: [N], or one entry for all rows."""
        return self._automaton.met_S[progress.state_N] & (words >= self.demands.min_words)

    def permitted(self, log_probs_NV: Array, progress: Progress, *, words: int) -> Array:
        """Forbid what would break a demand now or make it impossible to meet later.

        Args:
            log_probs_NV: under the model.
            progress: of each row.
            words: how many words every row has.

        Returns:
            The log-probabilities, -inf where a token is forbidden.
        """
        allowed_NA = self._completable_TS[words + 1][self._automaton.next_SA[progress.state_N]]
        allowed_NA[:, END] = self.may_end(progress, words=words)
        permitted_NV = log_probs_NV + self._ceiling(allowed_NA)
        ngram = self.demands.no_repeat_ngram
        if 0 < ngram <= words:
            row_R, token_R = _repeats(progress.history_NT, ngram=ngram)
            if len(row_R):
                permitted_NV[send(row_R, self._like), send(token_R, self._like)] = -np.inf
        return permitted_NV

    def _ceiling(self, allowed_NA: Bools) -> Array:
        """Return float32 [N, V], or [1, V]: 0 where a token may be written and -inf elsewhere."""
        ceiling_NA = np.where(allowed_NA, np.float32(0), np.float32(-np.inf))
        if self._class_V is not None:
            return namespace(self._like).take(send(ceiling_NA, self._like), self._class_V, axis=1)
        key = allowed_NA.tobytes()
        if key not in self._ceilings:
            self._ceilings[key] = send(ceiling_NA[:, self._automaton.class_V], self._like)
        return self._ceilings[key]


def _repeats(history_NT: Ints, *, ngram: int) -> tuple[Ints, Ints]:
    """Return the rows and words that would complete an n-gram which the row already has."""
    places, latest = history_NT.shape[1] - ngram + 1, history_NT.shape[1] - ngram + 1
    repeats_NG = np.ones((len(history_NT), places), dtype=np.bool_)
    for offset in range(ngram - 1):
        repeats_NG &= history_NT[:, offset : offset + places] == history_NT[:, latest + offset, None]
    row_R, place_R = repeats_NG.nonzero()
    return row_R, history_NT[row_R, place_R + ngram - 1]
