"""`search` and `stream`: options in, captions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

from captioner.arrays import Array, inference
from captioner.config import SearchOptions
from captioner.decoders.protocol import StepDecoder
from captioner.errors import ConfigError, SearchError
from captioner.search.beam import BeamMethod
from captioner.search.constraints import Constraints
from captioner.search.demands import Demands
from captioner.search.engine import Engine, Method
from captioner.search.hypothesis import Hypothesis, Phrase, SearchVocabulary, StreamedWord, rank_score
from captioner.search.sampling import SampleMethod
from captioner.search.trace import Ending, Path


def search(
    decoder: StepDecoder,
    grid_BPC: Array,
    *,
    vocabulary: SearchVocabulary,
    options: SearchOptions,
    must_include: Sequence[Phrase] = (),
    ban: Sequence[Phrase] = (),
) -> list[list[Hypothesis]]:
    """Find captions for a batch of pictures.

    No gradient flows and none is recorded: the search runs in inference mode and hands back plain numbers and
    maps. Whether dropout is on is the decoder's own affair: call its `eval()` first. The decoder's
    `attention` and `attention_heads_BLHP` of a step are kept until the end and must not be overwritten by
    later steps.

    Args:
        decoder: any decoder.
        grid_BPC: features of the pictures, on the decoder's device.
        vocabulary: which tokens there are.
        options: how to search; one token is one word.
        must_include: the phrases of `options.must_include` as tokens.
        ban: the phrases of `options.ban` as tokens.

    Returns:
        For each picture its captions, best first, at most `n_best` and no two with the same words; at least
        one. Captions with an end rank before those that the model gave no end at all. Beams rank by the sum
        of log-probabilities over tokens ** length_penalty, samples by the mean.

    Raises:
        ConfigError: when options, phrases and method do not go together.
        SearchError: when the demands exclude each other, saying which; when no caption that meets them was
            found; when the decoder cannot write `max_words`; when the model gives NaN.
    """
    if len(grid_BPC) == 0:
        return []
    with inference(grid_BPC):
        engine = _start(decoder, grid_BPC, vocabulary=vocabulary, options=options, must_include=must_include, ban=ban)
        while engine.open:
            engine.step()
        return _results(engine, pictures=len(grid_BPC), options=options)


def stream(
    decoder: StepDecoder,
    grid_1PC: Array,
    *,
    vocabulary: SearchVocabulary,
    options: SearchOptions,
    ban: Sequence[Phrase] = (),
) -> Iterator[StreamedWord]:
    """Find one caption of one picture and hand out each word as it is found; the same words as from `search`.

    Args:
        decoder: any decoder.
        grid_1PC: features of one picture, on the decoder's device.
        vocabulary: which tokens there are.
        options: how to search; `method` "greedy" or "sample", `n_best` 1.
        ban: the phrases of `options.ban` as tokens.

    Returns:
        An iterator over the words. It raises what `search` raises at the step that shows it.

    Raises:
        ConfigError: for a beam, more than one caption, or more than one picture.
        SearchError: when the demands exclude each other, or the decoder cannot write `max_words`.
    """
    if options.method == "beam":
        raise ConfigError("a beam knows no word before its end; stream with method='greedy' or method='sample'")
    if options.n_best != 1:
        raise ConfigError(f"a stream is one caption, got n_best={options.n_best}; set n_best=1")
    if len(grid_1PC) != 1:
        raise ConfigError(f"a stream is of one picture, got {len(grid_1PC)}")
    with inference(grid_1PC):
        engine = _start(decoder, grid_1PC, vocabulary=vocabulary, options=options, must_include=(), ban=ban)
    return _words(engine, options, like=grid_1PC)


def _words(engine: Engine, options: SearchOptions, *, like: Array) -> Iterator[StreamedWord]:
    while True:
        # Not around the loop: between two words the caller's code runs, and it is not to run in inference
        # mode.
        with inference(like):
            engine.step()
            word = engine.trace.last_word(row=0) if engine.open else None
        if word is None:
            break
        yield word
    _require_endings([engine.trace.endings], engine.constraints.demands, options)


def _start(
    decoder: StepDecoder,
    grid_BPC: Array,
    *,
    vocabulary: SearchVocabulary,
    options: SearchOptions,
    must_include: Sequence[Phrase],
    ban: Sequence[Phrase],
) -> Engine:
    _check(decoder, options, must_include)
    demands = Demands(
        min_words=options.min_words,
        max_words=options.max_words,
        no_repeat_ngram=options.no_repeat_ngram,
        must_include=tuple(must_include),
        ban=tuple(ban),
    )
    constraints = Constraints(demands, vocabulary, like=grid_BPC)
    # Greedy search is a beam of one.
    sample = options.method == "sample"
    method: Method = SampleMethod(options) if sample else BeamMethod(options, constraints, like=grid_BPC)
    return Engine(decoder, grid_BPC, vocabulary=vocabulary, constraints=constraints, method=method)


def _check(decoder: StepDecoder, options: SearchOptions, must_include: Sequence[Phrase]) -> None:
    if options.max_words + 1 > decoder.max_tokens:
        raise SearchError(
            f"max_words={options.max_words} needs {options.max_words + 1} tokens with the end, but this "
            f"model writes at most {decoder.max_tokens}; set max_words to at most {decoder.max_tokens - 1}"
        )
    if must_include and (options.method != "beam" or options.groups != 1):
        raise ConfigError(
            f"must_include needs method='beam' with groups=1, got method={options.method!r} and groups={options.groups}"
        )
    given = {phrase.text for phrase in must_include}
    for text in options.must_include:
        if text not in given:  # a demand must never be dropped in silence
            raise ConfigError(f"must_include {text!r} of the options came without its tokens; pass it as a Phrase")


def _results(engine: Engine, *, pictures: int, options: SearchOptions) -> list[list[Hypothesis]]:
    """Rank the captions of each picture, drop repeated ones, and collect the maps of those returned."""
    trace = engine.trace
    endings = trace.endings
    length_penalty = options.length_penalty if options.method == "beam" else 1.0
    of_picture: list[dict[tuple[int, ...], tuple[Ending, Path]]] = [{} for _ in range(pictures)]

    def rank(found: tuple[Ending, Path]) -> tuple[bool, float]:
        ending, path = found
        score = rank_score(path.log_probabilities, ending.end_log_probability, length_penalty=length_penalty)
        return ending.end_log_probability is None, -score

    for ending, path in sorted(zip(endings, trace.paths(endings), strict=True), key=rank):
        of_picture[ending.picture].setdefault(path.token_ids, (ending, path))
    _require_endings(of_picture, engine.constraints.demands, options)
    best = [list(distinct.values())[: options.n_best] for distinct in of_picture]
    hypotheses = iter(trace.hypotheses([found for chosen in best for found in chosen]))
    return [[next(hypotheses) for _ in chosen] for chosen in best]


def _require_endings(of_picture: Sequence[Sized], demands: Demands, options: SearchOptions) -> None:
    for picture, endings in enumerate(of_picture):
        if not endings:
            wider = f"; raise beam_size={options.beam_size}" if options.method == "beam" else "; use method='beam'"
            raise SearchError(
                f"picture {picture} of the batch: every caption in the search ran out of words before it met "
                f"{demands}{wider}, or drop or change one of them",
                picture=picture,
            )
