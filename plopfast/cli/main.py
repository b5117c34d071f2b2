"""The command line: parses, calls a command, and turns errors and interruptions into messages and exit codes."""

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from ..support import machine, threads
from ..support.errors import Interrupted, PlopfastError, RankError, for_terminal
from .bench_command import run_bench
from .commands import COMMANDS, Call
from .options import parse, settings_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command as `plopfast ARGV...` does, and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # rows may hold what a terminal's or a pipe's encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    launch = machine.launch()
    if launch.size == 1:
        return _main(argv, launch)
    # rank 0 speaks for all
    with contextlib.redirect_stdout(io.StringIO()) if launch.rank else contextlib.nullcontext():
        code = _main(argv, launch)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # on busy cores, threads of torch's process groups can abort an interpreter that shuts down


def _main(argv: Sequence[str] | None, launch: machine.Launch) -> int:
    with contextlib.redirect_stderr(io.StringIO()) if launch.rank else contextlib.nullcontext():
        arguments = parse(argv)
    threads.set_waiting_policy()  # not for --help, as it takes 0.1 s; nothing has imported torch yet
    try:
        code = _call(arguments, launch)
        if launch.size > 1:
            from ..support import ranks

            ranks.close()
    except RankError:
        return 2
    except PlopfastError as error:
        return _fail(str(error), launch)
    except OSError as error:
        return _fail(f"{error.filename or ''}: {error.strerror or error}", launch)
    except KeyboardInterrupt as error:
        resumable = hasattr(arguments, "resume") and arguments.out
        hint = f"; go on with: plopfast {arguments.command} --resume --out {arguments.out}" if resumable else ""
        if not launch.rank:
            print(f"\nplopfast: interrupted: {error or 'finished stages are kept'}{hint}", file=sys.stderr)
        if not isinstance(error, Interrupted):
            return 130
        code = 128 + error.number
    except Exception as error:
        if launch.size == 1:
            raise
        from ..support import ranks

        if ranks.is_loss(error):
            return _lost(error, launch)
        return _fail(f"{type(error).__name__}: {error}\n{traceback.format_exc()}", launch)
    return code


def _lost(error: Exception, launch: machine.Launch) -> int:
    """Every rank that is left says which one has ended, unless that one said why itself."""
    from ..support import ranks

    if said := ranks.explain_loss():
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "its own message, if any, or torchrun's says why"
        _say_error(f"{said}; {remedy} ({cause})", launch)
    return 2


def _fail(message: str, launch: machine.Launch) -> int:
    if launch.size > 1:
        from ..support import ranks

        if not ranks.first_to_fail():
            return 2
    _say_error(message, launch)
    return 2


def _say_error(message: str, launch: machine.Launch) -> None:
    who = f"rank {launch.rank} of {launch.size}: " if launch.size > 1 else ""
    print(f"plopfast: error: {who}{for_terminal(message)}", file=sys.stderr, flush=True)


def _call(arguments: argparse.Namespace, launch: machine.Launch) -> int:
    """Calls the command; returns its exit code."""
    command = COMMANDS.get(arguments.command)
    if launch.rank and not (command and command.on_ranks):
        return 0
    if command is None:
        run_bench(arguments)
        return 0
    config = settings_of(arguments)
    if command.on_ranks:
        from ..support import devices, ranks

        ranks.init(devices.device_for(config.device), config.timeout)
    with contextlib.ExitStack() as ends:
        return command.do(Call(arguments.command, arguments, config, ends)) or 0


if __name__ == "__main__":
    sys.exit(main())
