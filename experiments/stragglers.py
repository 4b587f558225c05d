"""Slow devices and a deadline: who learns most when stragglers may send the layers they finished?

    python -m experiments.stragglers --split dirichlet

SALF (Lang et al. 2024, arXiv 2403.18375): a layer's mean is over those who reached it in time,
going back from the last layer; its step is divided by 1 - p, where p is the chance that nobody did.
Its code (github langnatalie/SALF) has no such factor: unreached layers count as received. The paper
cuts one step of SGD: here a straggler trains for all its steps with the layers below its depth
frozen, which saves the time. The embedding goes with block 0, final norm and head with the last.

Speeds are log-uniform, fixed for a run (then p is 0 or 1, and the paper's rule is the plain mean),
or with --redraw new in every round, as the paper's depths are. The slower a fixed device, the
smaller the mean label of its images. A round ends at the deadline, or when all are done; a row has
about as many rounds as fit into --rounds x deadline seconds. SALF has nothing to cut in FLL's
stages, which train one block, but in progressive ones, which train blocks 1 to s."""
import functools
import itertools
import math
from dataclasses import replace

import data
import fllw
from experiments import add, once, settings, show
from ssl_loss import COLUMNS, features, knn

SPEEDS, RATIO = 300, 16  # what its draws are for; the fastest device's speed by the slowest's
SLOWEST = 3.5e7          # multiply-accumulates a second: 16 s for all blocks by default
ROWS = {  # name: (changes of the settings, which are end to end; what becomes of stragglers)
    "end to end, waiting": ({}, "wait"), "end to end, dropping": ({}, "drop"),
    "SALF": ({}, "salf"), "SALF, released rule": ({}, "salf code"),
    "SALF, progressive": ({"method": "progressive"}, "salf"),
    "FLL, dropping": ({"method": "fll"}, "drop"),
    "FLL + FDD, dropping": ({"method": "fll", "depth_dropout": 0.25}, "drop"),
    "one block, dropping": ({"depth": 1}, "drop")}
COLUMNS = {"rounds": ("rounds", 1, 0), "simulated_seconds": ("simulated s", 1, 0),
           "counted": ("counted %", 1, 0), **COLUMNS}

def nearest(encoder, dataset):
    """Accuracies in % by k-NN alone: probes would take as long as the training."""
    train, images = features(encoder, dataset.train_images), dataset.test_images
    return {name: knn(train, dataset.train_labels, features(encoder, part), dataset.test_labels)
            for name, part in (("knn", images), ("moved_knn", data.moved(images, "digits")))}

def cut(stage, depth):
    """The stage of a client that trains only the last `depth` of the active blocks."""
    return replace(stage, active=stage.active[-depth:])

def counted(rule, upload, received, stage, p):
    """What the server averages of a client's upload, given the tensors that it had received.
    p: depth -> the chance that nobody trains so many of the last active blocks."""
    if rule == "salf code":  # what a straggler did not reach counts as it was
        return {name: t for name, t in (received | upload).items() if stage.trains(name)}
    if rule == "salf":  # the mean of all w + step / (1 - p) is w + mean step / (1 - p)
        needed = {name: min(d for d in p if cut(stage, d).trains(name)) for name in upload}
        return {name: received[name] + (tensor - received[name]) / (1 - p[needed[name]])
                for name, tensor in upload.items()}
    return upload

class Devices:
    """Who finishes what by the deadline (seconds). rule: "wait" for stragglers, "drop" them, or let
    their last layers count, as SALF's paper does ("salf"), or its code ("salf code")."""
    def __init__(self, config, dataset, deadline, rule, redraw=False):
        self.config, self.shape, self.rule, self.redraw = config, dataset.shape, rule, redraw
        self.deadline = math.inf if rule == "wait" else deadline
        parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
        self.labels = [dataset.train_labels[part].double() for part in parts]
        self.order = sorted(range(len(parts)), key=lambda client: self.labels[client].mean())

    def on_slowest(self, stage, round_number, client):
        """{depth that counts: seconds that it would take on the slowest device there can be}."""
        kept = fllw.sample_kept_blocks(self.config, stage, round_number, client)
        images, whole = self.config.local_epochs * len(self.labels[client]), len(stage.active)
        return {depth: images * self.config.macs(cut(stage, depth), kept, self.shape) / SLOWEST
                for depth in range(1 if "salf" in self.rule else whole, whole + 1)}

    def finished(self, stage, round_number, clients):
        """({client: how many of the last active blocks it trains; 0: lost}, the round's seconds)"""
        draws = fllw.rng(self.config, SPEEDS, round_number * self.redraw).random(len(self.order))
        draws = dict(zip(self.order, draws if self.redraw else sorted(draws)))
        depths, longest = {}, 0.0
        for client in clients:
            times = {depth: seconds / RATIO ** draws[client] for depth, seconds
                     in self.on_slowest(stage, round_number, client).items()}
            depths[client] = max((d for d in times if times[d] <= self.deadline), default=0)
            longest = max(longest, *times.values())
        return depths, min(longest, self.deadline)

    def unreached(self, stage, round_number, clients):
        """{depth: p}. Clients are independent, log speeds uniform. Fixed devices reach a layer
        always or never: p is 0, or it is 1 and there is nothing to correct."""
        def too_slow(seconds):  # the chance that a device is
            return min(math.log(max(seconds / self.deadline, 1), RATIO), 1) * self.redraw
        times = [self.on_slowest(stage, round_number, client) for client in clients]
        return {depth: math.prod(too_slow(each[depth]) for each in times) for depth in times[0]}

    def ask(self, reach, stage, round_number, progress, messages):
        """An `ask` of federate(); reach: one in which no client is late."""
        messages = dict(messages)
        depths, _ = self.finished(stage, round_number, messages)
        streams = [reach(cut(stage, depth), round_number, progress,
                         [pair for pair in messages.items() if depths[pair[0]] == depth])
                   for depth in sorted({*depths.values()} - {0})]
        by_turns = itertools.chain(*itertools.zip_longest(*streams))  # so that no worker waits
        answers, p = dict(filter(None, by_turns)), self.unreached(stage, round_number, messages)
        for client in filter(depths.get, messages):  # in the order asked
            upload = counted(self.rule, answers[client].upload, messages[client], stage, p)
            yield client, answers[client]._replace(upload=upload)

    def clock(self, rows):
        """The first columns of a table, from the rows of a history."""
        stages = {stage.number: stage for stage in fllw.stages(self.config)}
        done = [self.finished(stages[row["stage"]], row["round"], row["clients"]) for row in rows]
        in_time = [depth > 0 for depths, _ in done for depth in depths.values()]
        return {"rounds": len(rows), "simulated_seconds": sum(seconds for _, seconds in done),
                "counted": 100 * sum(in_time) / len(in_time)}

def measure(config, dataset, name, deadline, redraw, reach):
    """Train and evaluate one row with one seed: its columns."""
    devices = Devices(config, dataset, deadline, ROWS[name][1], redraw)
    rate = config.rounds * deadline / devices.clock(fllw.planned_rows(config))["simulated_seconds"]
    config = replace(config, rounds=max(int(rate * config.rounds), len(fllw.stages(config))))
    def work(folder, state):
        ask = functools.partial(devices.ask, reach)
        encoder, history = fllw.train(config, dataset, folder, state, ask=ask)
        return devices.clock(history) | nearest(encoder, dataset)
    return once(config, dataset, f"stragglers {name}, {deadline:g} s{', redrawn' * redraw}", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.stragglers")
    parser.add_argument("--deadlines", nargs="+", type=float, default=[8, 4, 2], help="seconds")
    parser.add_argument("--redraw", action="store_true", default=False, help="speeds, each round")
    defaults = fllw.Config(images=600, dim=32, heads=4, head_hidden=64, head_dim=32, lr=8e-3,
                           clients=6, rounds=15, batch_size=50, depth_dropout=0.0,
                           out="runs/stragglers")
    config, flags = settings(parser, arguments, defaults, {"method", "depth_dropout", "seed"},
                             splits=("iid", "dirichlet"))
    if not all(0 < deadline < math.inf for deadline in flags["deadlines"]):
        raise data.InputError("--deadlines must be above 0 seconds")
    dataset, table = data.load(config.data, config.cache, config.images), {}
    for seed in flags["seeds"]:
        with fllw.reach_clients(replace(config, seed=seed), dataset) as reach:  # for all rows
            for deadline, name in itertools.product(flags["deadlines"], ROWS):
                folder = f"{config.out}/{deadline:g}s-{name.replace(' ', '-')}-seed{seed}"
                one = replace(config, seed=seed, out=folder, **{"method": "e2e"} | ROWS[name][0])
                columns = measure(one, dataset, name, deadline, flags["redraw"], reach)
                add(table, f"{deadline:g} s: {name}", columns)
    show(table, flags["save"], "stragglers", COLUMNS)

if __name__ == "__main__":
    fllw.command(main)
