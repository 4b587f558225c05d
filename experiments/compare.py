"""Methods side by side over seeds, each with the control that could refute it.

    python -m experiments.compare --rows raw one-block fll fdd lasting two-blocks --seeds 0 1 2

Each row and seed has a run folder in --out: the same command goes on where it stopped. The control
of a layer-wise method is the end-to-end model that fits into its memory: one block for FLL, two
for a lasting top block (the AllSmall of ProFL, Wu et al. 2024, arXiv 2404.13349).
"""
import contextlib
import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from data import InputError, friendly_errors
from fllw import Config, table
from ssl_loss import evaluate, first_of_each_class

RESULTS = Path(__file__).parent / "results"
MILD = {  # views that keep their class, for fine-tuning
    "digits": data.Recipe((0.9, 1.1), 1.1, shift=0.05, rotate=10),
    "natural": data.Recipe((1.0, 1.0), 1.0, shift=0.125, flip=0.5)}
BASELINES = {"raw": "raw pixels", "random": "random encoder", "scratch": "from scratch"}
COMPUTE, BYTES = ("macs",), ("download_bytes", "upload_bytes")
MATCHED = {  # row: (trained, with as many rounds as this one's ..., pays for)
    "one-block-compute": ("one-block", "fll", COMPUTE),
    "one-block-bytes": ("one-block", "fll", BYTES),
    "two-blocks-compute": ("two-blocks", "lasting", COMPUTE),
    "two-blocks-bytes": ("two-blocks", "lasting", BYTES),
    "e2e-compute": ("e2e", "fdd", COMPUTE), "e2e-bytes": ("e2e", "fdd", BYTES)}

def variants(config, one_block_lr=None):
    """The settings of every row that trains: key -> Config."""
    fll = replace(config, method="fll", depth_dropout=0.0, blocks_per_stage=1)
    fdd, epochs = replace(fll, depth_dropout=0.25), config.local_epochs
    e2e = replace(fll, method="e2e")
    rows = {
        "one-block": replace(e2e, depth=1, lr=one_block_lr or config.lr),
        "two-blocks": replace(e2e, depth=2),
        "fll": fll, "fdd": fdd, "fdd-half": replace(fll, depth_dropout=0.5),
        "fdd-epochs": replace(fdd, local_epochs=3 * epochs),  # spends what frozen blocks save
        "pairs": replace(fll, blocks_per_stage=2),
        "pairs-epochs": replace(fdd, blocks_per_stage=2, local_epochs=2 * epochs),
        "lasting": replace(fll, method="lasting"), "lasting-fdd": replace(fdd, method="lasting"),
        "progressive": replace(fll, method="progressive"),
        "e2e": e2e, "e2e-micro": replace(e2e, micro_batch=16),
        "centralized": replace(e2e, clients=1, clients_per_round=0)}
    return {key: one for key, one in rows.items() if possible(one)}

def possible(config):
    with contextlib.suppress(InputError):
        fllw.validate(config)
        return True

def matched(rows, key, shape):
    """The settings of a row that may spend what another one does: as many rounds as that buys."""
    mine, other, measure = MATCHED[key]
    prices = []
    for one in (rows[mine], rows[other]):
        price = fllw.cost(replace(one, seed=0), shape)
        prices.append(sum(price[column] for column in measure))
    rounds = round(rows[mine].rounds * prices[1] / prices[0])
    return replace(rows[mine], rounds=max(rounds, len(fllw.stages(rows[mine]))))

def name_of(key, one, config):
    """What a row is called in the table."""
    if key in BASELINES:
        return BASELINES[key]
    name = fllw.label(one)
    if one.depth != config.depth:
        name = f"{'one block' if one.depth == 1 else 'two blocks'} end to end"
    for setting, words in (("local_epochs", "{} local epochs"), ("lr", "rate {:g}"),
                           ("micro_batch", "micro-batches of {}")):
        if getattr(one, setting) != getattr(config, setting):
            name += ", " + words.format(getattr(one, setting))
    if key in MATCHED:
        what = "compute" if MATCHED[key][2] == COMPUTE else "bytes"
        name += f", {one.rounds} rounds: {what} of {MATCHED[key][1]}"
    return name

def finetune(encoder, dataset, recipe, generator, epochs=40, warmup=10, batch_size=256, lr=1e-3,
             weight_decay=1e-5, labels_per_class=0, amp=False):
    """Test accuracy in % after supervised training of a copy of `encoder` and a classifier, as in
    Tun et al. 2024: AdamW, linear warm-up, one cosine. recipe: a mild data.Recipe; generator: all
    randomness, on the encoder's device; labels_per_class: training images, 0 means all."""
    device = generator.device
    order = torch.randperm(len(dataset.train_labels), device=device, generator=generator).cpu()
    if labels_per_class:
        order = first_of_each_class(dataset.train_labels, order, labels_per_class)
    images, labels = dataset.train_images[order].to(device), dataset.train_labels[order].to(device)
    encoder = copy.deepcopy(encoder).requires_grad_().train()
    dim = encoder(data.normalise(images[:1])).shape[1]
    classifier = nn.Linear(dim, dataset.classes, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(encoder, classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    steps, warmup = math.ceil(len(images) / batch_size), min(warmup, epochs / 4)
    for epoch in range(epochs):
        batches = torch.randperm(len(images), device=device, generator=generator).split(batch_size)
        for step, chosen in enumerate(batches, 1):
            now = epoch + step / steps
            cosine = (1 + math.cos(math.pi * max(0, now - warmup) / (epochs - warmup))) / 2
            optimizer.param_groups[0]["lr"] = lr * min(now / warmup, cosine)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(data.view(images[chosen], recipe, generator))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[chosen]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(data.normalise(part.to(device))).argmax(1).cpu()
                             for part in dataset.test_images.split(500)])
    return 100 * (guesses == dataset.test_labels).double().mean().item()

def measure(key, one, dataset, out, epochs, labels):
    """Train and judge one row with one seed, or read it back: its columns."""
    experiment, tuned = f"compare {key}", epochs and key not in ("raw", "random")
    if tuned:
        experiment += f", fine-tuned {epochs} epochs on {labels or 'all'} labels a class"
    one = replace(one, out=str(out / f"{key}-seed{one.seed}"))
    with fllw.run_folder(one, dataset, experiment) as (folder, state):
        summary = folder / "summary.json"
        if summary.exists():
            with friendly_errors(f"{summary} is damaged", "delete it, and run the same command"):
                saved = json.loads(summary.read_text())
                return {column: float(saved[column]) for column in saved}
        if key in BASELINES:
            encoder, row, device = None, {}, fllw.pick_device(one)
            if key != "raw":
                encoder = fllw.encoder_of(one, fllw.initial(one, dataset.shape), dataset.shape)
                encoder.to(device)
            if key != "scratch":
                row = evaluate(encoder, dataset, fllw.recipe_name(one), device)
        else:
            encoder, history = fllw.train(one, dataset, folder, state)
            row = fllw.result(one, dataset, encoder, history)
        if tuned:
            draws = fllw.generator(one, fllw.pick_device(one), 100)
            mild = MILD["digits" if fllw.recipe_name(one) == "digits" else "natural"]
            row["finetuned"] = finetune(encoder, dataset, mild, draws, epochs,
                                        labels_per_class=labels, amp=one.amp)
        fllw.write(summary, row)
    return row

def save(name, command, rows):
    """Keep the numbers behind a table: experiments/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    fllw.write(RESULTS / f"{name}.json", {"command": command, "where": where, "rows": rows})

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.compare")
    mine = parser.add_argument_group("comparison")
    keys = [*BASELINES, *variants(Config()), *MATCHED]
    mine.add_argument("--rows", nargs="+", choices=keys, metavar="ROW",
                      default="raw random one-block fll fdd two-blocks lasting e2e".split(),
                      help="in the order of the table: " + " ".join(keys))
    mine.add_argument("--seeds", nargs="+", type=int, default=[0], help="instead of --seed")
    mine.add_argument("--one-block-lr", type=float, default=0, help="0: --lr if given, else 4e-3")
    mine.add_argument("--finetune", type=int, default=0, help="epochs of fine-tuning")
    mine.add_argument("--labels-per-class", type=int, default=0, help="for that; 0 means all")
    mine.add_argument("--save", default="", help="also keep the table in experiments/results/")
    given = vars(parser.parse_args())
    rows, seeds, epochs, labels, name, alone_lr = [given.pop(key) for key in (
        "rows", "seeds", "finetune", "labels_per_class", "save", "one_block_lr")]
    for row_by_row in {"method", "depth_dropout", "blocks_per_stage", "seed"} & given.keys():
        raise InputError(f"--{row_by_row.replace('_', '-')} differs from row to row: leave it out")
    if not min(epochs, labels, alone_lr) >= 0:
        raise InputError("--finetune, --labels-per-class, --one-block-lr must be 0 or more")
    config = Config(**given, depth_dropout=0.0)
    fllw.validate(replace(config, seed=min(seeds)))
    dataset = data.load(config.data, config.cache, config.images)
    out = Path(config.out or f"runs/compare-{Path(config.data).stem}")
    plan = variants(config, alone_lr or given.get("lr", 4e-3)) | dict.fromkeys(BASELINES, config)
    results = {}
    for key in rows:
        if key not in plan and key in MATCHED:
            plan[key] = matched(plan, key, dataset.shape)
        if key not in plan:
            raise InputError(f"the row {key} cannot be trained with --depth {config.depth}")
    for seed in seeds:
        for key in rows:
            row = measure(key, replace(plan[key], seed=seed), dataset, out, epochs, labels)
            columns = results.setdefault(name_of(key, plan[key], config), {})
            for column, value in row.items():
                columns.setdefault(column, []).append(value)
    print(f"\n{len(dataset.test_images):,} test images, seeds {seeds}\n{table(results)}")
    if name:
        save(name, "python -m experiments.compare " + " ".join(sys.argv[1:]), results)

if __name__ == "__main__":
    fllw.command(main)
