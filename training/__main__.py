"""`python -m training fit --config configs/NAME.yaml` trains; `python -m training export` makes the model folder.

`fit` is Lightning's command line over our module and data: every setting of both, and of the trainer, is an option.
"""

from __future__ import annotations

import sys

from lightning.pytorch.cli import LightningCLI

from captioner.errors import CaptionerError
from training import export
from training.data import Flickr8kDataModule
from training.module import CaptionModule


def main() -> int:
    """Run the command line.

    Returns:
        The exit status: 0 all well, 1 failed with a message of ours on standard error.
    """
    try:
        if sys.argv[1:2] == ["export"]:
            return export.main(sys.argv[2:])
        LightningCLI(
            CaptionModule,
            Flickr8kDataModule,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )
    except CaptionerError as err:
        print(f"error: {err}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
