"""Do LW-FedSSL's two mechanisms help: alignment of the clients, and calibration by the server?

    python -m experiments.lw_fedssl

Alignment brings nothing, for a quarter more compute. Calibration brings 4 to 8 points, but the
server alone, on its tenth of the images, gets most of that.

After Tun et al. 2024 (arXiv 2401.11647), whose fourth version has neither. Alignment: a client's
second NT-Xent pulls the projection of a view towards the received model's projection of the other
view. Calibration: after averaging, the server trains all blocks so far end to end, on unlabelled
images of its own, so that they keep fitting together. Its control is the server's training without
any client. What differs: the size; the server has a share of the training images.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

import data
import experiments
import fllw
from data import InputError
from ssl_loss import evaluate, nt_xent

FIXED = ("method", "micro_batch", "amp", "out")
SERVER = 2**32 - 1  # the server's number among the clients: what it draws is nobody else's

@dataclass(frozen=True)
class Settings(fllw.Config):
    weight: float = fllw.setting(1.0, "of the alignment term; 0: none", low=0, high=1e6)
    server_epochs: int = fllw.setting(4, "of the server, after each round", low=1, high=1e5)
    server_share: float = fllw.setting(0.1, "of the images, for the server", low=0, high=0.99)

    def macs(self, stage, kept, image_shape):
        """With alignment also the received model's forward pass: what micro-batches add, a head."""
        if self.weight == 0:
            return super().macs(stage, kept, image_shape)
        head = self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        return fllw.count_macs(replace(self, micro_batch=1), stage, kept, image_shape) + 2 * head

def aligned_step():
    """A local step of one client in one round: fllw.local_step() with alignment."""
    received = None

    def step(config, learner, stage, views):
        nonlocal received
        first = stage.first
        if received is None:  # the learner is still as it came; frozen blocks need no second copy
            upper = fllw.broadcast(learner.state_dict(), range(first, stage.stop))
            copies = {name: tensor.clone() for name, tensor in upper.items()}
            received = fllw.learner_of(config, copies, views.shape[1:]).requires_grad_(False)

        def project(model, x):  # tokens, or images where the embedding trains -> two of [B, D]
            return model.head(model.encoder.upper(x, first) if first else model.encoder(x)).chunk(2)

        with torch.no_grad():
            x = learner.encoder.lower(views, first) if first else views
            old1, old2 = project(received, x)
        (z1, z2), t = project(learner, x), config.temperature
        pull = nt_xent(z1, old2, t) + nt_xent(z2, old1, t)
        loss = nt_xent(z1, z2, t) + config.weight * pull / 2
        loss.backward()
        return loss.detach()
    return step

def train_client(config, stage, message, images, round_number, client):
    """A client's work: fllw.local_train(), with alignment if it has a weight."""
    step = aligned_step() if config.weight else None
    return fllw.local_train(config, stage, message, images, round_number, client, step)

def divide(config, dataset):
    """(a Dataset for the clients, images for the server): no training image is in both."""
    n = len(dataset.train_images)
    own, rest = np.split(fllw.rng(config, SERVER).permutation(n), [round(config.server_share * n)])
    if len(own) < 2:
        raise InputError(f"--server-share must leave the server 2 of the {n} images or more")
    rest.sort()
    return dataset._replace(train_images=dataset.train_images[rest],
                            train_labels=dataset.train_labels[rest]), dataset.train_images[own]

def calibration(config, images):
    """An on_round of fllw.federate(): the server trains all its blocks so far on its own images."""
    def on_round(state):
        number, stage = len(state.history), fllw.stages(config)[state.history[-1]["stage"] - 1]
        everything = fllw.Stage(1, 0, 0, stage.stop, range(1, config.rounds + 1))  # one cosine
        # In a thread, as clients are: the last bits depend on the number of torch's own threads.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=[1]) as pool:
            upload, _, _ = pool.submit(fllw.local_train, config, everything, state.server, images,
                                       number, SERVER).result()
        state.server |= upload
    return on_round

def run(config, dataset):
    """The rows of the table with one seed: yields (name, columns)."""
    theirs, own = divide(config, dataset)
    clients = data.split(theirs, config.clients, config.alpha, config.seed)
    plain = replace(config, weight=0.0)
    server = replace(plain, local_epochs=config.server_epochs)
    for name, row, on_round in (
            ("FLL", plain, None), (f"FLL + alignment {config.weight:g}", config, None),
            ("FLL + calibration", plain, calibration(server, own))):
        state = fllw.federate(row, clients, train_client=train_client, on_round=on_round)
        columns = fllw.result(row, dataset, state, train_client=train_client)
        if on_round:  # every tensor changes every round, and is downloaded anew
            columns["download_bytes"] = columns["stateless_download_bytes"]
        yield name, columns

    alone = replace(server, method="e2e", clients=1, clients_per_round=0)
    state = fllw.federate(alone, [own])
    encoder = fllw.encoder_of(alone, state.server, dataset.shape)
    yield "the server alone", evaluate(encoder, dataset, data.recipe_name(config))

def main(arguments=None):
    parser = experiments.make_parser("lw_fedssl", __doc__)
    for f in fields(Settings)[-3:]:  # its own
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type,
                            help=f"{f.metadata['help']} (default: {f.default})")
    with data.sentences(parser):
        given = vars(parser.parse_args(arguments))
        defaults = Settings(images=1000, rounds=16, depth_dropout=0.0)
        config, flags = experiments.settings(defaults, given, FIXED)
        dataset, rows = data.load(config.data, config.cache, config.images), {}
        for seed in flags["seeds"]:
            for name, columns in run(replace(config, seed=seed), dataset):
                experiments.add(rows, name, columns)
        experiments.show("lw_fedssl", rows, flags["save"])

if __name__ == "__main__":
    main()
