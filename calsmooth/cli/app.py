"""The `calsmooth` command: collects the five commands and turns every error into one line and an exit code."""

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from calsmooth import __version__, console
from calsmooth.errors import CalsmoothError

app = typer.Typer(
    name="calsmooth",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Calibrated language models: fine-tune with label smoothing, measure calibration, recalibrate.",
)


def _print_version(value: bool) -> None:
    if value:
        print(f"calsmooth {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


# Each module registers its command on `app`; none imports torch before its command runs.
from calsmooth.cli import bench, calibrate, entropy_bound, evaluate, finetune  # noqa: E402, F401

# --help shows them in the order in which they are used.
_ORDER = ("finetune", "evaluate", "calibrate", "bench", "entropy-bound")
app.registered_commands.sort(key=lambda command: _ORDER.index(command.name or ""))


def main() -> None:
    """Entry point of the console script and of `python -m calsmooth`."""
    debug = "--debug" in sys.argv[1:]
    # Read when torch loads its thread pool. By default idle threads spin, and where two programs share the cores, as
    # on any laptop, each then waits for the other's spinning: small models ran several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debug:
        # Their notices and loading bars would drown ours; download bars stay, because downloads take long.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except CalsmoothError as error:
        code = _end(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        code = _end("interrupted", 130, debug)
    except typer.Abort:
        code = _end("aborted", 130, debug)
    except BrokenPipeError:
        # The reader of our output went away (`calsmooth ... | head`): not an error, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _end(_describe_os_error(error), 1, debug)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of Typer's own
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "calsmooth"
            code = _end(f"{error.format_message()} (see {command} --help)", error.exit_code, debug)
        else:
            code = _end(f"{type(error).__name__}: {_first_line(error)} (--debug shows where)", 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _end(message: str, code: int, debug: bool) -> int:
    if debug and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    console.fail(message)
    return code


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the disk; free some or give another --output (nothing was left half-written)"
    return f"{where}{error.strerror or _first_line(error)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
