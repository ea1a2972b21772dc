"""Figure 2: captions per second in batches of 32 from files, beside the same baseline and the encoder's own rate."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.contestants import (
    DIFFERENCES,
    FORCED,
    HuggingFaceCaptioner,
    encoder_alone,
    encoder_file,
    load_captioner,
    missing,
)
from benchmarks.figure import Figure, Settings, Value, cpu_ratio_of, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import take_turns

TITLE = "2. Batches of 32 from 640 x 480 JPEG files"
BATCH = 32


def measure(settings: Settings) -> Figure:
    """Measure captions per second, and what they are of the baseline's and of the encoder's alone.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    absent = missing("transformers", "onnxruntime")
    if absent:
        return Figure(title=TITLE, absent=absent)
    captioner = load_captioner(settings)
    batch = settings.pick(BATCH, 2)
    count = 2 * batch
    baseline = HuggingFaceCaptioner(captioner.config)
    with photo_files(count) as photos, tempfile.TemporaryDirectory() as folder:
        path, origin = encoder_file(settings, captioner.config, Path(folder))
        side_px = captioner.config.preprocessing.side_px
        encode = encoder_alone(path, batch=batch, side_px=side_px, threads=settings.threads)
        ours, theirs = f"Captioner ({captioner.runtime.name})", "torch encoder + Hugging Face generate"
        limit = "encoder alone in ONNX Runtime, from tensors"
        times = take_turns(
            {
                theirs: lambda: baseline.from_files(photos, batch_size=batch),
                ours: lambda: list(captioner.caption_batch(photos, batch_size=batch, **FORCED)),
                limit: lambda: [encode() for _ in range(count // batch)],
            },
            repetitions=settings.pick(9, 1),
        )
    series = {name: taken.per(count) for name, taken in times.items()}
    rates = [Value(name=name, value=1 / of.median_s, unit="pictures/s") for name, of in series.items()]
    return Figure(
        title=TITLE,
        values=(
            Value(name="as fast as the baseline", value=ratio_of(series, theirs, ours), unit="x", least=5),
            Value(name="of the encoder's own rate", value=ratio_of(series, limit, ours), unit="x", least=0.5),
            Value(name="baseline, by processor time", value=cpu_ratio_of(series, theirs, ours), unit="x"),
            Value(name="encoder's own rate, by processor time", value=cpu_ratio_of(series, limit, ours), unit="x"),
            *rates,
        ),
        series=series,
        notes=(
            f"times are of one picture, in batches of {batch}, two batches a call",
            f"the encoder alone is {origin}",
            *DIFFERENCES,
        ),
    )
