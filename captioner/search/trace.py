"""What a search keeps of every step, and the way back from the end of a caption to its beginning.

Rows are reordered at every step, and reordering whole histories each time would copy all maps again and
again. So each step only notes which row went on from which and keeps its maps where they are; the few
captions that are returned are followed back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from captioner.arrays import Array, Bools, Floats, Ints, float32, namespace, send, to_numpy
from captioner.search.hypothesis import Hypothesis, StreamedWord


@dataclass(frozen=True)
class Ending:
    """Where a caption ended.

    Args:
        picture: its picture.
        words: number of words.
        row: the row of the step after the last word.
        end_log_probability: of the end token; None where it had no probability.
        finished: as in `Hypothesis`.
    """

    picture: int
    words: int
    row: int
    end_log_probability: float | None
    finished: bool


class Path(NamedTuple):
    """The words of a caption, and for each the row of `read` in which it was found."""

    parents: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]


class Trace:
    """Grows by one step at a time: `read`, any number of `end`, `write`."""

    def __init__(self) -> None:
        self._attention: list[Array] = []
        self._heads: list[Array] = []
        self._parents: list[Ints] = []
        self._tokens: list[Ints] = []
        self._log_probs: list[Floats] = []
        self.endings: list[Ending] = []
        """All endings in the order in which they were found."""

    def read(self, attention_NP: Array, heads_NLHP: Array) -> None:
        """Keep where each row looked for its next word, with the decoder."""
        self._attention.append(attention_NP)
        self._heads.append(heads_NLHP)

    def end(self, picture_E: Ints, row_E: Ints, *, log_prob_E: Floats, natural_E: Bools) -> None:
        """Note rows that end after the words written so far.

        Args:
            picture_E: the picture of each.
            row_E: rows of the last `read`.
            log_prob_E: of the end token after that row.
            natural_E: whether the end was not forced.
        """
        words = len(self._tokens)
        columns = (picture_E.tolist(), row_E.tolist(), log_prob_E.tolist(), natural_E.tolist())
        for picture, row, log_prob, natural in zip(*columns, strict=True):
            possible = log_prob > -np.inf
            self.endings.append(Ending(picture, words, row, log_prob if possible else None, natural and possible))

    def write(self, parents_N: Ints, tokens_N: Ints, log_probs_N: Floats) -> None:
        """Keep the next word of every row that goes on.

        Args:
            parents_N: the row of the last `read` that each row of the next `read` goes on from.
            tokens_N: its word.
            log_probs_N: of that word under the model.
        """
        self._parents.append(parents_N)
        self._tokens.append(tokens_N)
        self._log_probs.append(log_probs_N)

    def last_word(self, row: int) -> StreamedWord:
        """Return the last word written in a row."""
        parent = int(self._parents[-1][row])
        attention_P, heads_LHP = (to_numpy(float32(maps[-1][parent])) for maps in (self._attention, self._heads))
        return StreamedWord(
            token_id=int(self._tokens[-1][row]),
            log_probability=float(self._log_probs[-1][row]),
            attention_P=attention_P.copy(),
            attention_heads_LHP=heads_LHP.copy(),
        )

    def paths(self, endings: list[Ending]) -> list[Path]:
        """Follow captions back to their beginning.

        Args:
            endings: the captions.

        Returns:
            The words of each, in order.
        """
        parents, tokens, log_probs = (
            [values.tolist() for values in steps] for steps in (self._parents, self._tokens, self._log_probs)
        )
        paths = []
        for ending in endings:
            row, rows = ending.row, []
            for step in reversed(range(ending.words)):
                rows.append(row)
                row = parents[step][row]
            rows.reverse()
            paths.append(
                Path(
                    parents=tuple([parents[step][row] for step, row in enumerate(rows)]),
                    token_ids=tuple([tokens[step][row] for step, row in enumerate(rows)]),
                    log_probabilities=tuple([log_probs[step][row] for step, row in enumerate(rows)]),
                )
            )
        return paths

    def hypotheses(self, found: list[tuple[Ending, Path]]) -> list[Hypothesis]:
        """Collect the maps of the captions that are returned.

        Args:
            found: the captions and their words.

        Returns:
            One hypothesis per caption.
        """
        lengths = [ending.words for ending, _ in found]
        step_M = np.concatenate([np.arange(length) for length in lengths])
        row_M = np.concatenate([path.parents for _, path in found])
        starts = np.cumsum(lengths)[:-1]
        attention = np.split(_gather(self._attention, step_M, row_M), starts)
        heads = np.split(_gather(self._heads, step_M, row_M), starts)
        return [
            Hypothesis(
                token_ids=path.token_ids,
                log_probabilities=path.log_probabilities,
                end_log_probability=ending.end_log_probability,
                finished=ending.finished,
                # Each caption owns its maps: a view would keep those of the whole batch alive.
                attention_TP=attention_TP.copy(),
                attention_heads_TLHP=heads_TLHP.copy(),
            )
            for (ending, path), attention_TP, heads_TLHP in zip(found, attention, heads, strict=True)
        ]


def _gather(steps: list[Array], step_M: Ints, row_M: Ints) -> Floats:
    """Return the named (step, row) places in that order, float32 on the host, with one transfer."""
    xp = namespace(steps[0])
    by_step_M = step_M.argsort(kind="stable")
    rows = send(row_M[by_step_M], steps[0])
    bounds = np.searchsorted(step_M[by_step_M], np.arange(step_M.max() + 2)).tolist()
    parts = [xp.take(steps[step], rows[start:end], axis=0) for step, (start, end) in enumerate(pairwise(bounds))]
    gathered = to_numpy(float32(xp.concat(parts)))
    in_order = np.empty_like(gathered)
    in_order[by_step_M] = gathered
    return in_order
