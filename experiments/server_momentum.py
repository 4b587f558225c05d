"""Does the server gain by keeping up the direction of earlier rounds? Momentum and FedAdam.

    python -m experiments.server_momentum --rows fll one-block-compute --servers plain momentum-0.5

FedAvg puts the mean of the clients in place of the model. With momentum (Hsu et al. 2019, arXiv
1909.06335) the server takes the change that the mean brought as a gradient, and takes a step of its
own; FedAdam (Reddi et al. 2021, 2003.00295) takes one of Adam. Clients do the same, and no byte is
added: it is an on_round function. Rows are those of experiments.compare, with its flags. A quarter
of the training images is held out to judge by; no test image is used.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.server_momentum")

from dataclasses import replace
from functools import partial
from pathlib import Path

import data
import fllw
from experiments import add, compare, once, show
from ssl_loss import evaluate

def momentum(beta, change, moments):
    """Returns (step, moments): a step is the change and beta times the step before it."""
    step = change if moments is None else change + beta * moments
    return step, step

def fedadam(rate, change, moments):
    """Returns (step, moments), as in the paper's algorithm 2, with its 0.9, 0.99 and 0.001."""
    first, second = moments or (0, 0)
    first, second = 0.9 * first + 0.1 * change, 0.99 * second + 0.01 * change.square()
    return rate * first / (second.sqrt() + 1e-3), (first, second)

SERVERS = {"plain": None, "fedadam-0.01": partial(fedadam, 0.01),
           "fedadam-0.03": partial(fedadam, 0.03)}
for beta in (0.3, 0.5, 0.7, 0.9):
    SERVERS |= {f"momentum-{beta}{anew}": partial(momentum, beta) for anew in ("", "-anew")}

class Server:
    """An on_round function that steps from what the clients received. anew: whether every stage
    forgets the moments of the one before it."""
    def __init__(self, config, shape, rule, anew=False):
        self.config, self.shape, self.rule, self.anew = config, shape, rule, anew
        self.stage, self.received, self.moments = None, {}, {}

    def __call__(self, row, state):
        stage = fllw.stages(self.config)[row["stage"] - 1]
        fllw.grow(self.config, self.received, stage, self.shape)  # as federate() has done
        if self.anew and stage != self.stage:
            self.moments = {}
        for name, before in self.received.items():
            if state.server[name] is not before:
                change = state.server[name] - before
                step, self.moments[name] = self.rule(change, self.moments.get(name))
                state.server[name] = before + step
                row["changed"].append(name)
        self.stage, self.received = stage, dict(state.server)

def measure(key, server, row, dataset, out):
    """Accuracies of a row of experiments.compare with one seed and this server. A run that was cut
    off starts again: the moments are in no checkpoint."""
    row = replace(row, out=str(out / f"{key}-{server}-seed{row.seed}"))

    def work(folder, state):
        on_round = None
        if SERVERS[server]:
            on_round = Server(row, dataset.shape, SERVERS[server], server.endswith("-anew"))
        print(f"{fllw.label(row)}, {row.rounds} rounds, {server}, seed {row.seed}", flush=True)
        with fllw.reach_clients(row, dataset) as ask:
            encoder, _ = fllw.federate(row, dataset, ask=ask, on_round=on_round)
        return evaluate(encoder.to(fllw.pick_device(row)), dataset, fllw.recipe_name(row))

    return once(row, dataset, f"server_momentum {key} {server}", work)

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.server_momentum")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, metavar="SERVER",
                        default=["plain", "momentum-0.5"], help=" ".join(SERVERS))
    keys = [*compare.variants(fllw.Config()), *compare.MATCHED]
    config, flags = compare.arguments(parser, keys, "fll one-block-compute")
    dataset = compare.hold_out(data.load(config.data, config.cache, config.images))
    out = Path(config.out or f"runs/server-{Path(config.data).stem}").expanduser()
    plan, rows = compare.settings_of(flags, config, dataset, out), {}
    for seed in flags["seeds"]:
        for key in flags["rows"]:
            for server in flags["more"]["servers"]:
                columns = measure(key, server, replace(plan[key], seed=seed), dataset, out)
                add(rows, f"{compare.name_of(key, plan[key], config)}, {server}", columns)
    show(rows, flags["save"], "server_momentum")
    print(f"{len(dataset.test_images):,} held-out training images, seeds {flags['seeds']}")

if __name__ == "__main__":
    fllw.command(main)
