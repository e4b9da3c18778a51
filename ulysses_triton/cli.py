"""The command `ulysses-triton`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from . import doctor, plan_command, timeline_command, tuning, verify
from .errors import UlyssesError
from .training import command, launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 if a rank died or what is verified does not hold, 2 for a mistake
    in what was asked, 130 on Ctrl-C.

    In a process that torchrun started it does not return: it ends the process with that status.
    """
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.command(arguments) or 0
    except KeyboardInterrupt:
        print("ulysses-triton: interrupted; all ranks were stopped", file=sys.stderr)
        status = 130
    except UlyssesError as error:
        _print_error(error, debug=arguments.debug)
        status = 1 if isinstance(error, launch.RankError) else 2
    except Exception:
        if not launch.under_torchrun():
            raise
        traceback.print_exc()  # and leave below: destructors could wait for the other ranks
        status = 1
    if launch.under_torchrun():
        launch.leave(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ulysses-triton", description="Exact sequence-parallel attention: commands to try it out."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    command.add_command(commands)
    doctor.add_command(commands)
    verify.add_command(commands)
    tuning.add_command(commands)
    timeline_command.add_command(commands)
    plan_command.add_command(commands)
    return parser


def _print_error(error: UlyssesError, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, launch.RankError) and error.__cause__ is not None:
        print(error.__cause__, file=sys.stderr)  # nobody foresaw it, so its traceback is worth having
    rank = f"rank {os.environ['RANK']}: " if launch.under_torchrun() else ""
    print(f"ulysses-triton: error: {rank}{' '.join(str(error).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
