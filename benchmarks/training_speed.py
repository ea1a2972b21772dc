"""How fast the decoder trains on cached grid features, beside a plain PyTorch loop over `nn.TransformerDecoder`.

python benchmarks/training_speed.py [--steps 240] [--block 20] [--threads 2] [--profile]

Ours is what `python -m training fit` runs: Lightning's trainer over `CaptionModule` and `CaptionData`, precision
bf16-mixed, gradients clipped to norm 1, on a made data set whose feature cache holds random numbers. Captions are of
made words and as long as those of Flickr8k's training split (12.8 tokens with start and end, standard deviation 3.7).
The plain loop is what one writes with PyTorch alone: bf16 autocast, AdamW, `clip_grad_norm_`, `cross_entropy`. Both
have the same size (256 wide, 3 layers, 8 heads, feed-forward 1024, dropout 0.2), label smoothing 0.1, and batches of
32 pictures with 5 captions out of the same files. They take turns in one process, `--block` steps each, so that both
meet the same machine; a block's time holds all of it: reading, forward, backward, optimiser, Lightning. The ratio is
that of the medians over the blocks.

What differs:
- the plain loop draws its batches at random and pads to the longest caption; ours puts pictures together whose
  captions are of like length, and leaves padding out of everything but attention;
- the plain loop repeats the picture for each caption, as `nn.TransformerDecoder` needs it; ours computes keys and
  values once per picture;
- the plain loop has a matrix of its own for the output, no positions of cells and no norm of the grid;
- ours draws masks of dropout as bytes, and PyTorch whole numbers;
- ours logs, warms up its rate and lets no norm or bias decay.

A token is a word or an end that is predicted; padding does not count. On a GPU, which needs more threads and reading
processes than the defaults, the share of the time in which it waits for data is printed too.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.profilers import Profiler, SimpleProfiler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from captioner.encoder import Encoder
from captioner.tokenizer import Tokenizer
from training.batches import Batch, collate
from training.data import CaptionData
from training.datasets import CaptionDataset
from training.features import features_key
from training.module import CaptionModule
from training.stages import Stage

DIM, LAYERS, HEADS, FEEDFORWARD, DROPOUT = 256, 3, 8, 1024, 0.2
PICTURES, CAPTIONS, MAX_TOKENS, WORDS = 32, 5, 40, 2536
RATE, BETAS, DECAY, SMOOTHING, CLIP = 7e-4, (0.9, 0.98), 0.05, 0.1, 1.0
# Words of a Flickr8k caption: log-normal, a part of the variance belonging to the picture.
LOG_MEAN, LOG_SD_PICTURE, LOG_SD_CAPTION = 2.3175, 0.125, 0.333


def spelled(number: int) -> str:
    """Return the name of a made word, in letters alone: the tokenizer takes a digit for a token of its own."""
    return "w" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


def write_table(root: Path, *, pictures: int, rng: random.Random) -> None:
    """Write captions.csv and the picture files, all of them one tiny picture: only their features are read.

    Args:
        root: of the data set.
        pictures: of the training split; the dev split has two, the fewest that training takes.
        rng: source of chance.
    """
    unseen = [spelled(number) for number in range(WORDS)]
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    with (root / "captions.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(["image", "caption", "split"])
        for index in range(pictures + 2):
            (root / f"{index}.jpg").write_bytes(picture.getvalue())
            centre = rng.gauss(LOG_MEAN, LOG_SD_PICTURE)
            for _ in range(CAPTIONS):
                length = max(2, round(math.exp(rng.gauss(centre, LOG_SD_CAPTION))))
                # As in any text the k-th most frequent word has a share in proportion to 1 / k; each occurs once.
                words = [unseen.pop() if unseen else spelled(int(WORDS ** rng.random()) - 1) for _ in range(length)]
                writer.writerow([f"{index}.jpg", " ".join(words), "train" if index < pictures else "dev"])


class RandomFeatures(CaptionData):
    """The data of the benchmark: the cache is filled with random numbers where training looks for it."""

    def use_cache(self, encoder: Encoder, *, epochs: int) -> None:
        """Fill the cache, then let training find it; see `CaptionData.use_cache`."""
        pictures = self.pictures["train"]
        key = features_key(
            encoder,
            pictures,
            preprocessing=self.preprocessing,
            augmentation=self.augmentation,
            views=self.cache_views,
            seed=self.seed,
        )
        path = self.cache_folder / f"features-{key[:32]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = encoder.grid_hw[0] * encoder.grid_hw[1]
        shape = (len(pictures) * self.cache_views, cells, encoder.feature_dim)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        rng = np.random.default_rng(0)
        for index in range(len(array)):
            array[index] = rng.random(shape[1:], dtype=np.float32)
        array.flush()
        path.with_suffix(".json").write_text('{"bad": {}}', encoding="utf-8")
        super().use_cache(encoder, epochs=epochs)

    def plain_loader(self) -> DataLoader[Any]:
        """Return random batches of the same pictures, features and captions."""
        trained = self.train_dataloader()
        assert isinstance(trained.dataset, CaptionDataset)
        return DataLoader(
            trained.dataset,
            batch_size=PICTURES,
            shuffle=True,
            drop_last=True,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=trained.pin_memory,
        )


class PlainDecoder(nn.Module):
    """A captioner's decoder out of PyTorch's own parts.

    Args:
        feature_dim: channels of a grid cell.
        vocabulary_size: number of tokens.
    """

    def __init__(self, *, feature_dim: int, vocabulary_size: int) -> None:
        super().__init__()
        self.grid = nn.Linear(feature_dim, DIM)
        self.embedding = nn.Embedding(vocabulary_size, DIM)
        self.position = nn.Parameter(torch.randn(MAX_TOKENS, DIM) * 0.02)
        self.dropout = nn.Dropout(DROPOUT)
        layer = nn.TransformerDecoderLayer(
            DIM, HEADS, FEEDFORWARD, DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, LAYERS, norm=nn.LayerNorm(DIM))
        self.output = nn.Linear(DIM, vocabulary_size)

    def forward(self, grid_BPC: Tensor, tokens_NT: Tensor) -> Tensor:
        """Return logits_NTV."""
        steps = tokens_NT.shape[1]
        memory_NPD = self.grid(grid_BPC).repeat_interleave(len(tokens_NT) // len(grid_BPC), dim=0)
        mask_TT = nn.Transformer.generate_square_subsequent_mask(steps, device=tokens_NT.device)
        words_NTD = self.dropout(self.embedding(tokens_NT) + self.position[:steps])
        logits_NTV: Tensor = self.output(self.layers(words_NTD, memory_NPD, tgt_mask=mask_TT, tgt_is_causal=True))
        return logits_NTV


class PlainLoop:
    """The training loop around it.

    Args:
        loader: of batches.
        feature_dim: channels of a grid cell.
        vocabulary_size: number of tokens.
        device: that trains.
    """

    def __init__(
        self, loader: DataLoader[Any], *, feature_dim: int, vocabulary_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.decoder = PlainDecoder(feature_dim=feature_dim, vocabulary_size=vocabulary_size).to(device)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)
        self.batches = self._endless(loader)

    @staticmethod
    def _endless(loader: DataLoader[Any]) -> Iterator[Batch]:
        while True:
            yield from loader

    def step(self) -> Batch:
        """Train on the next batch; returns it."""
        batch = next(self.batches).to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits_NTV = self.decoder(batch.pictures.float(), batch.tokens[:, :-1])
            loss = functional.cross_entropy(
                logits_NTV.flatten(0, 1),
                batch.tokens[:, 1:].flatten(),
                ignore_index=Tokenizer.pad_id,
                label_smoothing=SMOOTHING,
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.decoder.parameters(), CLIP)
        self.optimizer.step()
        return batch


@dataclass
class Blocks:
    """What a loop did, block by block."""

    seconds: list[float] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """Begin a block."""
        self.seconds.append(-time.perf_counter())
        self.pictures.append(0)
        self.tokens.append(0)

    def count(self, batch: Batch) -> None:
        """Count a batch in the present block."""
        self.pictures[-1] += len(batch.names)
        self.tokens[-1] += int((batch.tokens[:, 1:] != Tokenizer.pad_id).sum())

    def end(self, device: torch.device) -> None:
        """End a block, once the device has done it."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[-1] += time.perf_counter()

    def rate(self, counts: list[int]) -> float:
        """Return the median over the blocks of so many a second."""
        return statistics.median(count / seconds for count, seconds in zip(counts, self.seconds, strict=True))

    def line(self, name: str) -> str:
        """Return the throughput in words."""
        pictures, tokens = self.rate(self.pictures), self.rate(self.tokens)
        return f"{name:<22}{pictures:9.1f} pictures/s {CAPTIONS * pictures:9.0f} captions/s {tokens:9.0f} tokens/s"


class TakeTurns(lightning.Callback):
    """Lets the plain loop run between two blocks of Lightning's steps, and times both.

    Args:
        block: steps of a block.
        profile: whether to print where the time of the last block of ours goes.
    """

    def __init__(self, *, block: int, profile: bool) -> None:
        self.block = block
        self.ours, self.plain = Blocks(), Blocks()
        self.loop: PlainLoop | None = None
        self.device = torch.device("cpu")
        self.profiler = torch.profiler.profile() if profile else None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Build the plain loop and warm it up."""
        assert isinstance(pl_module, CaptionModule)
        self.device = pl_module.device
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.loop = PlainLoop(
            data.plain_loader(),
            feature_dim=pl_module.model.encoder.feature_dim,
            vocabulary_size=pl_module.tokenizer.vocabulary_size,
            device=self.device,
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count the batch; at the end of a block let the other loop run."""
        assert self.loop is not None
        if self.ours.seconds:  # before the first turn, ours warms up
            self.ours.count(batch)
        if trainer.global_step % self.block:
            return
        if self.ours.seconds:
            self.ours.end(self.device)
            if self.profiler is not None and trainer.global_step == trainer.max_steps:
                self.profiler.stop()
            self._run_plain(self.plain)
        else:
            self._run_plain(Blocks())
        if self.profiler is not None and trainer.global_step == trainer.max_steps - self.block:
            self.profiler.start()
        if trainer.global_step < trainer.max_steps:
            self.ours.begin()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Print the profile."""
        if self.profiler is not None:
            print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))

    def _run_plain(self, blocks: Blocks) -> None:
        assert self.loop is not None
        blocks.begin()
        for _ in range(self.block):
            blocks.count(self.loop.step())
        blocks.end(self.loop.device)


def make_training(
    given: argparse.Namespace, folder: Path, *, callback: lightning.Callback, profiler: Profiler | None = None
) -> tuple[lightning.Trainer, CaptionModule, CaptionData]:
    """Make what `python -m training fit` runs, and its data.

    Args:
        given: the options `pictures`, `workers` and `steps`.
        folder: of the data and the run.
        callback: what watches it.
        profiler: of Lightning.

    Returns:
        Trainer, module and data.
    """
    write_table(folder, pictures=given.pictures, rng=random.Random(0))
    data = RandomFeatures(
        str(folder),
        batch_size=PICTURES,
        captions_per_picture=CAPTIONS,
        min_count=1,
        max_tokens=MAX_TOKENS,
        cache_folder=str(folder / "cache"),
        workers=given.workers,
    )
    sizes = {"dim": DIM, "layers": LAYERS, "heads": HEADS, "feedforward_dim": FEEDFORWARD, "dropout": DROPOUT}
    stage = Stage(epochs=1000, cached=True, learning_rate=RATE, warmup_steps=200, label_smoothing=SMOOTHING)
    module = CaptionModule(stages=[stage], decoder="multihead", decoder_settings=sizes, weight_decay=DECAY)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=CLIP,
        max_steps=given.steps,
        max_epochs=stage.epochs,
        limit_val_batches=0,
        log_every_n_steps=20,
        default_root_dir=str(folder / "run"),
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        profiler=profiler,
    )
    return trainer, module, data


def quiet() -> None:
    """Keep Lightning from warning of few workers, which the option sets, and of what the missing validation leaves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def train(given: argparse.Namespace, folder: Path) -> tuple[TakeTurns, float]:
    """Train as `python -m training fit` does, taking turns with the plain loop.

    Args:
        given: the options.
        folder: of the data and the run.

    Returns:
        The times, and the share of ours that was spent on waiting for data.
    """
    turns, profiler = TakeTurns(block=given.block, profile=given.profile), SimpleProfiler()
    trainer, module, data = make_training(given, folder, callback=turns, profiler=profiler)
    trainer.fit(module, datamodule=data)
    waits_s = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    return turns, sum(waits_s[given.block : given.steps]) / sum(turns.ours.seconds)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="of each loop, of which the first block is a warm-up")
    parser.add_argument("--block", type=int, default=20, help="steps of one loop before the other has its turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that read, of each loop")
    parser.add_argument("--pictures", type=int, default=1280, help="in the data set, of 125 kB each")
    parser.add_argument("--profile", action="store_true", help="print where the time of the last block of ours goes")
    given = parser.parse_args()
    if given.block < 1 or given.steps < 2 * given.block or given.steps % given.block:
        parser.error(f"--steps must be 2 or more times --block, a multiple, got {given.steps} and {given.block}")
    torch.set_num_threads(given.threads)
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        turns, wait_share = train(given, Path(folder))
    device = turns.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{given.threads} threads"
    print(f"PyTorch {torch.__version__}, Lightning {lightning.__version__}, {where}, load {os.getloadavg()[0]:.1f}")
    print(turns.plain.line("plain loop"))
    print(turns.ours.line("python -m training fit"))
    print(f"ratio of medians      {turns.ours.rate(turns.ours.pictures) / turns.plain.rate(turns.plain.pictures):9.2f}")
    print(f"waiting for data      {100 * wait_share:9.1f} % of the time of ours")


if __name__ == "__main__":
    main()
