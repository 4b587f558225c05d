"""How fast is it? Client threads against torch's own, and a client's round in other simulators.

    python -m experiments.speed    # some 12 minutes on two idle cores

Two client threads are 1.9 times as fast as one, by the seconds of a round of the default command. A
client with much work takes as long as a bare loop of its steps (one thread; one model, loss and
optimizer for all sides). A tiny one takes 3 to 4 times as long: it builds its learner anew. Beside
them stand pfl-research 0.6.0 (Granqvist et al. 2024, arXiv 2404.06430), which keeps one model, and
Flower's simulation (Beutel et al. 2020, 2007.14390), which sends it between processes."""
import argparse
from functools import partial
from importlib.util import find_spec
from time import perf_counter

import torch

import data
import experiments
import fllw
from ssl_loss import nt_xent

SIZES = {"2 clients of 1,984 images": (2, 1984, {}), "100 clients of 40 images": (100, 40, {}),
         "100 clients of 4, tiny": (100, 4, dict(dim=16, heads=4, head_hidden=24, head_dim=8))}

def ours(config, images, train_client=fllw.local_train):
    """Seconds of a round, all clients."""
    history = fllw.federate(config, images, train_client=train_client).history
    return sum(row["seconds"] for row in history) / config.rounds

def threads(rows):
    """Add a turn to the rows {name: {column: numbers}}: seconds of a round."""
    def wide(*arguments):
        torch.set_num_threads(2)
        return fllw.local_train(*arguments)
    for name, workers, train_client in (("one thread", 1, fllw.local_train),
                                        ("two of torch's own", 1, wide),
                                        ("two clients at once", 2, fllw.local_train)):
        config = fllw.Config(rounds=8, workers=workers)
        images = data.split(data.load(config.data), config.clients)
        experiments.add(rows, name, {"seconds": ours(config, images, train_client)})

def clients(rows):
    """Add a turn: milliseconds of a client's round."""
    for name, (count, own, changes) in SIZES.items():
        config = fllw.Config(method="e2e", clients=count, rounds=2, workers=1, **changes)
        images = data.split(data.load(config.data, images=count * own), count)
        for side, package in SIDES.items():
            if find_spec(package):
                experiments.add(rows, name, {side.__name__: 1000 * side(config, images) / count})

def loss(config, learner, images):
    z = learner.head(learner.encoder(data.two_views(images, data.RECIPES["digits"], None)))
    return nt_xent(*z.chunk(2), config.temperature)

def bare(config, images):
    """Seconds of the same steps and nothing else, with one learner."""
    learner = fllw.Learner(config, images[0].shape[1:], range(config.depth))
    optimizer = torch.optim.AdamW(learner.parameters(), config.lr, fused=True)
    began = perf_counter()
    for batch in (batch for own in images for batch in own.split(config.batch_size)):
        optimizer.zero_grad()
        loss(config, learner, batch).backward()
        optimizer.step()
    return perf_counter() - began

def pfl(config, images):
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel
    learner = fllw.Learner(config, images[0].shape[1:], range(config.depth))
    learner.loss, learner.metrics = partial(loss, config, learner), lambda batch: {}
    model = PyTorchModel(learner, partial(torch.optim.AdamW, fused=True),
                         torch.optim.SGD(learner.parameters(), 1.0))
    users = FederatedDataset(lambda own: PyTorchTensorDataset([images[own]]),
                             iter([*range(config.clients)] * config.rounds).__next__)
    local = NNTrainHyperParams(config.batch_size, 1, config.lr)  # one epoch
    rounds = NNAlgorithmParams(config.rounds, 10**6, config.clients, 0)  # no validation
    began = perf_counter()
    FederatedAveraging().run(rounds, SimulatedBackend(users, users), model, local, local,
                             send_metrics_to_platform=False)
    return (perf_counter() - began) / config.rounds

def flower(config, images):
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation
    client_app, server_app, done = ClientApp(), ServerApp(), []

    @client_app.train()
    def train(message, context):
        client, model = context.node_config["partition-id"], message.content["arrays"]
        upload, _, count = fllw.local_train(config, *fllw.stages(config),
                                            model.to_torch_state_dict(), images[client], 1, client)
        content = {"arrays": ArrayRecord(upload), "metrics": MetricRecord({"num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    @server_app.main()
    def serve(grid, context):
        model = ArrayRecord(fllw.initial(config, images[0].shape[1:]))
        FedAvg(fraction_evaluate=0.0).start(grid, model, num_rounds=config.rounds,
                                            evaluate_fn=lambda *_: done.append(perf_counter()))
    run_simulation(server_app, client_app, config.clients, backend_config={
        "init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1}})
    return done[-1] - done[-2]  # the first round starts processes

SIDES = {bare: "torch", ours: "torch", pfl: "pfl", flower: "ray"}  # and what each needs

def main(arguments=None):
    parser = argparse.ArgumentParser("python -m experiments.speed", description=__doc__)
    parser.add_argument("--save", type=experiments.plain_name, help="results/SAVE.json")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for side, package in SIDES.items():
        if not find_spec(package):
            print(f"{package} is not installed, so there is no column {side.__name__}")
    columns = {"seconds": ("seconds", 1, 1)}
    columns |= {side.__name__: (f"{side.__name__}, ms", 1, 1) for side in SIDES}
    rows = {}
    for part in 2 * (threads, clients):  # turns, so that other work slows all sides
        part(rows)
    experiments.show("speed", rows, flags.save, columns)

if __name__ == "__main__":
    main()
