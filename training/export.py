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
from captioner.config import ModelConfig, SearchOptions
from captioner.errors import CheckpointError, DataError
from captioner.metrics import Evaluation, evaluate, java
from captioner.model import CaptionModel, build_model
from captioner.tokenizer import Tokenizer
from training.data import CaptionData
from training.sources import CaptionedPicture

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
        tokenizer = Tokenizer.from_json(description["tokenizer"])
        return Run(Checkpoint(model.eval(), tokenizer), origin["source"], origin["data_sha256"], description["command"])
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
* It knows {config.vocabulary_size - 4} words, and only what its training pictures show. On others it still writes a
  fluent sentence, which is then wrong. Models of this kind cannot read text, count badly, and guess sex and age.
* The maps show where the decoder read from the grid. They tell where, not why.
* Terms: those of the training data hold for the weights too.
"""


def _interval(evaluation: Evaluation, metric: str) -> str:
    interval = evaluation.intervals.get(metric)
    return "" if interval is None else f"{interval.low:.1f} to {interval.high:.1f}"


def export(
    checkpoints: Sequence[Path],
    folder: Path,
    *,
    data_root: str | None = None,
    name: str = "Captioner model",
    data: str = "",
    command: str | None = None,
    search: SearchOptions | None = None,
    half: bool = False,
    notes: str = "",
) -> Evaluation:
    """Write the model folder of a run, evaluated as it ships.

    Args:
        checkpoints: of one run; several are averaged.
        folder: to write.
        data_root: folder of the data, whose dev pictures give the scores; None: where it was in training.
        name: of the model, for the card.
        data: what it was trained on and under which terms, for the card.
        command: that trained it, for the card; None: as the run noted it.
        search: how the dev pictures are captioned.
        half: store matrices as float16.
        notes: for the card, such as time and machine.

    Returns:
        The scores.

    Raises:
        CheckpointError: when a checkpoint cannot be read or the folder not be written.
        DataError: when the data cannot be read, or is not what the run was trained on.
    """
    runs = [load_run(path) for path in checkpoints]
    run, search = runs[0], search or SearchOptions()
    trained = average([run.checkpoint for run in runs])
    source = CaptionData(**{**run.data, **({} if data_root is None else {"root": data_root})})
    source.setup("validate")
    if source.data_hash() != run.data_sha256:
        raise DataError(f"{source.source.root}: not the data of the run: its names or captions differ; see --data-root")
    save_checkpoint(trained, folder, half=half)
    captioner = Captioner.load(folder)  # with the rounding of the stored weights
    given = {k: v for k, v in search.to_dict().items() if v != getattr(SearchOptions(), k)}
    predictions = caption_pictures(captioner, source.pictures["dev"], **given)
    references = {picture: texts for picture, texts in source.references().items() if picture in predictions}
    evaluation = evaluate(predictions, references, meteor=java.missing("METEOR") is None)
    train = source.pictures["train"]
    card = model_card(
        captioner.model,
        CardFacts(
            name=name,
            command=command or run.command,
            data=f"{data or 'Data: not described; `export --data` would say what it is.'} {len(train)} pictures with "
            f"{sum(len(picture.captions) for picture in train)} captions, format {source.source.format}.",
            data_sha256=run.data_sha256,
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
    parser.add_argument("--data-root", help="folder of the data, if it is not where it was in training")
    parser.add_argument("--name", default="Captioner model", help="name on the card")
    parser.add_argument("--data", default="", help="what it was trained on and under which terms, for the card")
    parser.add_argument("--command", help="command that trained it, for the card (default: as the run noted it)")
    parser.add_argument("--beam-size", type=int, default=SearchOptions().beam_size)
    parser.add_argument("--notes", default="", help="for the card, such as time and machine")
    parser.add_argument("--half", action="store_true", help="store matrices as float16")
    given = vars(parser.parse_args(arguments))
    search = SearchOptions(beam_size=given.pop("beam_size"))
    evaluation = export(given.pop("checkpoints"), given.pop("folder"), search=search, **given)
    sys.stdout.write(evaluation.table() + "\n")
    return 0
