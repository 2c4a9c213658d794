"""`sparsec serve tracker:HOST:PORT/KEY`: measure schedules on this machine's GPU for those who compile elsewhere."""

from collections.abc import Callable
from typing import Annotated

import typer

from .console import print_message
from .errors import ExitCode

FleetName = Annotated[
    str, typer.Argument(metavar="tracker:HOST:PORT/KEY", help="The tracker, and the key that this machine answers to.")
]
Port = Annotated[int, typer.Option(help="First port to try.", min=1, max=65435)]


def serve_command(fleet: FleetName, port: Port = 9091) -> Callable[[], int]:
    """Measure schedules on this machine's GPU for those who compile elsewhere (--tune-on), until interrupted.

    The tracker is TVM's: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port PORT. Whoever reaches these ports can run
    code on this machine: use it in networks of your own only.
    """
    return lambda: _serve(fleet, port)


def _serve(name: str, port: int) -> int:
    from ...codegen.tune import parse_fleet, serve

    fleet = parse_fleet(name)
    print_message("note", f"waiting for work from {fleet}; Ctrl+C ends it")
    serve(fleet, port)
    return ExitCode.DONE
