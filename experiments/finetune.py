"""What is an encoder worth to somebody who fine-tunes all of it with labels?

    python -m experiments.finetune --rows untrained one-block fll

With all labels of CIFAR-10 six blocks are worth more than one, but the upper ones need no
pre-training: one block is ahead of FLL if untrained blocks are put on top just before. On the
digits, with ten labels a class, two blocks in micro-batches are ahead of FLL.

The papers judge encoders so (Tun et al. 2024, arXiv 2401.11647); ours are smaller, on other images.
Rows, flags and --out are those of experiments.compare, and a rerun pre-trains nothing again. The
row "untrained" learns from labels alone. The strongest control of a deep encoder is a small one
with fresh blocks put on top just before: a row of fewer blocks than --depth is tuned both ways.
"""
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

import data
import experiments
import fllw
from experiments import compare
from ssl_loss import features, first_of_each_class

TUNING, DRAWS = 100, 5  # what its draws are for; how often few labels are drawn, for each seed
MILD = {  # views that keep their class
    "digits": data.Recipe((0.9, 1.1), 1.1, shift=0.05, rotate=10),
    "natural": data.Recipe((1.0, 1.0), 1.0, shift=0.125, flip=0.5)}

def finetune(config, encoder, dataset, epochs=40, per_class=0, draw=0):
    """Test accuracy in % after supervised training of a copy of the encoder and a classifier, with
    AdamW, a linear warm-up and one cosine. config: for its seed, views, device and amp; per_class:
    so many labels of each class, 0: all; draw: randomness derives from it and the seed."""
    device, recipe = fllw.pick_device(config), MILD[data.recipe_name(config)]
    seed = fllw.rng(config, TUNING, draw).integers(2**63)
    draws = torch.Generator(device).manual_seed(int(seed))
    order = torch.randperm(len(dataset.train_labels), device=device, generator=draws).cpu()
    order = order[dataset.train_labels[order] >= 0]  # -1: no label
    if per_class:
        order = first_of_each_class(dataset.train_labels, order, per_class)
    images, labels = dataset.train_images[order].to(device), dataset.train_labels[order].to(device)
    encoder = copy.deepcopy(encoder).to(device).requires_grad_().train()
    classes = 1 + int(max(dataset.train_labels.max(), dataset.test_labels.max()))
    classifier = nn.Linear(len(encoder.norm.weight), classes, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(encoder, classifier)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-5, fused=True)
    batch = 32 if per_class else 256  # few labels in large batches: too few steps
    steps, warmup = math.ceil(len(images) / batch), min(10, epochs / 4)
    for epoch in range(epochs):
        batches = torch.randperm(len(images), device=device, generator=draws).split(batch)
        for step, chosen in enumerate(batches, 1):
            now = epoch + step / steps
            cosine = (1 + math.cos(math.pi * max(0, now - warmup) / (epochs - warmup))) / 2
            optimizer.param_groups[0]["lr"] = 1e-3 * min(now / warmup, cosine)
            views = data.view(images[chosen], recipe, draws)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                logits = model(views)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[chosen]).backward()
            optimizer.step()
    guesses = features(model.eval(), dataset.test_images, device=device).argmax(1).cpu()
    return 100 * (guesses == dataset.test_labels).double().mean().item()

def encoder_of(config, server, image_shape):
    """The server's encoder, with fresh blocks on top of it up to config.depth."""
    return fllw.encoder_of(config, fllw.initial(config, image_shape) | server, image_shape)

def tune(config, encoder, dataset, flags):
    """{column: test accuracy} for each of --labels, the mean over draws."""
    columns, workers = {}, config.workers or torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=[1]) as pool:
        for count in flags["labels"]:
            draws = DRAWS if count else 1
            work = partial(finetune, config, encoder, dataset, flags["epochs"], count)
            columns[f"finetuned_{count}"] = sum(pool.map(work, range(draws))) / draws
    return columns

def main(arguments=None):
    parser = experiments.make_parser("finetune", __doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--labels", nargs="+", type=int, default=[0], help="a class; 0: all")
    with data.sentences(parser):
        config, flags, dataset, out = compare.read_flags(parser, arguments)
        if min(flags["epochs"], 1 + min(flags["labels"])) < 1:
            raise data.InputError("--epochs must be 1 or more, and --labels 0 or more")
        if dataset.train_labels.max() < 0:
            raise data.InputError("fine-tuning needs labels")
        plan, tried = compare.plan_rows(flags["rows"], config, dataset, out, flags["rates"])
        columns = {f"finetuned_{n}": (f"{n or 'all'} labels", 1, 1) for n in flags["labels"]}
        rows = {}
        for seed, key in product(flags["seeds"], plan):
            row = replace(plan[key], seed=seed, out=str(out / f"{key}-seed{seed}"))
            compare.measure(key, row, dataset, out)  # trains it if that has not been done
            _, checkpoint = fllw.open_run(row, dataset)  # without tensors if it is untrained
            name = compare.name_of(key, row)
            for depth in sorted({row.depth, config.depth}):
                name += ", fresh blocks on top" * (depth > row.depth)
                deep = replace(row, depth=depth)
                encoder = encoder_of(deep, checkpoint["server"], dataset.shape)
                experiments.add(rows, name, tune(deep, encoder, dataset, flags))
                experiments.show("finetune", rows, flags["save"], columns, tried=tried)

if __name__ == "__main__":
    main()
