"""What computes: the same model folder through PyTorch or ONNX Runtime, behind one protocol."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from captioner.errors import ConfigError
from captioner.runtimes.protocol import Runtime

if TYPE_CHECKING:
    from captioner.model_folder import ModelFolder

RuntimeName = Literal["auto", "torch", "onnx", "onnx-int8"]
RUNTIMES: tuple[str, ...] = get_args(RuntimeName)

__all__ = ["RUNTIMES", "Runtime", "RuntimeName", "open_runtime"]

# From 1.29 on, ONNX Runtime tells its maker about every session, over the network and with an identifier that it keeps
# in the home folder. It reads this once, when it is first imported; who wants to tell sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def open_runtime(
    folder: ModelFolder, *, device: str = "auto", runtime: str = "auto", threads: int | None = None
) -> Runtime:
    """Load a model folder into what computes it.

    Args:
        folder: the model.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        runtime: "torch"; "onnx", ONNX Runtime on the CPU; "onnx-int8", the same in 8 bits, where the folder
            has such graphs; "auto": onnx on a CPU where the folder has ONNX graphs, else torch.
        threads: of the CPU; None: ONNX Runtime takes those that this process may use, PyTorch keeps what it has.

    Returns:
        The runtime.

    Raises:
        CheckpointError: when a file of the model is missing, damaged or of another model.
        ConfigError: for an unknown runtime, one that is not installed, or a device that is not there or that the
            runtime does not compute on.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    wants_onnx = runtime.startswith("onnx")
    if wants_onnx and device not in ("auto", "cpu"):
        raise ConfigError(f"runtime {runtime!r} computes on the CPU, got device {device!r}; use runtime='torch' for it")
    installed = importlib.util.find_spec("onnxruntime") is not None
    if wants_onnx and not installed:
        raise ConfigError(f"runtime {runtime!r} needs the package onnxruntime: pip install onnxruntime")
    usable = folder.has_graphs and installed
    if wants_onnx or (runtime == "auto" and usable and (device == "cpu" or not _may_have_gpu(device))):
        from captioner.runtimes.onnx import OnnxRuntime

        return OnnxRuntime(folder, threads=threads, int8=runtime == "onnx-int8")
    from captioner.runtimes.pytorch import TorchRuntime, find_device

    # A driver is no GPU: PyTorch itself has the last word.
    if runtime == "auto" and usable and device == "auto" and find_device(device).type == "cpu":
        return open_runtime(folder, device="cpu", threads=threads)
    from captioner.checkpoint import load_checkpoint

    return TorchRuntime(load_checkpoint(folder).model, device=device, threads=threads)


def _may_have_gpu(device: str) -> bool:
    """Return whether a GPU could be there, without asking PyTorch, whose import takes seconds."""
    if device != "auto":
        return True
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if sys.platform == "win32":
        return ctypes.util.find_library("nvcuda") is not None
    # NVIDIA, AMD, either of them through Windows' subsystem for Linux; Intel only with a PyTorch that is built for it.
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    return any(Path(driver).exists() for driver in drivers) or "xpu" in importlib.metadata.version("torch")
