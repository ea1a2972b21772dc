"""Figure 6: the encoder in int8 beside the one in float32, ONNX Runtime.

The int8 encoder is made for the figure, as `captioner export --int8 PHOTOS` makes it. What it costs in scores is for
pictures with references: `captioner evaluate`, of captions with `--runtime onnx-int8` and with `--runtime onnx`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contestants import encoder_alone, encoder_file, load_captioner, missing, onnx_session
from benchmarks.figure import Figure, Settings, Value, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import take_turns
from captioner.runtimes.quantise import quantise_encoder

TITLE = "6. The encoder in int8 beside float32, ONNX Runtime"
BATCH = 32
_CALIBRATION = 64  # photos

Pixels = npt.NDArray[Any]


def _grid(path: Path, pixels_B3SS: Pixels, *, threads: int) -> npt.NDArray[np.float32]:
    session = onnx_session(path, threads=threads)
    found: npt.NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: pixels_B3SS})[0]
    return found


def measure(settings: Settings) -> Figure:
    """Measure how many times as fast int8 is, and how far its features are from those of float32.

    Args:
        settings: how.

    Returns:
        The figure.
    """
    absent = missing("onnxruntime", "onnx")
    if absent:
        return Figure(title=TITLE, absent=absent)
    captioner = load_captioner(settings)
    side_px, batch = captioner.config.preprocessing.side_px, settings.pick(BATCH, 2)
    with tempfile.TemporaryDirectory() as name, photo_files(settings.pick(_CALIBRATION, 2)) as photos:
        plain, origin = encoder_file(settings, captioner.config, Path(name))
        quantised = Path(name, "int8.onnx")
        pixels_B3SS: Pixels = np.stack([captioner.prepare(photo).pixels_u8 for photo in photos])
        if "8-bit" not in origin:
            pixels_B3SS = pixels_B3SS.astype(np.float32) / np.float32(127.5) - 1
        quantised.write_bytes(quantise_encoder(plain, list(pixels_B3SS)))
        exact, rounded = (_grid(path, pixels_B3SS[:batch], threads=settings.threads) for path in (plain, quantised))
        contestants = {
            f"{name}, {size} at once": encoder_alone(path, batch=size, side_px=side_px, threads=settings.threads)
            for size in (1, batch)
            for name, path in (("float32", plain), ("int8", quantised))
        }
        series = take_turns(contestants, repetitions=settings.pick(15, 1), least_s=0.0 if settings.quick else 0.2)
    return Figure(
        title=TITLE,
        values=(
            *(
                Value(
                    name=f"as fast as float32, {size} at once",
                    value=ratio_of(series, f"float32, {size} at once", f"int8, {size} at once"),
                    unit="x",
                    least=1.5,
                )
                for size in (1, batch)
            ),
            Value(
                name="error of the features, of their mean",
                value=100 * float(np.abs(rounded - exact).mean() / np.abs(exact).mean()),
                unit="%",
            ),
        ),
        series=series,
        notes=("wanted on a CPU with VNNI: see the machine's flags", f"from {origin}"),
    )
