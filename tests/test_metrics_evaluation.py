"""The evaluation says what it measured, how sure it is, and what does not fit together."""

import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_texts import DATA, captions

from captioner import MetricError
from captioner.metrics import METRICS, DocumentFrequencies, compare, describe, evaluate, hash_references, java, tokenize
from captioner.metrics.intervals import bootstrap, compare_paired
from captioner.metrics.language import is_unfinished, repeats_phrase

PREDICTIONS, REFERENCES = captions(seed=5, pictures=60)
MEANS = st.lists(st.floats(-5, 5), min_size=1, max_size=20)


def mean_of_sums(sums):
    return sums[:, :1] / sums[:, 1:]


def with_ones(values):
    return np.stack([np.asarray(values, dtype=float), np.ones(len(values))], axis=1)


def test_the_card_names_what_the_numbers_rest_on():
    card = evaluate(PREDICTIONS, REFERENCES, resamples=2, seed=4).card
    assert (card.pictures, card.references) == (60, sum(map(len, REFERENCES.values())))
    assert card.references_sha256 == hash_references(REFERENCES)
    assert card.document_frequencies == "evaluated references"
    assert "3.4.1" in card.tokenizer
    assert "seed 4" in card.interval
    assert "CIDEr-D" in card.scorers
    assert "METEOR" not in card.scorers
    assert card.source == ""
    sourced = evaluate(PREDICTIONS, REFERENCES, resamples=2, source="r.jsonl (JSONL)")
    assert sourced.card.source == "r.jsonl (JSONL)"
    assert "source               r.jsonl (JSONL)" in sourced.table()


def test_a_fixed_corpus_is_named_with_what_tells_it_from_any_other():
    def named(counts, documents=2):
        corpus = DocumentFrequencies("corpus of 2014", documents, counts)
        return evaluate(PREDICTIONS, REFERENCES, frequencies=corpus, resamples=2).card.document_frequencies

    first = named({("a",): 1, ("b",): 2})
    assert first.startswith("corpus of 2014 (2 pictures, sha256 ")
    assert first == named({("b",): 2, ("a",): 1})
    assert len({first, named({("a",): 2, ("b",): 2}), named({("a", "b"): 1}), named({("a",): 1, ("b",): 2}, 3)}) == 4


def test_a_fixed_corpus_of_the_references_themselves_changes_nothing(tmp_path):
    references = {name: [*many, "1 1/2 cups at http://\ud800x"] for name, many in REFERENCES.items()}
    DocumentFrequencies.of_captions(references, name="own").save(tmp_path / "own.json")
    corpus = DocumentFrequencies.load(tmp_path / "own.json")
    fixed = evaluate(PREDICTIONS, references, frequencies=corpus, resamples=2)
    assert fixed.scores == evaluate(PREDICTIONS, references, resamples=2).scores
    assert "own (60 pictures" in fixed.card.document_frequencies


def test_the_hash_depends_on_captions_and_not_on_the_order_of_pictures():
    turned = dict(reversed(REFERENCES.items()))
    assert hash_references(turned) == hash_references(REFERENCES)
    name = next(name for name, many in REFERENCES.items() if len(set(many)) > 1)
    assert hash_references(REFERENCES | {name: [*REFERENCES[name], "x"]}) != hash_references(REFERENCES)
    assert hash_references(REFERENCES | {name: REFERENCES[name][::-1]}) != hash_references(REFERENCES)


def test_everything_is_in_the_table_and_in_the_json():
    result = compare(PREDICTIONS, dict.fromkeys(REFERENCES, "A brown cow."), REFERENCES, resamples=20)
    for item in (result, result.first):
        content = json.loads(json.dumps(item.to_dict()))
        assert all(metric in item.table() for metric in METRICS)
        assert result.first.card.references_sha256 in item.table()
    assert "approximate randomisation" in result.first.card.interval
    assert set(content) == {"scores", "intervals", "language", "card"}
    assert content["scores"]["CIDEr-D"] == result.first.scores["CIDEr-D"]
    for table in (result.table(), result.first.table()):
        for figure in ("vocabulary", "distinct", "repeated", "unfinished", "length", "longest"):
            assert figure in table
    assert f"distinct    {result.first.language.distinct:>7.1%} {1 / 60:>7.1%}" in result.table()


@pytest.mark.parametrize(
    ("predictions", "references", "fault"),
    [
        ({}, {"a": ["x"], "b": ["x"]}, r"2 of 2 pictures have no prediction \(a, b\)"),
        ({"a": "x", "z": "x"}, {"a": ["x"]}, r"1 predictions are of pictures without references \(z\)"),
        ({"z": "x"}, {"a": ["x"]}, r"no prediction \(a\); 1 predictions"),
        ({"a": "x"}, {"a": []}, r"empty list of references \(a\)"),
        ({}, {}, "no pictures"),
        ({}, {f"{i:02}": ["x"] for i in range(35)}, r"\(00, 01, .*, 18, 19 and 15 more\)"),
    ],
)
def test_what_does_not_match_is_listed(predictions, references, fault):
    with pytest.raises(MetricError, match=fault):
        evaluate(predictions, references)


def test_of_two_prediction_files_the_one_at_fault_is_named():
    lacking = dict(list(PREDICTIONS.items())[1:])
    with pytest.raises(MetricError, match=r"^first predictions: 1 of 60"):
        compare(lacking, PREDICTIONS, REFERENCES)
    with pytest.raises(MetricError, match=r"^second predictions: 1 of 60"):
        compare(PREDICTIONS, lacking, REFERENCES)


def test_bad_settings_of_the_intervals_are_named():
    for wrong in ({"resamples": 1}, {"confidence": 1.0}, {"confidence": 0}):
        with pytest.raises(MetricError, match=next(iter(wrong))):
            evaluate(PREDICTIONS, REFERENCES, **wrong)


def test_scores_lie_in_their_intervals_and_a_seed_repeats_them():
    first = evaluate(PREDICTIONS, REFERENCES, resamples=300)
    for metric, interval in first.intervals.items():
        assert interval.low <= first.scores[metric] <= interval.high
        assert interval.low < interval.high
    assert evaluate(PREDICTIONS, REFERENCES, resamples=300) == first
    assert evaluate(PREDICTIONS, REFERENCES, resamples=300, seed=1).intervals != first.intervals
    assert evaluate(PREDICTIONS, REFERENCES, resamples=300, seed=1).scores == first.scores


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    interval = bootstrap(with_ones(values), mean_of_sums, resamples=2000, confidence=0.95, seed=0)[0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_set_compared_with_itself_shows_no_difference():
    for difference in compare(PREDICTIONS, PREDICTIONS, REFERENCES, resamples=50).differences.values():
        assert (difference.value, difference.interval.low, difference.interval.high) == (0, 0, 0)
        assert difference.p_value == 1


def test_better_captions_are_found_better():
    own = {name: many[0] for name, many in REFERENCES.items()}
    strange = dict.fromkeys(REFERENCES, "Nothing of the kind.")
    result = compare(own, strange, REFERENCES, resamples=200)
    for metric, difference in result.differences.items():
        assert difference.value == pytest.approx(result.first.scores[metric] - result.second.scores[metric])
        assert difference.interval.low > 0
        assert difference.p_value == pytest.approx(1 / 201)
    turned = compare(strange, own, REFERENCES, resamples=200)
    for metric, difference in turned.differences.items():
        assert difference.value == pytest.approx(-result.differences[metric].value)


def test_chance_differences_have_large_p_values_and_real_ones_small():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, size=400)
    p_values = []
    for shift in (0.0, 0.5):
        other = base + rng.normal(shift, 1, size=400)
        pair = with_ones(base), with_ones(other)
        p_values.append(compare_paired(*pair, mean_of_sums, resamples=500, confidence=0.95, seed=0)[0].p_value)
    assert p_values[0] > 0.05 > p_values[1]


@settings(max_examples=30)
@given(MEANS)
def test_an_interval_lies_within_the_values(values):
    interval = bootstrap(with_ones(values), mean_of_sums, resamples=30, confidence=0.9, seed=0)[0]
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("a man in a blue shirt and a blue shirt", True),
        ("a dog a dog runs", True),
        ("a dog runs on on the grass", True),
        ("two dogs run and two dogs run", True),
        ("a man in red and a man in blue", False),
        ("a dog and a dog", False),  # one content word makes no phrase
        ("a small dog looks at a large dog", False),
        ("a dog", False),
        ("", False),
    ],
)
def test_a_phrase_said_twice_is_found(text, repeats):
    assert repeats_phrase(text.split()) is repeats


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [
        ("a dog on the", True),
        ("a dog is standing next to a", True),
        ("a dog and", True),
        ("", True),
        ("a dog looks on", False),
        ("a dog walks by", False),
        ("people stand next to each other", False),
    ],
)
def test_a_caption_that_breaks_off_is_found(text, unfinished):
    assert is_unfinished(text.split()) is unfinished


def test_the_figures_of_a_set_are_of_all_its_captions():
    figures = describe([tokenize(text) for text in ("A dog.", "A dog!", "A cat sat on a", "A red hat and a red hat")])
    assert (figures.vocabulary, figures.distinct) == (8, 0.75)
    assert (figures.repeated, figures.unfinished) == (0.25, 0.25)
    assert (figures.mean_words, figures.longest_words) == (4.0, 7)


def test_meteor_without_java_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "Java" in java.missing("METEOR")
    with pytest.raises(MetricError, match="METEOR cannot run: no java"):
        evaluate(PREDICTIONS, REFERENCES, meteor=True)
    with pytest.raises(MetricError, match="METEOR cannot run"):
        java.meteor([["a"]], [[["a"]]])


def test_a_java_that_does_not_run_is_no_java(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    for mode in (0o755, 0o644):
        stub.chmod(mode)
        java._runs.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda _: str(stub))
        assert "-version` fails" in java.missing("METEOR")
    java._runs.cache_clear()


def test_meteor_and_spice_without_their_package_or_models_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/java")
    monkeypatch.setattr(java, "_runs", lambda _: True)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: None)
    assert "pip install pycocoevalcap" in java.missing("METEOR")
    package = java.importlib.machinery.ModuleSpec("pycocoevalcap", None, is_package=True)
    package.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: package)
    for metric, file in (("METEOR", "meteor-1.5.jar"), ("SPICE", "spice-1.0.jar")):
        assert file in java.missing(metric)
    with pytest.raises(MetricError, match="nothing is downloaded"):
        java.spice([["a"]], [[["a"]]])


def test_meteor_equals_the_recorded_value():
    if java.missing("METEOR"):
        pytest.skip(java.missing("METEOR"))
    recorded = json.loads((DATA / "metrics_scores.json").read_text())
    evaluation = evaluate(recorded["predictions"], recorded["references"], meteor=True, resamples=2)
    assert evaluation.scores["METEOR"] / 100 == pytest.approx(recorded["scores"]["METEOR"], abs=1e-9)
    assert "METEOR 1.5" in evaluation.card.scorers


def test_meteor_takes_empty_captions_and_its_own_separator():
    if java.missing("METEOR"):
        pytest.skip(java.missing("METEOR"))
    predictions = {"a": "", "b": "a ||| dog", "c": "..."}
    references = {"a": ["a cat"], "b": ["...", "a dog runs"], "c": ["", "||| !"]}
    assert evaluate(predictions, references, meteor=True, resamples=2).scores["METEOR"] > 0


def test_a_java_program_that_fails_is_an_error_of_ours(monkeypatch):
    class Broken:
        def compute_score(self, *_):
            raise BrokenPipeError

    with pytest.raises(MetricError, match="METEOR failed"):
        java._run("METEOR", Broken, [["a"]], [[["a"]]])


def test_predictions_may_be_empty_texts():
    rng = random.Random(0)
    predictions = {name: rng.choice(["", ".", "a cow"]) for name in REFERENCES}
    evaluation = evaluate(predictions, REFERENCES, resamples=10)
    assert all(np.isfinite(list(evaluation.scores.values())))
    assert evaluation.language.unfinished > 0
