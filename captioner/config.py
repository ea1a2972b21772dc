"""Frozen, self-validating settings of model, preprocessing and search. No torch here.

Each settings object checks itself when it is made and raises `ConfigError` naming the field, the value and
what is allowed; `to_dict` and `from_dict` are inverse to each other and refuse unknown keys, so that a typing
error in a file never passes silently.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

from captioner.errors import ConfigError

METHODS = ("beam", "greedy", "sample")
WORDS_LIMIT = 200
BEAM_LIMIT = 1000
# What exceeds these is damage or a typing error: no such network fits into a computer.
WIDTH_LIMIT, LAYERS_LIMIT, VOCABULARY_LIMIT = 2**16, 256, 10_000_000


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _require_int(name: str, value: object, *, at_least: int, at_most: int | None = None) -> None:
    # bool is an int in Python; `beam_size=True` is a mistake.
    valid = isinstance(value, int) and not isinstance(value, bool)
    upper = "" if at_most is None else f" and at most {at_most}"
    _require(
        valid and at_least <= cast(int, value) <= (math.inf if at_most is None else at_most),
        f"{name} must be a whole number, at least {at_least}{upper}, got {value!r}",
    )


def _require_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    limits = [
        text
        for limit, text in (
            (above, f"above {above}"),
            (at_least, f"at least {at_least}"),
            (at_most, f"at most {at_most}"),
        )
        if limit is not None
    ]
    wanted = "a finite number" + (f", {' and '.join(limits)}" if limits else "")
    number = cast(float, value)
    fits = (
        is_number
        and abs(number) <= sys.float_info.max  # neither infinite, nor NaN, nor an int too large for a float
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        and (at_most is None or number <= at_most)
    )
    _require(fits, f"{name} must be {wanted}, got {value!r}")


def _require_one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    # 16.0 and True equal an int in Python, but are no such setting.
    fits = any(value == option and type(value) is type(option) for option in allowed)
    _require(fits, f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


class _Settings:
    """Shared by the frozen dataclasses of this module: dictionaries in and out."""

    title: ClassVar[str] = "settings"

    def _make_numbers_plain(self) -> None:
        """Turn numbers of another kind, such as numpy's, into Python's own."""
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if isinstance(value, int | float):
                continue
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, each.name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, each.name, float(value))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON or YAML can hold; `from_dict` is the inverse."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings from plain values.

        Args:
            values: field names and values; fields that are left out keep their default.

        Returns:
            The checked settings.

        Raises:
            ConfigError: for an unknown key, a missing one, or a value out of its range.
        """
        _require(isinstance(values, Mapping), f"{cls.title} must be a mapping of names to values, got {values!r}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(str(key), list(fields), n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(fields)}"
                raise ConfigError(f"{cls.title} has no setting {key!r}{hint}")
        try:
            return cls(**values)
        except TypeError as err:
            missing = [
                n
                for n, f in fields.items()
                if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            ]
            raise ConfigError(f"{cls.title} needs {', '.join(missing) or 'other values'}: {err}") from err


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig(_Settings):
    """How a picture becomes the encoder's input. Travels with the weights.

    Args:
        side_px: side of the square input, model pixels; the picture is squashed to it, not cropped, so that
            the attention grid covers the whole picture.
        mean: per-channel mean of RGB in [0, 1].
        std: per-channel standard deviation of RGB in [0, 1].
    """

    title: ClassVar[str] = "preprocessing"

    side_px: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        _require_int("side_px", self.side_px, at_least=32, at_most=4096)
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(
                isinstance(values, list | tuple) and len(values) == 3,
                f"{name} must be three numbers (red, green, blue), got {values!r}",
            )
            for number in values:
                _require_number(name, number, **({"above": 0.0} if name == "std" else {}))
            object.__setattr__(self, name, tuple(float(number) for number in values))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(_Settings):
    """Which CNN looks at the picture.

    Args:
        backbone: name of a torchvision classification CNN, such as "mobilenet_v2" or "resnet50", or
            "efficientnet_lite0", 1 or 2.
        stride: model pixels per grid cell, 32 or, where the network allows it, 16.
    """

    title: ClassVar[str] = "encoder"

    backbone: str = "mobilenet_v2"
    stride: int = 32

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        _require(
            isinstance(self.backbone, str) and bool(self.backbone),
            f"backbone must be the name of a CNN, got {self.backbone!r}",
        )
        _require_one_of("stride", self.stride, (16, 32))


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(_Settings):
    """Sizes of the two LSTM decoders, `mean` and `additive`.

    Args:
        embedding_dim: width of the word embeddings.
        state_dim: width of the LSTM state.
        attention_dim: hidden width of the additive attention; `mean` has none and ignores it.
        dropout: probability of dropping a unit of the embeddings and of the output layer, in training.
    """

    title: ClassVar[str] = "decoder"

    embedding_dim: int = 256
    state_dim: int = 512
    attention_dim: int = 512
    dropout: float = 0.3

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        for name in ("embedding_dim", "state_dim", "attention_dim"):
            _require_int(name, getattr(self, name), at_least=1, at_most=WIDTH_LIMIT)
        _require_number("dropout", self.dropout, at_least=0.0, at_most=0.95)


@dataclass(frozen=True, kw_only=True)
class MultiheadConfig(_Settings):
    """Sizes of the transformer decoder, `multihead`.

    Args:
        dim: width of the model.
        layers: number of blocks.
        heads: number of attention heads; must divide `dim`.
        feedforward_dim: hidden width of the feed-forward layers.
        dropout: probability of dropping a unit, in training.
        map_layers: the layers whose cross-attention, averaged over layers and heads, is a word's map;
            negative numbers count from the last layer. Empty means all layers.
    """

    title: ClassVar[str] = "decoder"

    dim: int = 256
    layers: int = 3
    heads: int = 8
    feedforward_dim: int = 1024
    dropout: float = 0.2
    map_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        for name in ("dim", "layers", "heads", "feedforward_dim"):
            limit = LAYERS_LIMIT if name == "layers" else WIDTH_LIMIT
            _require_int(name, getattr(self, name), at_least=1, at_most=limit)
        _require(self.dim % self.heads == 0, f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        _require_number("dropout", self.dropout, at_least=0.0, at_most=0.95)
        _require(
            isinstance(self.map_layers, list | tuple),
            f"map_layers must be a list of layers, got {self.map_layers!r}",
        )
        for layer in self.map_layers:
            _require_int("map_layers", layer, at_least=-self.layers, at_most=self.layers - 1)
        object.__setattr__(self, "map_layers", tuple(self.map_layers))


DecoderConfig = RecurrentConfig | MultiheadConfig
DECODER_CONFIGS: dict[str, type[RecurrentConfig] | type[MultiheadConfig]] = {
    "mean": RecurrentConfig,
    "additive": RecurrentConfig,
    "multihead": MultiheadConfig,
}


@dataclass(frozen=True, kw_only=True)
class ConfidenceConfig(_Settings):
    """How a model's confidence in a caption comes about; fitted, see `captioner.confidence`.

    Args:
        directions: of the subspace in which the features of familiar pictures vary.
        intercept: of the logistic regression.
        score_weight: of the caption's mean log-probability per token.
        least_weight: of the log-probability of its least probable word.
        familiar: strangeness up to which a picture counts as familiar.
        strange: strangeness at which the confidence has fallen to 1 / e of that of a familiar picture.
    """

    title: ClassVar[str] = "confidence"

    directions: int
    intercept: float
    score_weight: float
    least_weight: float
    familiar: float
    strange: float

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        _require_int("directions", self.directions, at_least=1, at_most=WIDTH_LIMIT)
        for name in ("intercept", "score_weight", "least_weight"):
            _require_number(name, getattr(self, name))
        _require_number("familiar", self.familiar, at_least=0.0)
        _require_number("strange", self.strange, above=self.familiar)


@dataclass(frozen=True, kw_only=True)
class SearchDefaults(_Settings):
    """What a search does unless it is told otherwise: chosen for each model on its dev pictures.

    Args:
        beam_size: as in `SearchOptions`, like the others.
        max_words: most words of a caption.
        length_penalty: of a beam search.
        no_repeat_ngram: no sequence of this many words occurs twice; 0 allows repeats.
    """

    title: ClassVar[str] = "search defaults"

    beam_size: int = 3
    max_words: int = 20
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        SearchOptions.from_dict(self.to_dict())


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Settings):
    """Everything that fixes the shape of a model.

    Args:
        decoder: "mean", "additive" or "multihead".
        vocabulary_size: number of tokens, special ones included.
        max_tokens: the longest caption in tokens, end token included.
        preprocessing: how a picture becomes the encoder's input.
        encoder: which CNN looks at it.
        decoder_settings: sizes of the decoder, of the class that `DECODER_CONFIGS` names for `decoder`.
        search: how it is searched unless a search is told otherwise.
        confidence: how the confidence in a caption comes about; None: the model was not calibrated.
    """

    title: ClassVar[str] = "model"

    decoder: str
    vocabulary_size: int
    max_tokens: int = 40
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder_settings: DecoderConfig = None  # type: ignore[assignment]  # replaced below by the decoder's defaults
    search: SearchDefaults = field(default_factory=SearchDefaults)
    confidence: ConfidenceConfig | None = None

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        _require_one_of("decoder", self.decoder, tuple(DECODER_CONFIGS))
        _require_int("vocabulary_size", self.vocabulary_size, at_least=4, at_most=VOCABULARY_LIMIT)
        _require_int("max_tokens", self.max_tokens, at_least=2, at_most=WORDS_LIMIT + 1)
        parts: dict[str, type[_Settings]] = {
            "preprocessing": PreprocessingConfig,
            "encoder": EncoderConfig,
            "decoder_settings": DECODER_CONFIGS[self.decoder],
            "search": SearchDefaults,
        }
        for name, kind in parts.items():
            value = getattr(self, name)
            if value is None or isinstance(value, Mapping):
                object.__setattr__(self, name, kind.from_dict(value or {}))
            else:
                _require(
                    isinstance(value, kind),
                    f"{name} of a {self.decoder!r} model must be a {kind.__name__}, got {type(value).__name__}",
                )
        given = cast(object, self.confidence)
        if isinstance(given, Mapping):
            object.__setattr__(self, "confidence", ConfidenceConfig.from_dict(given))
        elif given is not None and not isinstance(given, ConfidenceConfig):
            raise ConfigError(f"confidence must be a ConfidenceConfig or None, got {type(given).__name__}")


def _phrases(name: str, value: object) -> tuple[str, ...]:
    """Return the words or phrases as a tuple; one string is one phrase."""
    items = (value,) if isinstance(value, str) else value
    _require(
        isinstance(items, list | tuple) and all(isinstance(item, str) and item.strip() for item in items),
        f"{name} must be words or phrases, such as ['dog', 'red ball'], got {value!r}",
    )
    return tuple(items)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(_Settings):
    """How the caption is searched for: the same names in Python, on the command line and on the page.

    Args:
        method: "beam", "greedy" or "sample".
        beam_size: hypotheses kept at every step; only for "beam".
        n_best: captions returned, best first, no two with one text.
        min_words: fewest words of a caption.
        max_words: most words of a caption; a sentence that is still open there is ended there.
        length_penalty: hypotheses are ranked by the sum of their log-probabilities over
            (tokens ** length_penalty): 1 is the mean, 0 the plain sum, more than 1 favours longer captions.
            Only for "beam".
        no_repeat_ngram: no sequence of this many words occurs twice; 0 allows repeats.
        must_include: words or phrases that the caption must contain; only for "beam".
        ban: words or phrases that the caption must not contain.
        groups: number of diverse-beam groups (Vijayakumar et al. 2018); must divide `beam_size`; 1 is a plain
            beam.
        diversity: log-probability that a word loses for each earlier group which chose it at the same step.
        temperature: of sampling: below 1 is safer, above 1 bolder; only for "sample".
        top_k: sample from this many most probable words; 0 means all; only for "sample".
        top_p: sample from the smallest set of words whose probability reaches this; only for "sample".
        seed: makes sampling reproducible; every picture is sampled with the same random numbers, so that a
            batch gives what single calls give. None draws fresh ones. Only for "sample".
    """

    title: ClassVar[str] = "search"

    method: str = "beam"
    beam_size: int = 3
    n_best: int = 1
    min_words: int = 1
    max_words: int = 20
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    must_include: tuple[str, ...] = ()
    ban: tuple[str, ...] = ()
    groups: int = 1
    diversity: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._make_numbers_plain()
        _require_one_of("method", self.method, METHODS)
        _require_int("beam_size", self.beam_size, at_least=1, at_most=BEAM_LIMIT)
        _require_int("n_best", self.n_best, at_least=1, at_most=BEAM_LIMIT)
        _require_int("min_words", self.min_words, at_least=1)
        _require_int("max_words", self.max_words, at_least=1, at_most=WORDS_LIMIT)
        _require_number("length_penalty", self.length_penalty, at_least=-5.0, at_most=5.0)
        _require_int("no_repeat_ngram", self.no_repeat_ngram, at_least=0)
        _require_int("groups", self.groups, at_least=1)
        _require_number("diversity", self.diversity, at_least=0.0)
        _require_number("temperature", self.temperature, above=0.0)
        _require_int("top_k", self.top_k, at_least=0)
        _require_number("top_p", self.top_p, above=0.0, at_most=1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, at_least=0, at_most=2**63 - 1)
        for name in ("must_include", "ban"):
            object.__setattr__(self, name, _phrases(name, getattr(self, name)))
        self._check_pairs()

    def _check_pairs(self) -> None:
        _require(
            self.min_words <= self.max_words,
            f"min_words must not exceed max_words, got min_words={self.min_words} and max_words={self.max_words}",
        )
        if self.method == "beam":
            _require(
                self.n_best <= self.beam_size,
                f"n_best must not exceed beam_size, got n_best={self.n_best} and beam_size={self.beam_size}; "
                f"raise beam_size to {self.n_best}",
            )
            _require(
                self.beam_size % self.groups == 0,
                f"groups must divide beam_size, got groups={self.groups} and beam_size={self.beam_size}",
            )
        if self.method == "greedy":
            _require(
                self.n_best == 1,
                f"greedy search finds one caption, got n_best={self.n_best}; set n_best to 1, or method to 'beam'",
            )
        _require(
            not self.must_include or (self.method == "beam" and self.groups == 1),
            f"must_include needs method='beam' with groups=1, got method={self.method!r} and groups={self.groups}",
        )
