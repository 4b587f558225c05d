"""Methods side by side over seeds, each beside the controls that could refute it.

    python -m experiments.compare --rows one-block two-blocks progressive fll fdd --seeds 0 1 2

FLL's controls are small models, in micro-batches if they need more memory than it, and progressive
training (ProFL, Wu et al. 2024, arXiv 2404.13349; Tun et al. 2024, 2401.11647). Rows have FLL's
compute, unless their name says otherwise. Of several --rates each row takes its best, by whole runs
on training images alone. A rerun resumes."""
import json
from dataclasses import replace
from pathlib import Path

import torch

import data
import experiments
import fllw
from ssl_loss import evaluate

PROGRESSIVE = {"method": "progressive", "micro_batch": 16}
ROWS = {  # name: (changes of the settings, the row whose compute it may spend)
    "untrained": ({}, None), "one-block": ({"method": "e2e", "depth": 1}, "fll"),
    "two-blocks": ({"method": "e2e", "depth": 2, "micro_batch": 16}, "fll"),
    "progressive": (PROGRESSIVE, "fll"),
    "progressive-fdd": ({**PROGRESSIVE, "depth_dropout": 0.25}, "fll"),
    "progressive-fdd-half": ({**PROGRESSIVE, "depth_dropout": 0.5}, "fll"),
    "fll": ({}, None), "fll-as-fdd": ({}, "fdd"), "fll-as-fdd-half": ({}, "fdd-half"),
    "fdd": ({"depth_dropout": 0.25}, None), "fdd-half": ({"depth_dropout": 0.5}, None),
    "pairs": ({"blocks_per_stage": 2, "micro_batch": 16}, "fll"),
    "e2e": ({"method": "e2e"}, "fll"), "e2e-micro": ({"method": "e2e", "micro_batch": 16}, "fll"),
    "e2e-rounds": ({"method": "e2e"}, None)}
FIXED = ("method", "depth_dropout", "micro_batch", "blocks_per_stage", "lr")

def row_of(key, config, image_shape):
    """The settings of a row, with the rounds that its compute allows."""
    changes, other = ROWS[key]
    row = replace(config, **changes)
    fllw.validate(row)
    allowed = other and experiments.macs(replace(config, seed=0, **ROWS[other][0]), image_shape)
    for _ in range(4 if other else 0):  # rounds do not all cost the same
        spent = experiments.macs(replace(row, seed=0), image_shape)
        row = replace(row, rounds=max(round(row.rounds * allowed / spent), row.depth))
    return row

def name_of(key, row):
    """What a row is called in the table."""
    if key == "untrained":
        return "untrained encoder"
    name = key.replace("-", " ") if key in ("one-block", "two-blocks") else fllw.label(row)
    if row.micro_batch:
        name += f", micro-batches of {row.micro_batch}"
    return f"{name}, {row.rounds} rounds"

def hold_out(dataset):
    """A data set whose test images are a quarter of the training images: to choose settings by."""
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(order) // 4], order[len(order) // 4:].sort().values
    return data.Dataset(dataset.train_images[rest], dataset.train_labels[rest],
                        dataset.train_images[held], dataset.train_labels[held])

def measure(key, row, dataset, out):
    """Train and evaluate a row with one seed, or read back what an earlier call found: its columns
    {name: number}. The run folder is OUT/KEY-seedN."""
    row = replace(row, out=str(out / f"{key}-seed{row.seed}"))
    path = Path(row.out) / "summary.json"
    fllw.open_run(row, dataset)  # refuses a folder of other settings
    if path.exists():
        return json.loads(path.read_text())
    if key == "untrained":
        encoder = fllw.encoder_of(row, fllw.initial(row, dataset.shape), dataset.shape)
        columns = evaluate(encoder, dataset, data.recipe_name(row))
    else:
        columns = fllw.result(row, dataset, fllw.train(row, dataset))
    fllw.write(path, columns)
    return columns

def choose_rate(key, row, dataset, out, rates):
    """{rate: k-NN + probe in %} of whole runs on training images, a quarter of them held out."""
    if dataset.train_labels.min() < 0 or dataset.train_clients is not None:
        raise data.InputError("labels are missing, or the file splits the images: give one rate")
    scores, held = {}, hold_out(dataset)
    for rate in rates:
        found = measure(f"{key}-rate-{rate:g}", replace(row, seed=0, lr=rate), held, out)
        scores[rate] = found["knn"] + found["linear_probe"]
    return scores

def plan_rows(keys, config, dataset, out, rates):
    """The settings of the rows `keys`: {key: Config}, and what every rate scored."""
    plan = {key: replace(row_of(key, config, dataset.shape), lr=rates[0]) for key in keys}
    if len({name_of(key, row) for key, row in plan.items()}) < len(keys):
        raise data.InputError(f"{', '.join(keys)}: two of these are the same run, leave one out")
    tried = {}
    for key in keys:
        if len(rates) == 1 or key == "untrained":
            continue
        tried[key] = choose_rate(key, plan[key], dataset, out, rates)
        plan[key] = replace(plan[key], lr=max(tried[key], key=tried[key].get))
        print(f"{key}: the rate is {plan[key].lr:g}; k-NN + probe on held-out training images: "
              + ", ".join(f"{rate:g}: {score:.1f}" for rate, score in tried[key].items()))
    return plan, tried

def read_flags(parser, arguments):
    """(settings, other flags, Dataset, folder of the runs), from the command's flags."""
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", required=True,
                        help="in the order of the table: " + " ".join(ROWS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3],
                        help="learning rates to choose from, by a whole run of each")
    given = vars(parser.parse_args(arguments))
    config, flags = experiments.settings(fllw.Config(depth_dropout=0.0), given, FIXED)
    for rate in flags["rates"]:
        fllw.validate(replace(config, lr=rate, clients_per_round=0))
    dataset = data.load(config.data, config.cache, config.images)
    config = replace(config, **data.own_split(dataset, given))
    out = Path(config.out or f"runs/compare-{Path(config.data).stem}").expanduser()
    return config, flags, dataset, out

def main(arguments=None):
    parser = experiments.make_parser("compare", __doc__)
    with data.sentences(parser):
        config, flags, dataset, out = read_flags(parser, arguments)
        plan, tried = plan_rows(flags["rows"], config, dataset, out, flags["rates"])
        rates, rows = {name_of(key, row): row.lr for key, row in plan.items()}, {}
        for seed in flags["seeds"]:
            for key in flags["rows"]:
                columns = measure(key, replace(plan[key], seed=seed), dataset, out)
                experiments.add(rows, name_of(key, plan[key]), columns)
        experiments.show("compare", rows, flags["save"], rates=rates, tried=tried)

if __name__ == "__main__":
    main()
