"""The command line in this process."""

from typer.testing import CliRunner

from captioner.cli import app

RUNNER = CliRunner()


def run(*arguments):
    """Run the command line in this process; whatever is not an exit of its own fails the test."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result
