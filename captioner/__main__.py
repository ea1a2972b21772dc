"""The console script; `python -m captioner` is the same."""

import sys


def main() -> None:
    """Run the command line; an interrupt while it is still being imported ends it as one does later."""
    try:
        from captioner.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
