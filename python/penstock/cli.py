# SPDX-License-Identifier: Apache-2.0
"""The `penstock` program: picks a subcommand and turns what went wrong into one line.

A subcommand is a module with add_arguments(parser) and run(args) -> exit code. Only the one asked
for is imported, so `penstock info` works without torch and `penstock --help` without anything.
Exit codes: 0 done, 2 an error the user can put right (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("penstock.train.command", "train a Mixture-of-Experts language model on text"),
    "bench": ("penstock.bench.command", "verify and time one layer against torch"),
    "convert": ("penstock.checkpoint.command", "lay out the experts of a checkpoint anew"),
    "info": ("penstock.info", "versions, backends with reasons, CPU and GPU"),
}
ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        module = importlib.import_module(COMMANDS[name][0]) if name else None
        args = _parse(name, module, arguments)  # ends here without a subcommand
        return module.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "penstock":
            raise
        return _fail(name, f"needs the package '{error.name}': pip install 'penstock[train]'")
    except ImportError as error:  # the engine's library is not there or cannot be loaded
        return _fail(name, str(error))
    except KeyboardInterrupt:
        print("\nInterrupted; what was saved before is complete.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(name, "standard output was closed")
    except Exception as error:
        if not _is_reported(error):
            raise
        return _fail(name, str(error))


def _parse(name: str | None, module: object, arguments: Sequence[str]) -> argparse.Namespace:
    """What `arguments` say, read with the options of the one subcommand that was asked for."""
    parser = argparse.ArgumentParser(
        prog="penstock", description="A Mixture-of-Experts engine for training and inference."
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for command, (_, about) in COMMANDS.items():
        subparser = commands.add_parser(
            command, help=about, description=about[0].upper() + about[1:]
        )
        if command == name:
            module.add_arguments(subparser)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Some versions of argparse let the program's parser refuse these, under the program's name
        # and usage: neither tells which subcommand has no such option.
        refusing = commands.choices.get(name, parser)
        refusing.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _is_reported(error: Exception) -> bool:
    """Whether an exception's text is meant for the user as it stands."""
    from penstock.checkpoint.errors import CheckpointError
    from penstock.train.errors import TrainError

    return isinstance(error, (TrainError, CheckpointError))


def _fail(name: str | None, message: str) -> int:
    text = " ".join(message.split())
    print(f"penstock {name}: error: {text}", file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
