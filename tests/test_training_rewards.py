"""Rewards equal the scores that are reported, end token included, and advantages are unbiased differences."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from captioner import ConfigError, DataError, MetricError
from captioner.metrics import bleu, evaluate, tokenize
from captioner.tokenizer import END, Tokenizer
from training.mosaics import has_content
from training.rewards import (
    CaptionReward,
    RewardConfig,
    SentenceBleu,
    SentenceOverlap,
    advantages,
    most_often,
    said_too_often,
)

PAD, END_ID = Tokenizer.pad_id, Tokenizer.end_id
VOCABULARY = "a man two dogs runs with the on red ball in park's snow near child jumps over white t-shirt gonna"
TOKENIZER = Tokenizer.train([VOCABULARY], min_count=1)
WORDS = VOCABULARY.split()
KNOWN = range(len(("pad", "start", "end", "unknown")), TOKENIZER.vocabulary_size)


def make_references(pictures=12, seed=0):
    """Sentences with capitals, punctuation and words that the vocabulary lacks."""
    rng = random.Random(seed)

    def sentence():
        words = [rng.choice([*WORDS, "zebra"]) for _ in range(rng.randint(3, 12))]
        return " ".join(words).capitalize() + rng.choice([" .", ".", "", "!"])

    return {f"{i}.jpg": [sentence() for _ in range(rng.randint(1, 5))] for i in range(pictures)}


REFERENCES = make_references()


def make_captions(count, seed=0):
    """Rows as the model writes them; about half are finished."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.choice(KNOWN) for _ in range(rng.randint(0, 10))] + [END_ID] * rng.randint(0, 1)
        rows.append(ids + [PAD] * (11 - len(ids)))
    return rows


def tokens_of(row):
    """What is scored, written out: PTB tokens of the readable sentence, and the end where there is one."""
    ids = [token for token in row if token not in (PAD, END_ID)]
    return tokenize(TOKENIZER.sentence(ids)) + ([END] if END_ID in row else [])


def reward_of(references=REFERENCES, **settings):
    return CaptionReward(references, tokenizer=TOKENIZER, config=RewardConfig(**settings))


# ---------------------------------------------------------------- CIDEr-D


def test_reward_equals_the_reference_scorer_on_tokens_with_the_end():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    reward, names = reward_of(), list(REFERENCES)
    compared = 0
    for seed in range(8):
        captions = make_captions(len(names), seed)
        theirs = scorer.CiderScorer(n=4, sigma=6.0)
        for name, caption in zip(names, captions, strict=True):
            theirs += (
                " ".join(tokens_of(caption)),
                [" ".join([*tokenize(text), END]) for text in REFERENCES[name]],
            )
        _, expected = theirs.compute_score()
        found = reward.score(names, captions)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-9)
        compared += (found > 0).sum()
    assert compared > 50


def test_captions_of_one_call_do_not_touch_each_other():
    reward, names, captions = reward_of(bleu4=0.5), list(REFERENCES) * 5, make_captions(60)
    whole = reward.score(names, captions)
    order = random.Random(1).sample(range(60), 60)
    np.testing.assert_array_equal(reward.score([names[i] for i in order], [captions[i] for i in order]), whole[order])
    alone = [reward.score([name], [caption])[0] for name, caption in zip(names, captions, strict=True)]
    np.testing.assert_allclose(alone, whole, atol=1e-12)


def test_reward_of_whole_sentences_is_the_reported_score_of_texts_that_say_their_end():
    """Through `evaluate`, with the end as one more word of every text."""
    names, rows = list(REFERENCES), [[t for t in row if t not in (PAD, END_ID)] for row in make_captions(12)]
    texts = {name: f"{TOKENIZER.sentence(row).rstrip('.')} theend." for name, row in zip(names, rows, strict=True)}
    ended = {name: [f"{text.rstrip(' .!')} theend." for text in many] for name, many in REFERENCES.items()}
    reported = evaluate(texts, ended, resamples=2).scores["CIDEr-D"]
    rewards = reward_of().score(names, [[*row, END_ID] for row in rows])
    assert rewards.mean() * 100 == pytest.approx(reported, rel=1e-9)
    assert reported > 1


@pytest.mark.parametrize(
    "weights",
    [{"cider": 1.0}, {"cider": 0.0, "bleu4": 1.0}, {"cider": 1.0, "bleu4": 0.5}, {"cider": 0.0, "overlap": 1.0}],
)
def test_a_sentence_that_ends_whole_is_worth_more_than_the_same_broken_off(weights):
    references = {f"{i}.jpg": ["A man runs with two dogs.", "Two dogs run."] for i in range(2)}
    references["other.jpg"] = ["The child jumps over snow."]
    reward = reward_of(references, **weights)
    ids = list(TOKENIZER.encode("a man runs with two dogs"))
    whole, broken = reward.score(["0.jpg"] * 2, [[*ids, END_ID, PAD], [*ids, PAD, PAD]])
    assert whole > broken > 0


def test_nothing_behind_the_end_counts():
    reward, ids = reward_of(bleu4=1.0), list(TOKENIZER.encode("a man runs with two dogs"))
    short, long = reward.score(["0.jpg"] * 2, [[*ids, END_ID], [*ids, END_ID, PAD, ids[0], END_ID]])
    assert short == long


def test_captions_of_no_words_are_scored_and_worth_nothing_much():
    found = reward_of(bleu4=1.0).score(["0.jpg"] * 3, [[END_ID, PAD], [PAD, PAD], []])
    assert np.isfinite(found).all()
    assert (found < 0.3).all()
    assert found[1] == found[2] == 0
    assert reward_of().score([], []).shape == (0,)


# ---------------------------------------------------------------- BLEU-4 and the mixture


def test_mixed_reward_is_the_weighted_sum():
    names, captions = list(REFERENCES), make_captions(len(REFERENCES), seed=3)
    cider = reward_of().score(names, captions)
    bleu4 = reward_of(cider=0.0, bleu4=1.0).score(names, captions)
    assert (bleu4 > 0).any()
    np.testing.assert_allclose(
        reward_of(cider=0.7, bleu4=2.0).score(names, captions), 0.7 * cider + 2.0 * bleu4, atol=1e-12
    )


SENTENCES = st.lists(st.sampled_from("abcde"), max_size=9)


@settings(deadline=None, max_examples=150)
@given(found=SENTENCES, truth=st.lists(SENTENCES, min_size=1, max_size=4))
def test_sentence_bleu_is_that_of_lin_and_och_over_the_counts_of_the_reported_bleu(found, truth):
    counts = bleu.count([found], [truth])
    score = SentenceBleu(truth).score(found)
    matched, written = counts.matched_PN[0], counts.written_PN[0]
    if matched[0] == 0:
        assert score == 0
        return
    precisions = [matched[0] / written[0], *((matched[1:] + 1) / (written[1:] + 1))]
    brevity = min(1.0, math.exp(1 - counts.reference_length_P[0] / len(found)))
    assert score == pytest.approx(brevity * math.prod(precisions) ** 0.25, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(truth=st.lists(SENTENCES.filter(bool), min_size=1, max_size=4))
def test_sentence_bleu_of_a_reference_is_one(truth):
    assert SentenceBleu(truth).score(truth[0]) == pytest.approx(1)


def test_sentence_bleu_tells_better_from_worse_without_a_matching_4_gram():
    scorer = SentenceBleu([list("abcdef")])
    assert 0 < scorer.score(list("axcxex")) < scorer.score(list("abxdex")) < scorer.score(list("abcxex")) < 1


# ---------------------------------------------------------------- overlap and repetition

TEXTS = st.lists(st.sampled_from(["a", "the", "on", "sink", "dog", "red"]), min_size=1, max_size=9)


@settings(deadline=None, max_examples=150)
@given(found=TEXTS, truth=st.lists(TEXTS, min_size=1, max_size=4))
def test_overlap_follows_the_definition_of_meteor_word_by_word(found, truth):
    """Matches are taken one by one, as a person would cross words out, and weighed at the end."""

    def weight(words):
        return sum(0.75 if has_content(word) else 0.25 for word in words)

    scores = []
    for reference in truth:
        left, matched = list(reference), []
        for word in found:
            if word in left:
                left.remove(word)
                matched.append(word)
        p, r = weight(matched) / weight(found), weight(matched) / weight(reference)
        scores.append(p * r / (0.85 * p + 0.15 * r) if matched else 0.0)
    assert SentenceOverlap(truth).score(found) == pytest.approx(max(scores), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(truth=st.lists(TEXTS, min_size=1, max_size=4))
def test_overlap_of_a_reference_is_one_and_of_other_words_nothing(truth):
    assert SentenceOverlap(truth).score(truth[0]) == pytest.approx(1)
    assert SentenceOverlap(truth).score(["zebra"]) == SentenceOverlap(truth).score([]) == 0


def words(text):
    return text.split()


def test_what_is_missing_costs_overlap_more_than_what_is_too_much():
    scorer = SentenceOverlap([words("a dog runs on red grass")])
    missing, spare = scorer.score(words("a dog runs")), scorer.score(words("a dog runs on red grass near big trees"))
    assert missing < spare < 1


def test_only_content_words_beyond_any_reference_are_said_too_often():
    most = most_often([words("a white sink and a sink"), words("a dog on a rug")])
    assert said_too_often(words("a white sink and a white sink"), most) == 1
    assert said_too_often(words("a sink and a sink and a sink"), most) == 1
    assert said_too_often(words("a dog and a dog and a dog"), most) == 2
    assert said_too_often(words("a a a the the sink"), most) == 0
    assert said_too_often(words("zebra zebra"), most) == 1


def test_repetition_costs_what_the_settings_say_and_overlap_earns_it():
    names = list(REFERENCES)
    rng = random.Random(4)
    captions = [rng.choices(KNOWN, k=5) * 2 + [END_ID] for _ in names]
    plain = reward_of().score(names, captions)
    both = reward_of(overlap=2.0, repeats=0.5).score(names, captions)
    found = [tokens_of(row) for row in captions]
    truth = [[[*tokenize(text), END] for text in REFERENCES[name]] for name in names]
    earned = [2.0 * SentenceOverlap(t).score(text) for t, text in zip(truth, found, strict=True)]
    cost = [0.5 * said_too_often(text, most_often(t)) for t, text in zip(truth, found, strict=True)]
    assert max(cost) > 0
    np.testing.assert_allclose(both, plain + np.array(earned) - np.array(cost), atol=1e-12)


# ---------------------------------------------------------------- advantages

REWARDS = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(-10, 10))


@settings(deadline=None, max_examples=100)
@given(rewards=REWARDS)
def test_advantages_over_the_mean_of_others_sum_to_zero_and_follow_their_definition(rewards):
    found = advantages(rewards, baseline="mean_of_others")
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-9)
    for row, column in np.ndindex(*rewards.shape):
        others = np.delete(rewards[row], column)
        assert found[row, column] == pytest.approx(rewards[row, column] - others.mean(), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(reward=st.floats(-10, 10), samples=st.integers(2, 7))
def test_equal_rewards_give_no_advantage(reward, samples):
    rewards = np.full((3, samples), reward)
    assert (advantages(rewards, baseline="mean_of_others") == 0).all()
    assert (advantages(rewards, baseline="greedy", greedy_B=rewards[:, 0]) == 0).all()


@settings(deadline=None, max_examples=50)
@given(rewards=REWARDS, greedy=st.floats(-10, 10))
def test_advantage_over_greedy_is_the_difference(rewards, greedy):
    greedy_B = greedy + np.arange(len(rewards))
    found = advantages(rewards, baseline="greedy", greedy_B=greedy_B)
    for picture, samples in enumerate(rewards):
        assert found[picture].tolist() == [reward - greedy_B[picture] for reward in samples]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"cider": -1.0}, "rewards.cider must be"),
        ({"bleu4": float("nan")}, "rewards.bleu4 must be"),
        ({"bleu4": float("inf")}, "rewards.bleu4 must be"),
        ({"cider": 0.0}, "all 0"),
        ({"overlap": -0.5}, "rewards.overlap must be"),
        ({"repeats": float("inf")}, "rewards.repeats must be"),
        ({"cider": 0.0, "repeats": 1.0}, "all 0"),
        ({"baseline": "mean"}, "rewards.baseline must be one of mean_of_others, greedy, got 'mean'"),
        ({"samples": 1}, "rewards.samples must be at least 2"),
        ({"baseline": "greedy", "samples": 0}, "rewards.samples must be at least 1"),
    ],
)
def test_settings_that_reward_nothing_or_cannot_be_are_refused(wrong, named):
    with pytest.raises(ConfigError, match=named):
        RewardConfig(**wrong)


def test_one_sample_is_enough_for_the_greedy_baseline():
    assert RewardConfig(baseline="greedy", samples=1).samples == 1


def test_missing_references_are_named():
    with pytest.raises(DataError, match="no reference captions at all"):
        reward_of({})
    with pytest.raises(DataError, match=r"b\.jpg has no reference captions"):
        reward_of({"a.jpg": ["A dog."], "b.jpg": []})
    with pytest.raises(MetricError, match=r"nowhere\.jpg has no references"):
        reward_of().score(["0.jpg", "nowhere.jpg"], [[END_ID], [END_ID]])
    with pytest.raises(MetricError, match="1 captions for 2 names"):
        reward_of().score(["0.jpg", "1.jpg"], [[END_ID]])


def test_baselines_that_do_not_fit_the_rewards_are_refused():
    rewards = np.zeros((2, 3))
    for greedy in (None, np.zeros(3), np.zeros((2, 1))):
        with pytest.raises(ConfigError, match="one greedy reward for each of 2 pictures"):
            advantages(rewards, baseline="greedy", greedy_B=greedy)
    with pytest.raises(ConfigError, match="takes no greedy rewards"):
        advantages(rewards, baseline="mean_of_others", greedy_B=np.zeros(2))
    with pytest.raises(ConfigError, match="at least 2 samples"):
        advantages(rewards[:, :1], baseline="mean_of_others")
    with pytest.raises(ConfigError, match="baseline must be one of"):
        advantages(rewards, baseline="median")
