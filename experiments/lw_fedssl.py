"""Do LW-FedSSL's two mechanisms help: alignment of the clients, and calibration by the server?

    python -m experiments.lw_fedssl

Alignment brings nothing, for a quarter more compute. Calibration brings 4 to 8 points, but the
server alone, on its tenth of the images, gets most of that.

After Tun et al. 2024 (arXiv 2401.11647), whose fourth version has neither. Alignment: a client's
second NT-Xent pulls the projection of a view towards the received model's projection of the other
view. Calibration: after averaging, the server trains all blocks so far end to end, on unlabelled
images of its own, so that they keep fitting together. Its control is the server's training without
any client. What differs: the size; the server has a share of the training images."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

import data
import experiments
import fllw
from experiments.objectives import step_with_targets
from ssl_loss import evaluate, nt_xent

FIXED = ("method", "micro_batch", "amp", "out")
SERVER = 2**32 - 1  # the server's number among the clients: what it draws is nobody else's
SERVER_EPOCHS = 4   # passes of the server over its images, after each round

class Aligned(fllw.Config):
    def macs(self, stage, kept, image_shape):
        """Also the received model's forward pass: what micro-batches add, and a head."""
        head = self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        return fllw.count_macs(replace(self, micro_batch=1), stage, kept, image_shape) + 2 * head

def aligned(z, received, temperature):
    """NT-Xent of two views, and of each with the received model's other one. Both [2B, D]."""
    (z1, z2), (old1, old2) = z.chunk(2), received.chunk(2)
    pull = nt_xent(z1, old2, temperature) + nt_xent(z2, old1, temperature)
    return nt_xent(z1, z2, temperature) + pull / 2

def aligned_train(config, stage, message, images, round_number, client):
    """A client's work: fllw.local_train() with alignment."""
    step = step_with_targets(aligned, momentum=1)  # the targets' model stays as it was received
    return fllw.local_train(config, stage, message, images, round_number, client, step)

def divide(config, dataset):
    """(a Dataset for the clients, a tenth of the images for the server): no image is in both."""
    n = len(dataset.train_images)
    own, rest = np.split(fllw.rng(config, SERVER).permutation(n), [max(2, n // 10)])
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

def rows_of(config, dataset):
    """The rows of the table with one seed: yields (name, columns)."""
    theirs, own = divide(config, dataset)
    clients = data.split(theirs, config.clients, config.alpha, config.seed)
    server = replace(config, local_epochs=SERVER_EPOCHS)
    for name, row, train_client, on_round in (
            ("FLL", config, fllw.local_train, None),
            ("FLL + alignment", Aligned(**vars(config)), aligned_train, None),
            ("FLL + calibration", config, fllw.local_train, calibration(server, own))):
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
    defaults = fllw.Config(images=1000, rounds=16, depth_dropout=0.0)
    experiments.command("lw_fedssl", __doc__, defaults, FIXED, rows_of, arguments)

if __name__ == "__main__":
    main()
