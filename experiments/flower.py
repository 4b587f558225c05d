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
import time
from dataclasses import asdict, replace
from pathlib import Path

import data
import fllw
import ssl_loss
from data import InputError

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds
    "NO_PROXY": "127.0.0.1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
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

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

@contextlib.contextmanager
def network(folder, nodes, log, via=lambda port: port):
    """A SuperLink, and a SuperNode for each of `nodes` (its node-config), while the block runs.

    Yields (flwr, supernodes): flwr(*arguments) starts a `flwr` command, supernodes are processes.
    via(port) is the port by which a SuperNode reaches the SuperLink, where bytes can be counted."""
    port, processes, output = free_port(), [], open(log, "wb")
    fcntl.flock(output, fcntl.LOCK_EX)  # by every process that writes into the log
    (folder / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')

    def start(*command, stdout=output):
        environment = os.environ | ENVIRONMENT | {"FLWR_HOME": str(folder)}
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=output))
        return processes[-1]

    here, supernodes = ("--insecure", "--host", "127.0.0.1", "--port"), []
    try:
        start("flower-superlink", *here, str(port), "--disable-runtime-dependency-installation")
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if processes[0].poll() is not None:
                raise OSError(f"Flower's SuperLink ended at once (see {log})")
            time.sleep(0.2)
        for node in nodes:
            text = " ".join(f"{key}={json.dumps(value)}" for key, value in node.items())
            supernodes.append(start("flower-supernode", *here, str(free_port()), "--superlink",
                                    f"127.0.0.1:{via(port)}", "--node-config", text))
        yield lambda *command, stdout=None: start("flwr", *command, stdout=stdout), supernodes
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
            fcntl.flock(again, fcntl.LOCK_EX)  # waits for the last process that they started

def run(config, nodes, timeout):
    """Train on a network of these nodes; returns Flower's record of the run."""
    with tempfile.TemporaryDirectory() as folder:
        write_app(Path(folder) / "app", config, timeout)
        with network(Path(folder), nodes, f"{config.out}.log") as (flwr, _):
            flwr("run", f"{folder}/app", "here", "--stream").wait()
            listing = flwr("list", "here", "--format", "json", stdout=subprocess.PIPE)
            runs = json.loads(listing.communicate()[0])["runs"]
    # `flwr run` ends with 0 whatever happened.
    if not runs or runs[0]["status"] != "finished:completed":
        reason = runs[0]["status-details"] if runs else "it did not start"
        sys.exit(f"{reason} (see {config.out}.log); rerun the command to resume")
    return runs[0]

def make_nodes(config, files):
    """The node-config of every client, and a data set; InputError if one cannot be trained on."""
    nodes = []
    for client in range(config.clients):
        source = files[client] if files else config.data
        dataset = data.load(source, config.cache, config.images)
        fllw.initial(config, dataset.shape, "meta")  # raises if the patches do not fit
        if source.lower() not in data.ARCHIVES:
            source = data.MNIST5K if source == "mnist5k" else Path(source).expanduser().absolute()
        node = {"partition-id": client, "data": str(source), "device": config.device,
                "cache": str(Path(config.cache).expanduser().absolute())}
        nodes.append(node if files else node | {"num-partitions": config.clients})
    if not files:
        data.partition(dataset.train_labels, config.clients)  # raises if there are too few images
    return nodes, dataset

def read_rows(config):
    path = Path(config.out) / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def report(config, shape, before, traffic):
    """Print what a client received and sent in a round of this run, and who counted it."""
    ledger, rows = fllw.Ledger(config, shape), read_rows(config)
    costs = [ledger.add(row) for row in rows][before:]
    asked = max(1, sum(len(row["clients"]) for row in rows[before:]))
    columns = {"stateless_download_bytes": "download_bytes", "upload_bytes": "upload_bytes"}
    print(fllw.table({
        "tensors, by the ledger": {column: sum(cost[name] for cost in costs) / max(1, len(costs))
                                   for name, column in columns.items()},
        "all, as Flower counts": {"download_bytes": traffic["outbound-bytes"] / asked,
                                  "upload_bytes": traffic["inbound-bytes"] / asked}}))
    print(f"Mean of a client and round, the app included. The encoder is in {config.out}")

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
    config = replace(config, augment=fllw.recipe_name(config), data=" ".join(files) or config.data)
    if app:
        return write_app(Path(app), config, timeout)
    if not shutil.which("flower-superlink", path=ENVIRONMENT["PATH"]):
        raise InputError("Flower is missing: pip install -r requirements-flower.txt")
    nodes, dataset = make_nodes(config, files)
    out = Path(config.out or f"runs/flower-{Path(config.data).stem}-seed{config.seed}")
    config = replace(config, out=str(out.expanduser().absolute()))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    before = len(read_rows(config))
    record = run(config, nodes, timeout)
    report(config, dataset.shape, before, record["network-traffic"])

if __name__ == "__main__":
    fllw.command(main)
