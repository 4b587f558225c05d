"""Can a stage end when it has nothing more to learn, and find its own learning rate?

    python -m experiments.early_stopping

After Sadeghi Tabrizi et al., "Layer-wise Learning of CNNs by Self-tuning Learning Rate and Early
Stopping at Each Layer" (BMVC 2024). There one machine has labels and both rules follow a separation
index, which needs them. Here each client holds back a tenth of its images and reports, instead of
its training loss, the NT-Xent of the model it receives on them. A stage starts with twice --lr; a
round that does not lower the clients' mean halves the rate (a line search, a trial a round); after
a few such rounds in a row it is over. Rerun the command to resume.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.early_stopping")

import itertools
import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments import add, once, settings, show
from ssl_loss import COLUMNS, nt_xent

HELD_OUT = 200  # what its draws are for
CASES = {"all rounds": {"patience": 0}, "early": {"tuned": False}, "early tuned": {},
         "as many evenly": {"patience": 0},
         "one block": {"patience": 0, "method": "e2e", "depth": 1}}

@dataclass(frozen=True)
class Settings(fllw.Config):
    encoder: str = "vit"  # or "cnn"
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
        return 2 * total  # as fllw.count_macs does

@dataclass(frozen=True)
class Stage(fllw.Stage):
    rate: float

class CNN(nn.Module):  # blocks of conv 3x3, norm, ReLU halve the image and double the channels
    def __init__(self, config, shape):
        super().__init__()
        self.dim, before, self.blocks = config.dim, shape[0], nn.ModuleList()
        for b in reversed(range(config.depth)):
            after = min(max(4, config.dim >> b), config.dim)
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
    """(how often the losses did not fall, after how many they had not `patience` times running).

    NaN is the loss of a round in which nobody answered: it says nothing."""
    best, failures, in_a_row = math.inf, 0, 0
    for done, loss in enumerate(losses, 1):
        if math.isnan(loss):
            continue
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
        losses = [fllw.mean_loss(row) for row in history if row["stage"] == stage.number]
        failures, over = follow(losses, config.patience, config.tolerance)
        rate = 2 * config.lr / 2**failures if config.tuned else config.lr
        result.append(Stage(stage.number, stage.present, stage.active, over or stage.rounds, rate))
    return result

def early_train(config, stage, message, images, round_number, client, progress=0.0):
    """A client's work; its loss is that of the model received on a tenth of its images, held out.
    Two batches always stay to train on; a client with no more reports its training loss."""
    held = max(0, min(len(images) // 10, len(images) - 2 * config.batch_size))
    forever = replace(stage, rounds=10**9)  # its cosine stays at the top
    upload, losses = fllw.local_train(replace(config, lr=stage.rate), forever, message,
                                      images[held:], round_number, client)
    if held:
        learner = fllw.assemble(config, message, images.shape[1:]).requires_grad_(False)
        same = fllw.generator(config, images.device, HELD_OUT, client)  # views in every round
        views = data.two_views(images[:held], data.RECIPES[fllw.recipe_name(config)], same)
        z = learner.head(learner.encoder(views))
        losses = nt_xent(*z.chunk(2), config.temperature)
    return upload, losses

def run(config, dataset):
    """The columns of a row with one seed."""
    train_client = early_train if config.patience else fllw.local_train
    plan_of = plan if config.patience else fllw.stages

    def work(folder, state):
        encoder, history = fllw.train(config, dataset, folder, state, train_client, plan=plan_of)
        columns = fllw.result(config, dataset, encoder, history, train_client, plan_of)
        return columns | {"rounds": len(history)}
    return once(config, dataset, "early_stopping", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.early_stopping")
    defaults = Settings(images=1000, rounds=60, depth_dropout=0.0, out="runs/early")
    fixed = {"method", "new_block", "depth_dropout", "micro_batch", "seed"}
    config, flags = settings(parser, arguments, defaults, fixed)
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    for encoder, (case, change) in itertools.product(("cnn", "vit"), CASES.items()):
        new_block = "copy" if encoder == "vit" else "fresh"  # blocks of a CNN differ in shape
        one = replace(config, encoder=encoder, new_block=new_block, **change)
        for i, seed in enumerate(flags["seeds"]):
            if case == "as many evenly":
                one = replace(one, rounds=rows[f"{encoder} early tuned"]["rounds"][i])
            folder = f"{config.out}/{encoder}-{case.replace(' ', '-')}-{seed}"
            add(rows, f"{encoder} {case}", run(replace(one, seed=seed, out=folder), dataset))
    show(rows, flags["save"], "early_stopping", {"rounds": ("rounds", 1, 1), **COLUMNS})

if __name__ == "__main__":
    fllw.command(main)
