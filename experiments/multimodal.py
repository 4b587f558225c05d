"""Two sensors, two encoders, grown layer by layer under a contrastive loss between them.

Tun et al. 2024, "Resource-Efficient Federated Multimodal Learning via Layer-wise and Progressive
Training" (arXiv 2407.15426), with CLIP's loss (Radford et al. 2021, 2103.00020). What differs: the
sensors are the halves of a grey image, or luma and chroma of a colour image (Tian et al. 2020,
1906.05849); of four clients the third lacks the second sensor and the fourth the first: without
pairs they train what they have with NT-Xent. Costs: a client with both. Resume is exact.
"""
import functools
import json
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments.compare import save, table
from ssl_loss import ProjectionHead, contrastive_step, features

@dataclass(frozen=True)
class Settings(fllw.Config):
    sensors: str = "first second"  # whose encoders a learner has
    def learner(self, image_shape):
        return Learner(self, image_shape)

    def macs(self, stage, kept, image_shape):  # of two encoders with one view each
        return super().macs(stage, kept, (image_shape[0] / 2, *image_shape[1:]))
LACKS = {2: "second", 3: "first"}  # client mod 4 -> the sensor that it does not have

def split(images):
    """uint8 [N, C, H, W] -> channel 0 is the first sensor's: grey halves, or luma and chromas."""
    if images.shape[1] == 1:
        half = images.shape[2] // 2
        return torch.cat([images[:, :, :half], images[:, :, -half:]], 1)
    jpeg = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    mixed = torch.einsum("dc,nchw->ndhw", jpeg, images.float())
    mixed[:, 1:] += 128
    return mixed.round().clamp(0, 255).byte()

class Pair(nn.ModuleDict):  # a block of each sensor: {sensor: tokens [B, T, D]} -> the same
    def forward(self, tokens):
        return {sensor: self[sensor](x) for sensor, x in tokens.items()}

class Encoder(nn.Module):  # a ViT for each sensor; features lie side by side, [B, sensors * dim]
    def __init__(self, config, shape):
        super().__init__()
        self.channels, self.vits = {"first": 1, "second": shape[0] - 1}, nn.ModuleDict()
        for sensor in config.sensors.split():
            self.vits[sensor] = fllw.ViT(shape[1:], config.patch_size, self.channels[sensor],
                                         config.dim, config.depth, config.heads)
        towers = [vit.blocks for vit in self.vits.values()]
        self.blocks = nn.ModuleList(Pair(zip(self.vits, blocks)) for blocks in zip(*towers))
        for vit in self.vits.values():
            vit.blocks = nn.ModuleList()  # embedding, final norm and pooling stay with it

    def lower(self, images, stop):
        parts = dict(zip(self.channels, images.split(list(self.channels.values()), 1)))
        tokens = {sensor: vit.lower(parts[sensor], 0) for sensor, vit in self.vits.items()}
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

def clip(z, temperature):
    """Cross entropy of each sensor's B rows among the other's, both ways, mean. z: [2B, D]."""
    first, second = F.normalize(z.float(), dim=1).chunk(2)
    similarity, own = first @ second.T / temperature, torch.arange(len(first), device=z.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

def two_sensor_train(config, stage, message, images, number, client, progress=0.0):
    """A client's work; what it lacks it ignores and uploads as received: no change in the mean."""
    there = [sensor for sensor in config.sensors.split() if sensor != LACKS.get(client % 4)]
    mine = {n: t for n, t in message.items() if any(f".{sensor}." in n for sensor in there)}

    def step(frozen, active, head, views, criterion, micro_batch):
        if len(there) == 2:
            one, other = views.chunk(2)  # a view of its own for each sensor
            views = torch.cat([one[:, :1], other[:, 1:]], 1)
            criterion = functools.partial(clip, temperature=config.temperature)
        return contrastive_step(frozen, active, head, views, criterion, micro_batch)

    upload, losses = fllw.local_train(replace(config, sensors=" ".join(there)), stage, mine, images,
                                      number, client, progress, step)
    return {n: upload.get(n, t) for n, t in message.items() if stage.trains(n)}, losses

@torch.no_grad()
def retrieval(config, server, dataset):
    """How often the first sensor's own image is among the k nearest to the second's, in %."""
    learner = fllw.assemble(config, server, dataset.shape)
    z = learner.head(features(learner.encoder, dataset.test_images))  # one batch for its norm
    first, second = F.normalize(z, dim=1).chunk(2)
    similarity = second @ first.T
    nearer = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"top{k}": 100 * (nearer < k).double().mean().item() for k in (1, 5)}

def run(config, dataset):
    with fllw.run_folder(config, dataset, "multimodal") as (folder, state):
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        state = state or fllw.start(config, dataset.shape)
        done = fllw.train(config, dataset, folder, state, client=two_sensor_train)
        row = {**fllw.result(config, dataset, *done, client=two_sensor_train),
               **retrieval(config, state.server, dataset)}
        fllw.write(folder / "summary.json", row)
        return row

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.multimodal")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="instead of --seed")
    given = vars(parser.parse_args(arguments))  # "digits" is a recipe that leaves colours alone
    for fixed in {"method", "new_block", "seed"} & given.keys():
        raise data.InputError(f"--{fixed.replace('_', '-')} differs from row to row or is fixed")
    seeds, rows, out = given.pop("seeds"), {}, given.pop("out", "runs/multimodal")
    config = Settings(**{"images": 1000, "rounds": 16, "depth_dropout": 0.0, "clients": 4,
                         "augment": "digits", **given})
    whole = data.load(config.data, config.cache, config.images)
    dataset = whole._replace(train_images=split(whole.train_images),
                             test_images=split(whole.test_images))
    for name, method, depth in (("end-to-end", "e2e", config.depth), ("one-block", "e2e", 1),
                                ("FLL", "fll", config.depth)):
        one = replace(config, method=method, depth=depth)
        fllw.check(replace(one, seed=min(seeds)))
        done = [run(replace(one, seed=seed, out=f"{out}/{name}-seed{seed}"), dataset)
                for seed in seeds]
        rows[name] = {column: [row[column] for row in done] for column in done[0]}
    columns = {"top1": ("top-1 %", 1, 1), "top5": ("top-5 %", 1, 1), **fllw.COLUMNS}
    print(table(rows, columns))
    save("multimodal", "python -m experiments.multimodal " + " ".join(sys.argv[1:]), rows)

if __name__ == "__main__":
    fllw.command(main)
