"""GPUs of other machines, behind a tracker of TVM's RPC: what is compiled here is measured there.

On each machine with a GPU `sparsec serve tracker:HOST:PORT/KEY` waits for work; the tracker, `python -m
tvm.exec.rpc_tracker`, hands each request to one that is free. As with all of TVM's RPC whoever reaches these ports can
run code there: networks of one's own only.
"""

from __future__ import annotations

import json
import pickle
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ....ir import SparsecError, UsageError
from ...generate.version import code_version
from ...target.cuda import CudaTarget, Gpu, find_driver, target_of
from .measure import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...kernel import CudaVariant
    from ...problem import Problem

    # From a variant and a number of rows to seconds.
    Meter = Callable[[Problem, CudaVariant, int], float]

_SYNTAX = re.compile(r"tracker:([^:/\s]+):(\d{1,5})/([^/\s]+)")
# Names of the functions that a server offers.
_GPUS, _MEASURE = "sparsec.gpus", "sparsec.measure"
# Seconds to wait for the tracker, and that one search may take.
_CONNECT, _SESSION = 5.0, 600
# What TVM's RPC raises: its own errors and those of sockets.
_FAILURES = (OSError, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class Fleet:
    """Machines that wait behind a tracker under one key.

    Attributes:
        host, port: of the tracker.
        key: which machines are meant; those under one key have the same GPUs.
    """

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"tracker:{self.host}:{self.port}/{self.key}"

    def gpus(self) -> dict[str, CudaTarget]:
        """The architectures of the GPUs there, with their limits.

        Raises:
            SparsecError: the tracker or a machine cannot be reached, or has another version of sparsec.
        """
        with self._session() as call:
            rows = call(_GPUS, pickle.dumps(code_version()))
        found: dict[str, CudaTarget] = {}
        for row in rows:
            target = target_of(Gpu(**{**row, "capability": tuple(row["capability"])}))
            if target is not None:
                found.setdefault(target.arch, replace(target, device=None, remote=target.device))
        return found

    @contextmanager
    def meter(self, gpu: CudaTarget, tf32: bool) -> Iterator[Meter]:
        """`measure` on one of the machines, the same for all calls.

        Args:
            gpu: one of `gpus`.
            tf32: as for `measure`.

        Raises:
            SparsecError: as `gpus` and `measure`.
        """
        with self._session() as call:
            yield lambda problem, variant, rows: float(
                call(_MEASURE, pickle.dumps((code_version(), problem, variant, rows, gpu.remote, tf32)))
            )

    @contextmanager
    def _session(self) -> Iterator[Callable[[str, bytes], Any]]:
        """A machine, on which functions are called with bytes; their answers are JSON."""
        from tvm import rpc

        try:
            socket.create_connection((self.host, self.port), _CONNECT).close()
            tracker = rpc.connect_tracker(self.host, self.port)
            waiting = tracker.summary()["server_info"]
            keys = sorted({one["key"].removeprefix("server:") for one in waiting})
        except _FAILURES as error:
            raise SparsecError(
                f"{self}: no tracker answers ({_words(error)}): start one there with 'python -m tvm.exec.rpc_tracker "
                f"--host 0.0.0.0 --port {self.port}', or check host and port"
            ) from error
        if self.key not in keys:
            known = ", ".join(keys) or "none"
            raise SparsecError(
                f"{self}: no machine waits under '{self.key}' (there: {known}): run 'sparsec serve {self}' on one"
            )
        try:
            session = tracker.request(self.key, session_timeout=_SESSION)
        except _FAILURES as error:
            raise SparsecError(f"{self}: the machine there cannot be reached ({_words(error)})") from error

        def call(name: str, data: bytes) -> Any:
            try:
                answer = json.loads(session.get_function(name)(data))
            except (*_FAILURES, AttributeError) as error:
                raise SparsecError(
                    f"{self}: '{name}' failed there ({_words(error)}): is it 'sparsec serve' that waits?"
                ) from error
            if "error" in answer:
                raise SparsecError(f"{self}: {answer['error']}")
            return answer["result"]

        yield call


def parse_fleet(text: str) -> Fleet:
    """`tracker:HOST:PORT/KEY`.

    Raises:
        UsageError: it is none.
    """
    match = _SYNTAX.fullmatch(text.strip())
    if match is None or not 0 < int(match[2]) < 65536:
        raise UsageError(f"'{text}' is no fleet: expected tracker:HOST:PORT/KEY, such as tracker:gpu-farm:9190/h200")
    return Fleet(match[1], int(match[2]), match[3])


# ---- On a machine with GPUs ----


def serve(fleet: Fleet, port: int = 9091) -> None:
    """Wait for work, on the first free port from `port` on, until interrupted; one request at a time.

    Each request runs in a process of its own: an error that spoils CUDA for a process ends with it.

    Raises:
        SparsecError: what TVM's RPC needs is not installed, no port is free, or there is no GPU.
    """
    driver = find_driver()
    if driver is None or not driver.gpus:
        raise SparsecError("serve: this machine has no NVIDIA GPU that could measure, or no driver for it")
    try:
        from tvm.rpc.server import Server

        server = Server(
            "0.0.0.0",
            port,
            port + 100,
            key=fleet.key,
            tracker_addr=(fleet.host, fleet.port),
            silent=True,
            server_init_callback=register,
        )
    except ImportError as error:
        raise SparsecError(f"serve needs what TVM's RPC is built on ({error}): pip install 'sparsec[rpc]'") from error
    except _FAILURES as error:
        raise SparsecError(f"serve: {_words(error)}") from error
    try:
        server.proc.join()
    finally:
        server.terminate()


def register() -> None:
    """Offer the functions to TVM's RPC in this process."""
    from tvm_ffi import register_global_func

    register_global_func(_GPUS, lambda data: _answered(_gpus, bytes(data)), override=True)
    register_global_func(_MEASURE, lambda data: _answered(_measured, bytes(data)), override=True)


def _answered(function: Callable[..., Any], data: bytes) -> str:
    """JSON of the result, or of the words of an error."""
    try:
        return json.dumps({"result": function(pickle.loads(data))})
    except SparsecError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:  # another version's data, or a driver's fault: the one who asks must hear of it
        return json.dumps({"error": f"{type(error).__name__}: {_words(error)}"})


def _gpus(version: str) -> list[dict[str, Any]]:
    _check_version(version)
    driver = find_driver()
    return [asdict(gpu) for gpu in driver.gpus] if driver is not None else []


def _measured(work: tuple[str, Problem, CudaVariant, int, int, bool]) -> float:
    version, problem, variant, rows, number, tf32 = work
    _check_version(version)
    return measure(problem, variant, rows, number, tf32)


def _check_version(version: str) -> None:
    if version != code_version():
        raise SparsecError(
            f"the machine there has another version of sparsec or TVM (code {code_version()}, here {version}): install "
            "the same"
        )


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[-300:] or type(error).__name__
