"""Can two encoders, one for each sensor, grow layer by layer under a loss between them?

    python -m experiments.multimodal

After Tun et al. 2024, "Resource-Efficient Federated Multimodal Learning via Layer-wise and
Progressive Training" (arXiv 2407.15426), with CLIP's loss (Radford et al. 2021, 2103.00020). What
differs: the sensors are the upper and the lower half of an image. Of four clients the third lacks
the second sensor and the fourth the first: they have no pairs, train what they have with NT-Xent,
and upload that. Costs are those of a client with both. Rerun the command to resume.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.multimodal")

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from data import InputError
from experiments import add, once, settings, show
from ssl_loss import COLUMNS, ProjectionHead, features

LACKS = {2: "second", 3: "first"}  # client mod 4 -> the sensor that it does not have

@dataclass(frozen=True)
class Settings(fllw.Config):
    sensors: str = "first second"  # whose encoders a learner has

    def learner(self, image_shape):
        return Learner(self, image_shape)

    def macs(self, stage, kept, image_shape):  # of two encoders with one view each
        return super().macs(stage, kept, (image_shape[0] // 2, *image_shape[1:]))

def split(images):
    """What the sensors see, the upper half's channels before the lower half's:
    uint8 [N, C, H, W] -> [N, 2C, H // 2, W]."""
    half = images.shape[2] // 2
    return torch.cat([images[:, :, :half], images[:, :, images.shape[2] - half:]], 1)

class Pair(nn.ModuleDict):  # a block of each sensor: {sensor: tokens [B, T, D]} -> the same
    def forward(self, tokens):
        return {sensor: self[sensor](x) for sensor, x in tokens.items()}

class Encoder(nn.Module):  # a ViT for each sensor; features lie side by side, [B, sensors * dim]
    def __init__(self, config, shape):
        super().__init__()
        self.vits = nn.ModuleDict()
        for sensor in config.sensors.split():
            self.vits[sensor] = fllw.ViT(shape[1:], config.patch_size, shape[0] // 2, config.dim,
                                         config.depth, config.heads)
        towers = [vit.blocks for vit in self.vits.values()]
        self.blocks = nn.ModuleList(Pair(zip(self.vits, blocks)) for blocks in zip(*towers))
        for vit in self.vits.values():
            vit.blocks = nn.ModuleList()  # embedding, final norm and pooling stay with it

    def lower(self, images, stop):
        halves = dict(zip(("first", "second"), images.chunk(2, 1)))
        tokens = {sensor: vit.lower(halves[sensor], 0) for sensor, vit in self.vits.items()}
        return nn.Sequential(*self.blocks[:stop])(tokens)

    def upper(self, tokens, start):
        tokens = nn.Sequential(*self.blocks[start:])(tokens)
        return torch.cat([vit.upper(tokens[sensor], 0) for sensor, vit in self.vits.items()], 1)

    def forward(self, images):
        return self.upper(self.lower(images, 0), 0)

class Heads(nn.ModuleDict):  # features side by side -> one below the other, [sensors * B, D]
    def forward(self, features):
        parts = features.chunk(len(self), 1)
        return torch.cat([head(part) for head, part in zip(self.values(), parts)])

class Learner(nn.Module):
    def __init__(self, config, shape):
        super().__init__()
        self.encoder, self.head = Encoder(config, shape), Heads()
        for sensor in config.sensors.split():
            self.head[sensor] = ProjectionHead(config.dim, config.head_hidden, config.head_dim)

def clip(config, z, chunks=None):
    """Cross entropy of each sensor's B rows among the other's, both ways, mean. z: [2B, D]."""
    first, second = F.normalize(z.float(), dim=1).chunk(2)
    similarity = first @ second.T / config.temperature
    own = torch.arange(len(first), device=z.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

def view_of_each(images, recipe, draws):
    """Two views of an image, one for each sensor: uint8 [B, 2C, H, W] -> float32 [B, 2C, H, W]."""
    one, other = data.two_views(images, recipe, draws).chunk(2)
    return torch.cat([one.chunk(2, 1)[0], other.chunk(2, 1)[1]], 1)

def two_sensor_train(config, stage, message, images, round_number, client, progress=0.0):
    """A client's work: fllw.local_train() of the sensors that it has, of which it sends all."""
    there = [sensor for sensor in config.sensors.split() if sensor != LACKS.get(client % 4)]
    mine = {n: t for n, t in message.items() if any(f".{sensor}." in n for sensor in there)}
    config = replace(config, sensors=" ".join(there))
    pairs = dict(make_views=view_of_each, criterion=clip) if len(there) == 2 else {}
    return fllw.local_train(config, stage, mine, images, round_number, client, progress, **pairs)

@torch.no_grad()
def retrieval(config, server, dataset):
    """How often the first sensor's own image is among the k nearest to the second's, in %."""
    learner = fllw.assemble(config, server, dataset.shape).to(fllw.pick_device(config))
    z = learner.head(features(learner.encoder, dataset.test_images))  # one batch for its norm
    first, second = F.normalize(z, dim=1).chunk(2)
    similarity = second @ first.T
    nearer = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"top{k}": 100 * (nearer < k).double().mean().item() for k in (1, 5)}

def run(config, dataset):
    """The columns of a row with one seed."""
    def work(folder, state):
        encoder, history = fllw.train(config, dataset, folder, state, two_sensor_train)
        columns = fllw.result(config, dataset, encoder, history, two_sensor_train)
        return columns | retrieval(config, state.server, dataset)
    return once(config, dataset, "multimodal", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.multimodal")
    defaults = Settings(images=1000, rounds=16, depth_dropout=0.0, clients=4, augment="digits",
                        out="runs/multimodal")
    config, flags = settings(parser, arguments, defaults, {"method", "new_block", "seed"})
    if data.RECIPES[fllw.recipe_name(config)].jitter:
        raise InputError("--augment must be digits: the other views mix the sensors' channels")
    whole, rows = data.load(config.data, config.cache, config.images), {}
    dataset = whole._replace(train_images=split(whole.train_images),
                             test_images=split(whole.test_images))
    for row, method, depth in (("end-to-end", "e2e", config.depth), ("one-block", "e2e", 1),
                               ("FLL", "fll", config.depth)):
        for seed in flags["seeds"]:
            folder = f"{config.out}/{row}-seed{seed}"
            one = replace(config, method=method, depth=depth, seed=seed, out=folder)
            add(rows, row, run(one, dataset))
    columns = {"top1": ("top-1 %", 1, 1), "top5": ("top-5 %", 1, 1), **COLUMNS}
    show(rows, flags["save"], "multimodal", columns)

if __name__ == "__main__":
    fllw.command(main)
