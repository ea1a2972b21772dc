"""Asynchronous code in a test."""

import asyncio
from concurrent.futures import ThreadPoolExecutor


def run(coroutine):
    """Run it to its end, as `asyncio.run`, in a thread of its own: a browser's loop may run in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
