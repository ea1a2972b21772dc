"""Which pictures come together, and what a batch is. All captions of a picture share one encoder pass.

Order, choice of captions and augmentation are functions of (seed, epoch, picture) alone, so that a run that is
resumed in the middle of an epoch goes on exactly as it would have.

Shapes: B pictures of a batch, R captions of each, T tokens of the longest caption, P grid cells, C channels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from captioner.errors import ConfigError
from captioner.tokenizer import Tokenizer
from training.sources import BadPicture


class ItemKey(NamedTuple):
    """What the sampler asks the data set for: a picture, in an epoch."""

    epoch: int
    picture: int


def stateless_random(*key: object) -> random.Random:
    """Return random numbers that depend on the key alone: not on the process, nor on what was drawn before."""
    return random.Random(stateless_seed(*key))


def stateless_seed(*key: object) -> int:
    """Return a seed of 63 bits that depends on the key alone."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Item:
    """One picture of a batch.

    Args:
        picture: normalised pixels [3, S, S], or the grid features [P, C] of a cached stage.
        captions: R captions as ids with start and end.
        name: of the picture.
    """

    picture: Tensor
    captions: list[list[int]]
    name: str


@dataclass(frozen=True)
class Batch:
    """Pictures and their captions.

    Args:
        pictures: float32 [B, 3, S, S], normalised pixels; or float16 [B, P, C], grid features of a cached stage.
        tokens: int64 [B * R, 1 + T], start token first and end token last, padded; R rows side by side per picture.
        names: of the pictures.
        bad: pictures that could not be read and are not among the others.
    """

    pictures: Tensor
    tokens: Tensor
    names: tuple[str, ...]
    bad: tuple[BadPicture, ...] = ()

    @property
    def cached(self) -> bool:
        """Whether the pictures are grid features."""
        return self.pictures.ndim == 3

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            pictures=self.pictures.to(device, non_blocking=non_blocking),
            tokens=self.tokens.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, for copies to a GPU that do not wait."""
        return replace(self, pictures=self.pictures.pin_memory(), tokens=self.tokens.pin_memory())


def collate(items: Sequence[Item | BadPicture]) -> Batch:
    """Join items; captions are padded to the longest of the batch, bad pictures are left out and listed."""
    good = [item for item in items if isinstance(item, Item)]
    bad = tuple(item for item in items if isinstance(item, BadPicture))
    rows = [caption for item in good for caption in item.captions]
    if not rows:
        return Batch(torch.zeros(0), torch.zeros(0, 1, dtype=torch.int64), (), bad)
    tokens = torch.full((len(rows), max(map(len, rows))), Tokenizer.pad_id)
    for row, caption in enumerate(rows):
        tokens[row, : len(caption)] = torch.tensor(caption)
    return Batch(torch.stack([item.picture for item in good]), tokens, tuple(item.name for item in good), bad)


def choose_captions(captions: Sequence[list[int]], wanted: int, draw: random.Random) -> list[list[int]]:
    """Return as many captions as wanted: a random choice of more, repetitions of fewer.

    Args:
        captions: of one picture, at least one.
        wanted: R.
        draw: random numbers.

    Returns:
        R captions.
    """
    chosen = draw.sample(list(captions), wanted) if wanted < len(captions) else list(captions)
    return chosen + [captions[k % len(captions)] for k in range(wanted - len(chosen))]


class LengthBatchSampler(Sampler[list[ItemKey]]):
    """Random batches of pictures whose longest captions are of like length, so that little is padding.

    Every `bucket_batches` batches are drawn at random and sorted among themselves; the batches are then shuffled.
    Several processes share batches of one process with as many times the batch size, each every n-th picture.

    Args:
        lengths: longest caption of each picture, tokens.
        batch_size: pictures per batch; a last smaller batch is left out (its batch norm statistics would be poor),
            unless it is the only one.
        seed: of the order; the epoch is added to it.
        bucket_batches: how many batches are sorted together.
        rank: of this process.
        world_size: processes that train together.
        where: asked at the start of each iteration: the epoch, and how many of its batches this process has had
            already. Lightning's own counters are the only ones that survive a resume.

    Raises:
        ConfigError: for a batch size below 1, or fewer batches than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        bucket_batches: int = 20,
        rank: int = 0,
        world_size: int = 1,
        where: Callable[[int], tuple[int, int]] = lambda _batches: (0, 0),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = lengths
        self.batch_size = min(batch_size, max(1, len(lengths) // world_size))
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.rank, self.world_size = rank, world_size
        self._where = where
        if len(self) < 1:
            raise ConfigError(f"{len(lengths)} pictures are too few for {world_size} processes; use fewer")

    def __len__(self) -> int:
        """Return the number of batches of an epoch, of this process."""
        return len(self.lengths) // self.batch_size // self.world_size

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """Return all batches of an epoch, of this process, as indices of pictures."""
        order = stateless_random(self.seed, "order", epoch)
        indices = list(range(len(self.lengths)))
        order.shuffle(indices)
        together = self.batch_size * self.world_size
        indices = indices[: len(self) * together]
        bucket = together * self.bucket_batches
        batches: list[list[int]] = []
        for first in range(0, len(indices), bucket):
            alike = sorted(indices[first : first + bucket], key=lambda index: self.lengths[index])
            batches += [alike[k : k + together] for k in range(0, len(alike), together)]
        order.shuffle(batches)
        return [batch[self.rank :: self.world_size] for batch in batches]

    def __iter__(self) -> Iterator[list[ItemKey]]:
        """Yield the batches of the epoch that is to come, or the rest of them."""
        epoch, done = self._where(len(self))
        for batch in self.epoch_batches(epoch)[done:]:
            yield [ItemKey(epoch, index) for index in batch]
