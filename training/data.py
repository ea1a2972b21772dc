"""Captioned photos: reading a data set, and batches in which all captions of a picture share one encoder pass.

Shapes: B pictures of a batch, R captions of each, T tokens of the longest caption.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from captioner.config import PreprocessingConfig
from captioner.errors import ConfigError, DataError
from captioner.images import open_picture
from captioner.preprocessing import to_pixels
from captioner.tokenizer import Tokenizer
from training.augmentation import Augmentation, augment, mirror_allowed

SPLITS = {"train": "Flickr_8k.trainImages.txt", "dev": "Flickr_8k.devImages.txt"}


@dataclass(frozen=True)
class CaptionedPicture:
    """A photo and its reference captions.

    Args:
        name: file name, the key of the picture in every list.
        path: of the file.
        captions: reference captions, as written.
    """

    name: str
    path: Path
    captions: tuple[str, ...]


def read_flickr8k(root: Path, split: str) -> list[CaptionedPicture]:
    """Read one split of Flickr8k in its original files (Hodosh et al. 2013).

    Args:
        root: folder with `Images/`, `Flickr8k.token.txt` and the lists of names.
        split: "train" or "dev".

    Returns:
        The pictures in the order of the list.

    Raises:
        ConfigError: for an unknown split.
        DataError: when a file is missing, a line is malformed, or a picture has no caption or no file.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(root / "Flickr8k.token.txt"), start=1):
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not tab or not mark:
            raise DataError(
                f"{root / 'Flickr8k.token.txt'}, line {number}: expected NAME.jpg#K<TAB>caption, got {line!r}"
            )
        captions.setdefault(name, []).append(caption)
    names = [line.strip() for line in _lines(root / SPLITS[split]) if line.strip()]
    pictures = [CaptionedPicture(name, root / "Images" / name, tuple(captions.get(name, ()))) for name in names]
    _refuse([p.name for p in pictures if not p.captions], f"{root}: pictures of split {split!r} without a caption")
    _refuse([p.name for p in pictures if not p.path.is_file()], f"{root / 'Images'}: missing pictures")
    if not pictures:
        raise DataError(f"{root / SPLITS[split]}: the list is empty")
    return pictures


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as err:
        raise DataError(f"{path}: no such file; data.root must be a folder with the original Flickr8k files") from err
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: cannot be read as text: {err}") from err


def _refuse(names: Sequence[str], fault: str) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DataError(f"{fault}: {', '.join(names[:5])}{more}")


@dataclass(frozen=True)
class Batch:
    """Pictures and their captions.

    Args:
        pixels: float32 [B, 3, S, S], normalised.
        tokens: int64 [B * R, 1 + T], start token first and end token last, padded; R rows side by side per picture.
        names: of the pictures.
    """

    pixels: Tensor
    tokens: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return Batch(
            self.pixels.to(device, non_blocking=non_blocking),
            self.tokens.to(device, non_blocking=non_blocking),
            self.names,
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, for copies to a GPU that do not wait."""
        return Batch(self.pixels.pin_memory(), self.tokens.pin_memory(), self.names)


class CaptionDataset(Dataset[tuple[Tensor, list[list[int]], str]]):
    """One item per picture: pixels, R captions as ids with start and end, name.

    Args:
        pictures: the photos.
        tokenizer: for the captions.
        preprocessing: the same as in use.
        captions_per_picture: R; a picture with fewer repeats some, one with more gives a random choice.
        max_tokens: longer captions are cut there, before the end token.
        augmentation: for training; None for evaluation.
    """

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        *,
        tokenizer: Tokenizer,
        preprocessing: PreprocessingConfig,
        captions_per_picture: int,
        max_tokens: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.pictures = pictures
        self.preprocessing = preprocessing
        self.captions_per_picture = captions_per_picture
        self.augmentation = augmentation
        self.token_ids = [
            [[tokenizer.start_id, *tokenizer.encode(text)[: max_tokens - 1], tokenizer.end_id] for text in p.captions]
            for p in pictures
        ]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pictures)

    def longest(self, index: int) -> int:
        """Return the length of the longest caption of a picture, in tokens."""
        return max(len(ids) for ids in self.token_ids[index])

    def __getitem__(self, index: int) -> tuple[Tensor, list[list[int]], str]:
        """Return pixels, captions and name of one picture."""
        picture = self.pictures[index]
        image = open_picture(picture.path).image
        if self.augmentation is not None:
            image = augment(image, self.augmentation, mirror=mirror_allowed(picture.captions))
        captions, wanted = self.token_ids[index], self.captions_per_picture
        chosen = random.sample(captions, wanted) if wanted < len(captions) else list(captions)
        chosen += [captions[k % len(captions)] for k in range(wanted - len(chosen))]
        return to_pixels(image, self.preprocessing), chosen, picture.name


def collate(items: Sequence[tuple[Tensor, list[list[int]], str]]) -> Batch:
    """Join items; captions are padded to the longest of the batch."""
    rows = [caption for _, captions, _ in items for caption in captions]
    tokens = torch.full((len(rows), max(map(len, rows))), Tokenizer.pad_id)
    for row, caption in enumerate(rows):
        tokens[row, : len(caption)] = torch.tensor(caption)
    return Batch(torch.stack([pixels for pixels, _, _ in items]), tokens, tuple(name for _, _, name in items))


class LengthBatchSampler(Sampler[list[int]]):
    """Random batches of pictures whose longest captions are of like length, so that little is padding.

    Every `bucket_batches` batches are drawn at random and sorted among themselves; the batches are then shuffled.

    Args:
        lengths: longest caption of each picture, tokens.
        batch_size: pictures per batch; a last smaller batch is left out (its batch norm statistics would be poor),
            unless it is the only one.
        seed: of the order; the epoch is added to it.
        bucket_batches: how many batches are sorted together.

    Raises:
        ConfigError: for a batch size below 1.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, bucket_batches: int = 20) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = lengths
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.epoch = 0

    @property
    def sampler(self) -> LengthBatchSampler:
        """This object: Lightning looks for `set_epoch` at the sampler of a batch sampler, not at itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.lengths) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        order = random.Random(self.seed * 1_000_003 + self.epoch)
        indices = list(range(len(self.lengths)))
        order.shuffle(indices)
        indices = indices[: len(self) * self.batch_size]
        bucket = self.batch_size * self.bucket_batches
        batches: list[list[int]] = []
        for first in range(0, len(indices), bucket):
            alike = sorted(indices[first : first + bucket], key=lambda index: self.lengths[index])
            batches += [alike[k : k + self.batch_size] for k in range(0, len(alike), self.batch_size)]
        order.shuffle(batches)
        yield from batches


class Flickr8kDataModule(lightning.LightningDataModule):
    """Flickr8k in its original files, for Lightning.

    Args:
        root: folder with `Images/`, `Flickr8k.token.txt` and the lists of names.
        batch_size: pictures per batch.
        captions_per_picture: captions of a picture in one training batch; they share its encoder pass.
        min_count: words that occur less often in the training captions are not learned.
        max_tokens: longest caption, end token included.
        preprocessing: side and normalisation; written into the model.
        augmentation: of the training pictures; None leaves them as they are.
        workers: processes that decode pictures.
        seed: of the order of the batches.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        captions_per_picture: int = 5,
        min_count: int = 5,
        max_tokens: int = 40,
        preprocessing: PreprocessingConfig | None = None,
        augmentation: Augmentation | None = None,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.captions_per_picture = captions_per_picture
        self.min_count = min_count
        self.max_tokens = max_tokens
        self.preprocessing = preprocessing or PreprocessingConfig()
        self.augmentation = augmentation
        self.workers = workers
        self.seed = seed
        self.tokenizer: Tokenizer | None = None
        self.pictures: dict[str, list[CaptionedPicture]] = {}

    def setup(self, stage: str) -> None:
        """Read the lists and make the vocabulary from the training captions; opens no picture."""
        if not self.pictures:
            self.pictures = {split: read_flickr8k(self.root, split) for split in SPLITS}
            captions = (caption for picture in self.pictures["train"] for caption in picture.captions)
            self.tokenizer = Tokenizer.train(captions, min_count=self.min_count)

    def references(self) -> dict[str, tuple[str, ...]]:
        """Return the reference captions of the dev pictures by name."""
        return {picture.name: picture.captions for picture in self.pictures["dev"]}

    def data_hash(self) -> str:
        """Return the SHA-256 of the names and captions of all splits, in order."""
        digest = hashlib.sha256()
        for split, pictures in self.pictures.items():
            for picture in pictures:
                digest.update("\0".join((split, picture.name, *picture.captions)).encode() + b"\n")
        return digest.hexdigest()

    def _dataset(self, split: str, augmentation: Augmentation | None) -> CaptionDataset:
        if self.tokenizer is None:
            raise DataError("the data was not set up: call setup() first")
        return CaptionDataset(
            self.pictures[split],
            tokenizer=self.tokenizer,
            preprocessing=self.preprocessing,
            captions_per_picture=self.captions_per_picture,
            max_tokens=self.max_tokens,
            augmentation=augmentation,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return augmented batches in random order."""
        dataset = self._dataset("train", self.augmentation)
        lengths = [dataset.longest(index) for index in range(len(dataset))]
        sampler = LengthBatchSampler(lengths, batch_size=self.batch_size, seed=self.seed)
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the dev pictures in order, as they are in use."""
        return DataLoader(
            self._dataset("dev", None),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
        )
