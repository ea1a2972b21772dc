"""Grid features of a frozen encoder, computed once and memory-mapped: the cache of the cached stages.

A cache is found by a key over everything that the features depend on: the encoder's weights and shape, the
preprocessing, the augmentation, and every picture's path, size and time of change. Whatever differs has another key,
so a stale cache is never read.

Shapes: N pictures, W views of each, P grid cells, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.config import PreprocessingConfig
from captioner.encoder import Encoder
from captioner.errors import DataError, ImageError
from captioner.images import open_picture
from captioner.prepared import side_to_open_px
from captioner.preprocessing import to_pixels
from training.augmentation import Augmentation, augment, mirror_allowed, side_to_open_part_px
from training.batches import stateless_random
from training.sources import BadPicture, CaptionedPicture

_LOG = logging.getLogger(__name__)
_BATCH = 32
# Counted up where pictures come to be opened in another way, so that older caches are made anew.
_DECODING = 3


class FeatureStore:
    """Features on disk, read as they are asked for.

    Args:
        path: of the `.npy` file, float16 [N * W, P, C]; beside it a `.json` with the bad pictures.
        views: W.
    """

    def __init__(self, path: Path, *, views: int) -> None:
        self.path, self.views = path, views
        listed = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["bad"]
        self.bad = {int(index): BadPicture(name, message) for index, (name, message) in listed.items()}
        self._array: npt.NDArray[np.float16] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped memory behind: each process maps the file itself."""
        return {**self.__dict__, "_array": None}

    def read(self, index: int, view: int) -> Tensor | BadPicture:
        """Return the features of a picture.

        Args:
            index: of the picture.
            view: 0 for the picture as it is, more for an augmented one.

        Returns:
            float16 [P, C], or what was wrong with the picture.
        """
        if index in self.bad:
            return self.bad[index]
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(np.array(self._array[index * self.views + view]))


def features_key(
    encoder: Encoder,
    pictures: Sequence[CaptionedPicture],
    *,
    preprocessing: PreprocessingConfig,
    augmentation: Augmentation | None,
    views: int,
    seed: int,
) -> str:
    """Return the SHA-256 over everything that the features depend on.

    Args:
        encoder: its weights and shape.
        pictures: path, size and time of change of each file, and whether it may be mirrored.
        preprocessing: side and normalisation.
        augmentation: of the views after the first.
        views: W.
        seed: of the augmentation.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    settings = {
        "decoding": _DECODING,
        "encoder": [encoder.backbone, encoder.stride, encoder.grid_hw_of(preprocessing.side_px)],
        "preprocessing": dataclasses.asdict(preprocessing),
        "augmentation": dataclasses.asdict(augmentation) if augmentation is not None and views > 1 else None,
        "views": views,
        "seed": seed if views > 1 else None,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for picture in pictures:
        try:
            facts = Path(picture.path).stat()
            stamp = f"{facts.st_size} {facts.st_mtime_ns}"
        except OSError:
            stamp = "missing"
        digest.update(f"{os.fspath(picture.path)}\0{stamp}\0{mirror_allowed(picture.captions)}\n".encode())
    return digest.hexdigest()


class _Views(Dataset[tuple[int, list[Tensor] | BadPicture]]):
    """Every picture with its views, as pixels."""

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        preprocessing: PreprocessingConfig,
        augmentation: Augmentation | None,
        views: int,
        seed: int,
    ) -> None:
        self.pictures, self.preprocessing, self.augmentation = pictures, preprocessing, augmentation
        self.views, self.seed = views, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor] | BadPicture]:
        picture = self.pictures[index]
        try:
            opened = open_picture(picture.path, side_px=side_to_open_px(self.preprocessing))
            found = [to_pixels(opened.image, self.preprocessing)]
            reduced = opened.image.size[::-1] != opened.full_hw_px
            if reduced and self.views > 1 and self.augmentation is not None:
                side_px = side_to_open_part_px(self.preprocessing, self.augmentation)
                opened = open_picture(picture.path, side_px=side_px)
        except ImageError as err:
            return index, BadPicture(picture.name, str(err))
        for view in range(1, self.views):
            changed = opened.image
            if self.augmentation is not None:
                draw = stateless_random(self.seed, "view", view, picture.name)
                changed = augment(opened.image, self.augmentation, mirror=mirror_allowed(picture.captions), rng=draw)
            found.append(to_pixels(changed, self.preprocessing))
        return index, found


def prepare_features(
    folder: Path,
    *,
    encoder: Encoder,
    pictures: Sequence[CaptionedPicture],
    preprocessing: PreprocessingConfig,
    augmentation: Augmentation | None,
    views: int,
    seed: int,
    workers: int,
) -> FeatureStore:
    """Return the features of all pictures, from the cache or computed now.

    Args:
        folder: of the caches; made when it is not there.
        encoder: frozen, on the device that is to compute.
        pictures: in the order of the data set.
        preprocessing: the same as in use, but perhaps for the side.
        augmentation: of the views after the first.
        views: how many versions of each picture: the first as it is, the others augmented.
        seed: of the augmentation.
        workers: processes that decode pictures.

    Returns:
        The store.

    Raises:
        DataError: when the disk has no room or cannot be written, or the features do not fit float16.
    """
    key = features_key(
        encoder, pictures, preprocessing=preprocessing, augmentation=augmentation, views=views, seed=seed
    )
    path = folder / f"features-{key[:32]}.npy"
    rows, columns = encoder.grid_hw_of(preprocessing.side_px)
    shape = (len(pictures) * views, rows * columns, encoder.feature_dim)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of several processes the first computes; the others wait, and find it.
        with FileLock(path.with_suffix(".lock")):
            if not (path.is_file() and path.with_suffix(".json").is_file()):
                _require_room(folder, 2 * int(np.prod(shape, dtype=np.int64)))
                _LOG.info("computing the grid features of %d pictures into %s", len(pictures), path)
                dataset = _Views(pictures, preprocessing, augmentation, views, seed)
                loader = DataLoader(dataset, max(1, _BATCH // views), num_workers=workers, collate_fn=list)
                _write(path, shape, _encoded(encoder, loader), views)
    except OSError as err:
        raise DataError(
            f"{path}: the feature cache cannot be written: {err}; free some space, name another data.cache_folder, "
            "or train with cached: false"
        ) from err
    return FeatureStore(path, views=views)


def _require_room(folder: Path, size_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise DataError(
            f"{folder}: the feature cache needs {size_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free; "
            "free some space, set data.cache_folder or a smaller data.cache_views, or train with cached: false"
        )


@torch.inference_mode()
def _encoded(
    encoder: Encoder, batches: Iterator[Any] | DataLoader[Any]
) -> Iterator[tuple[int, npt.NDArray[np.float16] | BadPicture]]:
    """Yield each picture's index with its features [W, P, C], or what is wrong with it."""
    device, in_use = next(encoder.parameters()).device, encoder.folded().to(memory_format=torch.channels_last)
    for batch in batches:
        good = [(index, views) for index, views in batch if not isinstance(views, BadPicture)]
        yield from ((index, views) for index, views in batch if isinstance(views, BadPicture))
        if not good:
            continue
        pixels = torch.stack([pixels for _, views in good for pixels in views]).to(device)
        grid = in_use(pixels.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
        if not np.isfinite(grid.astype(np.float16)).all():
            raise DataError(f"the features of {encoder.backbone} do not fit float16; train with cached: false")
        parts = grid.astype(np.float16).reshape(len(good), -1, *grid.shape[1:])
        yield from ((index, part) for (index, _), part in zip(good, parts, strict=True))


def _write(
    path: Path, shape: tuple[int, ...], found: Iterator[tuple[int, npt.NDArray[np.float16] | BadPicture]], views: int
) -> None:
    # Written beside and renamed when whole: a cache is complete or not there.
    partial = path.with_suffix(".partial")
    picture_bytes = 2 * views * shape[1] * shape[2]
    bad: dict[str, tuple[str, str]] = {}
    try:
        with partial.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            begin = file.tell()
            for index, features in found:
                if isinstance(features, BadPicture):
                    bad[str(index)] = (features.name, features.message)
                    continue
                file.seek(begin + index * picture_bytes)
                file.write(features.tobytes())
            file.truncate(begin + 2 * int(np.prod(shape, dtype=np.int64)))  # the last pictures may be bad ones
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".json").write_text(json.dumps({"bad": bad}), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
