"""A stage ends when its loss on held-out images stops falling, and tunes its own learning rate.

After Sadeghi Tabrizi et al., "Layer-wise Learning of CNNs by Self-tuning Learning Rate and Early
Stopping at Each Layer" (BMVC 2024). There one machine has labels and both rules follow a separation
index, which needs them. Here each client holds back a tenth of its images and reports, instead of
its training loss, the NT-Xent of the model it receives on them. A stage starts with twice --lr; a
round that does not lower the clients' mean halves the rate (a line search, a trial a round); after
a few such rounds in a row it is over. ViT or CNN. Exact resume holds as in fllw.py.
"""
import json
import sys
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments.compare import save, table
from ssl_loss import nt_xent

HELD_OUT = 200  # what its draws are for
CASES = {"all rounds": {"patience": 0}, "early": {"tuned": False}, "early tuned": {},
         "as many evenly": {"patience": 0},
         "one block": {"patience": 0, "method": "e2e", "depth": 1}}

@dataclass(frozen=True)
class Settings(fllw.Config):
    encoder: str = "vit"
    patience: int = 2  # rounds; 0: every stage has all its rounds, and a cosine
    tolerance: float = 0.03
    tuned: bool = True  # or the rate is --lr throughout

    def learner(self, image_shape):
        learner = super().learner(image_shape)
        if self.encoder == "cnn":
            learner.encoder = CNN(self, image_shape)
        return learner

    def macs(self, stage, kept, image_shape):
        if self.encoder == "vit":
            return super().macs(stage, kept, image_shape)
        height, width = image_shape[1:]
        total = 3 * self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        for name, tensor in fllw.initial(self, image_shape, "meta").items():
            if tensor.ndim == 4 and fllw.block_of(name) in stage.present:
                height, width = (height + 1) // 2, (width + 1) // 2
                total += (3 if stage.trains(name) else 1) * height * width * tensor.numel()
        return 2 * total  # as fllw.macs counts

@dataclass(frozen=True)
class Stage(fllw.Stage):
    rate: float

class CNN(nn.Module):  # blocks of conv 3x3, norm, ReLU halve the image and double the channels
    def __init__(self, config, shape):
        super().__init__()
        self.dim, before, self.blocks = config.dim, shape[0], nn.ModuleList()
        for b in reversed(range(config.depth)):
            after = max(4, config.dim >> b)
            self.blocks.append(nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1),
                                             nn.GroupNorm(1, after), nn.ReLU()))
            before = after

    def lower(self, images, stop):
        return nn.Sequential(*self.blocks[:stop])(images)

    def upper(self, x, start):
        x = nn.Sequential(*self.blocks[start:])(x).mean((2, 3))
        return F.pad(x, (0, self.dim - x.shape[1]))  # the head is as wide at every stage

    def forward(self, images):
        return self.upper(images, 0)

def follow(losses, patience, tolerance):
    """(how often the losses did not fall, after how many they had not `patience` times running)."""
    best, failures, in_a_row = float("inf"), 0, 0
    for done, loss in enumerate(losses, 1):
        if loss < best - tolerance:
            best, in_a_row = loss, 0
        else:
            failures, in_a_row = failures + 1, in_a_row + 1
        if in_a_row == patience:
            return failures, done
    return failures, None

def plan(config, history):
    """fllw.stages, each as long as its held-out loss falls, with its rate."""
    result = []
    for stage in fllw.stages(config):
        losses = [row["loss"] for row in history if row["stage"] == stage.number and row["loss"]]
        failures, over = follow(losses, config.patience, config.tolerance)
        rate = 2 * config.lr / 2**failures if config.tuned else config.lr
        result.append(Stage(stage.number, stage.present, stage.active, over or stage.rounds, rate))
    return result

def early_train(config, stage, message, images, number, client, progress=0.0):
    """A client's work; its loss is that of the model received on a tenth of its images, held out.
    Two batches always stay to train on; a client with no more reports its training loss."""
    held = max(0, min(len(images) // 10, len(images) - 2 * config.batch_size))
    forever = replace(stage, rounds=10**9)  # its cosine stays at the top
    upload, losses = fllw.local_train(replace(config, lr=stage.rate), forever, message,
                                      images[held:], number, client)
    if held:
        learner = fllw.receive(config, message, images.shape[1:], stage).requires_grad_(False)
        frozen, active, head = fllw.in_three(config, learner, stage)
        same = fllw.generator(config, images.device, HELD_OUT, client)  # views in every round
        views = data.two_views(images[:held], data.RECIPES[fllw.recipe(config)], same)
        losses = nt_xent(*head(active(frozen(views))).chunk(2), config.temperature)
    return upload, losses

def run(config, dataset):
    client, plan_of = (early_train, plan) if config.patience else (fllw.local_train, fllw.stages)
    with fllw.run_folder(config, dataset, "early stopping") as (folder, state):
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        done = fllw.train(config, dataset, folder, state, client=client, plan=plan_of)
        row = fllw.result(config, dataset, *done, client, plan_of) | {"rounds": len(done[1])}
        fllw.write(folder / "summary.json", row)
        return row

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.early_stopping")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="instead of --seed")
    parser.add_argument("--encoders", nargs="+", choices=("vit", "cnn"), default=["cnn", "vit"])
    given = vars(parser.parse_args(arguments))
    for fixed in {"method", "new_block", "depth_dropout", "seed"} & given.keys():
        raise data.InputError(f"--{fixed.replace('_', '-')} differs from row to row or is fixed")
    seeds, encoders, out = given.pop("seeds"), given.pop("encoders"), given.pop("out", "runs/early")
    config, rows = Settings(**{"images": 1000, "rounds": 60, "depth_dropout": 0.0, **given}), {}
    dataset = data.load(config.data, config.cache, config.images)
    for encoder in encoders:
        for name, change in CASES.items():
            new_block = "copy" if encoder == "vit" else "fresh"  # blocks of a CNN differ in shape
            one, done = replace(config, encoder=encoder, new_block=new_block, **change), []
            fllw.check(replace(one, seed=min(seeds)))
            for i, seed in enumerate(seeds):
                if name == "as many evenly":
                    one = replace(one, rounds=rows[f"{encoder} early tuned"]["rounds"][i])
                folder = f"{out}/{encoder}-{name.replace(' ', '-')}-{seed}"
                done.append(run(replace(one, seed=seed, out=folder), dataset))
            rows[f"{encoder} {name}"] = {key: [row[key] for row in done] for key in done[0]}
    print(table(rows, {"rounds": ("rounds", 1, 1), **fllw.COLUMNS}))
    save("early_stopping", "python -m experiments.early_stopping " + " ".join(sys.argv[1:]), rows)

if __name__ == "__main__":
    fllw.command(main)
