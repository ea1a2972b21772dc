"""A run's checkpoint → the product's model folder with a filled model card."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from captioner import Captioner
from captioner.caption import Caption
from captioner.checkpoint import Checkpoint, save_checkpoint
from captioner.config import EncoderConfig, ModelConfig, PreprocessingConfig, SearchOptions
from captioner.errors import CheckpointError
from captioner.metrics import Evaluation, evaluate, java
from captioner.model import CaptionModel, build_model
from captioner.tokenizer import Tokenizer
from training.augmentation import Augmentation
from training.data import CaptionedPicture, Flickr8kDataModule

_PREFIX = "model."
SAMPLES = 20
# Settings objects that Lightning writes into its checkpoints; nothing else is unpickled.
_SETTINGS: list[Any] = [EncoderConfig, SearchOptions, PreprocessingConfig, Augmentation]


def load_run(path: Path) -> Checkpoint:
    """Read the model out of a checkpoint of `fit`; with weight averaging, the averaged one.

    Args:
        path: the `.ckpt` file.

    Returns:
        The model in evaluation mode and its vocabulary.

    Raises:
        CheckpointError: when the file is missing, damaged, or was not written by our training.
    """
    try:
        with torch.serialization.safe_globals(_SETTINGS):
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
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}: no such checkpoint; name a .ckpt file of a run folder") from err
    except Exception as err:  # zip, pickle, missing keys, other shapes: whatever a foreign file brings
        raise CheckpointError(
            f"{path}: not a checkpoint of `python -m training fit`: {str(err).splitlines()[0] if str(err) else err!r}"
        ) from err
    return Checkpoint(model.eval(), Tokenizer.from_json(description["tokenizer"]))


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


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the model card tells of a training.

    Args:
        name: of the model.
        command: that trained it.
        data: what it was trained on, with its terms.
        data_sha256: of names and captions.
        evaluation: on pictures that it was not trained on.
        search: how they were captioned.
        samples: names and captions of pictures that were not chosen for it.
        notes: on the training, such as time and machine.
    """

    name: str
    command: str
    data: str
    data_sha256: str
    evaluation: Evaluation
    search: SearchOptions
    samples: Sequence[tuple[str, str]] = ()
    notes: str = ""


def model_card(model: CaptionModel, facts: CardFacts) -> str:
    """Return the text of the model card.

    Args:
        model: whose card it is.
        facts: of its training.

    Returns:
        Markdown.
    """

    def millions(module: nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"

    config, scores, language = model.config, facts.evaluation.scores, facts.evaluation.language
    rows = "\n".join(
        f"| {metric} | {value:.1f} | {_interval(facts.evaluation, metric)} |" for metric, value in scores.items()
    )
    samples = "\n".join(f"| {name} | {text} |" for name, text in facts.samples)
    settings = json.dumps(dataclasses.asdict(config.decoder_settings))
    chosen = {k: v for k, v in facts.search.to_dict().items() if v != getattr(SearchOptions(), k)}
    return f"""# {facts.name}

A picture in, an English sentence out, and for every word a map of where the model looked.

| | |
|---|---|
| encoder | {config.encoder.backbone}, stride {config.encoder.stride}, {millions(model.encoder)} parameters |
| decoder | {config.decoder} {settings}, {millions(model.decoder)} parameters |
| input | the whole picture squashed to {config.preprocessing.side_px} x {config.preprocessing.side_px} pixels |
| attention grid | {model.encoder.grid_hw[0]} x {model.encoder.grid_hw[1]} |
| vocabulary | {config.vocabulary_size} tokens |

## Scores

On the dev split, not trained on; {facts.evaluation.card.pictures} pictures,
{facts.evaluation.card.references} references; beam {facts.search.beam_size}, other search settings as by default{
        "" if set(chosen) <= {"beam_size"} else f" but {chosen}"
    }; x100.

| metric | score | 95 % interval |
|---|---|---|
{rows}

Distinct captions {language.distinct:.1%}, with a phrase said twice {language.repeated:.1%}, broken off
{language.unfinished:.1%}, mean length {language.mean_words:.1f} words, {language.vocabulary} different words used.

Tokenizer: {facts.evaluation.card.tokenizer}. CIDEr-D document frequencies:
{facts.evaluation.card.document_frequencies}. The split was also watched during training to choose what ships, so the
scores lean a little to the good side.

## Training

{facts.data}

* Command: `{facts.command}`
* SHA-256 of names and captions: `{facts.data_sha256}`
* Lightning {lightning.__version__}, torch {torch.__version__}. {facts.notes}

## What it writes

The first {len(facts.samples)} pictures of the split, not chosen:

| picture | caption |
|---|---|
{samples}

## Use, and what it does not know

* Meant for: trying out and teaching image captioning and attention; drafts that a person reads before use.
* Not meant for: descriptions that people rely on unread, identifying persons, or decisions about them.
* It has seen everyday outdoor photos of people, children, dogs and sport, and knows {config.vocabulary_size - 4} words.
  On other pictures (indoor objects, food, documents, drawings, screens) it still writes a fluent sentence about people
  or dogs, which is wrong. It cannot read text, counts badly beyond two, and guesses sex and age.
* The maps show where the decoder read from the grid. They tell where, not why.
* Terms: the weights are derived from Flickr8k, which is for non-commercial research and education.
"""


def _interval(evaluation: Evaluation, metric: str) -> str:
    interval = evaluation.intervals.get(metric)
    return "" if interval is None else f"{interval.low:.1f} to {interval.high:.1f}"


def export(
    checkpoints: Sequence[Path],
    folder: Path,
    *,
    data_root: Path,
    name: str,
    command: str,
    search: SearchOptions,
    half: bool,
    notes: str = "",
) -> Evaluation:
    """Write the model folder of a run, evaluated as it ships.

    Args:
        checkpoints: of one run; several are averaged.
        folder: to write.
        data_root: Flickr8k, whose dev pictures give the scores.
        name: of the model, for the card.
        command: that trained it, for the card.
        search: how the dev pictures are captioned.
        half: store matrices as float16.
        notes: for the card, such as time and machine.

    Returns:
        The scores.

    Raises:
        CheckpointError: when a checkpoint cannot be read or the folder not be written.
        DataError: when the data cannot be read.
    """
    trained = average([load_run(path) for path in checkpoints])
    save_checkpoint(trained, folder, half=half)
    data = Flickr8kDataModule(str(data_root))
    data.setup("validate")
    captioner = Captioner.load(folder)  # with the rounding of the stored weights
    given = {k: v for k, v in search.to_dict().items() if v != getattr(SearchOptions(), k)}
    predictions = caption_pictures(captioner, data.pictures["dev"], **given)
    evaluation = evaluate(predictions, data.references(), meteor=java.missing("METEOR") is None)
    card = model_card(
        captioner.model,
        CardFacts(
            name=name,
            command=command,
            data="Flickr8k (Hodosh, Young, Hockenmaier, JAIR 2013), the 6,000 photos and 30,000 captions of the "
            "official training split, photos squashed to 224 x 224; the encoder began with ImageNet-1k weights.",
            data_sha256=data.data_hash(),
            evaluation=evaluation,
            search=search,
            samples=list(predictions.items())[:SAMPLES],
            notes=notes,
        ),
    )
    save_checkpoint(Checkpoint(trained.model, trained.tokenizer, card), folder, half=half)
    return evaluation


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
    parser.add_argument("--data-root", type=Path, required=True, help="Flickr8k, for the scores on its dev split")
    parser.add_argument("--name", default="Captioner model", help="name on the card")
    parser.add_argument("--command", required=True, help="command that trained it, for the card")
    parser.add_argument("--beam-size", type=int, default=SearchOptions().beam_size)
    parser.add_argument("--notes", default="", help="for the card, such as time and machine")
    parser.add_argument("--half", action="store_true", help="store matrices as float16")
    given = parser.parse_args(arguments)
    evaluation = export(
        given.checkpoints,
        given.folder,
        data_root=given.data_root,
        name=given.name,
        command=given.command,
        search=SearchOptions(beam_size=given.beam_size),
        half=given.half,
        notes=given.notes,
    )
    sys.stdout.write(evaluation.table() + "\n")
    return 0
