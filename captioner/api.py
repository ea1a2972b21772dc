"""`Captioner`: the Python interface. Everything else in the package stands behind it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np

from captioner.arrays import Array
from captioner.caption import Caption, Word, make_captions, make_word
from captioner.confidence import confidence
from captioner.config import ModelConfig, SearchOptions
from captioner.errors import ConfigError, ImageError, SearchError
from captioner.geometry import Geometry
from captioner.images import Picture, Source, open_picture
from captioner.model_folder import ModelFolder, copy_folder, read_folder
from captioner.prepared import PreparedPicture, prepare, prepare_side_by_side
from captioner.runtimes import Runtime, open_runtime
from captioner.search import Hypothesis, Phrase, SearchVocabulary, StreamedWord, score_tokens, search, stream
from captioner.threads import available_cpus, checked_threads
from captioner.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from captioner.checkpoint import Checkpoint
    from captioner.model import CaptionModel

BATCH_LIMIT = 65_536


class Captioner:
    """Captions pictures: a sentence, and for every word its probability and its place in the picture.

        captioner = Captioner.load()
        caption = captioner.caption("photo.jpg")
        caption.text

    Search options are keywords, the same as on the command line; see `captioner.SearchOptions` for all of them.
    Safe to call from many threads, which share the model.

    Args:
        checkpoint: model, vocabulary and card, to run in PyTorch; `load` reads a model folder.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "auto") -> None:
        from captioner.runtimes.pytorch import TorchRuntime

        self._open(TorchRuntime(checkpoint.model, device=device), checkpoint.tokenizer, checkpoint.card)
        self._model: CaptionModel | None = checkpoint.model

    def _open(self, runtime: Runtime, tokenizer: Tokenizer, card: str) -> None:
        self.runtime, self.tokenizer, self.card = runtime, tokenizer, card
        self._vocabulary = search_vocabulary(tokenizer)
        self._folder: ModelFolder | None = None
        self._threads = available_cpus()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        runtime: str = "auto",
        threads: int | None = None,
    ) -> Self:
        """Load a model.

        Args:
            source: None for the bundled model, which needs no network; a folder; or a hub id "user/name".
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
            runtime: what computes: "torch"; "onnx", ONNX Runtime on the CPU, several times as fast there; "onnx-int8",
                the same in 8 bits, for CPUs with VNNI; "auto": onnx on a CPU where the folder has ONNX graphs (see
                `captioner export`), else torch.
            threads: of the CPU to compute on, and to decode the pictures of a batch; None: the CPUs that this process
                may use, but for torch to compute on what PyTorch is set to.

        Returns:
            The captioner.

        Raises:
            CheckpointError: when the model is missing, foreign or damaged, or the hub cannot be reached.
            ConfigError: for a source that is no path, a device that is not there, or an impossible runtime or number of
                threads.
        """
        folder = read_folder(source)
        captioner = cls.__new__(cls)
        captioner._open(
            open_runtime(folder, device=device, runtime=runtime, threads=threads), folder.tokenizer, folder.card
        )
        captioner._folder, captioner._model = folder, getattr(captioner.runtime, "model", None)
        captioner._threads = checked_threads(threads)
        return captioner

    @property
    def device(self) -> str:
        """Where the model computes, such as "cpu" or "cuda:0"."""
        return self.runtime.device

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What the model could compute in, by the files that its folder held: names for `load(runtime=...)`."""
        return self._folder.runtimes if self._folder is not None else ("torch",)

    @property
    def config(self) -> ModelConfig:
        """The settings of the model."""
        return self.runtime.config

    @property
    def model(self) -> CaptionModel:
        """The model in PyTorch: the one that computes, or, with another runtime, one that is loaded when asked for."""
        if self._model is None:
            from captioner.checkpoint import load_checkpoint

            self._model = load_checkpoint(self._folder).model
        return self._model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a folder that `load` reads; save and load is the identity.

        Args:
            folder: made when it is not there.

        Raises:
            CheckpointError: when it cannot be written.
            ConfigError: when `folder` is no path.
        """
        if self._folder is not None and self.runtime.name != "torch":  # nothing can have changed the weights
            copy_folder(self._folder, folder)
            return
        from captioner.checkpoint import Checkpoint, save_checkpoint

        save_checkpoint(Checkpoint(self.model, self.tokenizer, self.card), folder)

    def caption(self, picture: Source | PreparedPicture, **options: Any) -> Caption:
        """Caption one picture.

        Args:
            picture: a path, `bytes`, a binary file, a `PIL.Image`, a `uint8` numpy array [H, W, 3], [H, W] or
                [H, W, 4], a `uint8` torch tensor [3, H, W], or what `prepare` made of one of them.
            **options: search options, such as `beam_size=5, n_best=3`; see `SearchOptions`. What is left out is as
                the model's own `config.search` says.

        Returns:
            The best caption, and up to n_best - 1 others in its `alternatives`.

        Raises:
            ImageError: when the picture cannot be read.
            ConfigError: for an unknown or impossible option.
            SearchError: when no caption can be as the options ask.
        """
        arguments = self._search_arguments(options)
        (found,) = self._run([self.prepare(picture)], *arguments)
        if isinstance(found, SearchError):
            raise found
        return found

    def caption_batch(
        self,
        pictures: Iterable[Source | PreparedPicture],
        *,
        batch_size: int = 32,
        on_error: Literal["raise", "return"] = "raise",
        **options: Any,
    ) -> Iterator[Caption | ImageError | SearchError]:
        """Caption many pictures, lazily: no more than a batch is held in memory.

        Args:
            pictures: any iterable of what `caption` takes; what it raises itself comes after the captions of the
                pictures before.
            batch_size: pictures that go through the model together.
            on_error: "raise" raises the error of a picture that cannot be read (`ImageError`) or for which no caption
                meets the options (`SearchError`) after the captions of those before it; "return" gives the error in
                the place of its caption and goes on.
            **options: search options; see `SearchOptions`.

        Returns:
            An iterator over the captions, in the order of the pictures.

        Raises:
            ConfigError: at once, for an impossible argument or option.
            SearchError: at once, for a word that the model does not know; with the first batch, for options that no
                caption of any picture can meet.
        """
        whole = isinstance(cast(object, batch_size), numbers.Integral) and not isinstance(batch_size, bool)
        if not whole or not 1 <= batch_size <= BATCH_LIMIT:
            raise ConfigError(
                f"batch_size must be a whole number, at least 1 and at most {BATCH_LIMIT}, got {batch_size!r}"
            )
        if on_error not in ("raise", "return"):
            raise ConfigError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        if _is_one_picture(pictures) or not isinstance(pictures, Iterable):
            raise ConfigError(
                "pictures must be an iterable of pictures, such as a list of paths, got one "
                f"{type(pictures).__name__}; for one picture use caption()"
            )
        return self._caption_stream(iter(pictures), int(batch_size), on_error, *self._search_arguments(options))

    def _caption_stream(
        self,
        pictures: Iterator[Source | PreparedPicture],
        batch_size: int,
        on_error: str,
        options: SearchOptions,
        must_include: Sequence[Phrase],
        ban: Sequence[Phrase],
    ) -> Iterator[Caption | ImageError | SearchError]:
        fault: Exception | None = None
        while fault is None:
            chunk, fault = _pull(pictures, batch_size)
            if not chunk and fault is None:
                return
            inputs: list[PreparedPicture | ImageError] = []
            for item in prepare_side_by_side(chunk, self.prepare, threads=self._threads):
                inputs.append(item)
                if isinstance(item, ImageError) and on_error == "raise":
                    break
            good = [item for item in inputs if not isinstance(item, ImageError)]
            results = iter(self._run(good, options, must_include, ban))
            for item in inputs:
                result = item if isinstance(item, ImageError) else next(results)
                if not isinstance(result, Caption) and on_error == "raise":
                    raise result
                yield result
        raise fault

    def features(self, pictures: Sequence[Source | PreparedPicture]) -> Tensor:
        """Return what the encoder sees: the features that the decoder attends to.

        Args:
            pictures: each as for `caption`; at least one.

        Returns:
            float32 [pictures, grid cells, channels], on the captioner's device; the cells row by row.

        Raises:
            ImageError: when a picture cannot be read.
            ConfigError: for no picture.
        """
        if not len(pictures):
            raise ConfigError("features needs at least one picture")
        import torch

        grid_BPC = self._encode([self.prepare(picture) for picture in pictures])
        return torch.from_numpy(grid_BPC) if isinstance(grid_BPC, np.ndarray) else grid_BPC

    def stream(self, picture: Source | PreparedPicture, **options: Any) -> Iterator[Word]:
        """Caption one picture and give each word as it is found.

        Args:
            picture: as for `caption`.
            **options: search options; `method` is "greedy" unless it is given, or "sample".

        Returns:
            An iterator over the words, the same as those of `caption` with the same options.

        Raises:
            ImageError: at once, when the picture cannot be read.
            ConfigError: at once, for an impossible option, or a beam search, whose words are known only at its end.
            SearchError: when no caption can be as the options ask; at once, where that does not depend on what
                the model writes.
        """
        chosen, _, ban = self._search_arguments({"method": "greedy", **options})
        prepared = self.prepare(picture)
        # It checks the options and starts the search here and now, not when the first word is asked for.
        found = stream(
            self.runtime.decoder,
            self._encode([prepared]),
            vocabulary=self._vocabulary,
            options=chosen,
            ban=ban,
        )
        return self._readable(found)

    def _readable(self, found: Iterator[StreamedWord]) -> Iterator[Word]:
        for index, word in enumerate(found):
            text = self.tokenizer.word(word.token_id)
            if index == 0:  # the one with the capital letter
                (text,) = self.tokenizer.words([word.token_id])
            yield make_word(
                text,
                word.log_probability,
                word.attention_P,
                word.attention_heads_LHP,
                self.runtime.grid_hw,
            )

    def score(self, picture: Source | PreparedPicture, sentence: str) -> Caption:
        """Read a given sentence as the picture's caption: how probable is each word, and where would it look?

        Args:
            picture: as for `caption`.
            sentence: words that the model knows; capitals and punctuation do not matter.

        Returns:
            The caption of these words, with score, probabilities and maps.

        Raises:
            ImageError: when the picture cannot be read.
            SearchError: when the sentence is empty, too long, or has a word that the model does not know.
        """
        phrase = self._sentence(sentence)
        prepared = self.prepare(picture)
        grid_1PC = self._encode([prepared])
        hypothesis = score_tokens(
            self.runtime.decoder, grid_1PC, vocabulary=self._vocabulary, token_ids=phrase.token_ids
        )
        return self._captions([prepared], grid_1PC, [[hypothesis]])[0]

    def search_options(self, **options: Any) -> SearchOptions:
        """Check search options and complete them: what is left out is as the model's own `config.search` says.

        Args:
            **options: search options; see `SearchOptions`.

        Returns:
            All of them.

        Raises:
            ConfigError: for an unknown or impossible option.
            SearchError: for a word that the model does not know.
        """
        return self._search_arguments(options)[0]

    def check_sentence(self, sentence: str) -> None:
        """Check that `score` can read a sentence.

        Args:
            sentence: as for `score`.

        Raises:
            SearchError: when it is empty, too long, or has a word that the model does not know.
        """
        self._sentence(sentence)

    def _sentence(self, sentence: str) -> Phrase:
        phrase = self._phrase(sentence, "sentence")
        limit = self.runtime.decoder.max_tokens - 1
        if len(phrase.token_ids) > limit:
            raise SearchError(
                f"the sentence has {len(phrase.token_ids)} words, this model reads at most {limit}; shorten it"
            )
        return phrase

    def _search_arguments(self, options: dict[str, Any]) -> tuple[SearchOptions, list[Phrase], list[Phrase]]:
        defaults = self.config.search.to_dict()
        defaults["max_words"] = min(defaults["max_words"], self.config.max_tokens - 1)
        chosen = SearchOptions.from_dict({**defaults, **options})
        must_include = [self._phrase(text, "must_include") for text in chosen.must_include]
        # What holds a word that the model does not know can never be written: it is banned already.
        ban = [self._phrase(text, "ban") for text in chosen.ban if not self.tokenizer.unknown_words(text)]
        return chosen, must_include, ban

    def _phrase(self, text: str, name: str) -> Phrase:
        token_ids = self.tokenizer.encode(text) if isinstance(text, str) else ()
        if not token_ids:
            raise SearchError(f"{name} must hold at least one word, got {text!r}")
        unknown = self.tokenizer.unknown_words(text)
        if unknown:
            raise SearchError(
                f"{name}: this model does not know {', '.join(map(repr, unknown))}; its vocabulary has "
                f"{self.tokenizer.vocabulary_size} words: choose another word"
            )
        return Phrase(text, token_ids)

    def prepare(self, picture: Source | PreparedPicture) -> PreparedPicture:
        """Decode and resize a picture for this model; what comes out is a picture for every method too.

        Without a captioner at hand, as in another process: `captioner.prepared.prepare(picture,
        config.preprocessing)`.

        Args:
            picture: as for `caption`.

        Returns:
            The prepared picture; one that is prepared already as it is.

        Raises:
            ImageError: when the picture cannot be read.
            ConfigError: when it was prepared for a model with another side.
        """
        config = self.config.preprocessing
        if not isinstance(picture, PreparedPicture):
            return prepare(picture, config)
        if picture.pixels_u8.shape != (3, config.side_px, config.side_px):
            raise ConfigError(
                f"{picture.name}: prepared as {list(picture.pixels_u8.shape)}, this model takes "
                f"{[3, config.side_px, config.side_px]}; prepare it with this model's config.preprocessing"
            )
        return picture

    def open(self, picture: Source, *, name: str | None = None, side_px: int | None = None) -> Picture:
        """Open a picture to show it: `captioner.images.open_picture`, which a service does within its limits.

        Args:
            picture: as for `caption`.
            name: what to call it in messages; default: its path, or "<bytes>" and the like.
            side_px: the side that is needed; a larger JPEG is decoded at reduced scale.

        Returns:
            The picture, upright.

        Raises:
            ImageError: when it cannot be read.
        """
        return open_picture(picture, name=name, side_px=side_px)

    def _geometry(self, picture: PreparedPicture) -> Geometry:
        side_px = self.config.preprocessing.side_px
        return Geometry(
            picture_hw_px=picture.picture_hw_px,
            input_hw_px=(side_px, side_px),
            grid_hw=self.runtime.grid_hw,
        )

    def _encode(self, inputs: Sequence[PreparedPicture]) -> Array:
        return self.runtime.encode(np.stack([item.pixels_u8 for item in inputs]))

    def _run(
        self,
        inputs: Sequence[PreparedPicture],
        options: SearchOptions,
        must_include: Sequence[Phrase],
        ban: Sequence[Phrase],
    ) -> list[Caption | SearchError]:
        """Return the caption of each picture, or why the search found none for it."""
        if not inputs:
            return []
        try:
            with _memory_fault_named(options, pictures=len(inputs)):
                grid_BPC = self._encode(inputs)
                found = search(
                    self.runtime.decoder,
                    grid_BPC,
                    vocabulary=self._vocabulary,
                    options=options,
                    must_include=must_include,
                    ban=ban,
                )
        except SearchError as err:
            if err.picture is None:  # no picture is to blame
                raise
            if len(inputs) > 1:  # the others must not be lost
                return [result for item in inputs for result in self._run([item], options, must_include, ban)]
            named = SearchError(f"{inputs[0].name}: {str(err).removeprefix('picture 0 of the batch: ')}", picture=0)
            named.__cause__ = err
            return [named]
        return [*self._captions(inputs, grid_BPC, found)]

    def _captions(
        self, inputs: Sequence[PreparedPicture], grid_BPC: Array, found: Sequence[list[Hypothesis]]
    ) -> list[Caption]:
        return [
            make_captions(
                hypotheses,
                tokenizer=self.tokenizer,
                geometry=self._geometry(item),
                picture=item.source,
                confidence_of=functools.partial(self._confidence, strangeness=strange),
            )
            for item, hypotheses, strange in zip(inputs, found, self.runtime.strangeness(grid_BPC), strict=True)
        ]

    def _confidence(self, hypothesis: Hypothesis, *, strangeness: float | None) -> float | None:
        config = self.config.confidence
        if config is None or strangeness is None:
            return None
        return confidence(
            config,
            score=hypothesis.score,
            log_probabilities=hypothesis.log_probabilities,
            strangeness=strangeness,
        )


def _pull(
    pictures: Iterator[Source | PreparedPicture], count: int
) -> tuple[list[Source | PreparedPicture], Exception | None]:
    """Return the next pictures, at most `count`, and what the iterator raised after them."""
    chunk: list[Source | PreparedPicture] = []
    try:
        for picture in itertools.islice(pictures, count):
            chunk.append(picture)
    except Exception as err:
        return chunk, err
    return chunk, None


@contextlib.contextmanager
def _memory_fault_named(options: SearchOptions, *, pictures: int) -> Iterator[None]:
    """Turn a search that does not fit into memory into a `SearchError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as err:  # torch has a RuntimeError without a class of its own for the CPU
        if not isinstance(err, MemoryError) and type(err).__name__ != "OutOfMemoryError" and "alloc" not in str(err):
            raise
        raise SearchError(
            f"not enough memory to search with beam_size={options.beam_size} for {pictures} pictures at once; "
            "lower beam_size or batch_size"
        ) from err


def _is_one_picture(value: object) -> bool:
    """Return whether a value is a picture of its own, though it can be iterated over: its bytes, lines or rows."""
    if type(value).__module__ == "torch" or (isinstance(value, np.ndarray) and value.dtype == np.uint8):
        return cast("Tensor", value).ndim < 4
    return isinstance(value, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(value, "read")


def search_vocabulary(tokenizer: Tokenizer) -> SearchVocabulary:
    """Return what a search needs to know of a vocabulary."""
    return SearchVocabulary(
        size=tokenizer.vocabulary_size,
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        never_ids=(tokenizer.pad_id, tokenizer.start_id, tokenizer.unknown_id),
    )
