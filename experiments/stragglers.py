"""Slow devices and a deadline: who learns most when stragglers may send the layers they finished?

    python -m experiments.stragglers --split dirichlet --deadlines 8 4 2 --seeds 0 1 2

SALF (Lang, Cohen, Shlezinger 2024, arXiv 2403.18375): a layer's mean is over those who reached it
by the deadline, going back from the last layer, and its step is divided by 1 - p, where p is the
chance that nobody did. Its code (github langnatalie/SALF) has no such factor: unreached layers are
averaged as received. Both rules are here. The paper stops one step of SGD and does not say how to
stop several: here a straggler trains for all its steps with the layers below its depth frozen,
which saves it the time. A layer is a block; embedding, and norm and head, go with first and last.

Speeds are log-uniform, and fixed for a run: then p is 0 or 1, and the paper's rule is a plain mean.
The slower a device, the smaller the mean label of its images (with --split iid it hardly differs).
With --redraw, each round draws all speeds, as the paper draws depths; p follows from that. A round
ends at the deadline, or when all have done everything. A row has about as many rounds as fit into
--rounds x deadline seconds. A stage of FLL trains one block, so SALF has nothing to cut there; it
has on progressive stages, which train blocks 1 to s.
"""
import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np

import data
import fllw
from data import InputError, friendly_errors
from experiments.compare import save
from ssl_loss import evaluate

SETTING = {"images": 1000, "dim": 32, "heads": 4, "head_hidden": 64, "head_dim": 32, "lr": 8e-3,
           "clients": 10, "rounds": 24, "batch_size": 50, "depth_dropout": 0.0}
SPEEDS = 300                # what its draws are for
SLOWEST, RATIO = 3.4e7, 16  # multiply-accumulates a second; how many times as fast the fastest is
ROWS = {  # name: (changes of the settings, what becomes of stragglers)
    "end to end, waiting": ({"method": "e2e"}, "wait"),
    "end to end, dropping": ({"method": "e2e"}, "drop"),
    "SALF": ({"method": "e2e"}, "salf"),
    "SALF, released rule": ({"method": "e2e"}, "fill"),
    "SALF, progressive": ({"method": "progressive"}, "salf"),
    "FLL, dropping": ({"method": "fll"}, "drop"),
    "FLL + FDD, dropping": ({"method": "fll", "depth_dropout": 0.25}, "drop"),
    "one block, dropping": ({"method": "e2e", "depth": 1}, "drop")}
COLUMNS = {"rounds": ("rounds", 1, 0), "simulated_seconds": ("simulated s", 1, 0),
           "counted": ("counted %", 1, 0), **fllw.COLUMNS}

def cut(stage, depth):
    """The stage of a client that trains only the last `depth` of the active blocks."""
    return replace(stage, active=stage.active[-depth:])

def correct(upload, received, stage, p):
    """The paper's rule: the mean of uploads w + step / (1 - p) is w + (mean of steps) / (1 - p).
    p: depth -> the chance that nobody trains so many of the last active blocks."""
    depth = {name: min(d for d in p if cut(stage, d).trains(name)) for name in upload}
    return {name: received[name] + (tensor - received[name]) / (1 - p[depth[name]])
            for name, tensor in upload.items()}

def fill(upload, received, stage):
    """The released code's rule: what a straggler did not reach, it sends as it received it."""
    return {name: t for name, t in (received | upload).items() if stage.trains(name)}

class Devices:
    """Who finishes what by the deadline, in seconds. rule: "wait" for stragglers, "drop" them, or
    take the layers that they finished, as in SALF's paper ("salf") or code ("fill")."""
    def __init__(self, config, dataset, deadline, rule, redraw=False):
        self.config, self.shape, self.rule, self.redraw = config, dataset.shape, rule, redraw
        self.deadline = math.inf if rule == "wait" else deadline
        parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
        self.sizes = [len(part) for part in parts]
        self.order = np.argsort([dataset.train_labels[part].double().mean() for part in parts])

    def on_slowest(self, stage, depth, kept, client):
        """Seconds that the client's round would take on the slowest device there can be."""
        macs = self.config.macs(cut(stage, depth), kept, self.shape)
        return self.config.local_epochs * self.sizes[client] * macs / SLOWEST

    def finished(self, stage, round_number, kept):
        """({client: how many of the last active blocks it trains; 0: it is lost}, seconds of the
        round). kept: client -> its blocks."""
        draws = fllw.rng(self.config, SPEEDS, *[round_number] * self.redraw)
        speeds = RATIO ** draws.random(self.config.clients)
        if not self.redraw:
            speeds[self.order] = np.sort(speeds)
        whole, depths, slowest = len(stage.active), {}, 0.0
        for client, blocks in kept.items():
            possible = range(1, whole + 1) if self.rule in ("salf", "fill") else [whole]
            seconds = {depth: self.on_slowest(stage, depth, blocks, client) / speeds[client]
                       for depth in possible}
            depths[client] = max((d for d in possible if seconds[d] <= self.deadline), default=0)
            slowest = max(slowest, seconds[whole])
        return depths, min(slowest, self.deadline)

    def unreached(self, stage, kept):
        """p of every depth: clients are independent, the logarithm of a speed is uniform. A fixed
        device reaches a layer always or never: p is 0, or it is 1 and nothing is sent."""
        p = dict.fromkeys(range(1, 1 + len(stage.active)), 0.0)
        for depth in p if self.redraw else ():
            needed = [self.on_slowest(stage, depth, kept[c], c) / self.deadline for c in kept]
            p[depth] = math.prod(min(max(math.log(x, RATIO), 0), 1) for x in needed)
        return p

    def ask(self, reach, stage, round_number, progress, messages):
        """An `ask` of federate(); reach: one in which no client is late."""
        messages, groups = dict(messages), {}
        kept = {client: {fllw.block_of(name) for name in message} - {None}
                for client, message in messages.items()}
        depths, _ = self.finished(stage, round_number, kept)
        for client in filter(depths.get, messages):  # those that trained something
            groups.setdefault(depths[client], []).append((client, messages[client]))
        streams = [reach(cut(stage, depth), round_number, progress, group)
                   for depth, group in groups.items()]
        by_turns = itertools.chain(*itertools.zip_longest(*streams))  # so that no worker waits
        answers, p = dict(filter(None, by_turns)), self.unreached(stage, kept)
        for client in filter(depths.get, messages):  # in the order asked
            upload = answers[client].upload
            if self.rule == "salf":
                upload = correct(upload, messages[client], stage, p)
            if self.rule == "fill":
                upload = fill(upload, messages[client], stage)
            yield client, answers[client]._replace(upload=upload)

    def clock(self, rows):
        """The first columns of a table, from the rows of a history."""
        stages = {stage.number: stage for stage in fllw.stages(self.config)}
        kept = [dict(zip(row["clients"], row["kept_blocks"])) for row in rows]
        done = [self.finished(stages[row["stage"]], row["round"], blocks)
                for row, blocks in zip(rows, kept)]
        counted = [depth > 0 for depths, _ in done for depth in depths.values()]
        return {"rounds": len(rows), "simulated_seconds": sum(seconds for _, seconds in done),
                "counted": 100 * float(np.mean(counted))}

def measure(name, config, dataset, devices, rounds, reach):
    """Train one row with one seed, or read it back: its columns."""
    config = replace(config, rounds=rounds)
    experiment = f"stragglers {name}, {devices.deadline:g} s" + ", redrawn" * devices.redraw
    with fllw.run_folder(config, dataset, experiment) as (folder, state):
        summary = folder / "summary.json"
        if not summary.exists():
            ask = lambda *arguments: devices.ask(reach, *arguments)
            encoder, history = fllw.train(config, dataset, folder, state, ask=ask)
            row = devices.clock(history) | evaluate(encoder, dataset, fllw.recipe_name(config))
            fllw.write(summary, row)
        with friendly_errors(f"{summary} is damaged", "delete it, and rerun the command"):
            return {column: float(x) for column, x in json.loads(summary.read_text()).items()}

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.stragglers")
    mine = parser.add_argument_group("stragglers")
    mine.add_argument("--deadlines", nargs="+", type=float, default=[8, 4, 2], help="seconds")
    mine.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="instead of --seed")
    mine.add_argument("--split", choices=("iid", "dirichlet"), default="iid", help="alpha 0 or 0.1")
    mine.add_argument("--redraw", action="store_true", default=False, help="speeds, every round")
    mine.add_argument("--save", default="", help="also keep the table in experiments/results/")
    given = SETTING | vars(parser.parse_args(arguments))
    deadlines, seeds, split, redraw, saved_as = [given.pop(key) for key in (
        "deadlines", "seeds", "split", "redraw", "save")]
    ...
