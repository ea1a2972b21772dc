"""The data module: captioned photos of any format, for Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from captioner.checkpoint import load_checkpoint
from captioner.config import ModelConfig, PreprocessingConfig
from captioner.encoder import Encoder
from captioner.errors import ConfigError, DataError, ImageError
from captioner.images import open_picture
from captioner.tokenizer import Tokenizer
from training.augmentation import Augmentation
from training.batches import LengthBatchSampler, collate
from training.datasets import CaptionDataset, ItemMaker, ShardDataset, ShardDevDataset, ShardLoader
from training.features import FeatureStore, prepare_features
from training.shards import find_shards, read_captions
from training.sources import SHUFFLE_BUFFER, BadPicture, CaptionedPicture, DataSource, data_hash, read_source

TRIED = 4  # pictures of a split that are opened before the training
LOOK_SIDE_PX = 32


def batches_done(trainer: lightning.Trainer) -> int:
    """Return how many batches the run has processed in all, on this process; a resumed run counts on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def unreadable(pictures: Sequence[CaptionedPicture]) -> list[BadPicture]:
    """Return the pictures that cannot be opened, looking at all of them.

    Args:
        pictures: in files.

    Returns:
        What is wrong with each, in order.
    """

    def fault(picture: CaptionedPicture) -> BadPicture | None:
        try:
            open_picture(picture.path, side_px=LOOK_SIDE_PX)
        except ImageError as err:
            return BadPicture(picture.name, str(err))
        return None

    with ThreadPoolExecutor() as pool:
        return [bad for bad in pool.map(fault, pictures) if bad is not None]


class CaptionData(lightning.LightningDataModule):
    """Captioned photos of any format, for Lightning.

    Args:
        root: folder of the data.
        format: "flickr8k", "karpathy", "coco", "table" (captions.csv or captions.jsonl) or "shards"; the options
            up to `shuffle_buffer` belong to one or two of these each, see `training.sources.DataSource`.
        annotations: the JSON, CSV or JSONL file.
        images: folder of the pictures.
        train_annotations: of COCO's training pictures.
        train_images: folder of COCO's training pictures.
        dev_annotations: of COCO's dev pictures.
        dev_images: folder of COCO's dev pictures.
        image_column: of a table.
        caption_column: of a table.
        split_column: of a table.
        dev_share: of a table without splits.
        train_shards: tar files.
        dev_shards: tar files.
        shuffle_buffer: of the shards.
        batch_size: pictures per batch and process.
        captions_per_picture: captions of a picture in one training batch; they share its encoder pass.
        min_count: words that occur less often in the training captions are not learned.
        max_tokens: longest caption, end token included; None: the model's that training starts from, else 40.
        preprocessing: side and normalisation, written into the model; None: the model's that training starts from,
            else 224 px.
        augmentation: of the training pictures; None leaves them as they are.
        cache_folder: of the grid features of cached stages.
        cache_views: versions of each picture in that cache: the first as it is, the others augmented.
        bad_picture_limit: share of the pictures that may be missing or unreadable; beyond it training stops.
        workers: processes that decode pictures.
        seed: of order, choice of captions and augmentation.
        init_from: model folder or "bundled" whose vocabulary is kept and extended; set by `model.init_from`.
        extra: more data, whose training pictures are added to those above; its other splits are not used.

    Attributes:
        pictures: by split; of shards the names and captions alone.
        bad: pictures that were named but cannot be used, found so far, by name.
        tokenizer: from `setup` on.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        root: str,
        format: str = "table",
        annotations: str | None = None,
        images: str | None = None,
        train_annotations: str | None = None,
        train_images: str | None = None,
        dev_annotations: str | None = None,
        dev_images: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        split_column: str | None = None,
        dev_share: float | None = None,
        train_shards: str | None = None,
        dev_shards: str | None = None,
        shuffle_buffer: int | None = None,
        batch_size: int = 32,
        captions_per_picture: int = 5,
        min_count: int = 5,
        max_tokens: int | None = None,
        preprocessing: PreprocessingConfig | None = None,
        augmentation: Augmentation | None = None,
        cache_folder: str = "~/.cache/captioner",
        cache_views: int = 1,
        bad_picture_limit: float = 0.01,
        workers: int = 1,
        seed: int = 0,
        init_from: str | None = None,
        extra: DataSource | None = None,
    ) -> None:
        super().__init__()
        self.source = DataSource(
            root=root,
            format=format,
            annotations=annotations,
            images=images,
            train_annotations=train_annotations,
            train_images=train_images,
            dev_annotations=dev_annotations,
            dev_images=dev_images,
            image_column=image_column,
            caption_column=caption_column,
            split_column=split_column,
            dev_share=dev_share,
            train_shards=train_shards,
            dev_shards=dev_shards,
            shuffle_buffer=shuffle_buffer,
        )
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("captions_per_picture", captions_per_picture, 1),
            ("min_count", min_count, 1),
            ("max_tokens", 2 if max_tokens is None else max_tokens, 2),
            ("cache_views", cache_views, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ConfigError(f"data.{name} must be at least {least}, got {value}")
        if not 0 <= bad_picture_limit <= 1:
            raise ConfigError(f"data.bad_picture_limit must be from 0 to 1, got {bad_picture_limit}")
        self.batch_size, self.captions_per_picture = batch_size, captions_per_picture
        self.min_count, self._max_tokens, self._preprocessing = min_count, max_tokens, preprocessing
        self.augmentation, self.workers, self.seed = augmentation, workers, seed
        self.cache_folder, self.cache_views = Path(cache_folder).expanduser(), cache_views
        self.bad_picture_limit, self.init_from = bad_picture_limit, init_from
        if extra is not None and "shards" in (format, extra.format):
            raise ConfigError("data.extra needs pictures in files: neither data.format nor data.extra.format is shards")
        self.extra = extra
        self.base: ModelConfig | None = None
        self.tokenizer: Tokenizer | None = None
        self.pictures: dict[str, list[CaptionedPicture]] = {}
        self.bad: dict[str, BadPicture] = {}
        self._shards: dict[str, list[Path]] = {}
        self._features: FeatureStore | None = None
        self._sides_px: tuple[int | None, ...] = ()
        self._cached_epochs = 0
        self._train_loader: DataLoader[Any] | None = None

    def setup(self, stage: str) -> None:
        """Read the lists and make the vocabulary from the training captions; opens no picture file.

        Args:
            stage: of Lightning.

        Raises:
            ConfigError: when an option contradicts the model that training starts from.
            DataError: when the data cannot be read, or too many pictures are missing.
            CheckpointError: when that model cannot be read.
        """
        if self.pictures:
            return
        if self.source.format == "shards":
            self._shards = find_shards(self.source)
            for split, shards in self._shards.items():
                found = list(read_captions(shards))
                self.pictures[split] = [item for item in found if isinstance(item, CaptionedPicture)]
                self.note_bad([item for item in found if isinstance(item, BadPicture)], check=False)
        else:
            content = read_source(self.source)
            self.pictures = dict(content.pictures)
            self.note_bad(content.missing, check=False)
            self._add_extra()
        self.note_bad(())
        if len(self.pictures["dev"]) < 2:
            raise DataError(
                f"{self.source.root}: one dev picture, on which CIDEr-D is always 0; give at least two, or of a table "
                "without splits a larger data.dev_share"
            )
        if not self._shards:
            self._try_some()
        captions = [caption for picture in self.pictures["train"] for caption in picture.captions]
        if self.init_from is None:
            self.tokenizer = Tokenizer.train(captions, min_count=self.min_count)
            return
        base = load_checkpoint(None if self.init_from == "bundled" else self.init_from)
        self.base = base.model.config
        preprocessing = self._preprocessing
        if preprocessing is not None:  # another side is another grid, over which the positions are stretched
            preprocessing = replace(preprocessing, side_px=self.base.preprocessing.side_px)
        for name, given, own in (
            ("max_tokens", self._max_tokens, self.base.max_tokens),
            ("preprocessing", preprocessing, self.base.preprocessing),
        ):
            if given not in (None, own):
                raise ConfigError(f"data.{name}={given} differs from that of the model {self.init_from!r}, {own}")
        self.tokenizer = base.tokenizer.extended(captions, min_count=self.min_count)

    def _add_extra(self) -> None:
        if self.extra is None:
            return
        content = read_source(self.extra)
        own = {picture.name for of_split in self.pictures.values() for picture in of_split}
        twice = next((picture.name for picture in content.pictures["train"] if picture.name in own), None)
        if twice is not None:
            raise DataError(f"{self.extra.root}: {twice} is in {self.source.root} too; name every picture once")
        self.pictures["train"] = self.pictures["train"] + content.pictures["train"]
        self.note_bad(content.missing, check=False)

    @property
    def max_tokens(self) -> int:
        """Longest caption, end token included."""
        return self._max_tokens or (40 if self.base is None else self.base.max_tokens)

    @property
    def preprocessing(self) -> PreprocessingConfig:
        """Side and normalisation."""
        return self._preprocessing or (PreprocessingConfig() if self.base is None else self.base.preprocessing)

    def note_bad(self, found: Sequence[BadPicture], *, check: bool = True) -> None:
        """Count pictures that cannot be used.

        Args:
            found: in this batch.
            check: whether to stop beyond the limit.

        Raises:
            DataError: when there are more than `bad_picture_limit` allows. All pictures are then looked at, so that
                `bad` and with it `bad_pictures.txt` name all that cannot be used.
        """
        self.bad |= {bad.name: bad for bad in found}
        if not check or not self.bad:
            return
        pictures = [picture for of_split in self.pictures.values() for picture in of_split]
        # What is missing from the start is in `bad` and not in `pictures`.
        total = len({picture.name for picture in pictures} | self.bad.keys())
        if len(self.bad) <= self.bad_picture_limit * total:
            return
        if not self._shards:
            self.bad |= {bad.name: bad for bad in unreadable(pictures)}
        shown = "; ".join(bad.message for bad in list(self.bad.values())[:5])
        more = f"; and {len(self.bad) - 5} more" if len(self.bad) > 5 else ""
        raise DataError(
            f"{self.source.root}: {len(self.bad)} of {total} pictures cannot be used, more than "
            f"data.bad_picture_limit={self.bad_picture_limit:g} allows: {shown}{more}; mend them, or raise the limit"
        )

    def _try_some(self) -> None:
        """Look whether pictures can be read at all, before any long work."""
        for split in ("train", "dev"):
            some = self.pictures[split][:TRIED]
            found = unreadable(some)
            if len(found) == len(some):
                self.note_bad(found)
            if len(self.pictures[split]) == len(found):
                raise DataError(f"{self.source.root}: no picture of split {split!r} can be read: {found[0].message}")

    def references(self) -> dict[str, tuple[str, ...]]:
        """Return the reference captions of the dev pictures by name."""
        return {picture.name: picture.captions for picture in self.pictures["dev"]}

    def data_hash(self) -> str:
        """Return the SHA-256 of the names and captions of all splits, in order."""
        return data_hash(self.pictures)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must find again; Lightning writes it into the checkpoint."""
        sources = {"source": self.source, "extra": self.extra}
        plain = {
            key: {name: value for name, value in asdict(source).items() if value is not None}
            for key, source in sources.items()
            if source is not None
        }
        return {"data_sha256": self.data_hash(), **plain, **self._order_settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run goes on with the same data in the same order.

        Args:
            state_dict: of the checkpoint.

        Raises:
            DataError: when captions or names have changed.
            ConfigError: when an option has that fixes the order.
        """
        if state_dict["data_sha256"] != self.data_hash():
            raise DataError(
                f"{self.source.root}: names or captions have changed since the checkpoint was written; restore them, "
                "or start a new run"
            )
        for name, value in self._order_settings().items():
            if state_dict.get(name) != value:
                setting = "processes (trainer.devices x num_nodes)" if name == "processes" else f"data.{name}"
                raise ConfigError(
                    f"{setting}={value}, but the checkpoint's run had {state_dict.get(name)}; set it back"
                )

    def _order_settings(self) -> dict[str, Any]:
        names = ("batch_size", "seed", "captions_per_picture", "cache_views", "workers")
        chosen = [name for name in names if name != "workers" or self._shards]  # they share the shards
        return {name: getattr(self, name) for name in chosen} | {"processes": self._processes()[1]}

    def use_sides(self, sides_px: Sequence[int | None]) -> None:
        """Let epochs learn from pictures of another side than the model's.

        Args:
            sides_px: by epoch; None: the model's.
        """
        self._sides_px, self._train_loader = tuple(sides_px), None

    def use_cache(self, encoder: Encoder, *, epochs: int) -> None:
        """Let the first epochs read the features of the frozen encoder, computed now unless they are there.

        Args:
            encoder: on the device that is to compute.
            epochs: how many; 0 for none.

        Raises:
            ConfigError: for shards, which have no fixed list of pictures.
            DataError: when the cache cannot be written, or too many pictures are bad.
        """
        if not epochs:
            return
        if self._shards:
            raise ConfigError("cached stages need pictures in files, not data.format=shards; use cached: false")
        self._cached_epochs, self._train_loader = epochs, None
        self._features = prepare_features(
            self.cache_folder,
            encoder=encoder,
            pictures=self.pictures["train"],
            preprocessing=self._maker(None, self._sides_px).preprocessing_in(0),
            augmentation=self.augmentation,
            views=self.cache_views,
            seed=self.seed,
            workers=self.workers,
        )
        self.note_bad(list(self._features.bad.values()))

    def _maker(self, augmentation: Augmentation | None, sides_px: Sequence[int | None] = ()) -> ItemMaker:
        if self.tokenizer is None:
            raise DataError("the data was not set up: call setup() first")
        return ItemMaker(
            tokenizer=self.tokenizer,
            preprocessing=self.preprocessing,
            captions_per_picture=self.captions_per_picture,
            max_tokens=self.max_tokens,
            augmentation=augmentation,
            seed=self.seed,
            sides_px=sides_px,
        )

    def _where(self, batches: int) -> tuple[int, int]:
        """Return the epoch and its batches done, counted by what the run has processed in all."""
        if self.trainer is None:
            return 0, 0
        return divmod(batches_done(self.trainer), self._limited(batches))

    def _limited(self, batches: int) -> int:
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def train_batches(self) -> int:
        """Return the number of batches of an epoch, of this process.

        To ask the trainer would start the loader's workers, in a resumed run before it knows where it goes on.
        """
        if self._train_loader is None:
            self._train_loader = self._make_train_loader()
        return self._limited(len(self._train_loader))

    def _processes(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return augmented batches in random order; a resumed run goes on behind its last batch."""
        if self._train_loader is None:
            self._train_loader = self._make_train_loader()
        return self._train_loader

    def _make_train_loader(self) -> DataLoader[Any]:
        maker = self._maker(self.augmentation, self._sides_px)
        rank, world_size = self._processes()
        if self._shards:
            batches = len(self.pictures["train"]) // (self.batch_size * world_size)
            if not batches:
                raise DataError(f"{self.source.root}: fewer training pictures than a batch; lower data.batch_size")
            shards = ShardDataset(
                self._shards["train"],
                batches=batches,
                batch_size=self.batch_size,
                maker=maker,
                rank=rank,
                world_size=world_size,
                shuffle_buffer=SHUFFLE_BUFFER if self.source.shuffle_buffer is None else self.source.shuffle_buffer,
            )
            return ShardLoader(shards, where=self._where, workers=self.workers)
        pictures = CaptionDataset(
            self.pictures["train"], maker=maker, features=self._features, cached_epochs=self._cached_epochs
        )
        sampler = LengthBatchSampler(
            [pictures.longest(index) for index in range(len(pictures))],
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            where=self._where,
        )
        return DataLoader(
            pictures,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the dev pictures in order, as they are in use; each process its share."""
        maker = self._maker(None)
        rank, world_size = self._processes()
        if len(self.pictures["dev"]) < world_size:
            raise DataError(
                f"{self.source.root}: {len(self.pictures['dev'])} dev pictures for {world_size} processes; each needs "
                "one: give more, or lower trainer.devices"
            )
        if self._shards:
            dataset = ShardDevDataset(
                self._shards["dev"], batch_size=self.batch_size, maker=maker, rank=rank, world_size=world_size
            )
            return DataLoader(dataset, batch_size=None)
        return DataLoader(
            CaptionDataset(self.pictures["dev"][rank::world_size], maker=maker),
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
        )
