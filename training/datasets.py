"""Data sets of captioned photos: over files and features with any order, and streamed from tar shards.

Shapes: R captions of a picture in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from captioner.config import PreprocessingConfig
from captioner.errors import DataError, ImageError
from captioner.images import open_picture
from captioner.preprocessing import to_pixels
from captioner.tokenizer import Tokenizer
from training.augmentation import Augmentation, augment, mirror_allowed, side_to_open_part_px
from training.batches import Batch, Item, ItemKey, choose_captions, collate, stateless_random
from training.features import FeatureStore
from training.shards import StreamedPicture, stream_samples
from training.sources import BadPicture, CaptionedPicture

Where = Callable[[int], tuple[int, int]]


class ItemMaker:
    """Makes items of a batch out of pictures and captions.

    Args:
        tokenizer: for the captions.
        preprocessing: the same as in use.
        captions_per_picture: R; a picture with fewer repeats some, one with more gives a random choice.
        max_tokens: longer captions are cut there, before the end token.
        augmentation: for training; None for evaluation.
        seed: of the choice of captions and the augmentation.
        sides_px: by epoch, side of the pictures; None, or an epoch beyond: that of `preprocessing`.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        preprocessing: PreprocessingConfig,
        captions_per_picture: int,
        max_tokens: int,
        augmentation: Augmentation | None,
        seed: int,
        sides_px: Sequence[int | None] = (),
    ) -> None:
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self.captions_per_picture, self.max_tokens = captions_per_picture, max_tokens
        self.augmentation, self.seed, self.sides_px = augmentation, seed, sides_px

    def preprocessing_in(self, epoch: int) -> PreprocessingConfig:
        """Return side and normalisation of the pictures of an epoch."""
        side_px = self.sides_px[epoch] if epoch < len(self.sides_px) else None
        return self.preprocessing if side_px is None else replace(self.preprocessing, side_px=side_px)

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Return captions as ids with start and end."""
        tokenizer, room = self.tokenizer, self.max_tokens - 1
        return [[tokenizer.start_id, *tokenizer.encode(text)[:room], tokenizer.end_id] for text in captions]

    def choice(self, ids: Sequence[list[int]], name: str, epoch: int) -> list[list[int]]:
        """Return the R captions of a picture in an epoch."""
        return choose_captions(ids, self.captions_per_picture, stateless_random(self.seed, "captions", epoch, name))

    def item(
        self, source: Path | bytes, name: str, captions: Sequence[str], ids: Sequence[list[int]], epoch: int
    ) -> Item | BadPicture:
        """Return a picture as pixels with its captions in an epoch.

        Args:
            source: the file, or its bytes.
            name: of the picture.
            captions: as written.
            ids: of the captions.
            epoch: counted from 0.

        Returns:
            The item, or what is wrong with the picture.
        """
        preprocessing = self.preprocessing_in(epoch)
        try:
            side_px = side_to_open_part_px(preprocessing, self.augmentation)
            image = open_picture(source, side_px=side_px).image
        except ImageError as err:
            return BadPicture(name, str(err))
        if self.augmentation is not None:
            draw = stateless_random(self.seed, "augmentation", epoch, name)
            image = augment(image, self.augmentation, mirror=mirror_allowed(captions), rng=draw)
        return Item(to_pixels(image, preprocessing), self.choice(ids, name, epoch), name)

    def streamed(self, sample: StreamedPicture | BadPicture, epoch: int) -> Item | BadPicture:
        """Return a picture of a shard as `item` does; a bad one as it is."""
        if isinstance(sample, BadPicture):
            return sample
        return self.item(sample.data, sample.name, sample.captions, self.ids(sample.captions), epoch)


class CaptionDataset(Dataset[Item | BadPicture]):
    """One item per picture and epoch: pixels, or grid features in the first epochs, with R captions.

    Args:
        pictures: the photos.
        maker: of the items.
        features: of the cached stages.
        cached_epochs: so many epochs at the start read features; 0: none.
    """

    def __init__(
        self,
        pictures: Sequence[CaptionedPicture],
        *,
        maker: ItemMaker,
        features: FeatureStore | None = None,
        cached_epochs: int = 0,
    ) -> None:
        self.pictures, self.maker = pictures, maker
        self.features, self.cached_epochs = features, cached_epochs
        self.token_ids = [maker.ids(picture.captions) for picture in pictures]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.pictures)

    def longest(self, index: int) -> int:
        """Return the length of the longest caption of a picture, in tokens."""
        return max(len(ids) for ids in self.token_ids[index])

    def __getitem__(self, key: ItemKey | int) -> Item | BadPicture:
        """Return one picture in one epoch; a bare index stands for epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        picture, ids = self.pictures[index], self.token_ids[index]
        if epoch >= self.cached_epochs or self.features is None:
            return self.maker.item(picture.path, picture.name, picture.captions, ids, epoch)
        view = stateless_random(self.maker.seed, "view", epoch, picture.name).randrange(self.features.views)
        features = self.features.read(index, view)
        if isinstance(features, BadPicture):
            return features
        return Item(features, self.maker.choice(ids, picture.name, epoch), picture.name)


class ShardDataset(IterableDataset[Batch]):
    """Batches streamed from tar shards; every epoch has the same number, whatever the shards hold.

    A reader whose share of the shards is used up before the epoch ends begins again.

    Args:
        shards: tar files.
        batches: of one epoch, of this process.
        batch_size: pictures per batch.
        maker: of the items.
        rank: of this process.
        world_size: processes that train together.
        shuffle_buffer: pictures among which the next one is drawn; 0: in order, for evaluation.

    Attributes:
        start: epoch, and how many of its batches this process has had already.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        batches: int,
        batch_size: int,
        maker: ItemMaker,
        rank: int,
        world_size: int,
        shuffle_buffer: int,
    ) -> None:
        super().__init__()
        self.shards, self.batches, self.batch_size, self.maker = list(shards), batches, batch_size, maker
        self.rank, self.world_size, self.shuffle_buffer = rank, world_size, shuffle_buffer
        self.start = (0, 0)

    def __len__(self) -> int:
        """Return the number of batches of an epoch, of this process."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield this worker's batches: every n-th of the epoch's, so that workers in turn give all in order."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, done = self.start
        # Batch k is worker (k mod n)'s. A loader that starts in the middle asks worker 0 first.
        own = (worker + done) % workers
        skip = len(range(own, done, workers))
        samples = self._samples(epoch, own, workers, skip * self.batch_size)
        for _ in range(own + skip * workers, self.batches, workers):
            yield self._batch(samples, epoch)

    def _samples(self, epoch: int, worker: int, workers: int, skip: int) -> Iterator[StreamedPicture | BadPicture]:
        while True:
            count = 0
            for sample in stream_samples(
                self.shards,
                epoch=epoch,
                seed=self.maker.seed,
                rank=self.rank,
                world_size=self.world_size,
                worker=worker,
                workers=workers,
                shuffle_buffer=self.shuffle_buffer,
            ):
                count += 1
                if count > skip:
                    yield sample
            skip = max(0, skip - count)
            if count == 0:
                raise DataError(
                    f"{self.shards[0]} and others: {workers * self.world_size} readers, but too few samples for "
                    "each; use fewer data.workers or more shards"
                )

    def _batch(self, samples: Iterator[StreamedPicture | BadPicture], epoch: int) -> Batch:
        return collate([self.maker.streamed(next(samples), epoch) for _ in range(self.batch_size)])


class ShardDevDataset(IterableDataset[Batch]):
    """Batches of all pictures of tar shards, once and in order; of several processes each takes every n-th picture.

    Args:
        shards: tar files.
        batch_size: pictures per batch.
        maker: of the items.
        rank: of this process.
        world_size: processes; each reads all shards.
    """

    def __init__(
        self, shards: Sequence[Path], *, batch_size: int, maker: ItemMaker, rank: int, world_size: int
    ) -> None:
        super().__init__()
        self.shards, self.batch_size, self.maker = list(shards), batch_size, maker
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the last may be smaller."""
        samples = islice(stream_samples(self.shards), self.rank, None, self.world_size)
        while chosen := list(islice(samples, self.batch_size)):
            yield collate([self.maker.streamed(sample, epoch=0) for sample in chosen])


class ShardLoader(DataLoader[Batch]):
    """Loader of a `ShardDataset` that tells it where the run is, at the start of each iteration.

    Args:
        dataset: of batches.
        where: epoch and batches done, as for `LengthBatchSampler`.
        workers: processes that read.
    """

    def __init__(self, dataset: ShardDataset, *, where: Where, workers: int) -> None:
        super().__init__(dataset, batch_size=None, num_workers=workers)
        self.where = where

    def __iter__(self) -> Any:
        """Start the workers where the run is."""
        dataset = self.dataset
        assert isinstance(dataset, ShardDataset)
        dataset.start = self.where(len(dataset))
        return super().__iter__()
