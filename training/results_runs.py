"""Run folders of `python -m training fit` → the rows of the results: one for the end of each stage.

    config.yaml    the recipe                    checkpoints/stage-1.ckpt, stage-2.ckpt ...
    run.json       seed, machine, times          scores.jsonl    when each epoch was validated

What rows must share to be compared, and what seeds of one recipe must share to be joined, is checked here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # comes with jsonargparse

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, ConfigError, DataError
from training.callbacks.last import STAGE
from training.callbacks.record import RECORD, SCORES

CONFIG_FILE, CHECKPOINTS = "config.yaml", "checkpoints"
FROZEN, TUNED, SCST = "frozen", "fine-tuned", "+ SCST"
# Settings that two seeds of one recipe share; the others say where things are, how they are shown, or on which machine.
_RECIPE = {
    "model": ("init_from", "decoder", "decoder_settings", "weight_decay"),
    "data": ("batch_size", "captions_per_picture", "min_count", "max_tokens", "preprocessing", "augmentation"),
    "trainer": ("precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "callbacks"),
}
# What checkpoints say of themselves and all rows must share, in the words of the message.
_SHARED = {
    "encoder": (ConfigError, "encoder"),
    "preprocessing": (ConfigError, "preprocessing"),
    "data_sha256": (DataError, "hash of the data"),
    "vocabulary": (ConfigError, "vocabulary"),
}


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a training took.

    Args:
        seconds: from the start of the run, with what was lost where it was broken off.
        at_least: whether a part that was killed did not tell its end.
    """

    seconds: float
    at_least: bool


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of one stage of a run.

    Args:
        run: its folder.
        label: given to the recipe on the command line; "" for none.
        checkpoint: the `.ckpt` file.
        decoder: "mean", "additive" or "multihead".
        kind: "frozen", "fine-tuned", "+ SCST" and so on.
        seed: of the run; None where it is not recorded.
        duration: up to here; None where it is not recorded.
        machine: that trained it.
        versions: of the packages that trained it.
        facts: of the checkpoint, which all rows must share.
        recipe: settings, which all seeds of one row must share.
        source: of the data, and "extra" where there is one, as `training.sources.DataSource` takes them.
    """

    run: Path
    label: str
    checkpoint: Path
    decoder: str
    kind: str
    seed: int | None
    duration: Duration | None
    machine: str
    versions: Mapping[str, str | None]
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]
    source: Mapping[str, dict[str, Any]]


def read_run(folder: Path, *, label: str = "") -> list[Trained]:
    """Read what a run folder holds.

    Args:
        folder: with run.json in it.
        label: of the recipe.

    Returns:
        The end of each stage that was reached, in order.

    Raises:
        CheckpointError: when it is no run folder, one of its files is damaged, or no stage was finished.
    """
    record, config = _read_json(folder, RECORD), _read_yaml(folder)
    pattern = STAGE.format("*")
    found = {_number(path): path for path in (folder / CHECKPOINTS).glob(pattern) if _number(path)}
    if not found:
        raise CheckpointError(
            f"{folder}: no {CHECKPOINTS}/{pattern}; a run writes one at the end of each stage: let it come to one"
        )
    try:
        attempts = [*record["earlier"], record]
        scores = _read_scores(folder)
        stages = config["model"]["stages"]
        kinds = _kinds(stages, config["model"].get("init_from"))
        rows = []
        for number, path in sorted(found.items()):
            facts, source = _read_checkpoint(path)
            last_epoch = sum(stage["epochs"] for stage in stages[:number]) - 1
            rows.append(
                Trained(
                    run=folder,
                    label=label,
                    checkpoint=path,
                    decoder=facts["decoder"],
                    kind=kinds[number - 1],
                    seed=record["seed"],
                    duration=duration(attempts, scores, last_epoch=last_epoch),
                    machine=_machine(record["device"]),
                    versions=record["versions"],
                    facts=facts,
                    recipe={"stages": stages[:number], **_recipe(config)},
                    source=source,
                )
            )
        return rows
    except (LookupError, TypeError, AttributeError, ValueError) as err:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE}, {RECORD} or {SCORES} is damaged, or not of this run ({err!r}); restore it"
        ) from err


def check_comparable(rows: Sequence[Trained]) -> None:
    """Check that rows share encoder, data and vocabulary, and rows to be joined all of the recipe but the seed.

    Args:
        rows: of all runs.

    Raises:
        ConfigError: naming the run of which encoder, preprocessing, vocabulary or recipe differs, or that comes twice.
        DataError: naming the run of which the data differ.
    """
    first = rows[0]
    for row in rows:
        for key, (kind, what) in _SHARED.items():
            own, other = row.facts[key], first.facts[key]
            if own != other:
                values = "" if key == "vocabulary" else f" ({_brief(own)}, there {_brief(other)})"
                raise kind(f"{row.run}: its {what} is not that of {first.run}{values}; compare them in separate files")
    seen: dict[tuple[str, str, str], list[Trained]] = {}
    for row in rows:
        joined = seen.setdefault((row.label, row.decoder, row.kind), [])
        if any(other.seed == row.seed for other in joined):
            twin = next(other for other in joined if other.seed == row.seed)
            raise ConfigError(
                f"{row.run}: decoder {row.decoder}, {row.kind}, seed {row.seed} is in {twin.run} too; leave one of "
                "them out, or tell the recipes apart: LABEL=RUN"
            )
        joined.append(row)
        changed = [name for name, value in row.recipe.items() if value != joined[0].recipe.get(name)]
        if changed:
            raise ConfigError(
                f"{row.run}: {changed[0]} is not that of {joined[0].run}, so they are no two seeds of one recipe; "
                "tell the recipes apart: LABEL=RUN"
            )


def duration(
    attempts: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], *, last_epoch: int
) -> Duration | None:
    """Return how long a run took up to the end of an epoch, its validation included.

    Args:
        attempts: records of all runs in the folder, oldest first.
        scores: lines of scores.jsonl.
        last_epoch: counted from 0.

    Returns:
        The time of the last attempt at the epoch, from the attempt's start, and all of the attempts before; None where
        the epoch was neither validated nor recorded as over.
    """
    reached = [(line["attempt"], line["time"]) for line in scores if line["epoch"] == last_epoch]
    for number, attempt in enumerate(attempts, start=1):
        over = attempt.get("epoch_ends", {}).get(str(last_epoch))  # not in records of earlier versions
        reached += [(number, over)] if over else []
    if not reached:
        return None
    final, end = max(reached)
    seconds = _seconds(attempts[final - 1]["started"], end)
    at_least = False
    for number, attempt in enumerate(attempts[: final - 1], start=1):
        known = [line["time"] for line in scores if line["attempt"] == number]
        known += attempt.get("epoch_ends", {}).values()
        end = attempt["ended"] or max([attempt["started"], *known])
        at_least |= attempt["ended"] is None  # it was killed
        seconds += _seconds(attempt["started"], end)
    return Duration(seconds=seconds, at_least=at_least)


# --- One run ---


def _kinds(stages: Sequence[Mapping[str, Any]], init_from: str | None) -> list[str]:
    """Return what each stage leaves behind; of stages of one kind, all but the last say which they are."""
    kinds = []
    tuned = critical = False
    for stage in stages:
        tuned |= stage["encoder"] == "finetune"
        critical |= stage["objective"] == "self_critical"
        kind = TUNED if tuned else FROZEN
        if critical:
            kind = SCST if tuned else f"{FROZEN} {SCST}"
        kinds.append(kind if init_from is None else f"{kind}, from {Path(init_from).name}")
    return [
        f"{kind} (stage {number} of {len(kinds)})" if kind in kinds[number:] else kind
        for number, kind in enumerate(kinds, start=1)
    ]


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": config[section].get(name) for section, names in _RECIPE.items() for name in names}


def _machine(device: Mapping[str, Any]) -> str:
    cores = device.get("cores") if device["type"] == "cpu" else None  # a GPU does the work itself
    processes = device.get("processes", 1)
    return f"{device['name']}{f', {cores} cores' if cores else ''}{f', {processes} processes' if processes > 1 else ''}"


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        own, data = content["captioner"], content["CaptionData"]
        config = ModelConfig.from_dict(own["model"])
        facts = {
            "decoder": config.decoder,
            "encoder": config.encoder.to_dict(),
            "preprocessing": config.preprocessing.to_dict(),
            "vocabulary": own["tokenizer"],
            "data_sha256": data["data_sha256"],
        }
        return facts, {key: dict(data[key]) for key in ("source", "extra") if key in data}
    except Exception as err:  # zip, pickle, missing keys: whatever a foreign file brings
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of `python -m training fit`; take it out of the folder"
        ) from err


def _read_text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise CheckpointError(
            f"{folder}: no run folder, {name} cannot be read: {reason}; name the folder of a run with {RECORD} in it, "
            "such as runs/NAME/lightning_logs/version_0"
        ) from err


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(_read_text(folder, name))
        return content
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{folder / name}: not JSON: {err}; restore it") from err


def _read_yaml(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = yaml.safe_load(_read_text(folder, CONFIG_FILE))
        return content
    except yaml.YAMLError as err:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not YAML; restore it") from err


def _read_scores(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _read_text(folder, SCORES).splitlines() if line.strip()]


def _number(path: Path) -> int:
    found = re.fullmatch(STAGE.format(r"([1-9]\d*)"), path.name)
    return int(found.group(1)) if found else 0


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _brief(value: object) -> str:
    text = " ".join(str(part) for part in value.values()) if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
