"""The same rounds on Flower: server and clients in processes, or on machines, of their own.

    pip install -r requirements-flower.txt
    python -m experiments.flower                        # --data is shared out among --clients
    python -m experiments.flower --files A.npz B.npz    # each client has a file of its own

This starts Flower's server (a SuperLink), a SuperNode for each client and a run, all on 127.0.0.1,
and ends them. The app stays in OUT.flower/app: `flwr run` it with machines of your own, each with
a SuperNode that has --node-config 'partition-id=0 data="MINE.npz"' (FLWR_TELEMETRY_ENABLED=0 stops
Flower's reports to its makers). A real deployment also needs certificates and node authentication:
see Flower's documentation. Nothing here is a privacy mechanism.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import data
import fllw

client_app = ClientApp()  # Flower reads the source for these names: keep them plain assignments
server_app = ServerApp()

# ---------------------------------------------------------------------------------- the server
def exchange(grid, orders):
    """Send {who: (node, content)}; yields (who, content of the reply), without those who failed.

    Flower itself replies, with an error, for a node that is gone or takes longer than ttl."""
    messages = [Message(content, node, MessageType.TRAIN, ttl=600)  # seconds
                for node, content in orders.values()]
    keys, replies = list(grid.push_messages(messages)), {}
    while waiting := set(keys) - replies.keys():
        time.sleep(0.2)
        for reply in grid.pull_messages(waiting):
            replies[reply.metadata.reply_to_message_id] = reply
    if all(reply.has_error() for reply in replies.values()):
        raise RuntimeError(f"no client answered: {reply.error.reason}")

    # In the order sent, not of arrival: the last bits of an average depend on the order.
    for who, key in zip(orders, keys):
        if replies[key].has_error():
            print(f"no answer from {who}: {replies[key].error.reason}")
        else:
            yield who, replies[key].content

@server_app.main()
def serve(grid, context):
    """Train. The server has no images: its run folder belongs to the settings and --data's name."""
    config = fllw.Config(**context.run_config)
    while len(found := list(grid.get_node_ids())) < config.clients:
        time.sleep(0.2)
    nodes = {}  # client -> its node; a node says which client it is, and the shape of its images
    for node, content in exchange(grid, {node: (node, RecordDict()) for node in found}):
        nodes[content["about"]["client"]] = node
        shape = content["about"]["shape"]
    if nodes.keys() != set(range(config.clients)):
        raise data.InputError(f"there must be {config.clients} clients, there are {sorted(nodes)}")

    def ask(stage, round_number, progress, messages):
        # The round is enough: clients know the settings, so also the stage and its progress.
        task = MetricRecord({"round": round_number})
        orders = {client: (nodes[client], RecordDict({"task": task, "model": ArrayRecord(model)}))
                  for client, model in messages}
        for client, content in exchange(grid, orders):
            upload, report = content["upload"].to_torch_state_dict(), content["report"]
            yield client, fllw.Answer(upload, report["loss"], report["images"])

    images, labels = torch.zeros(0, *shape, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    dataset = data.Dataset(images, labels, images, labels)
    with fllw.run_folder(config, dataset, f"flower on {config.data}") as (folder, state):
        fllw.train(config, dataset, folder, state, ask=ask)

# ---------------------------------------------------------------------------------- a client
@client_app.train()
def answer(message, context):
    """Say who this client is; if it was sent a model, train that for one round.

    Flower starts a process for each message, so a client keeps nothing from round to round."""
    config, node = fllw.Config(**context.run_config), context.node_config
    client = node["partition-id"]
    dataset = data.load(node.get("data", config.data), config.cache, config.images)
    images = dataset.train_images
    if "data" not in node:  # all clients share a file: take this one's part
        images = images[fllw.parts_of(config, dataset)[client]]
    about = MetricRecord({"client": client, "shape": list(images.shape[1:])})
    content = RecordDict({"about": about})

    if "model" in message.content:
        round_number = message.content["task"]["round"]
        stage, progress = fllw.stage_progress(fllw.stages(config), round_number - 1)
        ask = fllw.in_turn(config, images, {client: range(len(images))})
        order = (client, message.content["model"].to_torch_state_dict())
        [(_, reply)] = ask(stage, round_number, progress, [order])
        content["upload"] = ArrayRecord(reply.upload)
        content["report"] = MetricRecord({"loss": reply.loss, "images": reply.images})
    return Message(content, reply_to=message)

# -------------------------------------------------------------------- all of it, on 127.0.0.1
def write_app(folder, config):
    """Flower's app: this file, the modules that it needs, and the run's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fllw.py", "data.py", "ssl_loss.py", "experiments/flower.py"):
        shutil.copy(Path(fllw.__file__).parent / name, folder)
    settings = ", ".join(f"{name} = {json.dumps(value)}" for name, value in asdict(config).items())
    (folder / "pyproject.toml").write_text(f"""
project = {{name = "fllw", version = "1.0.0", description = "FLL", license = "MIT"}}
[tool.flwr.app]
publisher = "fllw"
components = {{serverapp = "flower:server_app", clientapp = "flower:client_app"}}
config = {{{settings}}}
""")

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

def run(config, files=()):
    """Start Flower, train, end Flower. Returns what `flwr list` says about the run."""
    home, port = Path(f"{config.out}.flower"), free_port()
    write_app(home / "app", config)
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "127.0.0.1"}

    here = ["--insecure", "--host", "127.0.0.1", "--port"]
    commands = [["flower-superlink", *here, str(port), "--disable-runtime-dependency-installation"]]
    for client in range(config.clients):
        own = f" data={json.dumps(files[client])}" if files else ""
        commands.append(["flower-supernode", *here, str(free_port()), "--superlink",
                         f"127.0.0.1:{port}", "--node-config", f"partition-id={client}{own}"])
    started = []
    with open(home / "log", "wb") as log:
        try:
            for command in commands:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            while started[0].poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.2)  # until the SuperLink listens
            subprocess.run(["flwr", "run", home / "app", "here", "--stream"], env=environment)
            listing = subprocess.run(["flwr", "list", "here", "--format", "json"],
                                     env=environment, stdout=subprocess.PIPE).stdout
        finally:
            for process in started:  # what these have started ends by itself when they are gone
                process.kill()
                process.wait()
    if b"finished:completed" not in listing:  # `flwr run` ends with 0 whatever happened
        sys.exit(f"the run failed (see above and {home}/log): a rerun resumes")
    return listing

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.flower")
    parser.add_argument("--files", nargs="+", default=[], metavar="FILE.npz",
                        help="the images of each client, instead of a part of --data")
    given = vars(parser.parse_args(arguments))
    files = given.pop("files")
    config = fllw.Config(**given)
    if files:
        config = replace(config, clients=len(files), data=" ".join(files))
    fllw.validate(config)
    for source in files or [config.data]:
        data.load(source, config.cache, config.images)  # what is wrong is told here, not by Flower

    out = Path(config.out or f"runs/flower-{Path(config.data).stem}-seed{config.seed}")
    config = replace(config, out=str(out.expanduser().absolute()))
    if config.data.lower() == "mnist5k":  # Flower's app cannot hold an .npz: give its path
        config = replace(config, augment=fllw.recipe_name(config), data=str(data.MNIST5K))
    run(config, files)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run() ends Flower
    fllw.command(main)
