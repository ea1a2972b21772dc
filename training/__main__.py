"""`python -m training fit --config configs/NAME.yaml` trains; `python -m training export` makes the model folder.

`fit` is Lightning's command line over our module and data: every setting of both, and of the trainer, is an option.
"""

from __future__ import annotations

import sys

from training.cli import main

if __name__ == "__main__":
    sys.exit(main())
