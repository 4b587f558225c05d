"""The same rounds on Flower: a server and clients in other processes, or on other machines.

    pip install -r requirements-flower.txt
    python -m experiments.flower --rounds 8 --clients 2
    python -m experiments.flower --rounds 8 --clients 2 --files A.npz B.npz

Each command starts Flower's server (a SuperLink), a SuperNode for each client and the run, all on
127.0.0.1, and ends them. The clients share out --data, or have a file each. What they run is
flower_app.py: the loop is fllw.train() itself. In a real deployment, one command each instead:

    python -m experiments.flower --rounds 96 --clients 2 --augment natural --app APP
    flower-superlink --disable-runtime-dependency-installation --host ADDRESS
    flower-supernode --superlink ADDRESS:8000 --node-config 'partition-id=0 data="MINE.npz"'
    flwr run APP NAME --stream    # NAME: the SuperLink in Flower's config.toml

It also needs certificates and node authentication: see Flower's documentation. Nothing here is a
privacy mechanism. Flower reports its use to its makers unless FLWR_TELEMETRY_ENABLED=0 is set.
"""
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import data
import fllw
import ssl_loss
from data import InputError
from experiments.flower_network import ENVIRONMENT, network

PROJECT = """[project]
name = "fllw"
version = "1.0.0"
description = "Federated layer-wise learning"
license = "MIT"
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

def make_nodes(config, files):
    """The node-config of every client, and the last data set; InputError if they are unusable."""
    nodes, common = [], {"device": config.device, "cache": str(Path(config.cache).expanduser())}
    for source in files or [config.data]:
        dataset = data.load(source, config.cache, config.images)
        fllw.initial(config, dataset.shape, "meta")  # raises if the patches do not fit
        if source.lower() not in data.ARCHIVES:  # Flower's app cannot hold an .npz: give its path
            known = source.lower() == "mnist5k"
            source = str(data.MNIST5K if known else Path(source).expanduser().absolute())
        nodes.append({"partition-id": len(nodes), "data": source} | common)
    if not files:
        parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
        nodes = [nodes[0] | {"partition-id": client, "num-partitions": config.clients}
                 for client in range(len(parts))]
    return nodes, dataset

def run(config, nodes, timeout):
    """Train on a network of these nodes; returns Flower's record of the run."""
    with tempfile.TemporaryDirectory() as home:
        write_app(Path(home) / "app", config, timeout)
        with network(Path(home), nodes, f"{config.out}.log") as (flwr, _):
            flwr("run", f"{home}/app", "here", "--stream").wait()
            listing = flwr("list", "here", "--format", "json", stdout=subprocess.PIPE)
            runs = json.loads(listing.communicate()[0])["runs"]
    # `flwr run` ends with 0 whatever happened.
    if not runs or runs[0]["status"] != "finished:completed":
        reason = runs[0]["status-details"] if runs else "it did not start"
        sys.exit(f"{reason} (see {config.out}.log; a rerun resumes)")
    return runs[0]

def read_rows(config):
    path = Path(config.out) / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

def report(config, shape, before, traffic):
    """Print what a client received and sent in a round of this run; `before`: rounds of others."""
    ledger, rows = fllw.Ledger(config, shape), read_rows(config)
    costs = [ledger.add(row) for row in rows][before:]
    asked = sum(len(row["clients"]) for row in rows[before:])
    if costs:
        print(fllw.table({
            "tensors (ledger, stateless)": {
                "download_bytes": sum(c["stateless_download_bytes"] for c in costs) / len(costs),
                "upload_bytes": sum(c["upload_bytes"] for c in costs) / len(costs)},
            "bodies of HTTP messages (Flower)": {
                "download_bytes": traffic["outbound-bytes"] / asked,
                "upload_bytes": traffic["inbound-bytes"] / asked}}))
        print("Means of a client and round.")
    print(f"The encoder is in {config.out}: fllw.load_encoder() reads it.")

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
    if not 0 < timeout < 1e9:
        raise InputError(f"--timeout must be above 0 seconds, it is {timeout}")
    if len(files) not in (0, config.clients):
        raise InputError(f"--files must be one for each of --clients ({config.clients}), they are "
                         f"{len(files)}")
    config = replace(config, augment=fllw.recipe_name(config), data=" ".join(files) or config.data)
    if app:
        return write_app(Path(app), config, timeout)
    nodes, dataset = make_nodes(config, files)
    if not shutil.which("flower-superlink", path=ENVIRONMENT["PATH"]):
        raise InputError("Flower is missing: pip install -r requirements-flower.txt")
    out = Path(config.out or f"runs/flower-{Path(config.data).stem}-seed{config.seed}")
    config = replace(config, out=str(out.expanduser().absolute()))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending Flower
    before = len(read_rows(config))
    traffic = run(config, nodes, timeout)["network-traffic"]
    report(config, dataset.shape, before, traffic)

if __name__ == "__main__":
    fllw.command(main)
