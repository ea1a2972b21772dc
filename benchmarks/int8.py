"""Figure 6: the int8 variant of the encoder beside the one in float32, where a model's folder has both.

Its loss in CIDEr-D is not measured here: see the model card.
"""

from __future__ import annotations

from benchmarks.contestants import encoder_alone, load_captioner, missing, model_folder
from benchmarks.figure import Figure, Settings, Value, ratio_of
from benchmarks.timing import take_turns
from captioner.model_folder import ENCODER_GRAPH

TITLE = "6. The int8 encoder beside float32, ONNX Runtime"
BATCH = 32


def measure(settings: Settings) -> Figure:
    """Measure how many times as fast int8 is.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    folder = model_folder(settings)
    plain, quantised = folder / ENCODER_GRAPH, sorted(folder.glob("encoder*int8*.onnx"))
    absent = missing("onnxruntime")
    if absent is None and not (plain.is_file() and quantised):
        absent = "the model's folder has no encoder.onnx with an int8 variant"
    if absent:
        return Figure(title=TITLE, absent=absent)
    side_px = load_captioner(settings).config.preprocessing.side_px
    batch = settings.pick(BATCH, 2)
    contestants = {
        f"{name}, {size} at once": encoder_alone(path, batch=size, side_px=side_px, threads=settings.threads)
        for size in (1, batch)
        for name, path in (("float32", plain), ("int8", quantised[0]))
    }
    series = take_turns(contestants, repetitions=settings.pick(15, 1), least_s=0.0 if settings.quick else 0.2)
    return Figure(
        title=TITLE,
        values=tuple(
            Value(
                name=f"as fast as float32, {size} at once",
                value=ratio_of(series, f"float32, {size} at once", f"int8, {size} at once"),
                unit="x",
                least=1.5,
            )
            for size in (1, batch)
        ),
        series=series,
        notes=("wanted on a CPU with VNNI: see the machine's flags", quantised[0].name),
    )
