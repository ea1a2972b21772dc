"""A folder ↔ a model: `model.safetensors`, `config.json`, `tokenizer.json`, `README.md` (the model card).

Only safetensors are read, never pickles. Every file is checked: present, ours, undamaged (SHA-256), names and shapes of
all weights as the config says.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, ConfigError
from captioner.model import CaptionModel, build_model
from captioner.tokenizer import Tokenizer

FORMAT = "captioner"
# Version 1 had no checksum of the settings in config.json, version 2 no confidence; their folders are still read.
FORMAT_VERSION, READ_VERSIONS = 3, (1, 2, 3)
WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
BUNDLED = Path(__file__).parent / "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    path = _path(folder)
    weights = {name: _stored(name, value, half) for name, value in checkpoint.model.state_dict().items()}
    contents = {WEIGHTS: save_safetensors(weights), TOKENIZER: checkpoint.tokenizer.to_json().encode()}
    settings = checkpoint.model.config.to_dict()
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": settings,
        "sha256": {**checksums, "model": _settings_sha256(settings)},
    }
    contents[CARD] = checkpoint.card.encode()
    contents[CONFIG] = (json.dumps(description, indent=2) + "\n").encode()  # last: it vouches for the others
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = path / f".{name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(path / name)
    except (OSError, ValueError) as err:  # a name with a NUL is a ValueError
        raise CheckpointError(f"{_shown(path)}: the model cannot be written: {_first_line(err)}") from err


def _settings_sha256(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of "model" in config.json, however that file is laid out."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _stored(name: str, value: Tensor, half: bool) -> Tensor:
    stored = value.detach().cpu().contiguous()
    # Vectors (biases, norms and their statistics) are few and touchy: they keep their precision.
    if not half or stored.dtype != torch.float32 or stored.ndim < 2:
        return stored.clone()
    rounded = stored.to(torch.float16)
    if not bool(rounded.isfinite().all()):
        raise CheckpointError(f"{name}: a weight is too large for float16; save without half")
    return rounded


def load_checkpoint(source: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a model.

    Args:
        source: None for the bundled model; a folder; or the id "user/name" of a model on the Hugging Face hub.

    Returns:
        The checked model, float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: naming the file that is missing, foreign or damaged, or the weight of another name or shape.
        ConfigError: when `source` is no path.
    """
    folder = BUNDLED if source is None else _folder(source)
    description = _read_description(folder)
    contents = {name: _read_checked(folder, name, description) for name in (WEIGHTS, TOKENIZER)}
    try:
        config = ModelConfig.from_dict(description["model"])
    except ConfigError as err:
        raise CheckpointError(f"{folder / CONFIG}: {err}") from err
    tokenizer = Tokenizer.from_json(_text(contents[TOKENIZER], folder / TOKENIZER), name=str(folder / TOKENIZER))
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"{folder}: {TOKENIZER} has {tokenizer.vocabulary_size} tokens but {CONFIG} says "
            f"{config.vocabulary_size}; the two are not of one model"
        )
    model = _build(config, folder / CONFIG)
    _fill(model, contents[WEIGHTS], folder / WEIGHTS)
    return Checkpoint(model.eval(), tokenizer, _card(folder / CARD))


def _build(config: ModelConfig, path: Path) -> CaptionModel:
    try:
        with torch.device("meta"):  # no time is spent on random weights that are replaced at once
            return build_model(config)
    except ConfigError as err:
        raise CheckpointError(f"{path}: {err}") from err
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as err:  # settings that torch cannot build
        raise CheckpointError(f"{path}: no model can be built from it: {_first_line(err)}") from err


def _path(source: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.fsdecode(source))
    except TypeError as err:
        raise ConfigError(f"a model is named by the path of its folder, got {type(source).__name__}") from err


def _shown(path: Path) -> str:
    text = str(path).encode("unicode_escape").decode() if "\0" in str(path) else str(path)
    return text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"


def _folder(source: str | os.PathLike[str]) -> Path:
    path = _path(source)
    if not os.fsdecode(source):
        raise CheckpointError("the name of the model is empty; name a model folder or a hub id such as 'user/name'")
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as err:  # no permission, or a name that is too long
        raise CheckpointError(f"{_shown(path)}: cannot be read: {_first_line(err)}") from err
    if is_file:
        raise CheckpointError(f"{path}: is a file; name the folder that holds {WEIGHTS}, {CONFIG} and {TOKENIZER}")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{_shown(path)}: no such folder; name a model folder or a hub id such as 'user/name'")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[WEIGHTS, CONFIG, TOKENIZER, CARD]))
    except HFValidationError as err:
        raise CheckpointError(
            f"{_shown(Path(hub_id))}: neither a folder nor a valid hub id: {_first_line(err)[:120]}"
        ) from err
    except Exception as err:  # besides OSError whatever the network library raises, such as a proxy's refusal
        # In older versions of the library an HfHubHTTPError also stands for "offline, and not in the cache".
        if isinstance(err, HfHubHTTPError) and not isinstance(err, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{hub_id}: no such folder here, and the Hugging Face hub refused it: {_first_line(err)}; "
                "check the id, and log in if the model is private"
            ) from err
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the Hugging Face hub cannot be reached (offline?); connect "
            f"to the network once, or name a local folder: {_first_line(err)}"
        ) from err


def _first_line(err: Exception) -> str:
    reason = err.strerror if isinstance(err, OSError) else None
    return (reason or str(err).strip() or type(err).__name__).splitlines()[0]


def _read_description(folder: Path) -> dict[str, Any]:
    text = _text(_read(folder / CONFIG), folder / CONFIG)
    try:
        description = json.loads(text)
        settings = description.get("model") if isinstance(description, dict) else None
        checksum = _settings_sha256(settings) if isinstance(settings, dict) else None
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{folder / CONFIG}: damaged: not JSON: {err}") from err
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f'{folder / CONFIG}: not of a Captioner model; expected "format": "{FORMAT}"')
    version = description.get("format_version")
    if type(version) is not int or version not in READ_VERSIONS:
        raise CheckpointError(
            f"{folder / CONFIG}: format version {version!r} cannot be read, this Captioner reads version "
            f"{', '.join(map(str, READ_VERSIONS))}; upgrade with: pip install -U captioner"
        )
    if not isinstance(description.get("sha256"), dict) or checksum is None:
        raise CheckpointError(f'{folder / CONFIG}: damaged: it needs "model" and "sha256"')
    if version > 1 and description["sha256"].get("model") != checksum:
        raise CheckpointError(
            f'{folder / CONFIG}: damaged, or changed by hand: the SHA-256 of "model" is not the one that it states; '
            "copy or download the folder again"
        )
    return description


def _read_checked(folder: Path, name: str, description: dict[str, Any]) -> bytes:
    content = _read(folder / name)
    if hashlib.sha256(content).hexdigest() != description["sha256"].get(name):
        raise CheckpointError(
            f"{folder / name}: damaged, or not of this model: its SHA-256 is not the one in {CONFIG}; "
            "copy or download the folder again"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as err:
        raise CheckpointError(
            f"{path}: missing; a model folder holds {WEIGHTS}, {CONFIG}, {TOKENIZER} and {CARD}"
        ) from err
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror or err}") from err


def _card(path: Path) -> str:
    """Return the text of the model card; empty when there is none."""
    try:
        missing = not path.exists()
    except OSError:
        missing = False  # reading it says why
    return "" if missing else _text(_read(path), path)


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{path}: damaged: not UTF-8 text") from err


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
