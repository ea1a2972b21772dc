"""How many threads a model computes on: as many CPUs as this process may use, containers and workers minded."""

from __future__ import annotations

import math
import os
from pathlib import Path

from captioner.errors import ConfigError

THREADS_LIMIT = 1024
_CGROUP = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Return how many CPUs this process may use.

    Returns:
        The CPUs of its affinity mask, and no more than the quota of its control group (version 1 or 2), by which
        containers are held back without a word in the mask: with a thread for each CPU of the machine, such a process
        is stopped most of the time. No more either than OMP_NUM_THREADS, by which whoever starts several processes
        side by side, as Ray does its actors, tells each its share.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cpus, math.ceil(_quota(_CGROUP) or cpus)]
    share = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if share.isdecimal() and int(share) > 0:
        limits.append(int(share))
    return max(1, min(limits))


def _quota(root: Path) -> float | None:
    """Return the CPUs' worth of time that the control group grants; None where it grants all."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            return None
    # "max", -1, or what is no number at all.
    if not quota.isdecimal() or not period.isdecimal() or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)


def checked_threads(threads: int | None) -> int:
    """Return the number of threads to compute on.

    Args:
        threads: wanted; None is `available_cpus()`.

    Returns:
        The number.

    Raises:
        ConfigError: for no whole number from 1 to `THREADS_LIMIT`.
    """
    if threads is None:
        return available_cpus()
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= THREADS_LIMIT:
        raise ConfigError(f"threads must be a whole number from 1 to {THREADS_LIMIT}, got {threads!r}")
    return threads
