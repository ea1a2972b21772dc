"""The model card: what a model is, how good it is, where it came from, and what it does not know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import lightning
import torch
from torch import nn

from captioner.config import SearchDefaults
from captioner.metrics import Evaluation
from captioner.model import CaptionModel

MAPS = "maps.png"
LIMITS = """It knows {words} words, and only what its training pictures show. On others it still writes a fluent
  sentence, which is then wrong. Models of this kind cannot read text, count badly, and guess sex and age."""


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
        sections: more of the card, between scores and training: heading and text.
        limits: what the model does not know, in words; empty: what holds for all.
        pictured: whether a picture of its maps lies beside the card.
        averaged: names of the checkpoints whose mean its weights are; of one, none are told.
    """

    name: str
    command: str
    data: str
    data_sha256: str
    evaluation: Evaluation
    search: SearchDefaults
    samples: Sequence[tuple[str, str]] = ()
    notes: str = ""
    sections: Sequence[tuple[str, str]] = ()
    limits: str = ""
    pictured: bool = False
    averaged: Sequence[str] = ()


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
    sections = "".join(f"\n## {heading}\n\n{text}\n" for heading, text in facts.sections)
    maps = f"\n![What it wrote of a photo, and where it looked for each word]({MAPS})\n" if facts.pictured else ""
    settings = json.dumps(dataclasses.asdict(config.decoder_settings))
    chosen = {k: v for k, v in facts.search.to_dict().items() if v != getattr(SearchDefaults(), k)}
    mean = f"\n* Weights: the mean of {', '.join(facts.averaged)}." if len(facts.averaged) > 1 else ""
    return f"""# {facts.name}

A picture in, an English sentence out, and for every word a map of where the model looked.
{maps}
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
{sections}
## Training

{facts.data}

* Command: `{facts.command}`{mean}
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
* {facts.limits or LIMITS.format(words=config.vocabulary_size - 4)}
* The maps show where the decoder read from the grid. They tell where, not why.
* Terms: those of the training data hold for the weights too.
"""


def _interval(evaluation: Evaluation, metric: str) -> str:
    interval = evaluation.intervals.get(metric)
    return "" if interval is None else f"{interval.low:.1f} to {interval.high:.1f}"
