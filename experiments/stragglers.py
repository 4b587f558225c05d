"""Slow devices and a deadline: who learns most when stragglers send the layers they finished?

    python -m experiments.stragglers --alpha 0.1

One block: it has the best mean k-NN at every deadline. FLL's clients are in time more often than
end-to-end ones, but are not clearly ahead of them; SALF leads FLL with IID splits at 8 and 4 s.

SALF (Lang et al. 2024, arXiv 2403.18375): gradients come from the last layer down, so a client that
the deadline stops has those of its last layers, and sends these. A layer's mean is over the clients
that sent it; its step is divided by 1 - p, where p is the chance that nobody does. The released
code (github langnatalie/SALF) divides nothing and counts a layer not reached as received. The paper
cuts one step of SGD; here a straggler trains for all its steps with lower layers frozen,
which saves it the time. Speeds are log-uniform; they stay for a run or change every round. A row
has about as many rounds as fit into --rounds x deadline seconds."""
from dataclasses import replace
from itertools import product

import numpy as np

import data
import experiments
import fllw
from ssl_loss import evaluate

SPEEDS, RATIO = 300, 16  # what its draws are for; the fastest device's speed by the slowest's
SLOWEST = 3.5e7          # multiply-accumulates a second: 16 s for a round of all blocks by default
ROWS = {  # name: (changes of the settings, which are end to end; what becomes of stragglers)
    "end to end, waiting": ({}, "wait"), "end to end, dropping": ({}, "drop"),
    "SALF": ({}, "salf"), "SALF, released rule": ({}, "salf code"),
    "SALF, progressive": ({"method": "progressive"}, "salf"),
    "one block, dropping": ({"depth": 1}, "drop"), "FLL, dropping": ({"method": "fll"}, "drop"),
    "FLL + FDD, dropping": ({"method": "fll", "depth_dropout": 0.25}, "drop")}
COLUMNS = {"rounds": ("rounds", 1, 0), "counted": ("counted %", 1, 0), **experiments.SHOWN}

def cut(stage, depth):
    """The stage of a client that trains only the last `depth` of its blocks."""
    return replace(stage, first=stage.stop - depth)

class Devices:
    """Clients and a deadline in seconds. rule: "wait" for stragglers, "drop" them, or count their
    last layers as in the paper ("salf") or in its code ("salf code")."""
    def __init__(self, config, clients, deadline, rule, redraw=False):
        self.config, self.clients, self.rule, self.redraw = config, clients, rule, redraw
        self.deadline = np.inf if rule == "wait" else deadline

    def race(self, stage, round_number):
        """A round: {client: how many of its last blocks it trains; 0: it is late}, {so many: p}
        with p the chance that nobody trains so many, and the seconds that the round takes."""
        config, chosen, slowest = self.config, fllw.sample_clients(self.config, round_number), []
        depths = range(1, stage.stop - stage.first + 1)
        for client in chosen:
            images = self.clients[client]
            kept = fllw.sample_kept_blocks(config, stage, round_number, client)
            macs = [config.macs(cut(stage, depth), kept, images.shape[1:]) for depth in depths]
            slowest.append(np.array(macs) * config.local_epochs * len(images) / SLOWEST)
        slowest = np.array(slowest)  # seconds that the slowest device needs, [clients, depths]
        draws = fllw.rng(config, SPEEDS, round_number * self.redraw).random(config.clients)
        seconds = slowest / RATIO ** draws[chosen, None]
        in_time = (seconds <= self.deadline).sum(1)  # more blocks take longer
        if "salf" not in self.rule:  # all blocks or none
            in_time[in_time < len(depths)] = 0

        # A device that stays is late always or never: p is 0, or it is 1 and nothing is divided.
        late = np.log(np.maximum(slowest / self.deadline, 1)) / np.log(RATIO) * self.redraw
        p = dict(zip(depths, late.clip(max=1).prod(0)))  # clients are independent
        return dict(zip(chosen, in_time.tolist())), p, min(self.deadline, seconds.max())

    def train_client(self, config, stage, message, images, round_number, client):
        """fllw.local_train() of what a client finishes in time, as the server will count it."""
        depths, p, _ = self.race(stage, round_number)
        if depths[client] == 0:
            return None
        upload, losses, count = fllw.local_train(config, cut(stage, depths[client]), message,
                                                 images, round_number, client)
        if self.rule == "salf code":  # a layer that it did not reach counts as it was
            upload = {name: message[name] for name in message if stage.trains(name)} | upload
        if self.rule == "salf":  # the mean of all w + step / (1 - p) is w + mean step / (1 - p)
            for name, tensor in upload.items():
                needed = min(depth for depth in p if cut(stage, depth).trains(name))
                upload[name] = message[name] + (tensor - message[name]) / (1 - p[needed])
        return upload, losses, count

    def clock(self, config):
        """The first columns of a table, for a run of these settings."""
        races = [self.race(stage, number)
                 for stage in fllw.stages(config) for number in stage.rounds]
        in_time = [depth > 0 for depths, _, _ in races for depth in depths.values()]
        return {"rounds": len(races), "simulated_seconds": sum(seconds for *_, seconds in races),
                "counted": 100 * np.mean(in_time)}

def measure(config, dataset, deadline, rule, redraw):
    """Train and evaluate a row with one seed: its columns."""
    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    devices = Devices(config, clients, deadline, rule, redraw)
    share = config.rounds * deadline / devices.clock(config)["simulated_seconds"]
    config = replace(config, rounds=max(int(share * config.rounds), len(fllw.stages(config))))
    state = fllw.federate(config, clients, train_client=devices.train_client)
    encoder = fllw.encoder_of(config, state.server, dataset.shape)
    return devices.clock(config) | evaluate(encoder, dataset, data.recipe_name(config))

def main(arguments=None):
    parser, table = experiments.make_parser("stragglers", __doc__), {}
    parser.add_argument("--deadlines", nargs="+", type=float, default=[8, 4, 2], help="seconds")
    parser.add_argument("--redraw", action="store_true", default=False, help="speeds, each round")
    with data.sentences(parser):
        defaults = fllw.Config(images=600, dim=32, heads=4, head_hidden=64, head_dim=32, lr=8e-3,
                               method="e2e", clients=6, rounds=15, batch_size=50, depth_dropout=0.0)
        fixed = ("method", "depth_dropout", "out")
        config, flags = experiments.settings(defaults, vars(parser.parse_args(arguments)), fixed)
        fllw.validate(config)
        if not all(0 < deadline < np.inf for deadline in flags["deadlines"]):
            raise data.InputError("--deadlines must be above 0 seconds")
        dataset = data.load(config.data, config.cache, config.images)._replace(train_clients=None)
        for seed, deadline, name in product(flags["seeds"], flags["deadlines"], ROWS):
            changes, rule = ROWS[name]
            one = replace(config, seed=seed, **changes)
            columns = measure(one, dataset, deadline, rule, flags["redraw"])
            experiments.add(table, f"{deadline:g} s: {name}", columns)
        experiments.show("stragglers", table, flags["save"], COLUMNS)

if __name__ == "__main__":
    main()
