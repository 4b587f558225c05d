"""Can a stage end when it has nothing more to learn?

    python -m experiments.early_stopping

Ending early saves a vision transformer two fifths of its rounds, for one to three points; it leads
even stages by one to two. One ViT block is ahead of both. FLL gains more from a constant rate.

After Sadeghi Tabrizi et al., "Layer-wise Learning of CNNs by Self-tuning Learning Rate and Early
Stopping at Each Layer" (BMVC 2024), who follow a separation index, which needs labels. Here a
client's loss is the NT-Xent of the model that it receives, on a tenth of its images, held out. A
stage ends when the clients' mean loss has not fallen for PATIENCE rounds. "Evenly" has as many
rounds as "early". The rate is constant, but for the rows "cosine", fllw.py as it is."""
import math
from collections import Counter
from dataclasses import replace
from statistics import mean

import torch
from torch import nn

import data
import experiments
import fllw
from ssl_loss import nt_xent

FIXED = ("method", "depth_dropout", "micro_batch", "out")
PATIENCE, TOLERANCE = 2, 0.03  # rounds; nats: a loss that falls by less does not count as lower

class CNN(nn.Module):
    """Blocks of convolution, norm and ReLU halve the image and double the channels, up to --dim."""
    def __init__(self, config, image_shape, blocks):
        super().__init__()
        self.dim, self.blocks = config.dim, nn.ModuleDict()
        after = [max(1, config.dim >> b) for b in reversed(range(config.depth))]  # channels
        before = [image_shape[0], *after]
        for b in blocks:
            convolution = nn.Conv2d(before[b], after[b], 3, stride=2, padding=1)
            self.blocks[str(b)] = nn.Sequential(convolution, nn.GroupNorm(1, after[b]), nn.ReLU())

    def lower(self, x, first):  # [B, C, H, W]
        return nn.Sequential(*list(self.blocks.values())[:first])(x)

    def upper(self, x, first):
        x = nn.Sequential(*list(self.blocks.values())[first:])(x).mean((2, 3))  # [B, channels]
        return nn.functional.pad(x, (0, self.dim - x.shape[1]))  # the head is as wide throughout

    def forward(self, images):
        return self.upper(images, 0)

class CNNConfig(fllw.Config):
    @staticmethod
    def learner(config, image_shape, blocks):
        result = fllw.Learner(config, image_shape, blocks)
        result.encoder = CNN(config, image_shape, blocks)
        return result

    def macs(self, stage, kept, image_shape):  # counted as fllw.count_macs() does
        total = 3 * self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        with torch.device("meta"):
            encoder = CNN(self, image_shape, kept)
        for b, block in encoder.blocks.items():
            pixels = math.prod(math.ceil(side / 2 ** (int(b) + 1)) for side in image_shape[1:])
            total += pixels * block[0].weight.numel() * (3 if int(b) >= stage.first else 1)
        return 2 * total

def early_plan(config, state):
    """Yields stages of one round each."""
    for stage in fllw.stages(config):
        best = math.inf
        for _ in stage.rounds:  # it may be shorter, never longer
            number = len(state.history) + 1
            yield replace(stage, rounds=range(number, number + 1))
            loss = mean(state.history[-1]["losses"].values())
            if loss < best - TOLERANCE:
                best, last_fall = loss, number
            if number - last_fall == PATIENCE:
                break

def early_train(config, stage, message, images, round_number, client):
    """A client trains on nine tenths of its images; its loss is from the other tenth."""
    held, own = images.tensor_split([max(1, len(images) // 10)])
    endless = replace(stage, rounds=range(round_number, 10**9))  # its cosine stays at the top
    upload, _, count = fllw.local_train(config, endless, message, own, round_number, client)
    learner = fllw.learner_of(config, message, images.shape[1:]).requires_grad_(False)
    same = torch.Generator().manual_seed(config.seed)  # the same views in every round
    views = data.two_views(held, data.RECIPES[data.recipe_name(config)], same)
    z = learner.head(learner.encoder(views))
    return upload, nt_xent(*z.chunk(2), config.temperature), count

def measure(config, dataset, train_client=fllw.local_train, early=False):
    """The columns of a row with one seed."""
    clients, state = data.split(dataset, config.clients, config.alpha, config.seed), fllw.State()
    if isinstance(config, CNNConfig):  # new blocks are fresh; their first download is not counted
        state.server |= fllw.initial(config, dataset.shape)
    plan = early_plan(config, state) if early else None
    fllw.federate(config, clients, state, plan, train_client)
    paid = sum(map(Counter, fllw.replay(config, dataset.shape, state.history)), Counter())
    return {"rounds": len(state.history)} | fllw.result(config, dataset, state) | paid

def rows_of(config, dataset):
    """The rows of the table with one seed: yields (name, columns)."""
    for encoder, kind in {"cnn": CNNConfig, "vit": fllw.Config}.items():
        config = kind(**vars(config))
        early = measure(config, dataset, early_train, early=True)
        one, few = replace(config, method="e2e", depth=1), replace(config, rounds=early["rounds"])
        yield f"{encoder} cosine", measure(config, dataset)
        yield f"{encoder} cosine, rate x 2", measure(replace(config, lr=2 * config.lr), dataset)
        yield f"{encoder} all rounds", measure(config, dataset, early_train)
        yield f"{encoder} early", early
        yield f"{encoder} evenly", measure(few, dataset, early_train)
        yield f"{encoder} one block, cosine", measure(one, dataset)
        yield f"{encoder} one block", measure(one, dataset, early_train)

def main(arguments=None):
    defaults = fllw.Config(images=1000, rounds=48, depth_dropout=0.0)
    columns = {"rounds": ("rounds", 1, 1), **experiments.SHOWN}
    experiments.command("early_stopping", __doc__, defaults, FIXED, rows_of, arguments, columns)

if __name__ == "__main__":
    main()
