"""What is an encoder worth to somebody who fine-tunes all of it with labels?

    python -m experiments.finetune --rows scratch one-block fll fdd --labels 0 10 --seeds 0 1 2

The papers judge encoders so (Tun et al. 2024, arXiv 2401.11647: 40 epochs of AdamW). The encoders
are those of experiments.compare, with the same flags and --out. The strongest control of a deep one
is a small one with fresh blocks or identities put on top just before: the deployed model is alike.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.finetune")

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from data import InputError
from experiments import add, compare, show
from ssl_loss import first_of_each_class

TUNING = 100  # what its draws are for
MILD = {  # views that keep their class, for fine-tuning
    "digits": data.Recipe((0.9, 1.1), 1.1, shift=0.05, rotate=10),
    "natural": data.Recipe((1.0, 1.0), 1.0, shift=0.125, flip=0.5)}
SCRATCH = {"scratch": "from scratch", "scratch-one": "one block from scratch"}
GROWN = {  # encoders deepened just before fine-tuning: row -> (whose encoder, how, in words)
    "one-block-fresh": ("one-block-compute", "fresh", "fresh blocks"),
    "one-block-identity": ("one-block-compute", "zero", "identities"),
    "two-blocks-micro-identity": ("two-blocks-micro-compute", "zero", "identities"),
    "two-blocks-identity": ("two-blocks-compute", "zero", "identities")}
HOME = {key: home for key, (home, *_) in GROWN.items()}

def finetune(encoder, dataset, recipe, generator, epochs=40, warmup=10, batch_size=256, lr=1e-3,
             weight_decay=1e-5, labels_per_class=0, amp=False):
    """Test accuracy in % after supervised training of a copy of `encoder` and a classifier, as in
    Tun et al. 2024: AdamW, linear warm-up, one cosine. recipe: a mild data.Recipe; generator: all
    randomness, on the encoder's device; labels_per_class: training images, 0: all."""
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

def deepen(config, encoder, depth, new_block, shape):
    """The encoder with `depth` blocks; the new ones are made by fllw.grow()."""
    deep = replace(config, depth=depth, new_block=new_block)
    server = fllw.broadcast(fllw.initial(config, shape), ())  # for the head
    server |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    every = tuple(range(depth))
    fllw.grow(deep, server, fllw.Stage(1, every, every, 1), shape)
    return fllw.encoder_of(deep, server, shape)

def encoder_of(key, row, dataset, depth):
    """The encoder that a row fine-tunes. It has been trained by compare.measure() before."""
    if key in SCRATCH:
        return fllw.encoder_of(row, fllw.initial(row, dataset.shape), dataset.shape)
    encoder = fllw.load_encoder(row.out)
    return deepen(row, encoder, depth, GROWN[key][1], dataset.shape) if key in GROWN else encoder

def tune(key, row, dataset, out, depth, epochs, counts, draws):
    """Columns of a row: test accuracies after fine-tuning on each of `counts` labels a class, 0: on
    all; with few labels the mean of several draws. Kept in OUT/KEY-seedN-finetuned.json."""
    home = HOME.get(key, key)
    row = replace(row, out=str(out / f"{home}-seed{row.seed}"))
    if key not in SCRATCH:
        compare.measure(home, row, dataset, out)
    out.mkdir(parents=True, exist_ok=True)
    path, device = out / f"{key}-seed{row.seed}-finetuned.json", fllw.pick_device(row)
    with data.friendly_errors(f"{path} is damaged", "delete it and rerun the command"):
        saved = json.loads(path.read_text()) if path.exists() else {}
    mild = MILD["digits" if fllw.recipe_name(row) == "digits" else "natural"]
    columns = {}
    for count in counts:
        accuracies, batch = [], 32 if count else 256  # few labels in large batches: too few steps
        for draw in range(draws if count else 1):
            name = f"{count or 'all'} labels a class, {epochs} epochs of {batch}, draw {draw}"
            if name not in saved:
                encoder = encoder_of(key, row, dataset, depth).to(device)
                draws_of = fllw.generator(row, device, TUNING, draw)
                with fllw.one_thread():
                    saved[name] = finetune(encoder, dataset, mild, draws_of, epochs,
                                           batch_size=batch, labels_per_class=count, amp=row.amp)
                fllw.write(path, saved)
            accuracies.append(saved[name])
        columns[f"finetuned_{count}"] = sum(accuracies) / len(accuracies)
    return columns

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.finetune")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--labels", nargs="+", type=int, default=[0], help="a class; 0: all")
    parser.add_argument("--draws", type=int, default=5, help="of few labels, for each seed")
    keys = [*SCRATCH, *compare.variants(fllw.Config()), *compare.MATCHED, *GROWN]
    config, flags = compare.arguments(parser, keys, "scratch one-block-compute fll")
    epochs, counts, draws = (flags["more"][name] for name in ("epochs", "labels", "draws"))
    if min(epochs, draws) < 1 or min(counts) < 0:
        raise InputError("--epochs and --draws must be 1 or more, and --labels 0 or more")
    for key in [key for key in flags["rows"] if key in GROWN]:
        if config.depth <= (1 if key.startswith("one") else 2):
            raise InputError(f"--depth {config.depth} leaves nothing to put on top in {key}")
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    out = Path(config.out or f"runs/compare-{Path(config.data).stem}").expanduser()
    trained = [HOME.get(key, key) for key in flags["rows"] if key not in SCRATCH]
    plan = compare.settings_of({**flags, "rows": trained}, config, dataset, out)
    plan |= {"scratch": config, "scratch-one": replace(config, depth=1)}

    for seed in flags["seeds"]:
        for key in flags["rows"]:
            row = replace(plan[HOME.get(key, key)], seed=seed)
            name = SCRATCH.get(key) or compare.name_of(HOME.get(key, key), row, config)
            if key in GROWN:
                name += f", {config.depth - row.depth} {GROWN[key][2]} on top"
            add(rows, name, tune(key, row, dataset, out, config.depth, epochs, counts, draws))
    columns = {f"finetuned_{count}": (f"{count or 'all'} labels", 1, 1) for count in counts}
    show(rows, flags["save"], "finetune", columns)
    print(f"{len(dataset.test_images):,} test images, seeds {flags['seeds']}; labels: a class")

if __name__ == "__main__":
    fllw.command(main)
