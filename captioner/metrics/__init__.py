"""Scores of captions, equal to coco-caption's, without Java; no torch.

from captioner.metrics import evaluate
print(evaluate({"a.jpg": "A dog runs."}, {"a.jpg": ["A black dog is running."]}).table())
"""

from captioner.metrics.cider import CiderD
from captioner.metrics.evaluation import (
    METRICS,
    Comparison,
    Evaluation,
    ProtocolCard,
    compare,
    evaluate,
    hash_references,
)
from captioner.metrics.frequencies import DocumentFrequencies
from captioner.metrics.intervals import Difference, Interval
from captioner.metrics.language import Language, describe
from captioner.metrics.ptb import tokenize
from captioner.metrics.readers import References, read_predictions, read_references

__all__ = [
    "METRICS",
    "CiderD",
    "Comparison",
    "Difference",
    "DocumentFrequencies",
    "Evaluation",
    "Interval",
    "Language",
    "ProtocolCard",
    "References",
    "compare",
    "describe",
    "evaluate",
    "hash_references",
    "read_predictions",
    "read_references",
    "tokenize",
]
