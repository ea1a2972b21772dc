"""`python -m captioner` is the same as `captioner`."""

from captioner.cli import main

if __name__ == "__main__":
    main()
