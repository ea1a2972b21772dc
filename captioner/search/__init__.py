"""Greedy search, beam search, sampling and constraints over the protocol of the decoders; knows no model."""

from captioner.search.dispatch import search, stream
from captioner.search.hypothesis import Hypothesis, Phrase, SearchVocabulary, StreamedWord
from captioner.search.scoring import score_tokens

__all__ = ["Hypothesis", "Phrase", "SearchVocabulary", "StreamedWord", "score_tokens", "search", "stream"]
