"""A Ray of this machine for tests."""

import signal


def start(ray):
    """Start one of two CPUs and little memory; the caller shuts it down."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    signal.signal(signal.SIGTERM, handler)  # Ray sets its own
