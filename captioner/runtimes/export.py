"""A model → ONNX graphs: encoder, start and step of the decoder, with their weights left in `model.safetensors`.

A graph holds no weight of its own: each is a reference into the weights' file (ONNX external data), stored as that file
stores it and brought to float32 by a Cast, which ONNX Runtime computes once, when it loads the graph. So there is one
file of weights for both runtimes, and they cannot differ.

Shapes as in `captioner.decoders.protocol`; R rows of each picture, S slots of the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captioner.checkpoint import Checkpoint, load_checkpoint
from captioner.config import PreprocessingConfig
from captioner.decoders.additive import AdditiveDecoder
from captioner.decoders.mean import MeanDecoder
from captioner.decoders.multihead import MultiheadDecoder
from captioner.decoders.recurrent import RecurrentState
from captioner.errors import CheckpointError, ConfigError
from captioner.model_folder import (
    CARD,
    CONFIG,
    ENCODER_GRAPH,
    ENCODER_INT8_GRAPH,
    GRAPHS,
    INT8_GRAPHS,
    START_GRAPH,
    STEP_GRAPH,
    STEP_INT8_GRAPH,
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    read_folder,
    write_files,
)
from captioner.preprocessing import normalise
from captioner.rows import GridMemory, PictureRows
from captioner.runtimes.quantise import quantise_encoder, quantise_weights, read_photos

if TYPE_CHECKING:
    import onnx

OPSET = 20
TOLERANCE = 1e-4
"""How far log-probabilities and attention of the two runtimes may lie apart; below -1, this share of them."""
_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "I64": "INT64"}  # of safetensors: of ONNX
_FOLDED_LIMIT = 4096  # bytes; shapes and scalars are computed at export, weights stay what they are


class _Graph(NamedTuple):
    """What is exported: a module, example inputs with their names, dynamic axes of each, and names of the outputs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: list[str]


class _Encode(nn.Module):
    """8-bit pixels → grid."""

    def __init__(self, encoder: nn.Module, config: PreprocessingConfig) -> None:
        super().__init__()
        self.encoder, self._config = encoder, config

    def forward(self, pixels_u8: Tensor) -> Tensor:
        grid_BPC: Tensor = self.encoder(normalise(pixels_u8, self._config))
        return grid_BPC


class _MultiheadStart(nn.Module):
    def __init__(self, decoder: MultiheadDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, grid_BPC: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for memory in self.decoder.remember(grid_BPC) for part in (memory.keys, memory.values))


class _MultiheadStep(nn.Module):
    def __init__(self, decoder: MultiheadDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BR: Tensor, position: Tensor, seen_BRS: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        # In groups of four per layer: keys and values of the words, keys and values of the picture.
        read = self.decoder.read_step(
            tokens_BR,
            position,
            keys=caches[0::4],
            values=caches[1::4],
            seen_BRS=seen_BRS,
            memories=[GridMemory(key, value) for key, value in zip(caches[2::4], caches[3::4], strict=True)],
        )
        new = [part for pair in zip(read.keys, read.values, strict=True) for part in pair]
        return (
            read.logits_NV.float().log_softmax(dim=-1),
            read.attention_BRP.flatten(0, 1),
            read.heads_BRLHP.flatten(0, 1),
            *new,
        )


class _RecurrentStart(nn.Module):
    def __init__(self, decoder: MeanDecoder | AdditiveDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, grid_BPC: Tensor) -> tuple[Tensor, ...]:
        state: RecurrentState = self.decoder.start(grid_BPC)
        # A copy, for the values may be the grid itself, and a graph's output cannot be its input.
        return state.hidden_BS, state.cell_BS, state.memory.keys, state.memory.values.clone()


class _RecurrentStep(nn.Module):
    def __init__(self, decoder: MeanDecoder | AdditiveDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens_BR: Tensor, hidden_NS: Tensor, cell_NS: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, ...]:
        pictures, rows = tokens_BR.shape
        state = RecurrentState(
            hidden_BS=hidden_NS,
            cell_BS=cell_NS,
            attention_heads_BLHP=hidden_NS[:0],
            steps_left=1,
            memory=GridMemory(keys, values),
            rows=PictureRows(pictures, pictures * rows),
        )
        logits_NV, attention_NP, after = self.decoder.step(tokens_BR.flatten(), state)
        return logits_NV.float().log_softmax(dim=-1), attention_NP.clone(), after.hidden_BS, after.cell_BS


def export_onnx(source: str | os.PathLike[str] | None, *, int8_photos: Sequence[str] = ()) -> ModelFolder:
    """Write the ONNX graphs of a model into its folder.

    Before anything is written, captions are scored through both runtimes: what lies apart by more than `TOLERANCE` is
    refused. Of a model in 8 bits that cannot be asked: how much it costs is for the scores of its captions to say.

    Args:
        source: a model folder; None for the bundled model.
        int8_photos: to quantise the model too, files and folders of photos like those that it will see, of which the
            first 128 are taken; see `captioner.runtimes.quantise`.

    Returns:
        The folder with its graphs.

    Raises:
        CheckpointError: when the folder cannot be read or written, or the runtimes differ.
        ConfigError: when `source` is no path, what exports is not installed, or too few of the photos can be read.
    """
    _require_exporter()
    folder = read_folder(source)
    squares = read_photos(int8_photos, folder.config.preprocessing) if int8_photos else []
    checkpoint = load_checkpoint(folder)
    weights = folder.read_weights()
    places = _places(weights)
    unread = sorted({place.dtype for place in places.values()} - _DTYPES.keys())
    if unread:
        raise CheckpointError(
            f"{folder.path / WEIGHTS}: has weights of {', '.join(unread)}, the graphs read {', '.join(_DTYPES)}; "
            "save the model in float32 or with half=True"
        )
    with _quiet(), torch.inference_mode():
        graphs = {name: _export(graph, places) for name, graph in _graphs(checkpoint).items()}
    description = dict(folder.description)
    description["onnx"] = {
        "opset": OPSET,
        "versions": {name: importlib.metadata.version(name) for name in ("captioner", "torch", "onnx", "onnxscript")},
        "grid_hw": list(checkpoint.model.encoder.grid_hw),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in {**graphs, WEIGHTS: weights}.items()},
    }
    contents = {**graphs, CONFIG: _json(description)}
    with tempfile.TemporaryDirectory() as trial:
        rest = {name: (folder.path / name).read_bytes() for name in (WEIGHTS, TOKENIZER)}
        write_files(Path(trial), {**rest, CARD: folder.card.encode(), **contents})
        compare_runtimes(read_folder(trial), checkpoint)
        if int8_photos:
            graphs[ENCODER_INT8_GRAPH] = quantise_encoder(Path(trial, ENCODER_GRAPH), squares)
            graphs[STEP_INT8_GRAPH] = quantise_weights(Path(trial, STEP_GRAPH))
            for name in INT8_GRAPHS:
                description["onnx"]["sha256"][name] = hashlib.sha256(graphs[name]).hexdigest()
            description["onnx"]["int8_photos"] = len(squares)
            # config.json last: it vouches for the others.
            contents = {**graphs, CONFIG: _json(description)}
    write_files(folder.path, contents)
    return read_folder(folder.path)


def _json(description: dict[str, Any]) -> bytes:
    return (json.dumps(description, indent=2) + "\n").encode()


def _require_exporter() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as err:
            raise ConfigError(f"to export to ONNX needs the package {name}: pip install 'captioner[export]'") from err


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about its own work from the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _graphs(checkpoint: Checkpoint) -> dict[str, _Graph]:
    model = checkpoint.model
    side_px = model.config.preprocessing.side_px
    encoder = _Graph(
        _Encode(model.encoder, model.config.preprocessing),
        {"pixels_u8": torch.zeros(2, 3, side_px, side_px, dtype=torch.uint8)},
        {"pixels_u8": {0: "pictures"}},
        ["grid"],
    )
    cells = model.encoder.grid_hw[0] * model.encoder.grid_hw[1]
    grid_BPC = torch.randn(2, cells, model.encoder.feature_dim)
    decoder = model.decoder
    start, step = (
        _multihead_graphs(decoder, grid_BPC)
        if isinstance(decoder, MultiheadDecoder)
        else _recurrent_graphs(decoder, grid_BPC)
    )
    return {ENCODER_GRAPH: encoder, START_GRAPH: start, STEP_GRAPH: step}


_PICTURES, _ROWS = {0: "pictures"}, {0: "pictures", 1: "rows"}


def _multihead_graphs(decoder: MultiheadDecoder, grid_BPC: Tensor) -> tuple[_Graph, _Graph]:
    layers = range(len(decoder.blocks))
    memory = [f"memory_{kind}_{layer}" for layer in layers for kind in ("keys", "values")]
    start = _Graph(_MultiheadStart(decoder), {"grid": grid_BPC}, {"grid": _PICTURES}, memory)
    state = decoder.start(grid_BPC)
    inputs = {
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "position": torch.ones(1, dtype=torch.int64),
        "seen": torch.ones(2, 3, state.seen_NS.shape[1], dtype=torch.bool),
    }
    axes: dict[str, dict[int, str]] = {"tokens": _ROWS, "position": {}, "seen": {**_ROWS, 2: "slots"}}
    for layer in layers:
        for kind, cache in (("keys", state.keys[layer]), ("values", state.values[layer])):
            inputs[f"{kind}_{layer}"] = cache
            axes[f"{kind}_{layer}"] = {0: "pictures", 2: "slots"}
        for kind, part in (("keys", state.memories[layer].keys), ("values", state.memories[layer].values)):
            inputs[f"memory_{kind}_{layer}"] = part
            axes[f"memory_{kind}_{layer}"] = _PICTURES
    new = [f"new_{kind}_{layer}" for layer in layers for kind in ("keys", "values")]
    return start, _Graph(_MultiheadStep(decoder), inputs, axes, ["log_probs", "attention", "heads", *new])


def _recurrent_graphs(decoder: MeanDecoder | AdditiveDecoder, grid_BPC: Tensor) -> tuple[_Graph, _Graph]:
    names = ["hidden", "cell", "memory_keys_0", "memory_values_0"]
    start = _Graph(_RecurrentStart(decoder), {"grid": grid_BPC}, {"grid": _PICTURES}, names)
    state: RecurrentState = decoder.start(grid_BPC)
    inputs = {
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "hidden": state.hidden_BS.repeat(3, 1),
        "cell": state.cell_BS.repeat(3, 1),
        "memory_keys_0": state.memory.keys,
        "memory_values_0": state.memory.values,
    }
    flat = {0: "pictures*rows"}
    axes: dict[str, dict[int, str]] = {
        "tokens": _ROWS,
        "hidden": flat,
        "cell": flat,
        "memory_keys_0": _PICTURES,
        "memory_values_0": _PICTURES,
    }
    return start, _Graph(_RecurrentStep(decoder), inputs, axes, ["log_probs", "attention", "new_hidden", "new_cell"])


def _export(graph: _Graph, places: dict[str, _Place]) -> bytes:
    """Export one graph and point its weights into the weights' file."""
    from onnxscript import optimizer

    program: Any = torch.onnx.export(
        graph.module.eval(),
        tuple(graph.inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        dynamic_shapes=_dynamic_shapes(graph),
        optimize=False,
        verbose=False,
    )
    optimizer.inline(program.model)
    for _ in range(2):
        # Nothing is computed from a weight here, however small: the graph would hold it, beside the file.
        optimizer.fold_constants(
            program.model,
            input_size_limit=_FOLDED_LIMIT,
            output_size_limit=_FOLDED_LIMIT,
            should_fold=lambda node: False if any(each and each.name in places for each in node.inputs) else None,
        )
        optimizer.remove_unused_nodes(program.model)
    content: bytes = _linked(program.model_proto, places).SerializeToString()
    return content


def _dynamic_shapes(graph: _Graph) -> Any:
    dims = {name: torch.export.Dim(name) for name in ("pictures", "rows", "slots")}
    products = {"pictures*rows": torch.export.Dim.AUTO}
    shapes = [
        {axis: dims.get(name) or products[name] for axis, name in graph.axes[name].items()} for name in graph.inputs
    ]
    fixed = 3 if "seen" in graph.inputs else len(shapes)
    return (*shapes[:fixed], tuple(shapes[fixed:])) if fixed < len(shapes) else tuple(shapes)


class _Place(NamedTuple):
    """Where a weight lies in the weights' file."""

    dtype: str
    shape: list[int]
    offset: int
    length: int


def _places(weights: bytes) -> dict[str, _Place]:
    """Read the header of a safetensors file: a length in 8 bytes, JSON of so many, then the data."""
    (length,) = struct.unpack("<Q", weights[:8])
    header: dict[str, Any] = json.loads(weights[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: _Place(
            entry["dtype"],
            entry["shape"],
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _linked(model: onnx.ModelProto, places: dict[str, _Place]) -> onnx.ModelProto:
    """Replace every weight by a reference into the weights' file."""
    import onnx

    kept, casts = [], []
    for tensor in model.graph.initializer:
        place = places.get(tensor.name)
        if place is None:
            kept.append(tensor)
            continue
        stored = onnx.TensorProto(
            name=tensor.name,
            dims=place.shape,
            data_type=onnx.TensorProto.DataType.Value(_DTYPES[place.dtype]),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", WEIGHTS), ("offset", str(place.offset)), ("length", str(place.length))):
            stored.external_data.add(key=key, value=value)
        if stored.data_type != tensor.data_type:
            stored.name = f"{tensor.name}.stored"
            casts.append(onnx.helper.make_node("Cast", [stored.name], [tensor.name], to=tensor.data_type))
        kept.append(stored)
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    for node in model.graph.node:  # where in Python it came from: nine tenths of a graph's size
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def compare_runtimes(folder: ModelFolder, checkpoint: Checkpoint) -> None:
    """Score words on made pictures through both runtimes.

    Args:
        folder: with graphs.
        checkpoint: the same model.

    Raises:
        CheckpointError: when log-probabilities or attention lie further apart than `TOLERANCE`.
    """
    from captioner.runtimes.onnx import OnnxRuntime
    from captioner.runtimes.pytorch import TorchRuntime

    side_px = folder.config.preprocessing.side_px
    rng = np.random.default_rng(0)
    # Smooth, as photos are: pure noise drives the features where no picture does.
    small = rng.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    pixels_u8 = small.repeat(-(-side_px // 8), axis=2).repeat(-(-side_px // 8), axis=3)[:, :, :side_px, :side_px].copy()
    tokens_TN = rng.integers(0, folder.config.vocabulary_size, (min(6, folder.config.max_tokens), 6))
    reads = [
        _read(runtime, pixels_u8, tokens_TN)
        for runtime in (TorchRuntime(checkpoint.model, device="cpu"), OnnxRuntime(folder))
    ]
    # A log-probability of -20 has a digit less behind the point than one of -2 in float32, and counts for less.
    shares = [np.abs(ours - theirs) / np.maximum(1, np.abs(ours)) for ours, theirs in zip(*reads, strict=True)]
    # NumPy's maximum, not Python's: one NaN is a difference wherever it stands.
    apart = float(np.max([share.max() for share in shares]))
    if not apart <= TOLERANCE:
        raise CheckpointError(
            f"{folder.path}: PyTorch and ONNX Runtime differ by {apart:.1e}, more than {TOLERANCE:.0e}; "
            "please report the model and the versions of torch and onnxruntime"
        )


def _read(runtime: Any, pixels_u8: np.ndarray[Any, Any], tokens_TN: np.ndarray[Any, Any]) -> Sequence[Any]:
    from captioner.arrays import inference, log_softmax, send, to_numpy

    with inference(np.zeros(0)), torch.inference_mode():
        grid_BPC = runtime.encode(pixels_u8)
        pictures, rows = len(pixels_u8), tokens_TN.shape[1]
        state = runtime.decoder.start(grid_BPC, max_tokens=len(tokens_TN))
        state = state.select(send(np.repeat(np.arange(pictures), rows // pictures), grid_BPC))
        found = []
        for tokens_N in tokens_TN:
            logits_NV, attention_NP, state = runtime.decoder.step(send(tokens_N, grid_BPC), state)
            found += [to_numpy(log_softmax(logits_NV)), to_numpy(attention_NP), to_numpy(state.attention_heads_BLHP)]
            state = state.select(send(np.arange(rows).reshape(pictures, -1)[:, ::-1].reshape(-1).copy(), grid_BPC))
    return found


__all__ = ["GRAPHS", "OPSET", "TOLERANCE", "compare_runtimes", "export_onnx"]
