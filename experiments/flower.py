"""Does the loop run on several machines? Server and clients on Flower, each in its own process.

    python -m experiments.flower    # on 127.0.0.1; first pip install -r requirements-flower.txt

Yes, with the same bits (test_flower.py). Flower (Beutel et al. 2020, arXiv 2007.14390) carries the
messages; a client that is gone, or that sends what nobody asked for, is lost. On machines of your
own, `flwr run` the app in OUT.flower: PYTHONPATH names this repository, OUT is on the server's, and
a client's SuperNode has --node-config 'data="MINE.npz"'. You also need certificates."""
import contextlib
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from tomli_w import dumps  # comes with Flower

import data
import fllw

client_app = ClientApp()  # Flower reads the source for these names: keep them plain assignments
server_app = ServerApp()

def read_answer(stage, message, reply):
    """(upload, losses, images) from a client's reply. Raises for all else: it is not trusted."""
    if reply.has_error():  # Flower itself replies so for a node that is gone or takes too long
        raise ConnectionError(reply.error.reason)
    upload, report = reply.content["upload"].to_torch_state_dict(), reply.content["report"]
    losses, images = torch.tensor([report["loss"]]), report["images"]
    shapes = {name: tensor.shape for name, tensor in message.items() if stage.trains(name)}
    if {name: tensor.shape for name, tensor in upload.items()} != shapes:
        raise ValueError("other tensors than those that train")
    for tensor in [*upload.values(), losses]:
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError("numbers that are not finite float32")
    if type(images) is not int or images < 1:
        raise ValueError(f"number of images: {images!r}")
    return upload, losses, images

@server_app.main()
def serve(grid, context):
    """Train on images that are elsewhere: of them the server knows the shape alone."""
    config = fllw.Config(**context.run_config)
    checkpoint = torch.load(Path(config.out, "checkpoint.pt"), "cpu", weights_only=True)
    while len(nodes := sorted(grid.get_node_ids())) < config.clients:
        time.sleep(0.2)

    def train_client(config, stage, message, images, round_number, client):
        task = ConfigRecord({"round": round_number, "client": client})
        content = RecordDict({"task": task, "model": ArrayRecord(message)})
        try:  # each client's thread waits here, 600 seconds at most
            [reply] = grid.send_and_receive([Message(content, nodes[client], "train", ttl=600)])
            return read_answer(stage, message, reply)
        except Exception as error:  # of many kinds: anything may arrive, or nothing
            print(f"round {round_number}: client {client} is lost: {error!r}", flush=True)

    def after(state):
        if not state.history[-1]["losses"]:
            raise ConnectionError(f"no client answered in round {len(state.history)}")
        fllw.write(Path(config.out, "checkpoint.pt"), checkpoint | vars(state))
        print(f"round {len(state.history)}: loss {state.history[-1]['losses']}", flush=True)

    elsewhere = torch.empty(0, *checkpoint["settings"]["image_shape"], device="meta")
    state = fllw.State(checkpoint["server"], checkpoint["history"])
    fllw.federate(replace(config, workers=config.clients), [elsewhere] * config.clients, state,
                  train_client=train_client, on_round=after)

@client_app.train()
def answer(message, context):
    """Train what was sent for one round, on the node's own images or on a part of --data."""
    config, own = fllw.Config(**context.run_config), context.node_config.get("data")
    round_number, client = message.content["task"]["round"], message.content["task"]["client"]
    dataset = data.load(own or config.data, config.cache, config.images)
    images = (dataset.train_images if own else
              data.split(dataset, config.clients, config.alpha, config.seed)[client])
    model = message.content["model"].to_torch_state_dict()
    [stage] = [stage for stage in fllw.stages(config) if round_number in stage.rounds]
    torch.set_num_threads(1)  # as in federate(): the last bits depend on it
    upload, losses, count = fllw.local_train(config, stage, model, images, round_number, client)
    report = ConfigRecord({"loss": losses.mean().item(), "images": count})
    return Message(RecordDict({"upload": ArrayRecord(upload), "report": report}), reply_to=message)

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

def main(arguments=None):
    """Start Flower's server (a SuperLink), a SuperNode for each client and a run; then end them."""
    parser = fllw.make_parser((__doc__ or "").split("\n\n")[0], "python -m experiments.flower")
    given = vars(parser.parse_args(arguments))
    with data.sentences(parser):
        config = fllw.Config(**given)
        dataset = data.load(config.data, config.cache, config.images)
        config = replace(config, **data.own_split(dataset, given))
        fllw.validate(config)
        folder = fllw.open_run(config, dataset)[0].absolute()
        home, ports = Path(f"{folder}.flower"), [free_port() for _ in range(config.clients + 1)]
        (home / "app").mkdir(parents=True, exist_ok=True)  # the app: this file and the settings
        (home / "app" / "flower.py").write_bytes(Path(__file__).read_bytes())
        project = {"name": "fllw", "version": "1.0.0", "description": "FLL", "license": "MIT"}
        app = {"publisher": "fllw", "config": vars(config) | {"out": str(folder)},
               "components": {"serverapp": "flower:server_app", "clientapp": "flower:client_app"}}
        (home / "app" / "pyproject.toml").write_text(
            dumps({"project": project, "tool": {"flwr": {"app": app}}}), encoding="utf-8")
        link = {"address": f"127.0.0.1:{ports[0]}", "insecure": True}
        (home / "config.toml").write_text(dumps({"superlink": {"here": link}}))

        os.environ.update(FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED="0", NO_PROXY="127.0.0.1",
                          PYTHONPATH=os.path.dirname(fllw.__file__))
        commands = ["flower-superlink --disable-runtime-dependency-installation",
                    *[f"flower-supernode --superlink {link['address']}"] * config.clients]
        with open(home / "log", "wb") as log, contextlib.ExitStack() as stack:
            started = [subprocess.Popen(f"{command} --insecure --port {port}".split(), stdout=log,
                                        stderr=log) for command, port in zip(commands, ports)]
            for process in started:
                stack.callback(process.wait)
                stack.callback(process.kill)  # comes first; what it has started ends by itself
            while started[0].poll() is None and socket.socket().connect_ex(("127.0.0.1", ports[0])):
                time.sleep(0.2)  # until the SuperLink listens
            subprocess.run(["flwr", "run", home / "app", "here", "--stream"])
        if len(fllw.open_run(config, dataset)[1]["history"]) < config.rounds:
            parser.exit(1, f"the run failed (see above and {home}/log): a rerun resumes\n")

if __name__ == "__main__":
    main()
