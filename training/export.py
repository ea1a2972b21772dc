"""A run's checkpoint → the product's model folder with a filled model card."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from captioner import Captioner
from captioner.caption import Caption
from captioner.checkpoint import Checkpoint, save_checkpoint
from captioner.config import ModelConfig, SearchDefaults
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.images import Source
from captioner.metrics import Evaluation, evaluate, java
from captioner.model import CaptionModel, build_model
from captioner.tokenizer import Tokenizer
from training.calibration import FEWEST_DEV, FEWEST_TRAIN, calibrate
from training.card import MAPS, CardFacts, model_card
from training.data import CaptionData
from training.pointing import pointing
from training.sources import CaptionedPicture, DataSource, read_source
from training.survey import survey

_PREFIX = "model."
SAMPLES = 20


@dataclass(frozen=True)
class Run:
    """What a checkpoint of `fit` holds.

    Args:
        checkpoint: the model in evaluation mode, with weight averaging the averaged one, and its vocabulary.
        data: where the pictures came from, as arguments of `CaptionData`.
        data_sha256: of names and captions.
        command: that trained it.
    """

    checkpoint: Checkpoint
    data: dict[str, Any]
    data_sha256: str
    command: str


def load_run(path: Path) -> Run:
    """Read the model out of a checkpoint of `fit`, and what it was trained on.

    Args:
        path: the `.ckpt` file.

    Returns:
        Model and origin.

    Raises:
        CheckpointError: when the file is missing, damaged, or was not written by our training.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        description = content["captioner"]
        config = ModelConfig.from_dict(description["model"])
        model: CaptionModel = build_model(config)
        weights = {
            name.removeprefix(_PREFIX): value
            for name, value in content["state_dict"].items()
            if name.startswith(_PREFIX)
        }
        model.load_state_dict(weights, strict=True)
        origin = content["CaptionData"]
        data = origin["source"] | ({"extra": DataSource(**origin["extra"])} if "extra" in origin else {})
        tokenizer = Tokenizer.from_json(description["tokenizer"])
        return Run(Checkpoint(model.eval(), tokenizer), data, origin["data_sha256"], description["command"])
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: no such checkpoint; name a .ckpt file of a run folder") from err
    except Exception as err:  # zip, pickle, missing keys, other shapes: whatever a foreign file brings
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of `python -m training fit`; name a .ckpt file of a run folder"
        ) from err


def average(checkpoints: Sequence[Checkpoint]) -> Checkpoint:
    """Return the model whose weights are the mean of several of one run (Izmailov et al. 2018).

    Args:
        checkpoints: of one run, at least one.

    Returns:
        The first with averaged weights.

    Raises:
        CheckpointError: when they are not of one shape and vocabulary.
    """
    first = checkpoints[0]
    if any(
        other.model.config != first.model.config or other.tokenizer.to_json() != first.tokenizer.to_json()
        for other in checkpoints
    ):
        raise CheckpointError("only checkpoints of one run, with one shape and vocabulary, can be averaged")
    states = [checkpoint.model.state_dict() for checkpoint in checkpoints]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    first.model.load_state_dict(mean)
    return first


def caption_pictures(captioner: Captioner, pictures: Sequence[CaptionedPicture], **options: Any) -> dict[str, str]:
    """Return the caption of every picture by name.

    Args:
        captioner: the model.
        pictures: the photos.
        **options: search options.

    Returns:
        Name → sentence.
    """
    found = captioner.caption_batch([picture.path for picture in pictures], **options)
    return {
        picture.name: caption.text
        for picture, caption in zip(pictures, found, strict=True)
        if isinstance(caption, Caption)
    }


def data_of_run(run: Run, *, data_root: str | None = None, extra_images: str | None = None) -> CaptionData:
    """Read the data of a run again.

    Args:
        run: of `load_run`.
        data_root: folder of the data; None: where it was in training.
        extra_images: folder of the extra pictures, relative to their root, or absolute; None: where it was in training.

    Returns:
        The same names and captions in the same splits.

    Raises:
        ConfigError: for `extra_images` where there is no extra data, or one whose format has no such folder.
        DataError: when the data cannot be read, or is not what the run was trained on.
    """
    arguments = dict(run.data)
    if data_root is not None:
        arguments["root"] = data_root
    if extra_images is not None:
        if "extra" not in arguments:
            raise ConfigError(f"--extra-images {extra_images}: the run had no data.extra; leave it out")
        arguments["extra"] = dataclasses.replace(arguments["extra"], images=extra_images)
    data = CaptionData(**arguments)
    data.setup("validate")
    if data.data_hash() != run.data_sha256:
        roots = " and ".join(source.root for source in (data.source, data.extra) if source is not None)
        raise DataError(
            f"{roots}: not the data of the run: names or captions differ; see --data-root and --extra-images"
        )
    return data


def export(
    checkpoints: Sequence[Path],
    folder: Path,
    *,
    data_root: str | None = None,
    extra_images: str | None = None,
    name: str = "Captioner model",
    data: str = "",
    command: str | None = None,
    search: SearchDefaults | None = None,
    half: bool = False,
    notes: str = "",
    limits: str = "",
    photo: Path | None = None,
) -> Evaluation:
    """Write the model folder of a run, evaluated as it ships.

    Args:
        checkpoints: of one run; several are averaged.
        folder: to write.
        data_root: folder of the data, whose dev pictures give the scores; None: where it was in training.
        extra_images: folder of the pictures of `data.extra`, relative to the root of these, or absolute; None: where
            it was in training.
        name: of the model, for the card.
        data: what it was trained on and under which terms, for the card.
        command: that trained it, for the card; None: as the run noted it.
        search: how the dev pictures are captioned, and the model searches from then on.
        half: store matrices as float16.
        notes: for the card, such as time and machine.
        limits: what the model does not know, for the card.
        photo: whose maps are drawn beside the card.

    Returns:
        The scores.

    Raises:
        CheckpointError: when a checkpoint cannot be read or the folder not be written.
        ConfigError: for `extra_images` of a run without extra data.
        DataError: when the data cannot be read, or is not what the run was trained on.
    """
    runs = [load_run(path) for path in checkpoints]
    run, search = runs[0], search or SearchDefaults()
    checkpoint = average([run.checkpoint for run in runs])
    checkpoint.model.config = dataclasses.replace(checkpoint.model.config, search=search)
    source = data_of_run(run, data_root=data_root, extra_images=extra_images)
    save_checkpoint(checkpoint, folder, half=half)
    train, dev = source.pictures["train"], source.pictures["dev"]
    sections = []
    if len(train) >= FEWEST_TRAIN and len(dev) >= FEWEST_DEV:
        # What is calibrated and measured is what is stored: the rounded weights.
        try:
            checkpoint, report = calibrate(Captioner.load(folder), train=train, dev=dev)
            save_checkpoint(checkpoint, folder, half=half)
            sections.append(("Confidence", report.sentence()))
        except DataError as err:  # the model is none the worse for it
            sections.append(("Confidence", f"None: {err}."))
    captioner = Captioner.load(folder)
    predictions = caption_pictures(captioner, dev)
    references = {picture: texts for picture, texts in source.references().items() if picture in predictions}
    evaluation = evaluate(predictions, references, meteor=java.missing("METEOR") is None)
    sections += [*_pointing_section(captioner, dev), *_wider_section(captioner, source.extra)]
    if photo is not None:
        _draw_maps(captioner, photo, folder / MAPS)
    formats = " and ".join(part.format for part in (source.source, source.extra) if part is not None)
    card = model_card(
        captioner.model,
        CardFacts(
            name=name,
            command=command or run.command,
            data=f"{data or 'Data: not described; `export --data` would say what it is.'} {len(train)} pictures with "
            f"{sum(len(picture.captions) for picture in train)} captions, format {formats}.",
            data_sha256=run.data_sha256,
            evaluation=evaluation,
            search=search,
            samples=list(predictions.items())[:SAMPLES],
            notes=notes,
            sections=sections,
            limits=limits,
            pictured=photo is not None,
            averaged=[path.name for path in checkpoints],
        ),
    )
    save_checkpoint(Checkpoint(checkpoint.model, checkpoint.tokenizer, card), folder, half=half)
    return evaluation


def _draw_maps(captioner: Captioner, photo: Path, path: Path) -> None:
    """Draw the figure of a caption, in 256 colours: a quarter of the size, and a model folder may have a limit."""
    content = io.BytesIO()
    captioner.caption(photo).figure().savefig(content, format="png", dpi=80)
    Image.open(content).convert("RGB").quantize(256).save(path, optimize=True)


def _pointing_section(captioner: Captioner, dev: Sequence[CaptionedPicture]) -> list[tuple[str, str]]:
    """Return what the card says of how well maps point; nothing of a model that never looks, or for few pictures."""
    if captioner.config.decoder == "mean" or len(dev) < FEWEST_DEV:
        return []
    found = pointing(captioner, dev)
    text = (
        f"In {found.mosaics} mosaics of 2 x 2 dev photos, with a true caption of one of them scored, {found.share:.1%} "
        f"(95 % interval {found.interval.low:.1%} to {found.interval.high:.1%}) of the attention of content words "
        "falls into the right quadrant; by chance it would be 25 %."
    )
    return [("Where it looks", text)]


def _wider_section(captioner: Captioner, extra: DataSource | None) -> list[tuple[str, str]]:
    """Return what the card says of the dev pictures of the extra data."""
    if extra is None:
        return []
    pictures = read_source(extra).pictures["dev"]
    paths: list[Source] = [picture.path for picture in pictures]
    found = [result for result in captioner.caption_batch(paths, on_error="return") if isinstance(result, Caption)]
    if len(found) < len(pictures):  # bad pictures were counted when the training read them
        return []
    predictions = {picture.name: caption.text for picture, caption in zip(pictures, found, strict=True)}
    references = {picture.name: picture.captions for picture in pictures}
    scores = evaluate(predictions, references).scores
    described = survey(found)
    sure = "" if described.mean_confidence is None else f"; mean confidence {described.mean_confidence:.2f}"
    text = (
        f"On the {described.pictures} dev pictures of the extra data, not trained on, with "
        f"{sum(map(len, references.values()))} references: BLEU-4 {scores['BLEU-4']:.1f}, CIDEr-D "
        f'{scores["CIDEr-D"]:.1f}; distinct captions {described.distinct:.1%}, beginning "a man in a" '
        f"{described.man_in_a:.1%}, {described.vocabulary} different words{sure}."
    )
    return [("Other pictures", text)]


def main(arguments: Sequence[str]) -> int:
    """Run `python -m training export`.

    Args:
        arguments: after the word export.

    Returns:
        The exit status.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="python -m training export", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help=".ckpt files of one run; several are averaged")
    parser.add_argument("--folder", type=Path, required=True, help="model folder to write")
    parser.add_argument("--data-root", help="folder of the data, if it is not where it was in training")
    parser.add_argument(
        "--extra-images",
        help="folder of the pictures of data.extra, if it is not where it was in training; relative to data.extra.root",
    )
    parser.add_argument("--name", default="Captioner model", help="name on the card")
    parser.add_argument("--data", default="", help="what it was trained on and under which terms, for the card")
    parser.add_argument("--command", help="command that trained it, for the card (default: as the run noted it)")
    for field in dataclasses.fields(SearchDefaults):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="of the search")
    parser.add_argument("--notes", default="", help="for the card, such as time and machine")
    parser.add_argument("--limits", default="", help="what the model does not know, for the card")
    parser.add_argument("--photo", type=Path, help="photo whose maps are drawn beside the card")
    parser.add_argument("--half", action="store_true", help="store matrices as float16")
    given = vars(parser.parse_args(arguments))
    search = SearchDefaults(**{field.name: given.pop(field.name) for field in dataclasses.fields(SearchDefaults)})
    evaluation = export(given.pop("checkpoints"), given.pop("folder"), search=search, **given)
    sys.stdout.write(evaluation.table() + "\n")
    return 0
