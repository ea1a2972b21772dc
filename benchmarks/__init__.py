"""How fast Captioner is, as ratios measured within one run: `python -m benchmarks`, from a checkout."""
