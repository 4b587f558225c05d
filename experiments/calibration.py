"""Server-side calibration (Tun et al. 2024, arXiv 2401.11647, earlier versions).

    python -m experiments.calibration --epochs 60 --at end --rounds 24

After averaging, the server, which has resources and unlabelled images of its own, trains the whole
present sub-model end to end, so that frozen and new blocks keep fitting together. It is an
on_round function. The control is the server's own training alone (--alone): most of what
calibration gains, it gains without any client.
"""
from dataclasses import replace

import numpy as np

import data
import fllw
from fllw import Config, InputError, Stage
from ssl_loss import evaluate

SERVER = 2**32 - 1  # the server's number among the clients, where it trains

def divide(config, dataset, share):
    """(what the clients have, what the server has): Dataset, uint8 [n, C, H, W]."""
    n = len(dataset.train_images)
    order = fllw.rng(config, SERVER).permutation(n)
    own, rest = np.split(order, [round(share * n)])
    if len(own) < 2:
        raise InputError(f"the server needs at least 2 images: --server-share {share:g} of {n} is "
                         f"{len(own)}")
    rest = np.sort(rest)
    clients = dataset._replace(train_images=dataset.train_images[rest],
                               train_labels=dataset.train_labels[rest])
    return clients, dataset.train_images[own]

def calibrate(config, images, epochs, at, row, state):
    """An on_round function: after the last round, or after every one, the server trains."""
    if at == "end" and row["round"] < config.rounds:
        return
    present = tuple(row["present_blocks"])
    stage = Stage(1, present, present, 1 if at == "end" else config.rounds)
    progress = 0.0 if at == "end" else (row["round"] - 1) / config.rounds
    one = replace(config, local_epochs=epochs)
    device = next(iter(state.server.values())).device
    tensors, _ = fllw.local_train(one, stage, state.server, images.to(device), row["round"], SERVER,
                                  progress)
    if fllw.sound(tensors, state.server):  # what diverged is left out
        state.update(tensors)

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.calibration")
    parser.add_argument("--epochs", type=int, default=60, help="of the server, each time")
    parser.add_argument("--at", choices=("end", "round"), default="end")
    parser.add_argument("--server-share", type=float, default=0.1, help="of the images")
    parser.add_argument("--alone", action="store_true", help="the control: no clients at all")
    given = vars(parser.parse_args())
    epochs, at, share = (given.pop(name) for name in ("epochs", "at", "server_share"))
    alone = given.pop("alone", False)
    config = Config(**given)
    fllw.check(config)
    if epochs < 1 or not 0 < share < 1:
        raise InputError("--epochs must be at least 1, and --server-share between 0 and 1")
    dataset = data.load(config.data, config.cache, config.images)
    clients, own = divide(config, dataset, share)
    if alone:
        config = replace(config, method="e2e", clients=1, rounds=1, local_epochs=epochs)
        clients = dataset._replace(train_images=own, train_labels=dataset.train_labels[:len(own)])
    experiment = f"calibration {epochs} at {at}, server share {share:g}, alone {alone}"

    def on_round(row, state):
        if not alone:
            calibrate(config, own, epochs, at, row, state)

    with fllw.run_folder(config, clients, experiment) as (folder, state):
        encoder, history = fllw.train(config, clients, folder, state, on_round)
        row = evaluate(encoder, dataset, fllw.recipe(config)) | {
            "macs": sum(row["macs"] for row in history),
            "upload_bytes": sum(row["upload_bytes"] for row in history),
            "download_bytes": sum(row["download_bytes"] for row in history)}
        print(fllw.table({fllw.label(config) + (" (server alone)" if alone else ""): row}))

if __name__ == "__main__":
    fllw.command(main)
