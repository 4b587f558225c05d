"""Flower's processes on 127.0.0.1: a SuperLink and its SuperNodes, started and ended together."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "NO_PROXY": "127.0.0.1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

def still_running(home):
    """Ids of the processes that Flower started with this FLWR_HOME (found on Linux alone)."""
    found, mark = [], f"FLWR_HOME={home}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found

@contextlib.contextmanager
def network(home, nodes, log, via=lambda port: port):
    """A SuperLink, and a SuperNode for each of `nodes` (its node-config), while the block runs.

    Yields (flwr, supernodes): flwr(*arguments) starts a `flwr` command, supernodes are processes.
    via(port): the port by which a SuperNode reaches the SuperLink; tests count bytes there."""
    port, processes, output = free_port(), [], open(log, "wb")
    here = ("--insecure", "--host", "127.0.0.1", "--port")
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')

    def start(*command, stdout=output):
        environment = os.environ | ENVIRONMENT | {"FLWR_HOME": str(home)}
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=output))
        return processes[-1]
    try:
        start("flower-superlink", *here, str(port), "--disable-runtime-dependency-installation")
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if processes[0].poll() is not None:
                raise OSError(f"Flower's SuperLink ended at once (see {log})")
            time.sleep(0.2)
        for node in nodes:
            text = " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())
            start("flower-supernode", *here, str(free_port()), "--superlink",
                  f"127.0.0.1:{via(port)}", "--node-config", text)
        yield lambda *rest, stdout=None: start("flwr", *rest, stdout=stdout), processes[1:]
    finally:
        for process in processes:
            process.terminate()
        stop = time.monotonic() + 10  # seconds for those that Flower started in its turn
        while left := still_running(home):
            for process in processes:
                process.poll()  # a child that has ended goes only when its parent asks
            for pid in left if time.monotonic() > stop else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        output.close()
