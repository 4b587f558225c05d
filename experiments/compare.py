"""Methods side by side over seeds, each with the control that could refute it.

    python -m experiments.compare --rows raw one-block fll fdd lasting two-blocks --seeds 0 1 2

The control of a layer-wise method is an end-to-end model that fits into its memory: one block for
FLL, two for a lasting top block (the AllSmall of ProFL, Wu et al. 2024, arXiv 2404.13349), and with
micro-batches two or four blocks for FLL. That of depth dropout is FLL with fewer rounds. Rates do
not carry over from one to the other, nor from one set of images to another: each row's is chosen
first, by short runs on training images alone, unless --lr gives one. Rerun a command to resume.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.compare")

import contextlib
from dataclasses import fields, replace
from pathlib import Path

import torch

import data
import fllw
from data import InputError
from experiments import add, once, plain_name, show
from fllw import Config
from ssl_loss import evaluate

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
BASELINES = {"raw": "raw pixels", "random": "untrained encoder"}
COMPUTE, BYTES = ("macs",), ("download_bytes", "upload_bytes")
MATCHED = {  # row: (trained, with as many rounds as this one's ..., pays for)
    "one-block-compute": ("one-block", "fll", COMPUTE),
    "one-block-bytes": ("one-block", "fll", BYTES),
    "two-blocks-compute": ("two-blocks", "lasting", COMPUTE),
    "two-blocks-bytes": ("two-blocks", "lasting", BYTES),
    "e2e-compute": ("e2e", "fll", COMPUTE), "e2e-bytes": ("e2e", "fll", BYTES),
    "two-blocks-micro-compute": ("two-blocks-micro", "fll", COMPUTE),
    "e2e-micro-compute": ("e2e-micro", "fll", COMPUTE),
    "fll-as-fdd": ("fll", "fdd", COMPUTE), "fll-as-fdd-half": ("fll", "fdd-half", COMPUTE)}

def variants(config):
    """The settings of every row that trains: key -> Config."""
    fll = replace(config, method="fll", depth_dropout=0.0, blocks_per_stage=1)
    fdd, e2e = replace(fll, depth_dropout=0.25), replace(fll, method="e2e")
    rows = {
        "one-block": replace(e2e, depth=1), "two-blocks": replace(e2e, depth=2),
        "fll": fll, "fdd": fdd, "fdd-half": replace(fll, depth_dropout=0.5),
        "fdd-most": replace(fll, depth_dropout=0.75),
        "lasting": replace(fll, method="lasting"), "lasting-fdd": replace(fdd, method="lasting"),
        "progressive": replace(fll, method="progressive"),
        "e2e": e2e, "e2e-micro": replace(e2e, micro_batch=16),
        "two-blocks-micro": replace(e2e, micro_batch=16, depth=2)}
    return {key: row for key, row in rows.items() if possible(row)}

def possible(config):
    with contextlib.suppress(InputError):
        fllw.validate(config)
        return True

def matched(rows, key, shape):
    """The settings of a row that may spend what another one does: as many rounds as that buys."""
    mine, other, measure = MATCHED[key]
    totals = []
    for row in (rows[mine], rows[other]):
        costs = fllw.cost(replace(row, seed=0), shape)
        totals.append(sum(costs[column] for column in measure))
    rounds = round(rows[mine].rounds * totals[1] / totals[0])
    return replace(rows[mine], rounds=max(rounds, len(fllw.stages(rows[mine]))))

def plan_rows(keys, config, dataset, rate):
    """The settings of the rows `keys`: key -> Config. rate(key of a row of variants(), Config) ->
    its learning rate."""
    rows, plan = variants(config), dict.fromkeys(BASELINES, replace(config, lr=Config.lr))
    for key in keys:
        if key in BASELINES:
            continue
        mine, other = MATCHED[key][:2] if key in MATCHED else (key, key)
        if mine not in rows or other not in rows:
            raise InputError(f"the row {key} cannot be trained with --depth {config.depth}")
        row = replace(rows[mine], lr=rate(mine, rows[mine]))
        plan[key] = matched(rows | {mine: row}, key, dataset.shape) if key in MATCHED else row
    return plan

def hold_out(dataset):
    """A data set whose test images are a quarter of the training images: to choose settings by."""
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(order) // 4], order[len(order) // 4:].sort().values
    return data.Dataset(dataset.train_images[rest], dataset.train_labels[rest],
                        dataset.train_images[held], dataset.train_labels[held])

def try_rates(key, config, dataset, out, rates=RATES):
    """Learning rate -> k-NN + probe (%) on held-out training images, after a quarter of the
    rounds."""
    scores, held = {}, hold_out(dataset)
    short = replace(config, rounds=max(config.rounds // 4, len(fllw.stages(config))))
    for rate in rates:
        row = measure(f"{key}-rate-{rate:g}", replace(short, lr=rate), held, out)
        scores[rate] = row["knn"] + row["linear_probe"]
    return scores

def name_of(key, row, config):
    """What a row is called in the table."""
    if key in BASELINES:
        return BASELINES[key]
    name = fllw.label(row)
    if row.depth != config.depth:  # a smaller model, always trained end to end
        small = "one block" if row.depth == 1 else "two blocks"
        name = name.replace("end-to-end", f"{small} end to end")
    for setting, words in (("lr", "rate {:g}"), ("micro_batch", "micro-batches of {}")):
        if getattr(row, setting) != getattr(config, setting):
            name += ", " + words.format(getattr(row, setting))
    if key in MATCHED:
        what = "compute" if MATCHED[key][2] == COMPUTE else "bytes"
        name += f", {row.rounds} rounds: {what} of {MATCHED[key][1]}"
    return name

def measure(key, row, dataset, out):
    """Train and evaluate one row with one seed, or read it back: its columns."""
    row, device = replace(row, out=str(out / f"{key}-seed{row.seed}")), fllw.pick_device(row)

    def work(folder, state):
        if key == "raw":
            return evaluate(None, dataset, fllw.recipe_name(row), device)
        if key == "random":
            encoder = fllw.encoder_of(row, fllw.initial(row, dataset.shape), dataset.shape)
            return evaluate(encoder.to(device), dataset, fllw.recipe_name(row))
        encoder, history = fllw.train(row, dataset, folder, state)
        return fllw.result(row, dataset, encoder, history)

    return once(row, dataset, f"compare {key}", work)

def arguments(parser, rows, default):
    """Add the flags that rows, seeds and rates need; parse; give (settings, the other flags)."""
    mine = parser.add_argument_group("comparison")
    mine.add_argument("--rows", nargs="+", choices=rows, metavar="ROW", default=default.split(),
                      help="in the order of the table: " + " ".join(rows))
    mine.add_argument("--seeds", nargs="+", type=int, default=[0], help="instead of --seed")
    mine.add_argument("--rates", nargs="+", type=float,
                      help="learning rates to choose from, row by row; --lr: one for all")
    mine.add_argument("--one-block-lr", type=float, help="with --lr: that of one block")
    mine.add_argument("--save", type=plain_name, default=None, metavar="NAME",
                      help="also keep the table as experiments/results/NAME.json")
    given = vars(parser.parse_args())
    for differs in {"method", "depth_dropout", "blocks_per_stage", "seed"} & given.keys():
        raise InputError(f"--{differs.replace('_', '-')} differs from row to row: leave it out")
    flags = {key: given.pop(key, None) for key in ("rows", "seeds", "rates", "save")}
    flags |= {"one_block_lr": given.pop("one_block_lr", None), "tried": {}}
    known = {f.name for f in fields(Config)}  # flags that the caller added are left
    flags["more"] = {key: given.pop(key) for key in given.keys() - known}
    if flags["one_block_lr"] is not None and "lr" not in given:
        raise InputError("--one-block-lr goes with --lr: without it every row's rate is chosen")
    if flags["rates"] and "lr" in given:
        raise InputError("--lr is one rate for all rows, --rates are to choose from: give one of "
                         "the two")
    flags["rates"] = flags["rates"] or list(RATES)
    for name in ("rows", "seeds", "rates"):
        if len(set(flags[name])) < len(flags[name]):
            raise InputError(f"--{name} names {flags[name]}, one of them twice: leave it out")
    if not all(1e-6 <= rate <= 1 for rate in flags["rates"]):
        raise InputError(f"--rates must be from 1e-6 to 1, they are {flags['rates']}")
    config = Config(**given, depth_dropout=0.0)
    for seed in flags["seeds"]:
        for rate in flags["rates"]:
            fllw.validate(replace(config, seed=seed, lr=given.get("lr", rate)))
    fllw.validate(replace(config, lr=flags["one_block_lr"] or config.lr))
    if "lr" in given:
        flags["rates"] = [given["lr"]]
    return config, flags

def settings_of(flags, config, dataset, out):
    """The settings of the rows asked for: key -> Config, each with its learning rate. What was
    tried to choose it is added to flags["tried"]."""
    def rate(key, row):
        if key == "one-block" and flags["one_block_lr"]:
            return flags["one_block_lr"]
        if len(flags["rates"]) == 1:
            return flags["rates"][0]
        scores = flags["tried"][key] = try_rates(key, replace(row, seed=0), dataset, out,
                                                 flags["rates"])
        best = max(scores, key=scores.get)
        print(f"{key}: the rate is {best:g}; held out, k-NN + probe: "
              + ", ".join(f"{rate:g}: {score:.1f}" for rate, score in scores.items()))
        return best
    return plan_rows(flags["rows"], config, dataset, rate)

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.compare")
    keys = [*BASELINES, *variants(Config()), *MATCHED]
    config, flags = arguments(parser, keys, "raw random one-block fll fdd two-blocks lasting e2e")
    dataset = data.load(config.data, config.cache, config.images)
    out = Path(config.out or f"runs/compare-{Path(config.data).stem}").expanduser()
    plan, results = settings_of(flags, config, dataset, out), {}
    for seed in flags["seeds"]:
        for key in flags["rows"]:
            columns = measure(key, replace(plan[key], seed=seed), dataset, out)
            add(results, name_of(key, plan[key], config), columns)
    show(results, flags["save"], "compare", tried=flags["tried"])
    print(f"{len(dataset.test_images):,} test images, seeds {flags['seeds']}")

if __name__ == "__main__":
    fllw.command(main)
