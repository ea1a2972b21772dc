"""BLEU, ROUGE-L and CIDEr-D equal the reference scorers', and obey their own definitions."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_texts import DATA, reference_scores

from captioner import MetricError
from captioner.metrics import CiderD, DocumentFrequencies, bleu, cider, evaluate, tokenize
from captioner.metrics.rouge import common_subsequence_length, rouge_l

RECORDED = json.loads((DATA / "metrics_scores.json").read_text())
TOLERANCE = {"CIDEr-D": 1e-6}
TOKENS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=9)
PICTURES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=6)


def scores_each(found, truth):
    """BLEU-1..4, ROUGE-L and CIDEr-D of each picture."""
    counts = bleu.score_sums(bleu.count(found, truth).stacked())
    return {
        **{f"BLEU-{n + 1}": counts[:, n] for n in range(4)},
        "ROUGE-L": rouge_l(found, truth),
        "CIDEr-D": CiderD(truth).score(found),
    }


def plain_cider(found, truth, documents=None):
    """CIDEr-D as its paper and coco-caption define it, word by word."""

    def grams(tokens, n):
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    if documents is None:
        documents = [{gram for tokens in many for n in range(1, 5) for gram in grams(tokens, n)} for many in truth]

    def vector(tokens, n):
        idf = {g: math.log(len(documents) / max(1, sum(g in seen for seen in documents))) for g in grams(tokens, n)}
        return {g: count * idf[g] for g, count in grams(tokens, n).items()}

    scores = []
    for tokens, many in zip(found, truth, strict=True):
        total = 0.0
        for reference in many:
            delta = max(0, len(tokens) - 1) - max(0, len(reference) - 1)
            for n in range(1, 5):
                a, b = vector(tokens, n), vector(reference, n)
                norms = math.hypot(*a.values()) * math.hypot(*b.values())
                if norms > 0:
                    shared = sum(min(weight, b.get(g, 0)) * b.get(g, 0) for g, weight in a.items())
                    total += shared / norms * math.exp(-(delta**2) / (2 * 6.0**2))
        scores.append(10 * total / 4 / len(many))
    return np.array(scores)


def test_scores_equal_the_recorded_ones():
    evaluation = evaluate(RECORDED["predictions"], RECORDED["references"], resamples=2)
    for metric, value in RECORDED["scores"].items():
        if metric != "METEOR":
            assert evaluation.scores[metric] / 100 == pytest.approx(value, abs=TOLERANCE.get(metric, 1e-9))
    found = [tokenize(text) for text in RECORDED["predictions"].values()]
    truth = [[tokenize(text) for text in many] for many in RECORDED["references"].values()]
    for metric, values in scores_each(found, truth).items():
        assert values == pytest.approx(RECORDED["each"][metric], abs=TOLERANCE.get(metric, 1e-9))


def test_scores_equal_the_reference_scorers():
    pytest.importorskip("pycocoevalcap")
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(60)]

    def sentence():
        return [vocabulary[min(59, int(rng.expovariate(0.1)))] for _ in range(rng.randint(0, 14))]

    truth = [[sentence() for _ in range(rng.randint(1, 6))] for _ in range(150)]
    found = [rng.choice(many) if rng.random() < 0.3 else sentence() for many in truth]
    found = [[*tokens, "unseen", "unseen"] if rng.random() < 0.3 else tokens for tokens in found]
    expected = reference_scores(found, truth)
    for metric, values in scores_each(found, truth).items():
        assert values == pytest.approx(expected["each"][metric], abs=TOLERANCE.get(metric, 1e-9))
    whole = bleu.count(found, truth).score()[0]
    assert whole == pytest.approx([expected["scores"][f"BLEU-{n}"] for n in range(1, 5)], abs=1e-9)


@settings(max_examples=60)
@given(PICTURES)
def test_cider_equals_its_definition(pictures):
    found, truth = map(list, zip(*pictures, strict=True))
    assert CiderD(truth).score(found) == pytest.approx(plain_cider(found, truth), abs=1e-9)


@settings(max_examples=40)
@given(PICTURES, st.lists(st.tuples(st.integers(0, 5), TOKENS), max_size=12))
def test_many_samples_of_a_picture_score_like_one_at_a_time(pictures, samples):
    _, truth = map(list, zip(*pictures, strict=True))
    scorer = CiderD(truth)
    samples = [(i % len(truth), tokens) for i, tokens in samples]
    together = scorer.score([tokens for _, tokens in samples], [i for i, _ in samples])
    alone = [scorer.score([tokens], [i])[0] for i, tokens in samples]
    assert together == pytest.approx(alone, abs=1e-12)


@settings(max_examples=40)
@given(PICTURES)
def test_ids_score_like_words(pictures):
    found, truth = map(list, zip(*pictures, strict=True))

    def ids(tokens):
        return ["abcdef".index(token) for token in tokens]

    by_id = CiderD([[ids(tokens) for tokens in many] for many in truth]).score([ids(tokens) for tokens in found])
    assert by_id == pytest.approx(CiderD(truth).score(found), abs=1e-12)


def test_batches_larger_than_a_part_score_the_same(monkeypatch):
    truth = [[[f"w{i}", "a", "b"], ["a", f"w{i % 3}"]] for i in range(50)]
    found = [["a", f"w{i}", "b", "a"] for i in range(50)]
    expected = CiderD(truth).score(found)
    monkeypatch.setattr(cider, "_AT_ONCE", 7)
    assert CiderD(truth).score(found) == pytest.approx(expected, abs=1e-12)


def test_frequencies_of_the_same_set_change_nothing(tmp_path):
    truth = [[tokenize(text) for text in many] for many in RECORDED["references"].values()]
    found = [tokenize(text) for text in RECORDED["predictions"].values()]
    frequencies = DocumentFrequencies.of(truth, name="itself")
    frequencies.save(tmp_path / "df.json")
    loaded = DocumentFrequencies.load(tmp_path / "df.json")
    assert loaded == frequencies
    expected = CiderD(truth).score(found)
    assert CiderD(truth, frequencies=loaded).score(found) == pytest.approx(expected, abs=1e-12)
    # With them, a part of the set scores like the part of the whole set.
    assert CiderD(truth[:5], frequencies=loaded).score(found[:5]) == pytest.approx(expected[:5], abs=1e-12)


@settings(max_examples=40)
@given(PICTURES, PICTURES)
def test_fixed_frequencies_are_those_of_their_corpus(pictures, corpus):
    found, truth = map(list, zip(*pictures, strict=True))
    frequencies = DocumentFrequencies.of([many for _, many in corpus], name="corpus")
    documents = [
        {tuple(t[i : i + n]) for t in many for n in range(1, 5) for i in range(len(t) - n + 1)} for _, many in corpus
    ]
    scores = CiderD(truth, frequencies=frequencies).score(found)
    assert scores == pytest.approx(plain_cider(found, truth, documents), abs=1e-9)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("{}", "no document-frequency file"),
        ('{"format": "captioner-document-frequencies-1", "name": "x", "documents": 3}', "damaged"),
        (
            '{"format": "captioner-document-frequencies-1", "name": "x", "documents": 1, "counts": {"a": 2}}',
            "2 of 1 documents",
        ),
        (
            '{"format": "captioner-document-frequencies-1", "name": "x", "documents": Infinity, "counts": {}}',
            "damaged",
        ),
        (
            '{"format": "captioner-document-frequencies-1", "name": "x", "documents": 1, "counts": {"a": -1}}',
            "-1 of 1 documents",
        ),
        (
            f'{{"format": "captioner-document-frequencies-1", "name": "x", "documents": {"9" * 400}, "counts": {{}}}}',
            "documents must be 1 to",
        ),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_frequency_file_is_named(tmp_path, content, fault):
    path = tmp_path / "df.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MetricError, match=fault):
        DocumentFrequencies.load(path)


def test_frequencies_that_could_not_be_read_back_are_not_saved(tmp_path):
    for token in (7, "two words", ""):
        with pytest.raises(MetricError, match="cannot be saved"):
            DocumentFrequencies.of([[[token]]], name="x").save(tmp_path / "df.json")


def test_cider_names_what_does_not_match():
    scorer = CiderD([[["a"]], [["b"]]])
    for hypotheses, pictures in (([["a"]], None), ([["a"]], [0, 1]), ([["a"]], [2]), ([["a"]], [-1])):
        with pytest.raises(MetricError):
            scorer.score(hypotheses, pictures)
    assert scorer.score([], []).shape == (0,)
    for references in ([], [[["a"]], []]):
        with pytest.raises(MetricError, match="reference"):
            CiderD(references)


def test_a_scorer_of_another_process_is_refused():
    scorer = CiderD([[["a"]], [["b"]]])
    scorer._salt += 1
    with pytest.raises(MetricError, match="another process"):
        scorer.score([["a"]], [0])


@settings(max_examples=60)
@given(PICTURES)
def test_scores_keep_within_their_bounds(pictures):
    found, truth = map(list, zip(*pictures, strict=True))
    for metric, values in scores_each(found, truth).items():
        assert np.isfinite(values).all()
        assert values.min() >= 0
        assert values.max() <= (10 if metric == "CIDEr-D" else 1) + 1e-9


def test_the_reference_itself_scores_best():
    truth = [[tokenize(many[0])] for many in RECORDED["references"].values()]
    counts = bleu.count([many[0] for many in truth], truth).score()[0]
    assert counts == pytest.approx(np.ones(4), abs=1e-9)
    assert rouge_l([many[0] for many in truth], truth) == pytest.approx(np.ones(len(truth)))
    # Every reference of this set has an n-gram of each order that is in no other.
    assert CiderD(truth).score([many[0] for many in truth]) == pytest.approx(np.full(len(truth), 10.0))


@settings(max_examples=30)
@given(PICTURES, st.randoms())
def test_the_order_of_the_pictures_does_not_matter(pictures, rng):
    order = list(range(len(pictures)))
    rng.shuffle(order)
    found, truth = map(list, zip(*pictures, strict=True))
    before = scores_each(found, truth)
    after = scores_each([found[i] for i in order], [truth[i] for i in order])
    for metric, values in before.items():
        assert after[metric] == pytest.approx(values[order], abs=1e-12)


@given(TOKENS, TOKENS)
def test_common_subsequences_equal_the_textbook_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    assert common_subsequence_length(first, second) == table[-1][-1]


def test_an_n_gram_counts_as_often_as_the_reference_with_most_of_it():
    counts = bleu.count([["a", "a", "a", "b"]], [[["a", "a"], ["a", "c", "b"]]])
    assert counts.matched_PN[0].tolist() == [3, 1, 0, 0]  # a twice, b once; "a a" once
    assert counts.written_PN[0].tolist() == [4, 3, 2, 1]
    assert counts.reference_length_P.tolist() == [3]


def test_of_two_equally_close_lengths_the_shorter_counts():
    counts = bleu.count([["a", "b", "c"]], [[["a"] * 4, ["a"] * 2]])
    assert counts.reference_length_P.tolist() == [2]
