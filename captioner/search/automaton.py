"""The demands on a caption's words as one finite automaton that reads the caption word by word.

A state is a pair of a node, the longest end of the text that may still become a phrase (Aho & Corasick 1975),
and the set of required phrases that have occurred. With it "can this caption still be completed in the words
that are left?" is a table, so that the search never walks into a dead end that phrases make.

S states, M sets of phrases and N nodes, with S = N x M + 1; A classes of words: all words that no phrase
names behave alike and share one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from captioner.arrays import Bools, Floats, Ints
from captioner.errors import SearchError
from captioner.search.demands import Demands
from captioner.search.hypothesis import SearchVocabulary

START = 0
OTHER, FORBIDDEN, END = 0, 1, 2
NAMED = 3
TABLE_LIMIT = 4_000_000  # entries of next_SA; ten required phrases of three words make one million

_Text = tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Automaton:
    """The automaton as tables.

    State `START` is the empty caption; the last state is dead: a demand is broken.

    Args:
        class_V: int64, the class of every token.
        next_SA: int64, the state after a word of each class.
        met_S: bool, True where every required phrase has occurred.
        bank_S: int64; 0, 1, 2, ... in the order of how many words of required phrases are in place. The last
            bank holds the states in which all have occurred.
        banks: number of banks.
        named_ids: the tokens that phrases name and that may be written.
    """

    class_V: Ints
    next_SA: Ints
    met_S: Bools
    bank_S: Ints
    banks: int
    named_ids: tuple[int, ...]

    def completable(self, *, min_words: int, max_words: int) -> Bools:
        """Tell from which states a caption can still be completed.

        Args:
            min_words: fewest words of a caption.
            max_words: most words of a caption.

        Returns:
            bool [max_words + 2, S]: row n is True where a caption of n words in this state can be ended at
            once or continued so that every demand is met in time. No caption has max_words + 1 words: the
            last row is False.
        """
        used_A = np.bincount(self.class_V, minlength=self.next_SA.shape[1]) > 0
        used_A[END] = False
        after_SA = self.next_SA[:, used_A]
        table_TS = np.zeros((max_words + 2, len(self.met_S)), dtype=np.bool_)
        for words in range(max_words, -1, -1):
            table_TS[words] = table_TS[words + 1][after_SA].any(axis=1)
            if words >= min_words:
                table_TS[words] |= self.met_S
        return table_TS


@dataclass(frozen=True, eq=False, kw_only=True)
class Tables:
    """All that a search asks of its demands, on the host.

    Args:
        automaton: of the demands.
        completable_TS: its table `completable`.
        min_words: fewest words of a caption.
    """

    automaton: Automaton
    completable_TS: Bools
    min_words: int
    _distinct: dict[bytes, Floats] = field(default_factory=dict, init=False, repr=False)
    _masks: dict[int, Floats] = field(default_factory=dict, init=False, repr=False)

    @property
    def one_state(self) -> bool:
        """Whether there are but the empty caption and the dead one, so that all open captions are in one state."""
        return len(self.automaton.met_S) == 2

    def may_end(self, state_N: Ints, *, words: int) -> Bools:
        """Return where a caption of so many words meets every demand."""
        return self.automaton.met_S[state_N] & (words >= self.min_words)

    def ceiling(self, state_N: Ints, *, words: int) -> Floats:
        """Return [N, A]: 0 for each class of tokens that may follow so many words, -inf for the others."""
        allowed_NA = self.completable_TS[words + 1][self.automaton.next_SA[state_N]]
        allowed_NA[:, END] = self.may_end(state_N, words=words)
        return np.where(allowed_NA, np.float32(0), np.float32(-np.inf))

    def mask(self, *, words: int) -> Floats:
        """Return [1, V], `ceiling` by token for the one state; made once, and one array where the same is allowed."""
        if words not in self._masks:
            ceiling_1A = self.ceiling(np.array([START]), words=words)
            mask_1V = np.take(ceiling_1A, self.automaton.class_V, axis=1)
            self._masks[words] = self._distinct.setdefault(ceiling_1A.tobytes(), mask_1V)
        return self._masks[words]


def build_automaton(demands: Demands, vocabulary: SearchVocabulary) -> Automaton:
    """Build the automaton of must_include, ban and, inside required phrases, no_repeat_ngram.

    Args:
        demands: what is asked; the numbers of words play no part here.
        vocabulary: which tokens there are and which are never written.

    Returns:
        The automaton.

    Raises:
        SearchError: when the phrases are so many that the tables would be too large.
    """
    never = {vocabulary.start_id, vocabulary.end_id, *vocabulary.never_ids}
    # A ban that has a token which is never written is obeyed by itself; a single word needs no memory.
    bans = [phrase.token_ids for phrase in demands.ban if not never & {*phrase.token_ids}]
    forbidden = never | {ban[0] for ban in bans if len(ban) == 1}
    bans = [ban for ban in bans if not forbidden & {*ban}]
    required = _outermost(phrase.token_ids for phrase in demands.must_include)
    grams = {gram for text in required for gram in _ngrams(text, demands.no_repeat_ngram)}
    trie = _Trie([*bans, *required, *grams], never=forbidden, required=len(required))
    class_V = np.full(vocabulary.size, OTHER, dtype=np.int64)
    class_V[sorted(forbidden)] = FORBIDDEN
    class_V[vocabulary.end_id] = END
    class_V[trie.named] = np.arange(NAMED, trie.classes)
    bank_NM = _progress(trie, required)
    progress, bank_S = np.unique(np.append(bank_NM, 0), return_inverse=True)
    met_NM = np.zeros_like(bank_NM, dtype=np.bool_)
    met_NM[:, -1] = True
    return Automaton(
        class_V=class_V,
        next_SA=_transitions(trie, bans=bans, required=required, ngram=demands.no_repeat_ngram),
        met_S=np.append(met_NM, False),
        bank_S=bank_S,
        banks=len(progress),
        named_ids=tuple(trie.named),
    )


class _Trie:
    """The nodes: every beginning of every pattern, the empty one first, shorter ones before longer ones."""

    def __init__(self, patterns: Iterable[_Text], *, never: set[int], required: int) -> None:
        texts = {(), *(text[:end] for text in patterns for end in range(1, len(text) + 1))}
        self.nodes = sorted(texts, key=lambda text: (len(text), text))
        self.named = sorted({token for text in texts for token in text} - never)
        self.classes = NAMED + len(self.named)
        self.class_of = {token: NAMED + place for place, token in enumerate(self.named)}
        if len(self.nodes) * self.classes << required > TABLE_LIMIT:
            raise SearchError(
                f"must_include and ban are too much to search with: {required} required phrases, "
                f"{len(self.named)} different words in phrases; name fewer"
            )
        self.next_NA = self._link({text: node for node, text in enumerate(self.nodes)})

    def _link(self, node_of: dict[_Text, int]) -> Ints:
        next_NA = np.zeros((len(self.nodes), self.classes), dtype=np.int64)
        children: dict[_Text, list[tuple[int, int]]] = {text: [] for text in self.nodes}
        for node, text in enumerate(self.nodes[1:], start=1):
            if text[-1] in self.class_of:
                children[text[:-1]].append((self.class_of[text[-1]], node))
        for node, text in enumerate(self.nodes):
            if text:
                # A word that does not go on with this text may go on with an end of it: "a a dog" has "a
                # dog".
                next_NA[node] = next_NA[next(node_of[end] for end in _ends(text[1:]) if end in node_of)]
            for place, child in children[text]:
                next_NA[node, place] = child
        return next_NA

    def ending_with(self, end: _Text) -> Bools:
        """Return bool [N]: which nodes end with these words."""
        return np.array([text[len(text) - len(end) :] == end for text in self.nodes])


def _ends(text: _Text) -> Iterator[_Text]:
    """Yield all ends of a text, itself first and the empty one last."""
    return (text[start:] for start in range(len(text) + 1))


def _ngrams(text: _Text, length: int) -> list[_Text]:
    """Return the sequences of this many words, in order; none when the length is 0."""
    return [text[start : start + length] for start in range(len(text) - length + 1)] if length else []


def _outermost(texts: Iterable[_Text]) -> list[_Text]:
    """Drop repeated phrases and those that stand within another: they are met with it."""
    unique = list(dict.fromkeys(texts))
    return [text for text in unique if not any(other != text and text in _ngrams(other, len(text)) for other in unique)]


def _sets(count: int) -> Ints:
    """Return int64 [M]: every set of so many phrases as a bit mask; the last holds all."""
    return np.arange(1 << count)


def _progress(trie: _Trie, required: list[_Text]) -> Ints:
    """Return int64 [N, M]: words of phrases that have occurred, and of the open phrase that is furthest."""
    met_M = _sets(len(required))
    whole_NM = np.zeros((len(trie.nodes), len(met_M)), dtype=np.int64)
    part_NM = np.zeros_like(whole_NM)
    for bit, text in enumerate(required):
        is_met_M = (met_M >> bit & 1) == 1
        whole_NM += is_met_M * len(text)
        part_N = np.zeros(len(trie.nodes), dtype=np.int64)
        for length in range(1, len(text)):
            part_N[trie.ending_with(text[:length])] = length
        part_NM = np.maximum(part_NM, part_N[:, None] * ~is_met_M)
    return whole_NM + part_NM


def _transitions(trie: _Trie, *, bans: list[_Text], required: list[_Text], ngram: int) -> Ints:
    """Return next_SA: the node moves in the trie, complete phrases join the set, a broken demand is dead."""
    met_M = _sets(len(required))
    dead = len(trie.nodes) * len(met_M)
    gained_N = np.zeros(len(trie.nodes), dtype=np.int64)
    for bit, text in enumerate(required):
        gained_N[trie.ending_with(text)] |= 1 << bit
    banned = set(bans)
    banned_N = np.array([any(end in banned for end in _ends(text)) for text in trie.nodes])
    met_NMA = met_M[None, :, None] | gained_N[trie.next_NA][:, None, :]
    next_NMA = trie.next_NA[:, None, :] * len(met_M) + met_NMA
    np.putmask(next_NMA, np.broadcast_to(banned_N[trie.next_NA][:, None, :], next_NMA.shape), dead)
    next_NMA[:, :, FORBIDDEN] = dead
    if ngram:
        open_NA, done_NA = _repeats(trie, required=required, ngram=ngram)
        breaks = (open_NA[:, None, :] & ~met_M[None, :, None]) | (done_NA[:, None, :] & met_M[None, :, None])
        next_NMA[breaks != 0] = dead
    next_SA = np.concatenate([next_NMA.reshape(dead, -1), np.full((1, trie.classes), dead)])
    next_SA[:, END] = np.arange(len(next_SA))
    return next_SA


def _repeats(trie: _Trie, *, required: list[_Text], ngram: int) -> tuple[Ints, Ints]:
    """Find the moves that no_repeat_ngram forbids because of a required phrase.

    The phrase needs its n-grams for itself. While it is open, an n-gram of it may only be written as part of
    it, and once its first is written it must be gone through to its end; when it has occurred, none may be
    written again.

    Args:
        trie: the nodes.
        required: the phrases.
        ngram: n.

    Returns:
        Two int64 [N, A] of phrases as bits: which phrase, while open, forbids the move; which, when it has
        occurred.
    """
    open_N = np.zeros(len(trie.nodes), dtype=np.int64)
    done_N = np.zeros_like(open_N)
    abandons_NA = np.zeros_like(trie.next_NA)
    for bit, text in enumerate(required):
        for end, gram in enumerate(_ngrams(text, ngram), start=ngram):
            written_N, in_place_N = trie.ending_with(gram), trie.ending_with(text[:end])
            done_N[written_N] |= 1 << bit
            open_N[written_N & ~in_place_N] |= 1 << bit
            if end < len(text):
                others_A = np.ones(trie.classes, dtype=np.bool_)
                if text[end] in trie.class_of:
                    others_A[trie.class_of[text[end]]] = False
                abandons_NA[in_place_N[:, None] & others_A] |= 1 << bit
    # The end token comes only when every phrase has occurred, so its column is never looked at.
    return open_N[trie.next_NA] | abandons_NA, done_N[trie.next_NA]
