"""The command line of training: Lightning's, with the callbacks that every run has and errors of one line."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib
import inspect
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from captioner.config import SearchDefaults
from captioner.errors import CaptionerError, CheckpointError, ConfigError
from captioner.model_folder import CONFIG
from training import export, results, survey
from training.callbacks import Branches, HealthCheck, LastCheckpoint, PictureLog, RunEta, RunRecord
from training.callbacks.last import STAGE
from training.data import CaptionData
from training.module import CaptionModule

FAILED, WRONG_USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
# Of Lightning 2.6, and untrue or of no use here.
_NOISE = {
    "lightning.pytorch.utilities.rank_zero": ("litlogger", "to estimate number of stepping batches"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("`weights_only` was not set",),
}
_NOISY_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*exists and is not empty",  # `last.ckpt` is replaced, and the others have names of their own
    r".*WeightAveraging.*overrides .*configure_model",  # a model of this size fits
    r".*Precision .* is not supported by the model summary",
    r".*your dataloader is not resumable",  # it is: see `LengthBatchSampler`
)


class CaptionCLI(LightningCLI):
    """Lightning's command line with what every run has: two kinds of checkpoint, a health check, pictures."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run, and settings that follow from others."""
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.set_defaults(
            {
                "best_checkpoint.filename": "best-{epoch}-{val_cider:.1f}",
                "best_checkpoint.monitor": "val_cider",
                "best_checkpoint.mode": "max",
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(HealthCheck, "health")
        parser.add_lightning_class_args(PictureLog, "picture_log")
        parser.add_argument(
            "--export",
            type=str | None,
            default=None,
            help="model folder to write after fit, from the best epoch, or from the mean of the run's branches or of "
            "model.export_stages; it searches as model.search says",
        )
        parser.add_argument("--export_half", type=bool, default=False, help="store its matrices as float16")
        parser.link_arguments("model.init_from", "data.init_from")
        for target in ("data.seed", "model.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the settings.

        Args:
            parser: of the command line.
            args: to be parsed; None: those of the process.

        Raises:
            CheckpointError: for a `ckpt_path` that is no checkpoint of ours.
            ConfigError: for an `export` folder that cannot be written.
        """
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        if settings.get("ckpt_path") is not None:
            _check_checkpoint(Path(settings["ckpt_path"]))
        if settings.get("export") is not None:
            _check_export(Path(settings["export"]))
        trainer = settings["trainer"]
        if trainer["precision"] == "bf16-mixed" and _computes_bfloat16_in_software(trainer["accelerator"]):
            # In the settings themselves, so that the run's folder tells what it really ran with.
            trainer["precision"] = "32-true"
            sys.stderr.write(
                "trainer.precision: this CPU computes bfloat16 in software, many times as slow; 32-true is taken\n"
            )

    def instantiate_classes(self) -> None:
        """Make module, data and trainer.

        Raises:
            ConfigError: for settings that one of them refuses.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as err:  # how the parser passes on what the classes raise
            raise ConfigError(_one_line(err)) from err

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer: its epochs are those of the stages, which train different parts of the model.

        Args:
            **kwargs: of the trainer, before those of the command line.

        Returns:
            The trainer.

        Raises:
            ConfigError: for `trainer.max_epochs`.
        """
        given = self._get(self.config_init, "trainer")
        if given.get("max_epochs") is not None:
            raise ConfigError(
                f"trainer.max_epochs={given['max_epochs']}: the epochs are those of model.stages; change them there, "
                "and leave trainer.max_epochs out (trainer.max_steps stops a run earlier)"
            )
        trainer = super().instantiate_trainer(max_epochs=self.model.plan.epochs, **kwargs)
        if isinstance(trainer.strategy, DDPStrategy):
            # In a stage with a frozen encoder no gradient reaches it, which no setting should have to say.
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
        return trainer

    def after_fit(self) -> None:
        """Write the model folder, if it is wanted; Lightning calls it.

        Raises:
            ConfigError: when it is the best epoch's, and none was validated.
        """
        folder = self.config[self.config.subcommand].get("export")
        if folder is None or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.model.plan.exported:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            last = next(callback for callback in callbacks if isinstance(callback, LastCheckpoint))
            self._export([last.folder / STAGE.format(number) for number in self.model.plan.exported], Path(folder))
            return
        best = [
            callback.best_model_path
            for callback in self.trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.best_model_path
        ]
        if not best:
            raise ConfigError("--export: no epoch was validated, so none is the best; export last.ckpt by hand")
        self._export([Path(best[0])], Path(folder))

    def _export(self, checkpoints: list[Path], folder: Path) -> None:
        options = self.model.search_options
        evaluation = export.export(
            checkpoints,
            folder,
            search=SearchDefaults(
                **{field.name: getattr(options, field.name) for field in dataclasses.fields(SearchDefaults)}
            ),
            half=self.config[self.config.subcommand]["export_half"],
        )
        sys.stdout.write(f"{evaluation.table()}\n\nThe model is in {folder}\n")


def _computes_bfloat16_in_software(accelerator: str) -> bool:
    """Return whether training runs on an x86 CPU without AVX-512, on which convolutions in bfloat16 are emulated.

    There, forward and backward of 32 pictures through MobileNetV2's last 12 stages took 15 s instead of 0.8 s
    (timed once by hand, on two cores of Zen 3).
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_cpu and is_x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


def _check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint of ours before the data is read."""
    if not path.is_file():
        raise CheckpointError(f"--ckpt_path {path}: no such file; name a .ckpt file of a run folder")
    try:
        ours = "captioner" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:  # zip, pickle, end of file: whatever a foreign file brings
        raise CheckpointError(f"--ckpt_path {path}: damaged, or not a checkpoint; name another one") from err
    if not ours:
        raise CheckpointError(f"--ckpt_path {path}: not a checkpoint of `python -m training fit`; name another one")


def _check_export(folder: Path) -> None:
    """Refuse a model folder that could not be written after the training."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"--export {folder}: {there} is no folder that can be written; choose another place")
    if there == folder.absolute() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ConfigError(f"--export {folder}: holds other files than a model's; choose an empty or a new folder")


# --- What the parser says, in one line ---

_PLAIN_WORDS = (
    (r"Problem with given class_path '[\w.]+': ", ""),
    (r"Expected a <class 'int'>", "expected a whole number"),
    (r"Expected a <class 'float'>", "expected a number"),
    (r"Expected a <class 'str'>", "expected text"),
    (r"Expected a <class 'bool'>", "expected true or false"),
    (r"Expected a typing\.Literal\[(.*?)\]", r"expected one of \1"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"\.? (?:Got|Given) value: (.*)$", r", got \1; set another value"),
    (r"[Ff]ile does not exist: (.*)$", r"\1: no such file; check the path"),
    (r"^Problems parsing config: (.*)$", r"--config: not YAML: \1; mend it"),
    (r"^Unexpected config: (.*)$", r"--config: settings expected, such as 'model:' and 'data:', got \1; mend it"),
    (
        r"^.*\bsubcommand\b.*$",
        "say what to do: python -m training fit, validate or export, results, survey; see --help",
    ),
)


def _one_line(err: Exception) -> str:
    """Return what the parser found wrong in one line: thing, fault, and where there is one the remedy."""
    text = _innermost(str(err))
    key = ".".join(re.findall(r'[Pp]arser key "([\w.]+)":', text))
    text = re.sub(r'[Pp]arser key "[\w.]+": *', "", text)
    if found := re.search(r"(?:accept option '|arguments: --|[Kk]ey [\"'])(?:[a-z]+\.)??((?:\w+\.)*\w+)", text):
        return _unknown(found.group(1), _known_keys(), "see --help for all keys")
    if found := re.search(r"class_path '([\w.]+)'.*Option '(\w+)' is not accepted", text):
        module, _, kind = found.group(1).rpartition(".")
        names = list(inspect.signature(getattr(importlib.import_module(module), kind)).parameters)
        name = f"{key}.{found.group(2)}" if key else found.group(2)
        return _unknown(name, names, f"there are {', '.join(names)}")
    if found := re.search(r"required: ([\w., ]+)", text):
        return f"{found.group(1).replace('fit.', '')}: needed, and not given; add it to the config or the command line"
    for pattern, words in _PLAIN_WORDS:
        text = re.sub(pattern, words, text)
    return f"{key}: {text[:1].lower()}{text[1:]}" if key else text


def _innermost(text: str) -> str:
    """Return a message without what it says of the alternatives of a union that do not fit at all."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    if "Errors:" not in lines:
        return " ".join(lines)
    at = lines.index("Errors:")
    head = lines[0].partition("Does not validate")[0]
    errors = [line for line in lines[at + 1 :] if not line.startswith("Given value type") and "NoneType" not in line]
    given = [line for line in errors if line.startswith("Given value:")]
    faults = [line for line in errors if not line.startswith(("Expected", "Given", "Not a valid", "Subclass", "a "))]
    if faults:
        return head + " ".join(faults)
    expected = [line for line in errors if line.startswith("Expected")]
    return head + " ".join([" or ".join(expected), *given])


def _unknown(key: str, known: Iterable[str], otherwise: str) -> str:
    place = key.rpartition(".")[0]
    prefix = f"{place}." if place else ""
    whole = {option if "." in option else f"{prefix}{option}" for option in known}
    close = difflib.get_close_matches(key, sorted(whole), n=3, cutoff=0.8)
    remedy = f"did you mean {' or '.join(close)}?" if close else otherwise
    return f"{key}: no such setting; {remedy}"


def _known_keys() -> list[str]:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(CaptionModule, "model")
    parser.add_lightning_class_args(CaptionData, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    return [action.dest for action in parser._actions]


# --- The process ---


def complain(message: str) -> None:
    """Write one line about what went wrong to standard error."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _NOISE[record.name])


def _quieten() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_worth_saying)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: after the program's name; default: the process's.

    Returns:
        The exit status: 0 all well, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated; where it is not 0, with
        one line on standard error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _quieten()
    try:
        if given[:1] == ["export"]:
            return export.main(given[1:])
        if given[:1] == ["results"]:
            return results.main(given[1:])
        if given[:1] == ["survey"]:
            return survey.main(given[1:])
        _run(None if arguments is None else given)
    except BaseException as err:
        # Lightning's answer to Ctrl+C is a SystemExit.
        cause = (
            err.__context__ if isinstance(err, SystemExit) and isinstance(err.__context__, KeyboardInterrupt) else err
        )
        for kinds, status, describe in _FAULTS:
            if isinstance(cause, kinds):
                complain(describe(cause))
                return status
        raise
    return 0


def _run(arguments: list[str] | None) -> None:
    CaptionCLI(
        CaptionModule,
        CaptionData,
        args=arguments,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
        trainer_defaults={
            # Our sampler gives each process its share itself.
            "use_distributed_sampler": False,
            "callbacks": [RunRecord(), RunEta(), Branches()],
            "plugins": [{"class_path": "training.callbacks.SafeCheckpointIO"}],
        },
    )


def _disk_fault(err: OSError) -> str:
    place = f"{err.filename}: " if err.filename else ""
    remedy = "make room, then resume with --ckpt_path" if err.errno == errno.ENOSPC else "check the path"
    return f"{place}{err.strerror or err}; {remedy}"


def _stopped(err: BaseException) -> str:
    how = "interrupted" if isinstance(err, KeyboardInterrupt) else "terminated"
    return f"{how}; resume with --ckpt_path and the last.ckpt of the run's folder, if one was written"


_FAULTS: tuple[tuple[Any, int, Callable[[Any], str]], ...] = (
    ((ArgumentError, MisconfigurationException), WRONG_USAGE, _one_line),
    (CaptionerError, FAILED, str),
    (UnicodeDecodeError, WRONG_USAGE, lambda err: f"--config: not text in UTF-8: {err}; mend it"),
    (OSError, FAILED, _disk_fault),
    (KeyboardInterrupt, INTERRUPTED, _stopped),
    (SIGTERMException, TERMINATED, _stopped),
)
