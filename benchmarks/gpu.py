"""Figure 7: captions per second on a GPU, beside Hugging Face's `generate` in bfloat16 on the same card.

Two models: the one that is measured elsewhere, and a large one with random weights: ResNet-101, 384 px, 6 layers 512
wide. Both contestants start from pictures that are decoded and resized, in the memory of the host, and end with results
there, so that no wait for the card is left out.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.contestants import FORCED, WORDS, HuggingFaceCaptioner, load_captioner, missing
from benchmarks.figure import Figure, Settings, Value, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import Series, take_turns
from captioner import Captioner, SearchError
from captioner.checkpoint import Checkpoint, save_checkpoint
from captioner.config import EncoderConfig, ModelConfig, MultiheadConfig, PreprocessingConfig
from captioner.model import build_model
from captioner.prepared import PreparedPicture
from captioner.tokenizer import Tokenizer

TITLE = "7. Captions per second on a GPU, from decoded pictures, beside Hugging Face generate"
BATCHES = (1, 32, 256, 1024)
WANTED_AT = 256
LARGE = "ResNet-101, 6 layers x 512, 384 px"


def large_config(vocabulary_size: int) -> ModelConfig:
    """Return the settings of the large model."""
    return ModelConfig(
        decoder="multihead",
        vocabulary_size=vocabulary_size,
        preprocessing=PreprocessingConfig(side_px=384),
        encoder=EncoderConfig(backbone="resnet101"),
        decoder_settings=MultiheadConfig(dim=512, layers=6, heads=8, feedforward_dim=2048),
    )


def random_captioner(config: ModelConfig, tokenizer: Tokenizer, *, device: str) -> Captioner:
    """Make a captioner with random weights, loaded from a folder as any other."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Checkpoint(build_model(config).eval(), tokenizer), folder)
        return Captioner.load(folder, device=device)


def compare(captioner: Captioner, *, batches: Sequence[int], repetitions: int, least_s: float) -> dict[str, Series]:
    """Let both contestants caption batches, on the captioner's device.

    Args:
        captioner: ours.
        batches: sizes.
        repetitions: turns of each.
        least_s: of a turn.

    Returns:
        Times of one picture, named "ours, 32" and "theirs, 32". Sizes that do not fit into memory are left out.
    """
    theirs = HuggingFaceCaptioner(captioner.config, device=captioner.device, dtype=torch.bfloat16)
    with photo_files(8) as photos:
        prepared = [captioner.prepare(photo) for photo in photos]
    found: dict[str, Series] = {}
    for batch in batches:
        pictures = list(itertools.islice(itertools.cycle(prepared), batch))
        contestants = {
            f"theirs, {batch}": partial(_theirs, theirs, pictures),
            f"ours, {batch}": partial(_ours, captioner, pictures),
        }
        try:
            times = take_turns(contestants, repetitions=repetitions, least_s=least_s)
        except (torch.OutOfMemoryError, SearchError) as err:
            if isinstance(err, SearchError) and "memory" not in str(err):
                raise
            break  # what is larger does not fit either
        for name, series in times.items():
            found[name] = series.per(batch)
    return found


def _ours(captioner: Captioner, pictures: Sequence[PreparedPicture]) -> object:
    return list(captioner.caption_batch(pictures, batch_size=len(pictures), **FORCED))


def _theirs(baseline: HuggingFaceCaptioner, pictures: Sequence[PreparedPicture]) -> object:
    return baseline.from_squares(torch.from_numpy(np.stack([picture.pixels_u8 for picture in pictures])))


def values_of(model: str, series: dict[str, Series], batches: Sequence[int]) -> tuple[list[Value], list[str]]:
    """Return the ratios and rates of a model, and what to say of sizes that are missing."""
    values, notes = [], []
    for batch in batches:
        ours = f"ours, {batch}"
        if ours not in series:
            notes.append(f"{model}: batches of {batch} do not fit into memory")
            continue
        ratio = ratio_of(series, f"theirs, {batch}", ours)
        least = 3.0 if batch == WANTED_AT else None
        values.append(
            Value(name=f"as fast as the baseline, {batch} at once, {model}", value=ratio, unit="x", least=least)
        )
        rate = 1 / series[ours].median_s
        values.append(Value(name=f"rate, {batch} at once, {model}", value=rate, unit="captions/s"))
    return values, notes


def measure(settings: Settings) -> Figure:
    """Measure both models on the GPU; where there is none, say so.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    if not torch.cuda.is_available():
        return Figure(title=TITLE, absent="no CUDA GPU here")
    absent = missing("transformers")
    if absent:
        return Figure(title=TITLE, absent=absent)
    return measure_on("cuda", settings, batches=BATCHES[:2] if settings.quick else BATCHES)


def measure_on(device: str, settings: Settings, *, batches: Sequence[int], large: ModelConfig | None = None) -> Figure:
    """Measure both models on any device.

    Args:
        device: which.
        settings: how.
        batches: sizes.
        large: another large model, for tests.

    Returns:
        The figure.
    """
    first = load_captioner(settings, device=device)
    configs = {"the model": None, LARGE: large or large_config(first.tokenizer.vocabulary_size)}
    values: list[Value] = []
    series: dict[str, Series] = {}
    notes = [
        f"both write {WORDS} words with 3 beams; ours takes one step more, for the end, and gives sentence, "
        "probabilities, scores and maps, generate gives ids alone",
        "the baseline runs in bfloat16, with channels last; times are of one picture",
    ]
    for name, config in configs.items():
        captioner = first if config is None else random_captioner(config, first.tokenizer, device=device)
        times = compare(
            captioner,
            batches=batches,
            repetitions=settings.pick(9, 1),
            least_s=0.0 if settings.quick else 0.2,
        )
        found, missed = values_of(name, times, batches)
        values += found
        notes += missed
        series |= {f"{contestant}, {name}": of for contestant, of in times.items()}
        del captioner, times
    return Figure(title=TITLE, values=tuple(values), series=series, notes=tuple(notes))
