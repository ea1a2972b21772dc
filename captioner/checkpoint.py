"""A folder ↔ a model in PyTorch; see `captioner.model_folder` for what is in a folder.

Only safetensors are read, never pickles. Names and shapes of all weights are checked against the config.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, ConfigError
from captioner.model import CaptionModel, build_model
from captioner.model_folder import (
    CARD,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    first_line,
    folder_path,
    read_folder,
    settings_sha256,
    write_files,
)
from captioner.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds.

    Args:
        model: in evaluation mode, float32, on the CPU.
        tokenizer: its vocabulary.
        card: text of the model card; empty when the folder has none.
    """

    model: CaptionModel
    tokenizer: Tokenizer
    card: str = ""


def save_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike[str], *, half: bool = False) -> None:
    """Write a model folder; files of an earlier model in it are replaced, each at once.

    Args:
        checkpoint: what to write.
        folder: made when it is not there.
        half: store matrices and convolutions as float16, which halves the size; what is loaded again differs by the
            rounding. Otherwise save and load is the identity.

    Raises:
        CheckpointError: when the folder cannot be written, or a weight does not fit into float16.
        ConfigError: when `folder` is no path.
    """
    path = folder_path(folder)
    weights = {name: _stored(name, value, half) for name, value in checkpoint.model.state_dict().items()}
    contents = {WEIGHTS: save_safetensors(weights), TOKENIZER: checkpoint.tokenizer.to_json().encode()}
    settings = checkpoint.model.config.to_dict()
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": settings,
        "sha256": {**checksums, "model": settings_sha256(settings)},
    }
    contents[CARD] = checkpoint.card.encode()
    contents[CONFIG] = (json.dumps(description, indent=2) + "\n").encode()  # last: it vouches for the others
    write_files(path, contents)


def _stored(name: str, value: Tensor, half: bool) -> Tensor:
    stored = value.detach().cpu().contiguous()
    # Vectors (biases, norms and their statistics) are few and touchy: they keep their precision.
    if not half or stored.dtype != torch.float32 or stored.ndim < 2:
        return stored.clone()
    rounded = stored.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        raise CheckpointError(f"{name}: a weight is too large for float16; save without half")
    return rounded


def load_checkpoint(source: str | os.PathLike[str] | ModelFolder | None = None) -> Checkpoint:
    """Read a model.

    Args:
        source: None for the bundled model; a folder, or one that was read already; or the id "user/name" of a model on
            the Hugging Face hub.

    Returns:
        The checked model, float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: naming the file that is missing, foreign or damaged, or the weight of another name or shape.
        ConfigError: when `source` is no path.
    """
    folder = source if isinstance(source, ModelFolder) else read_folder(source)
    model = _build(folder.config, folder.path / CONFIG)
    _fill(model, folder.read_weights(), folder.path / WEIGHTS)
    return Checkpoint(model.eval(), folder.tokenizer, folder.card)


def _build(config: ModelConfig, path: Path) -> CaptionModel:
    try:
        with torch.device("meta"):  # no time is spent on random weights that are replaced at once
            return build_model(config)
    except ConfigError as err:
        raise CheckpointError(f"{path}: {err}") from err
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as err:  # settings that torch cannot build
        raise CheckpointError(f"{path}: no model can be built from it: {first_line(err)}") from err


def _fill(model: CaptionModel, content: bytes, path: Path) -> None:
    """Put the weights into a model without storage, after checking every name and shape."""
    try:
        weights = load_safetensors(content)
    except SafetensorError as err:
        raise CheckpointError(f"{path}: damaged: not a safetensors file: {err}") from err
    wanted = model.state_dict()
    for fault, names in (("lacks", wanted.keys() - weights.keys()), ("has unknown", weights.keys() - wanted.keys())):
        if names:
            raise CheckpointError(f"{path}: not of this model: it {fault} {len(names)} weights, such as {min(names)}")
    for name, value in sorted(weights.items()):
        if value.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path}: not of this model: {name} is {list(value.shape)}, expected {list(wanted[name].shape)}"
            )
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(f"{path}: not of this model: {name} is {value.dtype}, expected {wanted[name].dtype}")
        weights[name] = value.float() if value.is_floating_point() else value
    model.load_state_dict(weights, strict=True, assign=True)
