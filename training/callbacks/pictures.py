"""Pictures, captions and maps in TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger

from captioner.caption import Caption
from captioner.config import SearchOptions
from captioner.errors import ConfigError, ImageError
from training.callbacks.protocols import Picture, data_of, in_training, module_of

_LOG = logging.getLogger(__name__)
# Half of the figure's own, a quarter of the pixels: an event file holds every picture of every validation.
DOTS_PER_INCH = 60


class PictureLog(lightning.Callback):
    """Draws some dev pictures with a map under every word, at every validation, into TensorBoard.

    The pictures are spread evenly over the dev split, so that they are the same in every run. They are drawn when the
    validation begins, not when it is over: by then `WeightAveraging` has put the averaged weights, whose captions are
    scored, away again.

    Args:
        pictures: how many.
        search: options of the search, as in `captioner.SearchOptions`.

    Raises:
        ConfigError: for less than one picture, or a search that does not exist.
    """

    def __init__(self, *, pictures: int = 8, search: dict[str, Any] | None = None) -> None:
        if pictures < 1:
            raise ConfigError(f"PictureLog: pictures must be at least 1, got {pictures}")
        self.pictures = pictures
        self.search = dict(search or {})
        SearchOptions.from_dict(self.search)
        self._told: set[str] = set()

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw, before the first batch of a validation.

        Args:
            trainer: of the run.
            pl_module: whose captioner is asked.
            batch: not used.
            batch_idx: number of the batch.
            dataloader_idx: number of the loader.
        """
        if batch_idx or dataloader_idx or not in_training(trainer) or not trainer.is_global_zero:
            return
        writer = next((log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None)
        if writer is None:
            self._tell("PictureLog: no pictures are drawn, for there is no TensorBoardLogger among trainer.logger")
            return
        rows = ["| picture | caption | references |", "|---|---|---|"]
        for picture in spread(data_of(trainer).pictures["dev"], self.pictures):
            caption = self._caption(pl_module, picture)
            if caption is None:
                continue
            figure = caption.figure()
            figure.set_dpi(DOTS_PER_INCH)
            writer.add_figure(f"pictures/{picture.name}", figure, trainer.global_step)
            cells = (picture.name, caption.text, "<br>".join(picture.captions))
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        writer.add_text("captions", "\n".join(rows), trainer.global_step)

    def _caption(self, pl_module: lightning.LightningModule, picture: Picture) -> Caption | None:
        try:
            return module_of(pl_module).captioner().caption(picture.path, **self.search)
        except ImageError as err:  # a bad picture is for the module to count; a log is no reason to stop
            self._tell(f"PictureLog: {picture.name} is not drawn: {err}")
            return None

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            _LOG.warning(line)


def spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """Return some pictures of a list, evenly spread, the first among them.

    Args:
        pictures: to choose from.
        count: how many; all when there are not more.

    Returns:
        The chosen ones, in order.
    """
    wanted = min(count, len(pictures))
    return [pictures[index * len(pictures) // wanted] for index in range(wanted)]
