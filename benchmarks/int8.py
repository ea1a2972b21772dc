"""Figure 6: the encoder in int8 beside the one in float32, ONNX Runtime.

The int8 encoder is made for the figure, by ONNX Runtime's static quantisation: convolutions alone, weights per channel
in 7 bits (with 8, a CPU without VNNI overflows when it adds up pairs), ranges of the activations from photos. No model
folder has one, as long as it is no faster where Captioner runs.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.contestants import encoder_alone, encoder_file, load_captioner, missing, onnx_session
from benchmarks.figure import Figure, Settings, Value, ratio_of
from benchmarks.pictures import photo_files
from benchmarks.timing import take_turns

TITLE = "6. The encoder in int8 beside float32, ONNX Runtime"
BATCH = 32
_CALIBRATION = 64  # photos
_AT_ONCE = 8

Pixels = npt.NDArray[Any]


def quantise(path: Path, quantised: Path, pixels_B3SS: Pixels) -> None:
    """Write the int8 variant of an encoder.

    Args:
        path: of the encoder, with one input, pictures.
        quantised: the file to write.
        pixels_B3SS: photos as the encoder takes them, for the ranges of the activations.
    """
    import onnxruntime  # type: ignore[import-untyped]
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]
    from onnxruntime.quantization.calibrate import CalibrationDataReader  # type: ignore[import-untyped]

    class Photos(CalibrationDataReader):  # type: ignore[misc]
        """Yields the photos in batches."""

        def __init__(self, name: str) -> None:
            self._feeds: Iterator[dict[str, Pixels]] = (
                {name: pixels_B3SS[start : start + _AT_ONCE]} for start in range(0, len(pixels_B3SS), _AT_ONCE)
            )

        def get_next(self) -> dict[str, Pixels] | None:
            """Return the next batch."""
            return next(self._feeds, None)

    # The quantiser wants one file with its weights in float32, and what is constant computed.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(quantised.with_suffix(".float32.onnx"))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises what has just been done
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_static(
                options.optimized_model_filepath,
                str(quantised),
                Photos(session.get_inputs()[0].name),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv"],
            )
    finally:
        root.setLevel(level)


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
        quantise(plain, quantised, pixels_B3SS)
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
