"""ONNX Runtime: the default on a CPU. torch is never imported here.

The graphs are those of `captioner.runtimes.export`. A step computes on the rows of each picture side by side; the
caches are NumPy arrays that the graph reads where they lie, so that no step copies them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open

from captioner.arrays import float32
from captioner.confidence import strangeness
from captioner.config import ModelConfig
from captioner.decoders.multihead_state import MultiheadState
from captioner.decoders.protocol import StepDecoder, checked_steps, count_down
from captioner.decoders.recurrent import RecurrentState
from captioner.errors import CheckpointError
from captioner.model_folder import (
    CONFIG,
    ENCODER_GRAPH,
    ENCODER_INT8_GRAPH,
    INT8_GRAPHS,
    START_GRAPH,
    STEP_GRAPH,
    STEP_INT8_GRAPH,
    WEIGHTS,
    ModelFolder,
    first_line,
)
from captioner.rows import GridMemory, PictureRows
from captioner.threads import checked_threads

if os.environ["ORT_DISABLE_TELEMETRY"] != "0":
    onnxruntime.disable_telemetry_events()  # on Windows, where the environment variable does nothing

Floats = npt.NDArray[np.float32]
_Feed = dict[str, npt.NDArray[Any]]


class OnnxRuntime:
    """A model in ONNX Runtime, on the CPU; see `Runtime`.

    Args:
        folder: of a model that was exported.
        threads: to compute on; None: the CPUs that this process may use.
        int8: compute in 8 bits; see `captioner.runtimes.quantise`.

    Attributes:
        name: "onnx" or "onnx-int8".
        variant: empty, or the SHA-256 of the graphs in 8 bits.

    Raises:
        CheckpointError: when the folder has no graphs, or a file is missing, damaged or of another model.
        ConfigError: for an impossible number of threads.
    """

    device = "cpu"

    def __init__(self, folder: ModelFolder, *, threads: int | None = None, int8: bool = False) -> None:
        folder.check_graphs(int8=int8)
        self.name = "onnx-int8" if int8 else "onnx"
        checksums = folder.description["onnx"]["sha256"]
        self.variant = " ".join(checksums[name] for name in INT8_GRAPHS) if int8 else ""
        self._config = folder.config
        self.grid_hw = folder.grid_hw
        self._folder = folder
        options = _options(checked_threads(threads))
        encoder, step_graph = (ENCODER_INT8_GRAPH, STEP_INT8_GRAPH) if int8 else (ENCODER_GRAPH, STEP_GRAPH)
        self._encoder = _Graph(folder, encoder, options)
        cells = self._encoder.output_shape[1]
        if cells != self.grid_hw[0] * self.grid_hw[1]:
            raise CheckpointError(
                f"{folder.path / CONFIG}: damaged: grid_hw {list(self.grid_hw)} is not the grid of {cells} cells that "
                f"{encoder} gives"
            )
        kind = _MultiheadDecoder if folder.config.decoder == "multihead" else _RecurrentDecoder
        start, step = _Graph(folder, START_GRAPH, options), _Graph(folder, step_graph, options)
        self._decoder = kind(start, step, max_tokens=folder.config.max_tokens)
        self._familiarity = None
        if folder.config.confidence is not None:
            self._familiarity = {
                name.removeprefix("familiarity."): value
                for name, value in self._read("familiarity.mean_C", "familiarity.basis_KC")
            }

    @property
    def config(self) -> ModelConfig:
        """The settings of the model."""
        return self._config

    @property
    def decoder(self) -> StepDecoder:
        """The decoder over NumPy arrays."""
        return self._decoder

    def encode(self, squares_u8: npt.NDArray[np.uint8]) -> Floats:
        """Look at pictures; see `Runtime.encode`."""
        grid_BPC: Floats = self._encoder({"pixels_u8": squares_u8})[0]
        return grid_BPC

    def strangeness(self, grid_BPC: Floats) -> Sequence[float | None]:
        """Return how strange each picture is to the model; see `Runtime.strangeness`."""
        if self._familiarity is None:
            return [None] * len(grid_BPC)
        found: list[float | None] = strangeness(grid_BPC, **self._familiarity).tolist()
        return found

    def weights(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield the weights; see `Runtime.weights`."""
        return self._read()

    def _read(self, *names: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        path = self._folder.path / WEIGHTS
        try:
            with safe_open(path, framework="np") as weights:
                for name in sorted(names or weights.keys()):
                    value = weights.get_tensor(name)
                    yield name, float32(value) if value.dtype.kind == "f" else value
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: damaged: not a safetensors file: {first_line(err)}") from err


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Within a run threads wait for one another for microseconds: to sleep would take longer. Between two runs they must
    # not spin, for that takes the CPU from the threads that decode pictures and choose words.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class _Graph:
    """One graph, loaded; safe to call from many threads."""

    def __init__(self, folder: ModelFolder, name: str, options: onnxruntime.SessionOptions) -> None:
        path = folder.path / name
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as err:  # the library has a dozen classes of errors without a common one
            raise CheckpointError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {first_line(err)[:200]}; upgrade "
                "onnxruntime, or use runtime='torch'"
            ) from err
        self.inputs = frozenset(each.name for each in self._session.get_inputs())
        self.output_shape: list[int | str] = self._session.get_outputs()[0].shape

    def __call__(self, feed: _Feed) -> list[Any]:
        try:
            found: list[Any] = self._session.run(None, feed)
        except Exception as err:  # as above
            if "alloc" in str(err):
                raise MemoryError(first_line(err)) from err
            raise
        return found


class _MultiheadDecoder:
    """The transformer; see `Decoder`. It gives log-probabilities as logits."""

    normalised = True

    def __init__(self, start: _Graph, step: _Graph, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._start, self._step = start, step

    def start(self, grid_BPC: Floats, *, max_tokens: int | None = None) -> MultiheadState:
        """Compute keys and values of the pictures and allocate the caches; see `Decoder.start`."""
        steps = checked_steps(self.max_tokens if max_tokens is None else max_tokens, limit=self.max_tokens)
        pictures, cells, _ = grid_BPC.shape
        parts = self._start({"grid": grid_BPC})
        memories = tuple(GridMemory(keys, values) for keys, values in zip(parts[0::2], parts[1::2], strict=True))
        heads, head_dim = parts[0].shape[1], parts[0].shape[3]
        caches = [np.zeros((pictures, heads, steps, head_dim), dtype=np.float32) for _ in parts]
        return MultiheadState(
            keys=tuple(caches[0::2]),
            values=tuple(caches[1::2]),
            seen_NS=np.zeros((pictures, steps), dtype=bool),
            slots=0,
            position=np.zeros(1, dtype=np.int64),
            steps_left=steps,
            attention_heads_BLHP=np.empty((0, len(memories), heads, cells), dtype=np.float32),
            memories=memories,
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: npt.NDArray[np.int64], state: MultiheadState) -> tuple[Floats, Floats, MultiheadState]:
        """Read one token and predict the next; see `Decoder.step`. The caches are written in place."""
        steps_left = count_down(state.steps_left)
        pictures, width = state.rows.pictures, state.rows.per_picture
        state = state.with_room(width)
        feed: _Feed = {
            "tokens": tokens_B.reshape(pictures, width),
            "position": state.position,
            # All that is allocated, for a part of it would be copied; what is free is not seen.
            "seen": state.seen_NS.reshape(pictures, width, -1),
        }
        for layer, (keys, values, memory) in enumerate(zip(state.keys, state.values, state.memories, strict=True)):
            feed[f"keys_{layer}"], feed[f"values_{layer}"] = keys, values
            feed[f"memory_keys_{layer}"], feed[f"memory_values_{layer}"] = memory.keys, memory.values
        log_probs_NV, attention_NP, heads_NLHP, *new = self._step(feed)
        taken = slice(state.slots, state.slots + width)
        for layer, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
            keys[:, :, taken], values[:, :, taken] = new[2 * layer], new[2 * layer + 1]
        seen_NS = state.seen_NS.copy()
        seen_NS.reshape(pictures, width, -1)[:, :, taken] = np.eye(width, dtype=bool)
        after = dataclasses.replace(
            state,
            seen_NS=seen_NS,
            slots=taken.stop,
            position=state.position + 1,
            steps_left=steps_left,
            attention_heads_BLHP=heads_NLHP,
        )
        return log_probs_NV, attention_NP, after


class _RecurrentDecoder:
    """The two decoders with an LSTM; see `Decoder`. They give log-probabilities as logits."""

    normalised = True

    def __init__(self, start: _Graph, step: _Graph, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._start, self._step = start, step

    def start(self, grid_BPC: Floats, *, max_tokens: int | None = None) -> RecurrentState:
        """Set the initial state; see `Decoder.start`."""
        steps = checked_steps(self.max_tokens if max_tokens is None else max_tokens, limit=self.max_tokens)
        pictures, cells, _ = grid_BPC.shape
        hidden_BS, cell_BS, keys, values = self._start({"grid": grid_BPC})
        return RecurrentState(
            hidden_BS=hidden_BS,
            cell_BS=cell_BS,
            attention_heads_BLHP=np.empty((0, 1, 1, cells), dtype=np.float32),
            steps_left=steps,
            memory=GridMemory(keys, values),
            rows=PictureRows(pictures, pictures),
        )

    def step(self, tokens_B: npt.NDArray[np.int64], state: RecurrentState) -> tuple[Floats, Floats, RecurrentState]:
        """Read one token and predict the next; see `Decoder.step`."""
        rows = state.rows
        feed: _Feed = {
            "tokens": tokens_B.reshape(rows.pictures, rows.per_picture),
            "hidden": state.hidden_BS,
            "cell": state.cell_BS,
            "memory_keys_0": state.memory.keys,
            "memory_values_0": state.memory.values,
        }
        # What a decoder does not read is no input of its graph.
        log_probs_NV, attention_NP, hidden_NS, cell_NS = self._step(
            {name: value for name, value in feed.items() if name in self._step.inputs}
        )
        return log_probs_NV, attention_NP, state.stepped(hidden_NS, cell_NS, attention_NP)
