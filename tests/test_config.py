"""Laws of the settings: checked, frozen, and the same after a file."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.config import (
    BEAM_LIMIT,
    LAYERS_LIMIT,
    METHODS,
    VOCABULARY_LIMIT,
    WIDTH_LIMIT,
    WORDS_LIMIT,
    ConfidenceConfig,
    EncoderConfig,
    ModelConfig,
    MultiheadConfig,
    PreprocessingConfig,
    RecurrentConfig,
    SearchDefaults,
    SearchOptions,
)
from captioner.errors import ConfigError

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
sizes = st.integers(1, 4096)
rgb = st.lists(finite, min_size=3, max_size=3)
phrases = st.lists(st.text(min_size=1).filter(str.strip), max_size=3)
preprocessing = st.builds(
    PreprocessingConfig,
    side_px=st.integers(32, 4096),
    mean=rgb,
    std=st.lists(positive, min_size=3, max_size=3),
)
encoders = st.builds(EncoderConfig, backbone=st.text(min_size=1), stride=st.sampled_from([16, 32]))
rates = st.floats(0, 0.95)
recurrent = st.builds(RecurrentConfig, embedding_dim=sizes, state_dim=sizes, attention_dim=sizes, dropout=rates)


@st.composite
def _multihead(draw):
    layers, heads = draw(st.integers(1, 12)), draw(st.integers(1, 16))
    return MultiheadConfig(
        dim=heads * draw(st.integers(1, 64)),
        layers=layers,
        heads=heads,
        feedforward_dim=draw(sizes),
        dropout=draw(rates),
        map_layers=draw(st.lists(st.integers(-layers, layers - 1), max_size=3)),
    )


@st.composite
def _models(draw):
    decoder = draw(st.sampled_from(["mean", "additive", "multihead"]))
    return ModelConfig(
        decoder=decoder,
        vocabulary_size=draw(st.integers(4, 10**6)),
        max_tokens=draw(st.integers(2, WORDS_LIMIT + 1)),
        preprocessing=draw(preprocessing),
        encoder=draw(encoders),
        decoder_settings=draw(_multihead() if decoder == "multihead" else recurrent),
    )


@st.composite
def _searches(draw):
    method = draw(st.sampled_from(METHODS))
    groups = draw(st.integers(1, 4)) if method == "beam" else 1
    beam_size = groups * draw(st.integers(1, 5))
    n_best = 1 if method == "greedy" else draw(st.integers(1, beam_size))
    min_words = draw(st.integers(1, WORDS_LIMIT))
    return SearchOptions(
        method=method,
        beam_size=beam_size,
        n_best=n_best,
        groups=groups,
        min_words=min_words,
        max_words=draw(st.integers(min_words, WORDS_LIMIT)),
        length_penalty=draw(st.floats(-5, 5)),
        no_repeat_ngram=draw(st.integers(0, 9)),
        must_include=draw(phrases) if method == "beam" and groups == 1 else (),
        ban=draw(phrases),
        diversity=draw(st.floats(0, 9)),
        temperature=draw(positive),
        top_k=draw(st.integers(0, 999)),
        top_p=draw(st.floats(0.001, 1)),
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
    )


every_settings = st.one_of(preprocessing, encoders, recurrent, _multihead(), _models(), _searches())


@settings(deadline=None, max_examples=150)
@given(value=every_settings)
def test_settings_are_the_same_after_a_dictionary_json_or_yaml(value):
    kind, plain = type(value), value.to_dict()
    assert kind.from_dict(plain) == value
    assert kind.from_dict(json.loads(json.dumps(plain))) == value
    assert kind.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == value
    assert kind.from_dict(json.loads(json.dumps(plain))).to_dict() == plain


@settings(deadline=None, max_examples=30)
@given(value=every_settings)
def test_settings_are_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))


def test_left_out_settings_keep_their_defaults():
    config = ModelConfig.from_dict({"decoder": "mean", "vocabulary_size": 9, "preprocessing": {"side_px": 96}})
    assert config == ModelConfig(decoder="mean", vocabulary_size=9, preprocessing=PreprocessingConfig(side_px=96))
    assert config.decoder_settings == RecurrentConfig()
    assert ModelConfig(decoder="multihead", vocabulary_size=9).decoder_settings == MultiheadConfig()


@pytest.mark.parametrize(
    ("kind", "key", "hint"),
    [
        (SearchOptions, "beamsize", "did you mean 'beam_size'?"),
        (SearchOptions, "max_word", "did you mean 'max_words'?"),
        (PreprocessingConfig, "side", "did you mean 'side_px'?"),
        (MultiheadConfig, "head", "did you mean 'heads'?"),
        (EncoderConfig, "xyz", "known: backbone, stride"),
        (EncoderConfig, 3, "known: backbone, stride"),
    ],
)
def test_an_unknown_key_is_refused_with_a_hint(kind, key, hint):
    with pytest.raises(ConfigError) as caught:
        kind.from_dict({key: 1})
    assert f"{kind.title} has no setting {key!r}" in str(caught.value)
    assert hint in str(caught.value)


def test_an_unknown_key_inside_a_part_is_refused():
    with pytest.raises(ConfigError, match="encoder has no setting 'strid'"):
        ModelConfig.from_dict({"decoder": "mean", "vocabulary_size": 9, "encoder": {"strid": 32}})


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="model needs vocabulary_size"):
        ModelConfig.from_dict({"decoder": "mean"})


@pytest.mark.parametrize("values", [None, 3, "beam", [("method", "beam")]])
def test_settings_that_are_no_mapping_are_refused(values):
    with pytest.raises(ConfigError, match="search must be a mapping"):
        SearchOptions.from_dict(values)


CONFIDENCE = {
    "directions": 3,
    "intercept": 1.0,
    "score_weight": 1.0,
    "least_weight": 0.5,
    "familiar": 0.5,
    "strange": 1.0,
}
# Field → values just inside its bounds, and values outside them.
BOUNDS = [
    (PreprocessingConfig, "side_px", [32, 4096], [31, 4097, 224.0, "224", True, None]),
    (PreprocessingConfig, "mean", [(0, 0, 0), [0.5, -1, 2]], [(0, 0), 0.5, (0, 0, "x"), (0, 0, float("nan"))]),
    (PreprocessingConfig, "std", [(1e-9, 1, 1)], [(0, 1, 1), (-1, 1, 1), (1, 1), (1, 1, float("inf"))]),
    (EncoderConfig, "backbone", ["resnet50"], ["", None, 50]),
    (EncoderConfig, "stride", [16, 32], [8, 0, 64, 32.0, "32", None]),
    (RecurrentConfig, "embedding_dim", [1, WIDTH_LIMIT], [0, -1, 1.0, WIDTH_LIMIT + 1]),
    (RecurrentConfig, "state_dim", [1, WIDTH_LIMIT], [0, -1, 1.0, WIDTH_LIMIT + 1]),
    (RecurrentConfig, "attention_dim", [1, WIDTH_LIMIT], [0, -1, 1.0, 10**30]),
    (RecurrentConfig, "dropout", [0, 0.0, 0.95], [-0.01, 0.96, float("nan"), "0.1", None, False]),
    (MultiheadConfig, "dim", [8, WIDTH_LIMIT], [0, -8, 8.0, 12, 2**62]),
    (MultiheadConfig, "layers", [1, LAYERS_LIMIT], [0, -1, True, LAYERS_LIMIT + 1]),
    (MultiheadConfig, "heads", [1, 256], [0, -1, 3, 512]),
    (MultiheadConfig, "feedforward_dim", [1, WIDTH_LIMIT], [0, 1.5, 10**30]),
    (MultiheadConfig, "dropout", [0, 0.95], [-0.01, 0.96, 10**400]),
    (MultiheadConfig, "map_layers", [(), [-3], [0, 2]], [(3,), (-4,), ("0",), 1, "12"]),
    (SearchOptions, "method", ["beam", "greedy", "sample"], ["Beam", "", None, ["beam"]]),
    (SearchOptions, "beam_size", [1, BEAM_LIMIT], [0, -1, BEAM_LIMIT + 1, 2.0, True]),
    (SearchOptions, "n_best", [1, 3], [0, -1, 1001, 1.0]),
    (SearchOptions, "min_words", [1, 20], [0, -1, 21, 1.0]),
    (SearchOptions, "max_words", [1, WORDS_LIMIT], [0, WORDS_LIMIT + 1, 5.0]),
    (SearchOptions, "length_penalty", [-5, 5.0], [-5.1, 5.1, float("nan"), "1"]),
    (SearchOptions, "no_repeat_ngram", [0, 50], [-1, 1.0]),
    (SearchOptions, "must_include", [(), "red ball", ["dog"]], ["", " ", [""], [3], 3, None]),
    (SearchOptions, "ban", [(), "red ball", ["dog"]], ["", [" "], [None], {"a": 1}]),
    (SearchOptions, "groups", [1, 3], [0, -1, 2, 1.0]),
    (SearchOptions, "diversity", [0, 2.5], [-0.1, float("inf"), "1"]),
    (SearchOptions, "temperature", [1e-9, 100], [0, -1.0, float("inf"), None]),
    (SearchOptions, "top_k", [0, 10**6], [-1, 1.0]),
    (SearchOptions, "top_p", [1e-9, 1], [0, 1.01, -1, float("nan")]),
    (SearchOptions, "seed", [None, 0, 2**63 - 1], [-1, 2**63, 1.0, "1"]),
    (ModelConfig, "decoder", ["mean", "additive", "multihead"], ["transformer", None, 1]),
    (ModelConfig, "vocabulary_size", [4, VOCABULARY_LIMIT], [3, 0, 9.0, "9", 10**30]),
    (ModelConfig, "max_tokens", [2, WORDS_LIMIT + 1], [1, WORDS_LIMIT + 2, 9.0]),
    (ModelConfig, "preprocessing", [{}, {"side_px": 64}], [3, "x", [], EncoderConfig()]),
    (ModelConfig, "encoder", [{}, {"stride": 16}], [3, PreprocessingConfig()]),
    (ModelConfig, "decoder_settings", [{}, {"state_dim": 9}], [3, MultiheadConfig(), [1]]),
    (ModelConfig, "search", [{}, {"beam_size": 5}, SearchDefaults()], [3, SearchOptions(), [1]]),
    (ModelConfig, "confidence", [None, CONFIDENCE, ConfidenceConfig(**CONFIDENCE)], [3, {}, EncoderConfig()]),
    (SearchDefaults, "beam_size", [1, BEAM_LIMIT], [0, BEAM_LIMIT + 1, 2.0]),
    (SearchDefaults, "max_words", [1, WORDS_LIMIT], [0, WORDS_LIMIT + 1, 5.0]),
    (SearchDefaults, "length_penalty", [-5, 5.0], [-5.1, float("nan"), "1"]),
    (SearchDefaults, "no_repeat_ngram", [0, 50], [-1, 1.0]),
    (ConfidenceConfig, "directions", [1, WIDTH_LIMIT], [0, 1.0, WIDTH_LIMIT + 1]),
    (ConfidenceConfig, "intercept", [-3, 0.5], [float("nan"), "1", None]),
    (ConfidenceConfig, "score_weight", [-3, 0.5], [float("inf"), "1"]),
    (ConfidenceConfig, "least_weight", [-3, 0.5], [float("inf"), True]),
    (ConfidenceConfig, "familiar", [0, 0.9], [-0.1, float("nan")]),
    (ConfidenceConfig, "strange", [0.51, 100], [0.5, float("inf")]),
]
REQUIRED = {ModelConfig: {"decoder": "mean", "vocabulary_size": 9}, ConfidenceConfig: CONFIDENCE}


def test_every_field_has_its_bounds_tested():
    listed = {(kind, name) for kind, name, _, _ in BOUNDS}
    kinds = {kind for kind, *_ in BOUNDS}
    assert listed == {(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("kind", "name", "inside", "outside"), BOUNDS)
def test_a_field_takes_what_is_in_its_bounds_and_names_what_is_not(kind, name, inside, outside):
    required = REQUIRED.get(kind, {})
    for value in inside:
        kind(**{**required, name: value})
    for value in outside:
        with pytest.raises(ConfigError, match=rf"\b{name}\b") as caught:
            kind(**{**required, name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"min_words": 9, "max_words": 8}, "min_words=9 and max_words=8"),
        ({"n_best": 4, "beam_size": 3}, "n_best=4 and beam_size=3; raise beam_size to 4"),
        ({"beam_size": 4, "groups": 3}, "groups=3 and beam_size=4"),
        ({"method": "greedy", "n_best": 2}, "n_best=2; set n_best to 1, or method to 'beam'"),
        ({"method": "greedy", "must_include": "dog"}, "must_include needs method='beam'"),
        ({"method": "sample", "must_include": "dog"}, "must_include needs method='beam'"),
        ({"beam_size": 4, "groups": 2, "must_include": "dog"}, "must_include needs method='beam' with groups=1"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(options, fault):
    with pytest.raises(ConfigError) as caught:
        SearchOptions(**options)
    assert fault in str(caught.value)


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_settings_of_the_beam_alone_do_not_bind_other_methods(method):
    SearchOptions(method=method, beam_size=4, groups=3)


def test_settings_of_another_decoder_are_refused():
    for decoder, other in (("multihead", RecurrentConfig()), ("additive", MultiheadConfig())):
        with pytest.raises(ConfigError, match=f"decoder_settings of a '{decoder}' model"):
            ModelConfig(decoder=decoder, vocabulary_size=9, decoder_settings=other)
    with pytest.raises(ConfigError, match="decoder has no setting 'heads'"):
        ModelConfig(decoder="mean", vocabulary_size=9, decoder_settings={"heads": 8})


def test_numbers_of_numpy_become_plain_ones():
    chosen = SearchOptions(beam_size=np.int64(4), temperature=np.float32(0.5), seed=np.uint64(3))
    assert chosen == SearchOptions(beam_size=4, temperature=0.5, seed=3)
    assert json.loads(json.dumps(chosen.to_dict()))["beam_size"] == 4
    with pytest.raises(ConfigError, match="beam_size"):
        SearchOptions(beam_size=np.float64(4))


def test_one_phrase_may_be_given_as_a_string():
    assert SearchOptions(must_include="red ball", ban="cat").must_include == ("red ball",)


def test_settings_with_equal_values_are_equal_and_hash_alike():
    first = MultiheadConfig(map_layers=[0, 1])
    second = MultiheadConfig.from_dict({"map_layers": (0, 1)})
    assert first == second
    assert hash(first) == hash(second)
