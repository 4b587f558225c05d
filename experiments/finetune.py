"""What is an encoder worth to somebody who fine-tunes all of it with labels?

    python -m experiments.finetune --rows one-block fll --controls scratch one-block-fresh

On CIFAR-10 six blocks are worth more than one or two, but the upper ones need no pre-training: one
block or two are level with FLL if untrained blocks are put on top just before. On the digits, with
ten labels a class, two blocks in micro-batches are ahead of FLL.

The papers judge encoders so (Tun et al. 2024, arXiv 2401.11647); ours are smaller, on other images.
Rows, flags and --out are those of experiments.compare. The strongest control of a deep encoder is a
small one with blocks put on top just before: fresh ones, or identities, which return their input.
"""
import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import data
import experiments
import fllw
from data import InputError
from experiments import compare
from ssl_loss import features, first_of_each_class

TUNING = 100  # what its draws are for
MILD = {  # views that keep their class
    "digits": data.Recipe((0.9, 1.1), 1.1, shift=0.05, rotate=10),
    "natural": data.Recipe((1.0, 1.0), 1.0, shift=0.125, flip=0.5)}
CONTROLS = {  # name: the row of compare that it starts from
    "scratch": "untrained", "scratch-one": "one-block", "one-block-fresh": "one-block",
    "one-block-identity": "one-block", "two-blocks-identity": "two-blocks"}

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
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                logits = model(data.view(images[chosen], recipe, draws))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[chosen]).backward()
            optimizer.step()
    guesses = features(model.eval(), dataset.test_images, device=device).argmax(1).cpu()
    return 100 * (guesses == dataset.test_labels).double().mean().item()

def encoder_of(key, row, server, depth, image_shape):
    """The encoder that a row fine-tunes: the server's, an untrained one, or the server's with new
    blocks on top, `depth` in all: fresh ones, or copies whose output layers are 0, identities."""
    tensors = {} if key.startswith("scratch") else dict(server)
    if key.endswith(("fresh", "identity")):
        row = replace(row, depth=depth)
    if key.endswith("identity"):
        fllw.grow(tensors, fllw.Stage(1, 0, 0, depth, range(1)))  # adds copies of the last block
        for name in tensors.keys() - server.keys():
            if ".attn.proj." in name or ".mlp.fc2." in name:
                tensors[name] = torch.zeros_like(tensors[name])
    return fllw.encoder_of(row, fllw.initial(row, image_shape) | tensors, image_shape)

def tune(config, encoder, dataset, path, flags):
    """{column: test accuracy} for each of --labels, the mean over draws; it is kept in a file."""
    columns, saved = {}, json.loads(path.read_text()) if path.exists() else {}
    workers = config.workers or torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=[1]) as pool:
        for count in flags["labels"]:
            draws = flags["draws"] if count else 1
            name = f"{count or 'all'} labels a class, {flags['epochs']} epochs, {draws} draws"
            if name not in saved:
                work = partial(finetune, config, encoder, dataset, flags["epochs"], count)
                saved[name] = sum(pool.map(work, range(draws))) / draws
                fllw.write(path, saved)
            columns[f"finetuned_{count}"] = saved[name]
    return columns

def main(arguments=None):
    parser = experiments.make_parser("finetune", __doc__)
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=["scratch"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--labels", nargs="+", type=int, default=[0], help="a class; 0: all")
    parser.add_argument("--draws", type=int, default=5, help="of few labels, for each seed")
    with data.sentences(parser):
        config, flags, dataset, out = compare.read_flags(parser, arguments, "one-block fll")
        if min(flags["epochs"], flags["draws"], 1 + min(flags["labels"])) < 1:
            raise InputError("--epochs and --draws must be 1 or more, and --labels 0 or more")
        if "raw" in flags["rows"] or dataset.train_labels.max() < 0:
            raise InputError("fine-tuning needs an encoder (--rows raw is none) and labels")
        homes = {key: CONTROLS.get(key, key) for key in [*flags["rows"], *flags["controls"]]}
        rows, started = {}, dict.fromkeys(homes.values())
        plan, _ = compare.plan_rows(started, config, dataset, out, flags["rates"])
        for seed in flags["seeds"]:
            for key, home in homes.items():
                row = replace(plan[home], seed=seed, out=str(out / f"{home}-seed{seed}"))
                compare.measure(home, row, dataset, out)  # trains it if that has not been done
                folder, checkpoint = fllw.open_run(row, dataset)
                encoder = encoder_of(key, row, checkpoint["server"], config.depth, dataset.shape)
                name = key if key in CONTROLS else compare.name_of(key, row)
                path = folder / f"finetuned-{key}.json"
                experiments.add(rows, name, tune(row, encoder, dataset, path, flags))
        columns = {f"finetuned_{n}": (f"{n or 'all'} labels", 1, 1) for n in flags["labels"]}
        experiments.show("finetune", rows, flags["save"], columns)

if __name__ == "__main__":
    main()
