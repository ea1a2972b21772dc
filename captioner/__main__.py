"""`python -m captioner` is the same as `captioner`."""

from captioner.cli import main

main()
