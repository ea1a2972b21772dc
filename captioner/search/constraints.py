"""What every row of a search may write next: one mask for all options that forbid words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from captioner.arrays import Array, Bools, Ints, namespace, send
from captioner.search.automaton import START
from captioner.search.demands import Demands
from captioner.search.feasibility import feasible_tables
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
        self._tables = feasible_tables(demands, vocabulary)
        self._automaton, self._one_state = self._tables.automaton, self._tables.one_state
        self._like = like
        self._sent: dict[int, Array] = {}
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
        return self._tables.may_end(progress.state_N, words=words)

    def permitted(self, log_probs_NV: Array, progress: Progress, *, words: int) -> Array:
        """Forbid what would break a demand now or make it impossible to meet later.

        Args:
            log_probs_NV: under the model.
            progress: of each row.
            words: how many words every row has.

        Returns:
            The log-probabilities, -inf where a token is forbidden.
        """
        permitted_NV = log_probs_NV + self._ceiling(progress, words=words)
        ngram = self.demands.no_repeat_ngram
        if 0 < ngram <= words:
            row_R, token_R = _repeats(progress.history_NT, ngram=ngram)
            if len(row_R):
                permitted_NV[send(row_R, self._like), send(token_R, self._like)] = -np.inf
        return permitted_NV

    def _ceiling(self, progress: Progress, *, words: int) -> Array:
        """Return float32 [N, V], or [1, V] for all rows: 0 where a token may be written and -inf elsewhere."""
        if self._class_V is not None:
            ceiling_NA = send(self._tables.ceiling(progress.state_N, words=words), self._like)
            return namespace(self._like).take(ceiling_NA, self._class_V, axis=1)
        mask_1V = self._tables.mask(words=words)
        if id(mask_1V) not in self._sent:  # for most numbers of words it is the same
            self._sent[id(mask_1V)] = send(mask_1V, self._like)
        return self._sent[id(mask_1V)]


def _repeats(history_NT: Ints, *, ngram: int) -> tuple[Ints, Ints]:
    """Return the rows and words that would complete an n-gram which the row already has."""
    places, latest = history_NT.shape[1] - ngram + 1, history_NT.shape[1] - ngram + 1
    repeats_NG = np.ones((len(history_NT), places), dtype=np.bool_)
    for offset in range(ngram - 1):
        repeats_NG &= history_NT[:, offset : offset + places] == history_NT[:, latest + offset, None]
    row_R, place_R = repeats_NG.nonzero()
    return row_R, history_NT[row_R, place_R + ngram - 1]
