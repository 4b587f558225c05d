"""Does it help if the server trains as well, on images of its own? Server-side calibration.

    python -m experiments.calibration --epochs 60 --at end --rounds 24
    python -m experiments.calibration --epochs 60 --alone              # the control

After Tun et al. 2024 (arXiv 2401.11647, its earlier versions). After averaging, the server, which
has resources and unlabelled images, trains all blocks so far end to end, so that frozen and new
blocks keep fitting together. It is an on_round function. The control is the server's own training
without any client (--alone): most of what calibration gains, it gains alone.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.calibration")

from dataclasses import replace
from functools import partial

import numpy as np
import torch

import data
import fllw
from data import InputError
from experiments import once, parse, show
from fllw import Config, Stage
from ssl_loss import evaluate

SERVER = 2**32 - 1  # the server's number among the clients: what it draws is nobody else's

def divide(config, dataset, share):
    """(the clients' Dataset, the server's): no training image is in both; both keep the tests."""
    n = len(dataset.train_images)
    order = fllw.rng(config, SERVER).permutation(n)
    own, rest = np.split(order, [round(share * n)])
    if len(own) < 2:
        raise InputError(f"the server needs at least 2 images: --server-share {share:g} of {n} is "
                         f"{len(own)}")
    return [dataset._replace(train_images=dataset.train_images[part],
                             train_labels=dataset.train_labels[part])
            for part in (np.sort(rest), own)]

def calibrate(config, images, epochs, at, row, state):
    """An on_round function: after the last round, or after every one, the server trains.

    images: the server's own, uint8 [n, C, H, W]; at: "end" or "round"."""
    if at == "end" and row["round"] < config.rounds:
        return
    present = fllw.stages(config)[row["stage"] - 1].present
    rounds, progress = 1, 0.0  # one cosine over all that the server does
    if at == "round":
        rounds, progress = config.rounds, (row["round"] - 1) / config.rounds
    everything = Stage(1, present, present, rounds)
    ask = fllw.in_turn(replace(config, local_epochs=epochs), images,
                       {SERVER: torch.arange(len(images))})
    for _, answer in ask(everything, row["round"], progress, [(SERVER, state.server)]):
        if fllw.is_valid(answer.upload, state.server):  # what diverged is left out
            state.server |= answer.upload
            row["changed"] = sorted(answer.upload)

def client_costs(config, shape, history):
    """What a client of this history paid: the sums over its rows."""
    ledger = fllw.Ledger(config, shape)
    costs = [ledger.add(row) for row in history]
    return {column: sum(cost[column] for cost in costs) for column in costs[0]}

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.calibration")
    add = parser.add_argument_group("calibration").add_argument
    add("--epochs", type=int, default=60, help="of the server, each time (default: 60)")
    add("--at", choices=("end", "round"), default="end",
        help="after the last round, or after each (default: end)")
    add("--server-share", type=float, default=0.1, help="of the images (default: 0.1)")
    add("--alone", action="store_true", default=False, help="the control: no clients at all")
    given = parse(parser, arguments, seeds="")
    epochs, at, share, alone, name = (
        given.pop(flag) for flag in ("epochs", "at", "server_share", "alone", "save"))
    if not 1 <= epochs <= 100_000:
        raise InputError(f"--epochs must be from 1 to 100000, it is {epochs}")
    if not 0 < share < 1:
        raise InputError(f"--server-share must be between 0 and 1, it is {share}")
    config = Config(**given)
    fllw.validate(config)
    dataset = data.load(config.data, config.cache, config.images)
    clients, server = divide(config, dataset, share)
    row, on_round = f"{fllw.label(config)} + calibration, {epochs} epochs at {at}", None
    if alone:  # the server is the only client then, and nobody calibrates
        config = replace(config, method="e2e", clients=1, clients_per_round=0, rounds=1,
                         local_epochs=epochs)
        row, clients = "the server alone", server
    else:
        on_round = partial(calibrate, config, server.train_images, epochs, at)

    def work(folder, state):
        encoder, history = fllw.train(config, clients, folder, state, on_round=on_round)
        accuracies = evaluate(encoder.to(fllw.pick_device(config)), dataset,
                              fllw.recipe_name(config))
        costs = client_costs(config, dataset.shape, history)
        return accuracies | ({"macs": costs["macs"]} if alone else costs)  # alone, nothing is sent

    experiment = f"calibration {epochs} at {at}, server share {share:g}, alone {alone}"
    rows = {row: once(config, clients, experiment, work)}
    show(rows, name, "calibration")

if __name__ == "__main__":
    fllw.command(main)
