"""A model folder as files: `model.safetensors`, `config.json`, `tokenizer.json`, `README.md` (the model card), and
where it was exported, the ONNX graphs, which hold no weights of their own.

Free of torch. Every file is checked: present, ours, undamaged (SHA-256).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.config import ModelConfig
from captioner.errors import CheckpointError, ConfigError
from captioner.tokenizer import Tokenizer

FORMAT = "captioner"
# Version 1 had no checksum of the settings in config.json, version 2 no confidence; their folders are still read.
FORMAT_VERSION, READ_VERSIONS = 3, (1, 2, 3)
WEIGHTS, CONFIG, TOKENIZER, CARD = "model.safetensors", "config.json", "tokenizer.json", "README.md"
# The graphs of ONNX Runtime; their weights are those of WEIGHTS.
ENCODER_GRAPH, START_GRAPH, STEP_GRAPH = "encoder.onnx", "decoder_start.onnx", "decoder_step.onnx"
GRAPHS = (ENCODER_GRAPH, START_GRAPH, STEP_GRAPH)
# Encoder and step in 8 bits, where they were made; they have weights of their own.
ENCODER_INT8_GRAPH, STEP_INT8_GRAPH = "encoder_int8.onnx", "decoder_step_int8.onnx"
INT8_GRAPHS = (ENCODER_INT8_GRAPH, STEP_INT8_GRAPH)
_FILES = [WEIGHTS, CONFIG, TOKENIZER, CARD, *GRAPHS, *INT8_GRAPHS]
BUNDLED = Path(__file__).parent / "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds, but for the weights.

    Args:
        path: where it is.
        config: settings of the model.
        tokenizer: its vocabulary.
        card: text of the model card; empty when the folder has none.
        description: the whole of config.json.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    card: str
    description: Mapping[str, Any]

    @property
    def has_graphs(self) -> bool:
        """Whether the model was exported to ONNX."""
        return "onnx" in self.description

    @property
    def has_int8(self) -> bool:
        """Whether the model was quantised to 8 bits too."""
        return self.has_graphs and all(name in self.description["onnx"]["sha256"] for name in INT8_GRAPHS)

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Names of the runtimes that it holds the files of; PyTorch needs none beside the weights."""
        graphs = [("onnx", self.has_graphs), ("onnx-int8", self.has_int8)]
        return ("torch", *(name for name, there in graphs if there))

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the grid, as the export noted them; of a folder whose graphs were checked."""
        rows, columns = self.description["onnx"]["grid_hw"]
        return rows, columns

    def read_weights(self) -> bytes:
        """Read the weights.

        Returns:
            The content of their file.

        Raises:
            CheckpointError: when it is missing, damaged or of another model.
        """
        return _read_checked(self.path, WEIGHTS, self.description["sha256"])

    def check_graphs(self, *, int8: bool = False) -> None:
        """Check the ONNX graphs and the weights that they point into.

        Args:
            int8: those in 8 bits too.

        Raises:
            CheckpointError: when the folder has none, or a file is missing, damaged or of another model.
        """
        if not self.has_graphs:
            raise CheckpointError(
                f"{self.path}: holds no ONNX graphs; make them with: captioner export {self.path} --format onnx"
            )
        graphs = self.description["onnx"]
        if not isinstance(graphs, dict) or not isinstance(graphs.get("sha256"), dict):
            raise CheckpointError(f'{self.path / CONFIG}: damaged: "onnx" needs "sha256"')
        grid_hw = graphs.get("grid_hw")
        if not isinstance(grid_hw, list) or [type(side) for side in grid_hw] != [int, int] or min(grid_hw) < 1:
            raise CheckpointError(
                f'{self.path / CONFIG}: damaged: "onnx" needs "grid_hw", rows and columns of the grid'
            )
        if int8 and not self.has_int8:
            raise CheckpointError(
                f"{self.path}: holds no graphs in 8 bits; make them with: captioner export {self.path} --int8 PHOTOS"
            )
        for name in (WEIGHTS, *GRAPHS, *(INT8_GRAPHS if int8 else ())):
            _read_checked(self.path, name, graphs["sha256"])


def read_folder(source: str | os.PathLike[str] | None = None) -> ModelFolder:
    """Read a model folder, all but the weights.

    Args:
        source: None for the bundled model; a folder; or the id "user/name" of a model on the Hugging Face hub.

    Returns:
        What it holds.

    Raises:
        CheckpointError: naming the file that is missing, foreign or damaged.
        ConfigError: when `source` is no path.
    """
    path = BUNDLED if source is None else _folder(source)
    description = _read_description(path)
    content = _read_checked(path, TOKENIZER, description["sha256"])
    try:
        config = ModelConfig.from_dict(description["model"])
    except ConfigError as err:
        raise CheckpointError(f"{path / CONFIG}: {err}") from err
    tokenizer = Tokenizer.from_json(_text(content, path / TOKENIZER), name=str(path / TOKENIZER))
    if tokenizer.vocabulary_size != config.vocabulary_size:
        raise CheckpointError(
            f"{path}: {TOKENIZER} has {tokenizer.vocabulary_size} tokens but {CONFIG} says "
            f"{config.vocabulary_size}; the two are not of one model"
        )
    # Absolute: what is read later is read from there, whatever the current folder is by then.
    return ModelFolder(path.absolute(), config, tokenizer, _card(path / CARD), description)


def copy_folder(folder: ModelFolder, target: str | os.PathLike[str]) -> None:
    """Copy a model, file by file.

    Args:
        folder: the model.
        target: made when it is not there.

    Raises:
        CheckpointError: when a file is missing or damaged, or the folder cannot be written.
        ConfigError: when `target` is no path.
    """
    checksums = {**folder.description["sha256"], **folder.description.get("onnx", {}).get("sha256", {})}
    names = [WEIGHTS, TOKENIZER, *(GRAPHS if folder.has_graphs else ()), *(INT8_GRAPHS if folder.has_int8 else ())]
    contents = {name: _read_checked(folder.path, name, checksums) for name in names}
    contents[CARD] = folder.card.encode()
    contents[CONFIG] = _read(folder.path / CONFIG)
    if _read_description(folder.path) != folder.description:
        raise CheckpointError(f"{folder.path / CONFIG}: changed since the model was loaded; load it again")
    write_files(folder_path(target), contents)


def write_files(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a model folder, each at once, in the given order; graphs that are not among them are removed.

    Args:
        path: the folder, made when it is not there.
        contents: by name; CONFIG last, for it vouches for the others.

    Raises:
        CheckpointError: when the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = path / f".{name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(path / name)
        for name in (*GRAPHS, *INT8_GRAPHS):
            if name not in contents:  # of an earlier model: they point into its weights
                (path / name).unlink(missing_ok=True)
    except (OSError, ValueError) as err:  # a name with a NUL is a ValueError
        raise CheckpointError(f"{shown(path)}: the model cannot be written: {first_line(err)}") from err


def settings_sha256(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of "model" in config.json, however that file is laid out."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_path(source: str | os.PathLike[str]) -> Path:
    """Return the path that a user named; ConfigError when it is none."""
    try:
        return Path(os.fsdecode(source))
    except TypeError as err:
        raise ConfigError(f"a model is named by the path of its folder, got {type(source).__name__}") from err


def shown(path: Path) -> str:
    """Return a path for a message, cut when it is long."""
    text = str(path).encode("unicode_escape").decode() if "\0" in str(path) else str(path)
    return text if len(text) <= 300 else f"{text[:200]}...{text[-80:]}"


def _folder(source: str | os.PathLike[str]) -> Path:
    path = folder_path(source)
    if not os.fsdecode(source):
        raise CheckpointError("the name of the model is empty; name a model folder or a hub id such as 'user/name'")
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except OSError as err:  # no permission, or a name that is too long
        raise CheckpointError(f"{shown(path)}: cannot be read: {first_line(err)}") from err
    if is_file:
        raise CheckpointError(f"{path}: is a file; name the folder that holds {WEIGHTS}, {CONFIG} and {TOKENIZER}")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{shown(path)}: no such folder; name a model folder or a hub id such as 'user/name'")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except HFValidationError as err:
        raise CheckpointError(
            f"{shown(Path(hub_id))}: neither a folder nor a valid hub id: {first_line(err)[:120]}"
        ) from err
    except Exception as err:  # besides OSError whatever the network library raises, such as a proxy's refusal
        # In older versions of the library an HfHubHTTPError also stands for "offline, and not in the cache".
        if isinstance(err, HfHubHTTPError) and not isinstance(err, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{hub_id}: no such folder here, and the Hugging Face hub refused it: {first_line(err)}; "
                "check the id, and log in if the model is private"
            ) from err
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the Hugging Face hub cannot be reached (offline?); connect "
            f"to the network once, or name a local folder: {first_line(err)}"
        ) from err


def first_line(err: Exception) -> str:
    """Return what an error says, in one line."""
    reason = err.strerror if isinstance(err, OSError) else None
    return (reason or str(err).strip() or type(err).__name__).splitlines()[0]


def _read_description(folder: Path) -> dict[str, Any]:
    text = _text(_read(folder / CONFIG), folder / CONFIG)
    try:
        description = json.loads(text)
        settings = description.get("model") if isinstance(description, dict) else None
        checksum = settings_sha256(settings) if isinstance(settings, dict) else None
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


def _read_checked(folder: Path, name: str, sha256: Mapping[str, Any]) -> bytes:
    content = _read(folder / name)
    if hashlib.sha256(content).hexdigest() != sha256.get(name):
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
