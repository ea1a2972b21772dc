"""ONNX graphs → graphs that compute in 8 bits, faster on CPUs with VNNI.

Encoder, about twice as fast: static quantisation of ONNX Runtime, weights per channel, in 7 bits with a scale for each;
the ranges of the activations from photos. The convolutions come with what follows them: clips, so that the range of an
activation is that behind the ReLU6 and not before it, where most of it is cut off, and additions, so that a residual
block stays in 8 bits. A step of the decoder, which for one picture takes as long as its weights take to come from
memory: weights in blocks of 128 with a scale for each, and the rows that they meet likewise, as they come; attention,
norms and probabilities stay in float32.

Source: Krishnamoorthi 2018 (arXiv 1806.08342), sec. 3; Dettmers et al. 2022 (arXiv 2110.02861), sec. 2.1, for blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captioner.config import PreprocessingConfig
from captioner.decoding import Task, decode
from captioner.errors import ConfigError
from captioner.prepared import PreparedPicture
from captioner.sources import find_pictures

FEWEST_PHOTOS, MOST_PHOTOS = 32, 128
_AT_ONCE = 8  # photos
_BLOCK = 128  # weights
_QUANTISED = ("Conv", "Clip", "Relu", "Add")

Pixels = npt.NDArray[Any]


def read_photos(sources: Sequence[str], config: PreprocessingConfig) -> list[Pixels]:
    """Read the photos to tell ranges from.

    Args:
        sources: of `captioner.sources.find_pictures`.
        config: of the model.

    Returns:
        The first 128 that can be read, uint8 [3, side, side] each.

    Raises:
        ConfigError: when a source cannot be understood, or fewer than 32 photos can be read.
    """
    decoded = (decode(Task(picture, config)) for picture in find_pictures(sources))
    good = (item.pixels_u8 for item in decoded if isinstance(item, PreparedPicture))
    squares: list[Pixels] = list(itertools.islice(good, MOST_PHOTOS))
    if len(squares) < FEWEST_PHOTOS:
        raise ConfigError(
            f"--int8 {' '.join(sources)}: {len(squares)} photos that can be read; name at least {FEWEST_PHOTOS}, to "
            "tell the ranges of the activations from"
        )
    return squares


def quantise_encoder(path: Path, pictures: Sequence[Pixels]) -> bytes:
    """Make the int8 graph of an encoder; it holds its own weights.

    Args:
        path: of the graph, with one input, pictures.
        pictures: as the graph takes them, [3, side, side] each.

    Returns:
        The content of the new graph's file.
    """
    with tempfile.TemporaryDirectory() as name:
        plain, quantised = Path(name, "float32.onnx"), Path(name, "int8.onnx")
        _quantise(plain, quantised, pictures, name=_write_plain(path, plain))
        return quantised.read_bytes()


def _write_plain(path: Path, plain: Path) -> str:
    """Write a graph as the quantiser wants it, weights in the file and what is constant computed; return its input."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    onnx.save(onnx.load(path), plain)  # with the weights that lie in another file
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(plain)
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(plain.read_bytes(), options, providers=["CPUExecutionProvider"])
    name: str = session.get_inputs()[0].name
    return name


def quantise_weights(path: Path) -> bytes:
    """Make the int8 graph of a step of the decoder; it holds its own weights.

    Args:
        path: of the graph.

    Returns:
        The content of the new graph's file.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # type: ignore[import-untyped]
        MatMulNBitsQuantizer,
    )

    with tempfile.TemporaryDirectory() as name, _warnings_alone():
        plain = Path(name, "float32.onnx")
        _write_plain(path, plain)
        graph = _products(onnx.load(plain))
        # Level 4: products are sums of 8-bit integers.
        quantiser = MatMulNBitsQuantizer(graph, bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=4)
        quantiser.process()
        content: bytes = quantiser.model.model.SerializeToString()
    return content


def _products(graph: Any) -> Any:
    """Write each linear layer of a graph as a product and a sum: the quantiser knows products alone."""
    from onnx import helper, numpy_helper

    weights = {each.name: each for each in graph.graph.initializer}
    nodes = []
    for node in graph.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in weights:
            nodes.append(node)
            continue
        settings = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if settings.get("transA", 0) or settings.get("alpha", 1.0) != 1 or settings.get("beta", 1.0) != 1:
            raise ValueError(f"{node.name}: a linear layer of an unknown kind: {settings}")
        values = numpy_helper.to_array(weights[node.input[1]])
        factor, product = f"{node.input[1]}, by input", f"{node.output[0]}, without bias"
        if factor not in weights:
            turned = np.ascontiguousarray(values.T) if settings.get("transB", 0) else values
            weights[factor] = numpy_helper.from_array(turned, factor)
        biased = len(node.input) > 2
        nodes.append(
            helper.make_node("MatMul", [node.input[0], factor], [product if biased else node.output[0]], product)
        )
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], node.name))
    read = {name for node in nodes for name in node.input}
    for field, kept in (("node", nodes), ("initializer", [each for each in weights.values() if each.name in read])):
        graph.graph.ClearField(field)
        getattr(graph.graph, field).extend(kept)
    return graph


@contextlib.contextmanager
def _warnings_alone() -> Iterator[None]:
    """Keep what the quantisers say of their own work from the user's screen."""
    root, other = logging.getLogger(), logging.getLogger("onnxruntime")
    levels = root.level, other.level
    root.setLevel(logging.ERROR)  # it advises what has just been done
    other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(levels[0])
        other.setLevel(levels[1])


def _quantise(plain: Path, quantised: Path, pictures: Sequence[Pixels], *, name: str) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]
    from onnxruntime.quantization.calibrate import CalibrationDataReader  # type: ignore[import-untyped]

    class Photos(CalibrationDataReader):  # type: ignore[misc]
        """Yields the photos in batches."""

        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = (
                {name: np.stack(pictures[start : start + _AT_ONCE])} for start in range(0, len(pictures), _AT_ONCE)
            )

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch."""
            return next(self._feeds, None)

    with _warnings_alone():
        quantize_static(
            str(plain),
            str(quantised),
            Photos(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Weights in 7 bits: with 8, a CPU without VNNI overflows when it adds up pairs, without a word.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_QUANTISED),
        )
