"""The same rounds on Flower: a server and clients in other processes, or on other machines.

    pip install -r requirements-flower.txt
    python -m experiments.flower --rounds 8 --clients 2
    python -m experiments.flower --rounds 8 --clients 2 --files A.npz B.npz

Each command starts Flower's server (a SuperLink), a SuperNode for each client and the run, all on
127.0.0.1, and ends them. The clients share out --data, or have a file each. What they run is
flower_app.py: the loop is fllw.train() itself, and its `ask` sends messages by Flower.

In a real deployment every machine has the requirements installed, and you run:

    python -m experiments.flower --rounds 96 --clients 2 --augment natural --app APP
    flower-superlink --disable-runtime-dependency-installation --host ADDRESS
    flower-supernode --superlink ADDRESS:8000 --node-config 'partition-id=0 data="MINE.npz"'
    flwr run APP NAME --stream    # NAME: the SuperLink in Flower's config.toml

It also needs certificates and node authentication: see Flower's documentation. Nothing here is a
privacy mechanism. Flower reports its use to its makers unless FLWR_TELEMETRY_ENABLED=0 is set.
"""
import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import data
import fllw
import ssl_loss
from data import InputError

SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1",
            "RAY_USAGE_STATS_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
PROJECT = """[project]
name = "fllw"
version = "1.0.0"
[tool.flwr.app]
publisher = "fllw"
components = {serverapp = "flower_app:server_app", clientapp = "flower_app:client_app"}
[tool.flwr.app.config]
"""

def write_app(folder, config, timeout):
    """Flower's app: the modules, and the settings in pyproject.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    app = Path(__file__).with_name("flower_app.py")
    for module in (app, fllw.__file__, data.__file__, ssl_loss.__file__):
        shutil.copy(module, folder)
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
             for name, value in (asdict(config) | {"timeout": timeout}).items()]
    (folder / "pyproject.toml").write_text(PROJECT + "".join(lines))

class Wire:
    """A port of 127.0.0.1 that passes everything on to another one, and counts the bytes."""
    def __init__(self, target):
        self.target, self.bytes = target, {"up": 0, "down": 0}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            near = self.listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", self.target))
            for ends in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source, sink, direction):
        with contextlib.suppress(OSError), source, sink:
            while chunk := source.recv(2**16):
                self.bytes[direction] += len(chunk)
                sink.sendall(chunk)

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

@contextlib.contextmanager
def network(folder, nodes, log):
    """A SuperLink, and a SuperNode for each of `nodes` (its node-config), while the block runs.

    Yields (flwr, supernodes, wires); flwr(*arguments) starts a `flwr` command that reaches them."""
    port, processes, output = free_port(), [], open(log, "wb")
    fcntl.flock(output, fcntl.LOCK_EX)  # held by every process that writes into the log
    (folder / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')

    def start(*command, stdout=output):
        environment = os.environ | SETTINGS | {"FLWR_HOME": str(folder)}
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=output))
        return processes[-1]

    here, supernodes, wires = ("--insecure", "--host", "127.0.0.1", "--port"), [], []
    try:
        start("flower-superlink", *here, str(port), "--disable-runtime-dependency-installation")
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if processes[0].poll() is not None:
                raise OSError(f"Flower's SuperLink ended at once (see {log})")
            time.sleep(0.2)
        for node in nodes:
            wires.append(Wire(port))
            text = " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())
            supernodes.append(start("flower-supernode", *here, str(free_port()), "--superlink",
                                    f"127.0.0.1:{wires[-1].port}", "--node-config", text))
        yield lambda *command, stdout=None: start("flwr", *command, stdout=stdout), supernodes, wires
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        output.close()
        with open(log) as again:
            fcntl.flock(again, fcntl.LOCK_EX)  # waits until the last process has ended

def run(config, nodes, timeout):
    """Train on a network of these nodes; returns (how it ended, bytes on the wires)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_app(folder / "app", config, timeout)
        with network(folder, nodes, f"{config.out}.log") as (flwr, _, wires):
            flwr("run", str(folder / "app"), "here", "--stream").wait()
            listing = flwr("list", "here", "--format", "json", stdout=subprocess.PIPE)
            runs = json.loads(listing.communicate()[0])["runs"]  # `flwr run` ends with 0 anyhow
        if [one["status"] for one in runs] != ["finished:completed"]:
            why = runs[0]["status-details"] if runs else "it did not start"
            sys.exit(f"the run failed: {why} (see {config.out}.log); rerun the command to resume")
    return {way: sum(wire.bytes[way] for wire in wires) for way in ("up", "down")}

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.flower")
    mine = parser.add_argument_group("Flower")
    mine.add_argument("--files", nargs="+", default=[], metavar="FILE.npz",
                      help="the images of each client, instead of a part of --data")
    mine.add_argument("--timeout", type=float, default=600.0,
                      help="seconds after which a client that has not answered is lost")
    mine.add_argument("--app", default="", help="write Flower's app into this folder, no more")
    given = vars(parser.parse_args(arguments))
    files, timeout, app = given.pop("files"), given.pop("timeout"), given.pop("app")
    config = fllw.Config(**given)
    fllw.validate(config)
    if not 0 < timeout < 1e9 or len(files) not in (0, config.clients):
        raise InputError("--timeout must be above 0, and --files one for each of --clients")
    config = replace(config, augment=fllw.recipe_name(config))
    if app:
        write_app(Path(app), config, timeout)
        return
    if not shutil.which("flower-superlink", path=SETTINGS["PATH"]):
        raise InputError("Flower is missing: pip install -r requirements-flower.txt")
    sources = files or [config.data] * config.clients
    datasets = {source: data.load(source, config.cache, config.images) for source in sources}
    ...
