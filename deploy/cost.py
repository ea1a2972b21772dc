"""What captioning a million and a billion pictures costs, from rates that were measured and prices that you give.

    python deploy/cost.py NAME=RATE:PRICE... [--pictures 1e6 1e9] [--machines 1 10 100]

RATE is pictures per second of one machine, as the summary of `captioner batch` or `benchmarks/batch.py` gives it; PRICE
is that of an hour of the machine, in any currency. Storage, transfer, and machines that stand idle cost extra.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Machine(NamedTuple):
    """A kind of machine.

    Args:
        name: in the table.
        rate: pictures per second.
        price: of an hour.
    """

    name: str
    rate: float
    price: float


def parse_machine(text: str) -> Machine:
    """Read "NAME=RATE:PRICE".

    Args:
        text: such as "2 cores=48:0.10".

    Returns:
        The machine.

    Raises:
        argparse.ArgumentTypeError: when it is not of that form, or a number is impossible.
    """
    name, _, numbers = text.rpartition("=")
    try:
        rate, price = (float(number) for number in numbers.split(":"))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATE:PRICE, such as 'my machine=48:0.10'") from err
    if not name or not (math.isfinite(rate) and rate > 0) or not (math.isfinite(price) and price >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}: needs a name, a rate above 0 and a price of at least 0")
    return Machine(name, rate, price)


def parse_count(text: str) -> int:
    """Read a number of pictures or machines, "1e9" too.

    Args:
        text: the number.

    Returns:
        It.

    Raises:
        argparse.ArgumentTypeError: when it is not a whole number, at least 1.
    """
    try:
        number = float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from err
    if not number.is_integer() or number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(number)


def machine_hours(pictures: int, machine: Machine) -> float:
    """Return how long one machine takes.

    Args:
        pictures: how many.
        machine: which.

    Returns:
        Hours.
    """
    return pictures / machine.rate / 3600


def duration(hours: float) -> str:
    """Write a time so that it can be read.

    Args:
        hours: how long.

    Returns:
        Such as "5.8 h" or "241 days".
    """
    if hours < 1:
        return f"{60 * hours:.3g} min"
    if hours < 48:
        return f"{hours:.3g} h"
    return f"{hours / 24:,.0f} days" if hours >= 240 else f"{hours / 24:.1f} days"


def table(machines: Sequence[Machine], pictures: Sequence[int], counts: Sequence[int]) -> str:
    """Return the table.

    Args:
        machines: kinds of machines.
        pictures: how many pictures, for each row.
        counts: with how many machines, for each column of time.

    Returns:
        Markdown.
    """
    times = [f"time with {count:,}" for count in counts]
    heads = ["machine", "pictures/s", "price per hour", "pictures", "machine hours", "price", *times]
    rows = [heads, ["---"] * len(heads)]
    for machine in machines:
        for count in pictures:
            hours = machine_hours(count, machine)
            figures = [f"{machine.rate:g}", f"{machine.price:.2f}", f"{count:,}", f"{hours:,.1f}"]
            price = f"{hours * machine.price:,.2f}"
            rows.append([machine.name, *figures, price, *(duration(hours / number) for number in counts)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; the command line.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("machines", nargs="+", type=parse_machine, metavar="NAME=RATE:PRICE")
    parser.add_argument("--pictures", nargs="+", type=parse_count, default=[10**6, 10**9])
    parser.add_argument("--machines", dest="counts", nargs="+", type=parse_count, default=[1, 10, 100])
    given = parser.parse_args(arguments)
    sys.stdout.write(table(given.machines, given.pictures, given.counts) + "\n")


if __name__ == "__main__":
    main()
