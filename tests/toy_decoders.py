"""A tiny decoder behind the protocol, exact and deterministic, and the whole tree of what it can say.

Its next token depends on the picture and on every word before, and so does its attention. It checks that a
search keeps to the protocol: a state is used once, and the pictures are looked at once.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import captioner.search
from captioner.search import SearchVocabulary

PAD, START, END, UNKNOWN, FIRST_WORD = 0, 1, 2, 3, 4
CELLS, CHANNELS, LAYERS, HEADS, DIM = 6, 5, 2, 3, 7


@dataclasses.dataclass
class ToyState:
    hidden_ND: Tensor
    grid_NPC: Tensor
    attention_heads_BLHP: Tensor
    used: bool = False

    def use(self) -> None:
        assert not self.used, "a state was used twice"
        self.used = True

    def select(self, index_N: Tensor) -> "ToyState":
        assert index_N.dtype == torch.int64
        self.use()
        heads = self.attention_heads_BLHP
        return ToyState(self.hidden_ND[index_N], self.grid_NPC[index_N], heads[index_N] if len(heads) else heads)


class ToyDecoder:
    """A random recurrent network in float64, so that the batch size does not change a result.

    Args:
        words: number of words besides the four special tokens.
        seed: of the weights.
        scale: of the logits; larger is more peaked.
        impossible: tokens whose logit is -inf.
        end_bias: added to the logit of the end.
        nan_at: the step whose logits are NaN.
        max_tokens: longest sequence, end included.
        dtype: of logits and attention.
    """

    def __init__(
        self,
        words=3,
        *,
        seed=0,
        scale=2.0,
        impossible=(),
        end_bias=0.0,
        nan_at=None,
        max_tokens=12,
        dtype=torch.float64,
    ):
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.size = FIRST_WORD + words
        self.normalised = False
        self.max_tokens = max_tokens
        self.embedding, self.recurrent, self.look = (
            weights(self.size, DIM),
            weights(DIM, DIM),
            weights(CHANNELS, DIM),
        )
        self.query, self.output = weights(LAYERS, HEADS, DIM, CHANNELS), weights(DIM + CHANNELS, self.size)
        self.scale, self.impossible, self.end_bias, self.nan_at = scale, list(impossible), end_bias, nan_at
        self.dtype = dtype
        self.starts: list[int] = []
        self.rows: list[int] = []

    @property
    def vocabulary(self) -> SearchVocabulary:
        return SearchVocabulary(size=self.size, start_id=START, end_id=END, never_ids=(PAD, START, UNKNOWN))

    @property
    def words(self) -> range:
        return range(FIRST_WORD, self.size)

    def start(self, grid_BPC, *, max_tokens=None):
        assert max_tokens is None or max_tokens <= self.max_tokens
        self.starts.append(len(grid_BPC))
        self.rows, self._left = [], max_tokens or self.max_tokens
        grid = grid_BPC.double()
        return ToyState(torch.tanh(grid.mean(1) @ self.look), grid, grid.new_empty(0, LAYERS, HEADS, CELLS))

    def step(self, tokens_B, state):
        state.use()
        assert tokens_B.dtype == torch.int64
        assert len(tokens_B) == len(state.hidden_ND)
        assert len(self.rows) < self._left, "more steps than announced"
        hidden = torch.tanh(state.hidden_ND @ self.recurrent * 0.7 + self.embedding[tokens_B])
        scores = torch.einsum("nd,lhdc,npc->nlhp", hidden, self.query, state.grid_NPC)
        heads = scores.softmax(-1)
        attention = heads.mean((1, 2))
        context = torch.einsum("np,npc->nc", attention, state.grid_NPC)
        logits = torch.cat([hidden, context], 1) @ self.output * self.scale / math.sqrt(DIM + CHANNELS)
        logits[:, END] += self.end_bias
        logits[:, self.impossible] = -torch.inf
        if len(self.rows) == self.nan_at:
            logits[:] = torch.nan
        self.rows.append(len(tokens_B))
        heads = heads.to(self.dtype)
        return logits.to(self.dtype), attention.to(self.dtype), ToyState(hidden, state.grid_NPC, heads)

    def forward(self, grid_BPC, tokens_BT):
        state, logits, attention = self.start(grid_BPC), [], []
        for token_B in tokens_BT.unbind(1):
            logits_BV, attention_BP, state = self.step(token_B, state)
            logits.append(logits_BV)
            attention.append(attention_BP)
        return torch.stack(logits, 1), torch.stack(attention, 1)


def grids(pictures: int, seed: int = 0) -> Tensor:
    return torch.randn(pictures, CELLS, CHANNELS, generator=torch.Generator().manual_seed(1000 + seed))


@dataclasses.dataclass
class Reading:
    """What the decoder says after a prefix."""

    log_probs: list[float]
    attention: Tensor
    heads: Tensor


class Tree:
    """Everything the decoder can say about one picture, prefix by prefix, by plain steps from the start."""

    def __init__(self, decoder: ToyDecoder, grid_1PC: Tensor) -> None:
        self._decoder, self._grid = decoder, grid_1PC
        self._known: dict[tuple[int, ...], Reading] = {}

    def after(self, prefix: tuple[int, ...]) -> Reading:
        if prefix not in self._known:
            state = self._decoder.start(self._grid)
            for token in (START, *prefix):
                logits, attention, state = self._decoder.step(torch.tensor([token]), state)
            log_probs = logits[0].float().log_softmax(0).tolist()
            self._known[prefix] = Reading(log_probs, attention[0].float(), state.attention_heads_BLHP[0].float())
        return self._known[prefix]

    def log_probabilities(self, words: tuple[int, ...]) -> list[float]:
        return [self.after(words[:i]).log_probs[word] for i, word in enumerate(words)]

    def end(self, words: tuple[int, ...]) -> float:
        return self.after(words).log_probs[END]


def contains(words, phrase) -> bool:
    return any(tuple(words[i : i + len(phrase)]) == tuple(phrase) for i in range(len(words) - len(phrase) + 1))


def obeys(words, options, must_include=(), ban=()) -> bool:
    """Say whether a sentence meets every demand."""
    n = options.no_repeat_ngram
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)] if n else []
    return (
        options.min_words <= len(words) <= options.max_words
        and not {PAD, START, END, UNKNOWN} & set(words)
        and len(set(grams)) == len(grams)
        and all(contains(words, phrase.token_ids) for phrase in must_include)
        and not any(contains(words, phrase.token_ids) for phrase in ban)
    )


def sentences(decoder: ToyDecoder, max_words: int):
    """Yield every sentence of 1 to max_words words."""
    for length in range(1, max_words + 1):
        yield from itertools.product(decoder.words, repeat=length)


def brute_force(tree: Tree, decoder: ToyDecoder, options, must_include=(), ban=()):
    """Return all sentences that meet the demands as (score, words), best first; an end must be possible."""
    found = []
    for words in sentences(decoder, options.max_words):
        if obeys(words, options, must_include, ban) and tree.end(words) > -math.inf:
            total = math.fsum([*tree.log_probabilities(words), tree.end(words)])
            found.append((total / (len(words) + 1) ** options.length_penalty, words))
    return sorted(found, reverse=True)


def as_numpy(tensor):
    assert isinstance(tensor, Tensor)
    # NumPy has no bfloat16; float32 has all of its values.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@dataclasses.dataclass
class NumpyState:
    state: object

    @property
    def attention_heads_BLHP(self):
        return as_numpy(self.state.attention_heads_BLHP)

    def select(self, index_N):
        assert isinstance(index_N, np.ndarray)
        return NumpyState(self.state.select(torch.from_numpy(index_N)))


class NumpyDecoder:
    """A torch decoder behind the protocol in NumPy arrays: it says the very same."""

    def __init__(self, decoder) -> None:
        self.decoder, self.max_tokens, self.normalised = decoder, decoder.max_tokens, decoder.normalised

    def start(self, grid_BPC, *, max_tokens=None):
        assert isinstance(grid_BPC, np.ndarray)
        with torch.inference_mode():
            return NumpyState(self.decoder.start(torch.from_numpy(grid_BPC), max_tokens=max_tokens))

    def step(self, tokens_B, state):
        assert isinstance(tokens_B, np.ndarray)
        assert not torch.is_inference_mode_enabled()
        with torch.inference_mode():
            logits, attention, after = self.decoder.step(torch.from_numpy(tokens_B), state.state)
        return as_numpy(logits), as_numpy(attention), NumpyState(after)


KINDS = ("numpy", "torch")
_chosen = {"kind": "torch"}


def use(kind):
    """Search with arrays of this kind from now on; see the fixture `array_kind`."""
    assert kind in KINDS
    _chosen["kind"] = kind


def of_kind(decoder, grid_BPC, kind=None):
    """Return a torch decoder and a grid as they are, or in NumPy."""
    if (kind or _chosen["kind"]) == "torch":
        return decoder, grid_BPC
    return NumpyDecoder(decoder), grid_BPC.numpy()


def search(decoder, grid_BPC, **arguments):
    """Search with arrays of the chosen kind."""
    return captioner.search.search(*of_kind(decoder, grid_BPC), **arguments)


def stream(decoder, grid_BPC, **arguments):
    """Stream with arrays of the chosen kind."""
    return captioner.search.stream(*of_kind(decoder, grid_BPC), **arguments)


def run(decoder, grid_BPC, options, **phrases):
    return search(decoder, grid_BPC, vocabulary=decoder.vocabulary, options=options, **phrases)


def words_of(hypotheses):
    return [hypothesis.token_ids for hypothesis in hypotheses]


def assert_close(found, expected, **tolerances):
    """Assert that NumPy arrays of float32 are equal but for rounding to another one, or to a tensor."""
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), torch.as_tensor(expected), **tolerances)


def assert_same(left, right):
    assert words_of(left) == words_of(right)
    for a, b in zip(left, right, strict=True):
        assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-5)
        assert a.end_log_probability == pytest.approx(b.end_log_probability, abs=1e-5)
        assert a.finished == b.finished
        assert_close(a.attention_TP, b.attention_TP)
        assert_close(a.attention_heads_TLHP, b.attention_heads_TLHP)
