"""What a search keeps of every step, and the way back from the end of a caption to its beginning.

Rows are reordered at every step, and reordering whole histories each time would copy all maps again and
again. So each step only notes which row went on from which and keeps its maps where they are; the few
captions that are returned are followed back at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


class PathStep(NamedTuple):
    """One word of a caption: the row of `read` in which it was found, and what it is."""

    parent: int
    token_id: int
    log_probability: float


Path = list[PathStep]


@dataclass(frozen=True, eq=False)
class _Candidates:
    """The endings of one step, still on the device: [B, J] each, those where `ends` is True."""

    words: int
    picture_B: Tensor
    row_BJ: Tensor
    log_probability_BJ: Tensor
    natural_BJ: Tensor
    ends_BJ: Tensor


class Trace:
    """Grows by one step at a time: `read`, any number of `end`, `write`."""

    def __init__(self) -> None:
        self._attention: list[Tensor] = []
        self._heads: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._endings: list[_Candidates] = []

    def read(self, attention_NP: Tensor, heads_NLHP: Tensor) -> None:
        """Keep where each row looked for its next word."""
        self._attention.append(attention_NP)
        self._heads.append(heads_NLHP)

    def end(
        self,
        picture_B: Tensor,
        *,
        row_BJ: Tensor,
        log_probability_BJ: Tensor,
        natural_BJ: Tensor,
        ends_BJ: Tensor,
    ) -> None:
        """Note the rows that end after the words written so far.

        Args:
            picture_B: int64, the picture of each line.
            row_BJ: int64, rows of the last `read`.
            log_probability_BJ: of the end token after that row.
            natural_BJ: bool, whether the end was not forced.
            ends_BJ: bool, which of them end.
        """
        words = len(self._tokens)
        self._endings.append(_Candidates(words, picture_B, row_BJ, log_probability_BJ, natural_BJ, ends_BJ))

    def write(self, parents_N: Tensor, tokens_N: Tensor, log_probs_N: Tensor) -> None:
        """Keep the next word of every row that goes on.

        Args:
            parents_N: int64, the row of the last `read` that each row of the next `read` goes on from.
            tokens_N: int64, its word.
            log_probs_N: of that word under the model.
        """
        self._parents.append(parents_N)
        self._tokens.append(tokens_N)
        self._log_probs.append(log_probs_N)

    def last_word(self, row: int) -> StreamedWord:
        """Return the last word written in a row."""
        parent = self._parents[-1][row]
        attention_P, heads_LHP = self._attention[-1][parent], self._heads[-1][parent]
        return StreamedWord(
            token_id=int(self._tokens[-1][row]),
            log_probability=float(self._log_probs[-1][row]),
            attention_P=attention_P.float().cpu().clone(),
            attention_heads_LHP=heads_LHP.float().cpu().clone(),
        )

    def endings(self) -> list[Ending]:
        """Return all endings in the order in which they were found."""
        found = []
        for step in self._endings:
            line, column = step.ends_BJ.nonzero(as_tuple=True)
            values = (step.picture_B[line], step.row_BJ[line, column], step.natural_BJ[line, column])
            log_probs = step.log_probability_BJ[line, column].tolist()
            for picture, row, natural, log_prob in zip(*(v.tolist() for v in values), log_probs, strict=True):
                possible = log_prob > -torch.inf
                found.append(Ending(picture, step.words, row, log_prob if possible else None, natural and possible))
        return found

    def paths(self, endings: list[Ending]) -> list[Path]:
        """Follow captions back to their beginning.

        Args:
            endings: the captions.

        Returns:
            The words of each, in order.
        """
        sizes = [len(tokens) for tokens in self._tokens]
        # One transfer for all steps: on a GPU each costs a wait.
        parents, tokens, log_probs = (
            [step.tolist() for step in torch.split(torch.cat(steps).cpu(), sizes)] if steps else []
            for steps in (self._parents, self._tokens, self._log_probs)
        )
        paths = []
        for ending in endings:
            row, path = ending.row, []
            for step in reversed(range(ending.words)):
                path.append(PathStep(parents[step][row], tokens[step][row], log_probs[step][row]))
                row = parents[step][row]
            paths.append(path[::-1])
        return paths

    def hypotheses(self, found: list[tuple[Ending, Path]]) -> list[Hypothesis]:
        """Collect the maps of the captions that are returned.

        Args:
            found: the captions and their words.

        Returns:
            One hypothesis per caption.
        """
        places = [(step, word.parent) for _, path in found for step, word in enumerate(path)]
        lengths = [len(path) for _, path in found]
        attention = torch.split(_gather(self._attention, places), lengths)
        heads = torch.split(_gather(self._heads, places), lengths)
        return [
            Hypothesis(
                token_ids=tuple(word.token_id for word in path),
                log_probabilities=tuple(word.log_probability for word in path),
                end_log_probability=ending.end_log_probability,
                finished=ending.finished,
                # Each caption owns its maps: a view would keep those of the whole batch alive.
                attention_TP=attention_TP.clone(),
                attention_heads_TLHP=heads_TLHP.clone(),
            )
            for (ending, path), attention_TP, heads_TLHP in zip(found, attention, heads, strict=True)
        ]


def _gather(steps: list[Tensor], places: list[tuple[int, int]]) -> Tensor:
    """Return the named (step, row) places in that order, float32 on the CPU, with one transfer."""
    by_step = sorted(range(len(places)), key=lambda place: places[place][0])
    rows: dict[int, list[int]] = {}
    for place in by_step:
        step, row = places[place]
        rows.setdefault(step, []).append(row)
    device = steps[0].device
    parts = [steps[step][torch.tensor(chosen, device=device)] for step, chosen in rows.items()]
    gathered = torch.cat(parts or [steps[0][:0]]).float().cpu()
    in_order = torch.empty_like(gathered)
    in_order[torch.tensor(by_step, dtype=torch.int64)] = gathered
    return in_order
