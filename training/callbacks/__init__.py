"""What watches a training run, without taking part in it. Each is a Lightning callback or plugin, named in YAML.

trainer:
  callbacks:
    - class_path: training.callbacks.HealthCheck
    - class_path: training.callbacks.PictureLog
    - class_path: training.callbacks.RunRecord
    - class_path: training.callbacks.RunEta
  plugins:
    - class_path: training.callbacks.SafeCheckpointIO
"""

from training.callbacks.averaging import WarmAveraging
from training.callbacks.branches import Branches
from training.callbacks.checkpoints import SafeCheckpointIO
from training.callbacks.health import HealthCheck
from training.callbacks.last import LastCheckpoint
from training.callbacks.pictures import PictureLog
from training.callbacks.progress import RunEta
from training.callbacks.protocols import Picture, RunData, RunModule
from training.callbacks.record import RunRecord

__all__ = [
    "Branches",
    "HealthCheck",
    "LastCheckpoint",
    "Picture",
    "PictureLog",
    "RunData",
    "RunEta",
    "RunModule",
    "RunRecord",
    "SafeCheckpointIO",
    "WarmAveraging",
]
