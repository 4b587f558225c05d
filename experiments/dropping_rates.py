"""Does depth dropout cost less, if not every frozen block is dropped alike? Other rules.

    python -m experiments.dropping_rates --rounds 48 --depth-dropout 0.5

On average over a run, every rule drops as many blocks as *uniform*, plain depth dropout, so all
cost the same compute. *Rising*: a block's rate is in proportion to its number, the linear rule of
Huang et al. 2016 (arXiv 1603.09382). *Falling*: the other way round. *Early*: a higher rate, but
nothing is dropped in the last quarter of a stage. *Uniform, scaled*: in evaluation, a frozen block
adds its part times the chance that it was kept, as Huang et al. do. A rule is an `ask` function: it
takes blocks out of the messages. A quarter of the training images is held out to judge by; no test
image is used.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.dropping_rates")

from dataclasses import replace

from torch import nn

import data
import fllw
from data import InputError
from experiments import add, compare, once, settings, show
from fllw import Config
from ssl_loss import evaluate

RULES = ("none", "uniform", "rising", "falling", "early")

def rates(rule, config, progress):
    """For each block but the last, the chance that it is dropped while it is frozen. progress: the
    share of the stage's rounds that is done."""
    p, below = config.depth_dropout, config.depth - 1
    if rule == "none":
        return [0.0] * below
    if rule == "early":
        return [p / 0.75 if progress < 0.75 else 0.0] * below
    weights = {"uniform": [1] * below, "rising": range(1, below + 1),
               "falling": range(below + 1, 1, -1)}[rule]
    frozen = range(below, 0, -1)  # in how many stages a block is frozen
    mean = sum(w * n for w, n in zip(weights, frozen)) / sum(frozen)
    return [p * w / mean for w in weights]

def keep(rule, config, stage, round_number, client, progress):
    """As fllw.sample_kept_blocks(), from the same draws, but with the rates of a rule."""
    draws = fllw.rng(config, fllw.DROPOUT, round_number, client).random(len(stage.frozen))
    chances = rates(rule, config, progress)
    dropped = [b for b, u in zip(stage.frozen, draws) if u < chances[b]]
    return tuple(b for b in stage.present if b not in dropped)

def thinning(ask, rule, config):
    """The `ask` that drops blocks by a rule before it calls another one."""
    def thinned(stage, round_number, progress, messages):
        fewer = ((client, fllw.broadcast(message, keep(rule, config, stage, round_number, client,
                                                       progress)))
                 for client, message in messages)
        return ask(stage, round_number, progress, fewer)
    return thinned

class Scaled(nn.Module):
    """A block that adds `share` of what it adds otherwise."""
    def __init__(self, block, share):
        super().__init__()
        self.block, self.share = block, share

    def forward(self, x):
        return x + self.share * (self.block(x) - x)

def measure(rule, config, dataset):
    """Rows {name: columns} of a rule with one seed, and for "uniform" of its scaled evaluation."""
    whole = replace(config, depth_dropout=0.0)  # federate() sends all: the rule drops

    def note(row, state):  # what was dropped, for the Ledger
        stage, progress = fllw.stage_progress(fllw.stages(config), row["round"] - 1)
        row["kept_blocks"] = [list(keep(rule, config, stage, row["round"], client, progress))
                              for client in row["clients"]]

    def work(folder, state):
        with fllw.reach_clients(whole, dataset) as ask:
            encoder, history = fllw.train(whole, dataset, folder, state, on_round=note,
                                          ask=thinning(ask, rule, config))
        ledger = fllw.Ledger(whole, dataset.shape)
        macs = {"macs": sum(ledger.add(row)["macs"] for row in history)}
        encoder, recipe = encoder.to(fllw.pick_device(config)), fllw.recipe_name(config)
        rows = {rule: evaluate(encoder, dataset, recipe) | macs}
        if rule == "uniform":
            for b in range(config.depth - 1):
                encoder.blocks[b] = Scaled(encoder.blocks[b], 1 - config.depth_dropout)
            rows["uniform, scaled"] = evaluate(encoder, dataset, recipe) | macs
        return rows

    return once(config, dataset, f"dropping_rates {rule}", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.dropping_rates")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    defaults = Config(rounds=48, depth_dropout=0.5, out="runs/dropping-rates")
    config, flags = settings(parser, arguments, defaults, {"method", "blocks_per_stage", "seed"})
    if config.depth < 2:
        raise InputError("--depth must be 2 or more: a single block is never frozen")
    for rule in flags["rules"]:
        if max(rates(rule, config, 0)) > 1:
            raise InputError(f"--depth-dropout {config.depth_dropout} is too high: {rule} would "
                             f"drop a block with a chance of {max(rates(rule, config, 0)):.2f}")
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    held_out = compare.hold_out(dataset)
    for seed in flags["seeds"]:
        for rule in flags["rules"]:
            one = replace(config, seed=seed, out=f"{config.out}/{rule}-seed{seed}")
            for name, columns in measure(rule, one, held_out).items():
                add(rows, name, columns)
    show(rows, flags["save"], "dropping_rates")
    print(f"{len(held_out.test_images):,} held-out training images, seeds {flags['seeds']}")

if __name__ == "__main__":
    fllw.command(main)
