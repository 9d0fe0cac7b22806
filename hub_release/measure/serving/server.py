"""A server with the demo in processes of its own, on a free port of this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from huggingface_hub.utils import httpx


HOST = "127.0.0.1"
_REPLICA = "ServeReplica:qzoom:Model"  # what Ray calls the processes that hold the model
_START_SECONDS = 240
_STOP_SECONDS = 120


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """A running server.

    Args:
        process: its first process.
        address: where it listens.
        log: where its processes write to.
        flags: of the command that started it.
    """

    def __init__(self, process: subprocess.Popen[bytes], address: str, log: Path, flags: tuple[str, ...]) -> None:
        self.process, self.address, self.log, self.flags = process, address, log, flags

    def replicas(self) -> list[int]:
        """Ids of the processes that hold the model."""
        if "--in-process" in self.flags:
            return [self.process.pid]
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if _REPLICA in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def resident_mib(self) -> float:
        """Memory of the processes that hold the model, in MiB; without Ray's object store, which they only map."""
        infos = [psutil.Process(pid).memory_info() for pid in self.replicas()]
        return sum(info.rss - getattr(info, "shared", 0) for info in infos) / 2**20

    def wait(self) -> None:
        """Returns when it answers.

        Raises:
            RuntimeError: it has ended, or does not answer in time.
        """
        began = time.monotonic()
        while time.monotonic() - began < _START_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server has ended: {self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.address}/health", timeout=10, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server does not answer: {self.log.read_text()[-2000:]}")

    def stop(self) -> int:
        """Ends it with SIGTERM; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_SECONDS)


@contextmanager
def running(model: str | Path, *flags: str) -> Iterator[Server]:
    """A server that answers; it is ended afterwards.

    Args:
        model: folder of the checkpoint.
        flags: of `python -m modeling_qzoom.serving`.
    """
    port = free_port()
    command = [sys.executable, "-m", "modeling_qzoom.serving", str(model), "--port", str(port), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            server = Server(process, f"http://{HOST}:{port}", log, flags)
            try:
                server.wait()
                yield server
            finally:
                server.stop()
