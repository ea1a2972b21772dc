"""Figure 1: one JPEG file to a caption with maps, the model loaded, beside torch and Hugging Face's `generate`."""

from __future__ import annotations

from benchmarks.contestants import DIFFERENCES, FORCED, HuggingFaceCaptioner, load_captioner, missing
from benchmarks.figure import Figure, Settings, Value, cpu_ratio_of, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import take_turns

TITLE = "1. One 640 x 480 JPEG file to a caption with maps, beam 3, model loaded"


def measure(settings: Settings) -> Figure:
    """Measure how many times as fast ours is.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    absent = missing("transformers")
    if absent:
        return Figure(title=TITLE, absent=absent)
    captioner = load_captioner(settings)
    baseline = HuggingFaceCaptioner(captioner.config)
    ours, theirs = f"Captioner ({captioner.runtime.name})", "torch encoder + Hugging Face generate"
    with photo_files(1) as (photo,):
        series = take_turns(
            {
                theirs: lambda: baseline.from_files([photo]),
                ours: lambda: captioner.caption(photo, **FORCED),
                "Captioner, as long as the model likes": lambda: captioner.caption(photo, method="beam", beam_size=3),
            },
            repetitions=settings.pick(25, 1),
            least_s=0.0 if settings.quick else 0.2,
        )
    return Figure(
        title=TITLE,
        values=(
            Value(name="as fast as the baseline", value=ratio_of(series, theirs, ours), unit="x", least=4),
            Value(name="by processor time", value=cpu_ratio_of(series, theirs, ours), unit="x"),
        ),
        series=series,
        notes=DIFFERENCES,
    )
