"""Entry point of the command `stripewell`: every expected error is one line on stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from stripewell.cli import cli
from stripewell.errors import UserError, one_line


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Exit status: 0 done, 1 it could not be done, 2 it was asked wrongly."""
    try:
        result = cli.main(list(arguments), prog_name="stripewell", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "stripewell"
        return _fail(f"{error.format_message()} (see `{command} --help`)", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except UserError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(one_line(error), 1)


def _fail(line: str, status: int) -> int:
    print(f"stripewell: {' '.join(line.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
