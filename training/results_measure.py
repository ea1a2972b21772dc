"""What the results need to know of one model: captions of the dev pictures, scores, maps, size, speed.

Taking the measure of a model lasts minutes, so it is kept as JSON beside the model, under a name made from all that it
depends on: the model's bytes, the search, the pictures with their captions, and the version of the way of measuring.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from captioner import Captioner
from captioner.config import SearchOptions
from captioner.errors import CheckpointError
from captioner.images import open_picture
from captioner.metrics import Evaluation, Interval, Language, ProtocolCard, evaluate, java
from captioner.model_folder import CONFIG, TOKENIZER, WEIGHTS
from training.callbacks.files import not_written, write_whole
from training.callbacks.record import device_name
from training.export import caption_pictures, load_run
from training.pointing import PointingScore, pointing
from training.sources import CaptionedPicture, data_hash

# To be raised with every change of what is measured, or how.
VERSION = 1
SPEED_PICTURES, SPEED_BATCH, SPEED_PASSES = 96, 32, 3
_MODEL_FILES = (CONFIG, TOKENIZER, WEIGHTS)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model whose measure is taken.

    Args:
        name: for messages.
        path: checkpoint of a run, or model folder; what was measured lies beside it.
        sha256: of its bytes.
        load: gives the model.
    """

    name: str
    path: Path
    sha256: str
    load: Callable[[], Captioner]

    @classmethod
    def of_run(cls, name: str, checkpoint: Path) -> Subject:
        """Take a checkpoint of a run.

        Args:
            name: for messages.
            checkpoint: the `.ckpt` file.

        Returns:
            The subject.

        Raises:
            CheckpointError: when it cannot be read.
        """
        return cls(
            name=name,
            path=checkpoint,
            sha256=_digest([checkpoint]),
            load=lambda: Captioner(load_run(checkpoint).checkpoint),
        )

    @classmethod
    def of_folder(cls, name: str, folder: Path) -> Subject:
        """Take a model folder.

        Args:
            name: for messages.
            folder: that `Captioner.load` reads.

        Returns:
            The subject.

        Raises:
            CheckpointError: when it cannot be read.
        """
        sha256 = _digest([folder / name for name in _MODEL_FILES])
        return cls(name=name, path=folder.absolute(), sha256=sha256, load=lambda: Captioner.load(folder))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How every model is measured.

    Args:
        pictures: of the dev split, with their references.
        search: how they are captioned.
        mosaics: how many, for the pointing of the maps.
        speed_again: time the model anew, though all else is known.
    """

    pictures: Sequence[CaptionedPicture]
    search: SearchOptions
    mosaics: int
    speed_again: bool = False

    @property
    def references(self) -> dict[str, tuple[str, ...]]:
        """The reference captions by name of the picture."""
        return {picture.name: picture.captions for picture in self.pictures}

    @property
    def data_sha256(self) -> str:
        """Of the names and captions of the dev split."""
        return data_hash({"dev": self.pictures})

    def options(self, captioner: Captioner) -> dict[str, Any]:
        """Return the search options for one model, all of them: what is left out is as the model's own settings say.

        Args:
            captioner: whose longest caption may be shorter than that of the search.

        Returns:
            Keywords of `Captioner.caption`.
        """
        given = self.search.to_dict()
        return given | {"max_words": min(given["max_words"], captioner.config.max_tokens - 1)}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model captions.

    Args:
        per_second: captions, from decoded pictures.
        machine: that it ran on.
    """

    per_second: float
    machine: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found of a model.

    Args:
        captions: by name of the picture.
        evaluation: of these captions.
        pointing: of its maps.
        parameters: number of weights.
        speed: in captioning.
        decoder: its kind.
        encoder: its name and stride, and the side of its input.
        vocabulary_size: in tokens.
        versions: of the packages that it was measured with.
    """

    captions: Mapping[str, str]
    evaluation: Evaluation
    pointing: PointingScore
    parameters: int
    speed: Speed
    decoder: str
    encoder: str
    vocabulary_size: int
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            The fields by name.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """Read what `to_dict` gave, after its way through JSON.

        Args:
            values: the fields by name.

        Returns:
            What was found.
        """
        found = values["evaluation"]
        evaluation = Evaluation(
            found["scores"],
            {name: Interval(**interval) for name, interval in found["intervals"].items()},
            Language(**found["language"]),
            ProtocolCard(**found["card"]),
        )
        own = {"pointing": PointingScore.from_dict(values["pointing"]), "speed": Speed(**values["speed"])}
        return cls(**{**values, **own, "evaluation": evaluation})


def measure(subject: Subject, protocol: Protocol) -> Measured:
    """Return what is known of a model, taking its measure where that was not done before.

    Args:
        subject: the model.
        protocol: how it is measured.

    Returns:
        What was found.

    Raises:
        CaptionerError: when model or pictures cannot be read, or what was found cannot be written.
    """
    key = {
        "version": VERSION,
        "model_sha256": subject.sha256,
        "data_sha256": protocol.data_sha256,
        "search": protocol.search.to_dict(),
        "mosaics": protocol.mosaics,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = subject.path.with_name(f"{subject.path.name}.results-{name}.json")
    known = _read(path)
    found = known or _measure(subject, protocol)
    if known is not None and protocol.speed_again:
        _LOG.info("%s: timing", subject.name)
        found = replace(found, speed=_speed(subject.load(), protocol))
    if "METEOR" not in found.evaluation.scores and java.missing("METEOR") is None:
        found = replace(found, evaluation=evaluate(found.captions, protocol.references, meteor=True))
    if found is not known:
        _write(path, {"key": key, **found.to_dict()})
    return found


def _measure(subject: Subject, protocol: Protocol) -> Measured:
    captioner = subject.load()
    config = captioner.config
    _LOG.info("%s: captioning %d pictures", subject.name, len(protocol.pictures))
    captions = caption_pictures(captioner, protocol.pictures, **protocol.options(captioner))
    _LOG.info("%s: pointing in %d mosaics, timing", subject.name, protocol.mosaics)
    return Measured(
        captions=captions,
        evaluation=evaluate(captions, protocol.references),
        pointing=pointing(captioner, protocol.pictures, mosaics=protocol.mosaics),
        parameters=sum(parameter.numel() for parameter in captioner.model.parameters()),
        speed=_speed(captioner, protocol),
        decoder=config.decoder,
        encoder=f"{config.encoder.backbone}, stride {config.encoder.stride}, {config.preprocessing.side_px} px",
        vocabulary_size=config.vocabulary_size,
        versions={name: _version(name) for name in ("captioner", "torch")},
    )


def _speed(captioner: Captioner, protocol: Protocol) -> Speed:
    pictures = [open_picture(picture.path).image for picture in protocol.pictures[:SPEED_PICTURES]]
    seconds = []
    for _ in range(SPEED_PASSES):
        begin = time.perf_counter()
        for _caption in captioner.caption_batch(pictures, batch_size=SPEED_BATCH, **protocol.options(captioner)):
            pass
        seconds.append(time.perf_counter() - begin)
    machine = device_name(torch.device(captioner.device))
    if captioner.device == "cpu":
        machine += f", {torch.get_num_threads()} threads"
    return Speed(per_second=len(pictures) / statistics.median(seconds), machine=machine)


def _read(path: Path) -> Measured | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("key")
        return Measured.from_dict(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}: damaged ({err!r}); delete it, and it is made anew") from err


def _write(path: Path, content: Mapping[str, Any]) -> None:
    data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    try:
        write_whole(path, data)
    except OSError as err:
        raise not_written(path, len(data), err, remedy="make room, or copy the model to where you may write") from err


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as err:
            raise CheckpointError(f"{path}: cannot be read: {err.strerror}; name a run or a model folder") from err
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a checkout
        return "not installed"
