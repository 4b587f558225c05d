"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

Guo et al. 2023, "Towards Federated Learning Under Resource Constraints via Layer-wise Training and Depth Dropout"
(arXiv 2309.05213); resource accounting after Tun et al. 2024, "LW-FedSSL" (arXiv 2401.11647).

Read it from top to bottom: configuration, model, stages and depth dropout, one client, the server, cost, evaluation.
The method ends there; what follows serves the command line: checks, tables, run folders, comparisons, benchmark, flags.

    python fllw.py             # train on the embedded digits, about two minutes on two CPU cores
    python fllw.py --compare e2e fll fdd   # methods side by side; without names, all of them
    python fllw.py --help
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
from data import InputError
from ssl_loss import MemoryMeter, ProjectionHead, contrastive_step, finetune, knn, linear_probe, nt_xent, storage_id

# -------------------------------------------------------------------------------------------- configuration


def knob(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is generated from these fields."""
    data: str = knob("mnist5k", "mnist5k, cifar10, cifar100 or a FILE.npz of your own images")
    images: int = knob(0, "use only so many of the training images, the same for every seed; 0 means all", low=0)
    method: str = knob("fll", "which blocks exist and train at a stage", choices=("fll", "e2e", "progressive"))
    dim: int = knob(64, "width of the vision transformer", low=1)
    depth: int = knob(4, "number of blocks L", low=1)
    heads: int = knob(8, "attention heads; must divide dim", low=1)
    patch_size: int = knob(7, "side of a patch, pixels; must divide the image", low=1)
    pool: str = knob("mean", "what the loss reads", choices=("mean", "token"))
    head_hidden: int = knob(256, "width of the projection head's two hidden layers", low=1)
    head_dim: int = knob(64, "dimension in which the loss compares views", low=1)
    blocks_per_stage: int = knob(1, "blocks added (and, layer-wise, trained) at each stage; must divide depth", low=1)
    new_block: str = knob("copy", "how a new block starts: as a copy of the one below, as one whose outputs are 0, or fresh",
                          choices=("copy", "zero", "fresh"))
    depth_dropout: float = knob(0.25, "probability with which a client drops each frozen block in a round, in [0, 1)")
    clients: int = knob(2, "number of clients N", low=1)
    clients_per_round: int = knob(0, "clients sampled each round; 0 means all", low=0)
    alpha: float = knob(0.0, "Dirichlet concentration of the labels over clients; 0 means IID", low=0)
    rounds: int = knob(96, "federated rounds, shared equally among the stages", low=1)
    first_share: float = knob(0.0, "share of the rounds for a layer-wise run's first stage, the one that trains the embedding; 0 means an equal share")
    local_epochs: int = knob(1, "passes of a client over its images in a round", low=1)
    batch_size: int = knob(64, "images in a local step (each gives two views)", low=2)
    micro_batch: int = knob(0, "images whose graph is held at a time (gradient caching, exact); 0 means the whole batch", low=0)
    client_failure: float = knob(0.0, "probability that a sampled client drops out of a round before uploading")
    patience: int = knob(0, "rounds without a lower loss after which a stage ends early and leaves its rounds to later ones; 0 means never", low=0)
    align: float = knob(0.0, "weight of the term that aligns a client's projections with the received model's", low=0)
    calibrate: int = knob(0, "epochs of end-to-end training by the server, on images that no client has", low=0)
    calibrate_at: str = knob("end", "when the server calibrates: after the last round or after every round", choices=("end", "round"))
    server_share: float = knob(0.1, "share of the training images that the server keeps for itself if it calibrates, in [0, 1)")
    lr: float = knob(2e-3, "peak learning rate (AdamW, one cosine per stage)", low=1e-6)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    temperature: float = knob(0.2, "temperature of NT-Xent", low=1e-6)
    augment: str = knob("auto", "recipe of the two views; auto is digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural"))
    finetune: int = knob(0, "epochs of fine-tuning in the evaluation; 0 leaves it out", low=0)
    labels_per_class: int = knob(0, "labelled images a class for fine-tuning; 0 means all", low=0)
    amp: bool = knob(False, "bf16 autocast for the model; the loss stays in float32")
    seed: int = knob(0, "everything random derives from it", low=0)
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "run folder; by default runs/<data>-<method>-seed<seed>")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")


PRESETS = {"paper": dict(  # the setting of Tun et al. 2024
    data="cifar10", dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256,
    clients=10, rounds=180, local_epochs=3, batch_size=512, finetune=40)}


def rank():
    """This process among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def rng(config, *key):
    """A numpy generator for (seed, *key) alone; key is for instance (purpose, round, client)."""
    return np.random.default_rng([config.seed, *key])


INIT, SAMPLING, DROPOUT, TRAINING, FAILURE, SERVER_IMAGES, FINETUNING = range(1, 8)  # purposes of a draw
SERVER = 2**32 - 1  # the server's number among the clients, where it trains


# ---------------------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # [B, T, D]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, residual around each half: without its two halves it is the identity."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x):  # [B, T, D]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, images):  # [B, C, H, W] -> [B, patches, D]
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): images [B, C, H, W] -> features [B, dim].

    image_size: a side in pixels or (height, width). Names and arithmetic are those of timm's VisionTransformer with
    num_classes=0: pool="token" as it comes, pool="mean" as with global_pool="avg", fc_norm=False."""

    def __init__(self, image_size=32, patch_size=4, channels=3, dim=192, depth=12, heads=3, pool="token"):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise InputError(f"the patch size {patch_size} must divide the image, which is {height} x {width} pixels")
        if dim % heads:
            raise InputError(f"the width must be a multiple of the heads, {dim} is no multiple of {heads}")
        patches = (height // patch_size) * (width // patch_size)
        self.pool = pool
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.pos_embed, std=0.5)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def lower(self, images, stop):
        """Patch embedding and the first `stop` blocks: [B, C, H, W] -> tokens [B, T, D]."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks[:stop]:
            x = block(x)
        return x

    def upper(self, x, start):
        """The blocks from `start` on, final norm, pooling: tokens [B, T, D] -> features [B, D]."""
        for block in self.blocks[start:]:
            x = block(x)
        x = self.norm(x)
        return x[:, 1:].mean(1) if self.pool == "mean" else x[:, 0]

    def forward(self, images):
        return self.upper(self.lower(images, 0), 0)


class Learner(nn.Module):
    """What is trained: the encoder and, on top of it, the projection head that is thrown away afterwards."""

    def __init__(self, config, shape, depth):
        super().__init__()
        channels, height, width = shape
        self.encoder = ViT((height, width), config.patch_size, channels, config.dim, depth, config.heads, config.pool)
        self.head = ProjectionHead(config.dim, config.head_hidden, config.head_dim)


def initial(config, shape, depth, device="cpu"):
    """State dict of a freshly initialised learner with `depth` blocks; torch's own randomness is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(int(rng(config, INIT).integers(2**63)))
        return Learner(config, shape, depth).state_dict()


# ------------------------------------------------------------------------------- stages and depth dropout

@dataclass(frozen=True)
class Stage:
    """Which blocks exist and which of them train: blocks 0..present-1 exist, first..present-1 train.

    The final norm and the head always train; patch embedding, positions and class token while block 0 does."""
    number: int   # counted from 1
    first: int    # the first block that trains
    present: int
    rounds: int

    def trains(self, name):
        """Whether the tensor of this name in a learner's state dict trains."""
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) >= self.first
        return name.startswith(("head.", "encoder.norm.")) or self.first == 0


def stages(config, history=()):
    """The stages of a run: the one place where the methods differ.

    history: the rows of the rounds done. With patience, a stage whose loss has not fallen below its best for so many
    rounds is over, and the later ones share the rounds it leaves."""
    k = config.depth if config.method == "e2e" else config.blocks_per_stage
    blocks = [(0 if config.method == "progressive" else top - k, top) for top in range(k, config.depth + 1, k)]
    plan, left = [], config.rounds
    for number, (first, present) in enumerate(blocks, 1):
        later = len(blocks) - number
        rounds = math.ceil(left / (later + 1))
        if number == 1 and later and config.first_share and config.method == "fll":
            rounds = min(max(1, round(config.first_share * left)), left - later)
        mine = [row for row in history if row["stage"] == number]
        losses = [row["loss"] for row in mine if row["loss"] is not None]
        if later and config.patience and losses and len(losses) - 1 - np.argmin(losses) >= config.patience:
            rounds = min(rounds, len(mine))
        plan.append(Stage(number, first, present, rounds))
        left -= rounds
    return plan


def sample_clients(config, round):
    """The clients of a round, in ascending order: a function of (seed, round)."""
    chosen = rng(config, SAMPLING, round).choice(config.clients, config.clients_per_round or config.clients, replace=False)
    return sorted(chosen.tolist())


def draw_blocks(config, stage, round, client):
    """Federated depth dropout: the blocks this client keeps this round, a function of (seed, round, client).

    Every frozen block is dropped with probability depth_dropout, independently; active blocks never are."""
    dropped = rng(config, DROPOUT, round, client).random(stage.first) < config.depth_dropout
    return [b for b in range(stage.present) if b >= stage.first or not dropped[b]]


def broadcast(server, stage, kept):
    """What a client receives: the server's tensors, less the blocks that depth dropout dropped."""
    gone = tuple(f"encoder.blocks.{b}." for b in range(stage.present) if b not in kept)
    return {name: tensor for name, tensor in server.items() if not name.startswith(gone)}


def grow(config, server, shape, stage):
    """The server's state at the start of a stage, with the blocks that the stage adds.

    A copy is the very tensors of the last block trained before, so broadcasting it costs one block, not two. A zero
    block is a copy whose two output layers are 0: at first it is the identity, and features go on where they were."""
    top = max(int(name.split(".")[2]) for name in server if name.startswith("encoder.blocks."))
    source = server
    if config.new_block == "fresh":
        device = server["encoder.cls_token"].device
        source = initial(config, shape, stage.present, "meta" if device.type == "meta" else "cpu")
        source = {name: tensor.to(device) for name, tensor in source.items()}
    added = {}
    for b in range(top + 1, stage.present):
        origin = f"encoder.blocks.{top if source is server else b}."
        added |= {name.replace(origin, f"encoder.blocks.{b}."): t for name, t in source.items() if name.startswith(origin)}
    if config.new_block == "zero":
        added |= {name: t.new_zeros(()).expand_as(t) for name, t in added.items() if ".attn.proj." in name or ".mlp.fc2." in name}
    return {**server, **added}


# ----------------------------------------------------------------------------------------------- one client

def receive(config, message, shape, stage):
    """Build a client's learner from what it received; a dropped block is the identity and holds nothing."""
    with torch.device("meta"):
        learner = Learner(config, shape, stage.present)
    for b in range(stage.present):
        if f"encoder.blocks.{b}.norm1.weight" not in message:
            learner.encoder.blocks[b] = nn.Identity()
    learner.load_state_dict({name: tensor.clone() for name, tensor in message.items()}, assign=True)
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    return learner


def recipe(config):
    """The name of the views' recipe: digits for the embedded digits, natural for the rest, unless told otherwise."""
    return ("digits" if config.data == "mnist5k" else "natural") if config.augment == "auto" else config.augment


def local_train(config, stage, message, images, round, client, progress=0.0):
    """One client's work in one round.

    message: what broadcast() handed over; images: uint8 [n, C, H, W], on the device; progress: the share of the
    stage's rounds that is done. Returns (upload, losses, peak_memory_bytes): the trained tensors, the loss of every
    local step [steps], and the memory that the first two of them took."""
    changes = data.RECIPES[recipe(config)]
    draws = torch.Generator(images.device).manual_seed(int(rng(config, TRAINING, round, client).integers(2**63)))
    batch = min(config.batch_size, len(images))
    steps = len(images) // batch  # in an epoch; what is left over waits for the next shuffle
    meter, losses = MemoryMeter(images.device), []
    with meter:
        learner = receive(config, message, images.shape[1:], stage)
        trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay, fused=True)
        frozen, active, head = split(config, learner, stage)
        if config.align:  # what was received, once more, as it came; the frozen blocks are the same in both
            received = receive(config, broadcast(message, stage, range(stage.first, stage.present)), images.shape[1:], stage)
            _, old_active, old_head = split(config, received, stage)
    for step in range(config.local_epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(images), device=images.device, generator=draws).split(batch)
        done = progress + step / (config.local_epochs * steps) / stage.rounds  # of this stage
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * done)) / 2
        with meter if step < 2 else contextlib.nullcontext():  # from the second step the optimizer has its state
            optimizer.zero_grad()
            views, old = [data.two_views(images[order[step % steps]], changes, draws)], None
            if config.align:
                with torch.no_grad():
                    parts = views[0].split(2 * config.micro_batch or len(views[0]))
                    old = old_head(torch.cat([old_active(frozen(part)) for part in parts]))
                    del parts
            losses.append(contrastive_step(frozen, active, head, views.pop(), lambda z: criterion(config, z, old), config.micro_batch))
            optimizer.step()
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses), meter.peak


def criterion(config, z, old=None):
    """NT-Xent of the projections z [2B, D] of two views; with `old`, the projections of the same views by the model that
    the client received, also representation alignment (Tun et al. 2024): find the image's other view as it was there."""
    contrast, (z1, z2) = lambda a, b: nt_xent(a, b, config.temperature), z.chunk(2)
    if old is None:
        return contrast(z1, z2)
    old1, old2 = old.chunk(2)
    return contrast(z1, z2) + config.align * (contrast(z1, old2) + contrast(z2, old1)) / 2


def split(config, learner, stage):
    """The learner as three functions: the frozen part, which keeps no graph, the active part, and the head."""
    device = next(learner.parameters()).device.type
    amp = torch.autocast(device, torch.bfloat16, enabled=config.amp)  # the loss itself stays in float32
    encoder = learner.encoder
    if stage.first == 0:
        return (lambda images: images), amp(encoder.forward), amp(learner.head.forward)
    return (torch.no_grad()(amp(lambda images: encoder.lower(images, stage.first))),
            amp(lambda tokens: encoder.upper(tokens, stage.first)), amp(learner.head.forward))


# ---------------------------------------------------------------------------------------------- the server

@dataclass
class State:
    """All there is between two rounds."""
    shape: tuple                                 # (channels, height, width) of an image
    server: dict                                 # name -> tensor: the encoder so far, and the head
    history: list = field(default_factory=list)  # one dict a round
    held: dict = field(default_factory=dict)     # client -> names of the final tensors it has received


class WeightedMean:
    """FedAvg (McMahan et al. 2017): the mean of state dicts, weighted by |D_n|.

    A running mean, so that memory does not grow with the number of clients."""

    def __init__(self):
        self.weight, self.mean = 0, {}

    def add(self, state, weight):
        self.weight += weight
        for name, tensor in state.items():
            if name not in self.mean:
                self.mean[name] = tensor.clone()
            elif not tensor.is_meta:  # cost() counts tensors that hold no data
                self.mean[name].lerp_(tensor, weight / self.weight)

    def combine(self, like, report):
        """Over the processes of torchrun, by one all-reduce of the weighted sum, the weight and the report.

        like: name -> tensor, for the shapes; report: array of numbers, 0 where another process fills it in."""
        parts = [self.mean.get(name, torch.zeros_like(t)).flatten().double() * self.weight for name, t in like.items()]
        numbers = torch.tensor([*report.flatten(), self.weight], dtype=torch.float64, device=parts[0].device)
        total = torch.cat([*parts, numbers])
        dist.all_reduce(total)
        *parts, numbers = total.split([len(part) for part in [*parts, numbers]])
        self.weight = numbers[-1].item()
        if self.weight:
            self.mean = {name: (part / self.weight).to(t).view_as(t) for (name, t), part in zip(like.items(), parts)}
        return numbers[:-1].view(report.shape).cpu().numpy()


def nbytes(message):
    """Bytes of a message; a tensor that goes by two names travels once, and one number repeated is one number."""
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in message.values()}.values())


def news(state, stage, message, client):
    """The part of a message that a client which keeps what it received does not hold yet.

    What it holds is noted in state.held: tensors that are frozen, since only those are final."""
    first = {}
    for name, tensor in state.server.items():
        first.setdefault(storage_id(tensor), name)  # a block that starts as a copy goes by the original's name
    held = state.held.setdefault(client, set())
    new = {name: tensor for name, tensor in message.items() if first[storage_id(tensor)] not in held}
    held.update(name for name in map(first.get, map(storage_id, message.values())) if not stage.trains(name))
    return new


def sound(upload, expected):
    """Whether an upload has exactly the tensors that the server expects, and only finite numbers in them."""
    form = lambda state: {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if form(upload) != form(expected):
        return False
    return any(t.is_meta for t in upload.values()) or bool(torch.stack([t.isfinite().all() for t in upload.values()]).all())


class Diverged(Exception):
    """The loss became NaN or infinite on every client of a round."""


def run_round(config, state, stage, work, progress=0.0, share=(0, 1)):
    """One round: broadcast, local work of the sampled clients, upload, average. Updates `state`, returns its new row.

    work(stage, message, round, client, progress) -> (upload, losses, peak_memory_bytes, number of images) is what a
    client does. share = (rank, K) when torchrun runs K processes: each does every K-th client."""
    began, round, average = time.perf_counter(), len(state.history) + 1, WeightedMean()
    clients = sample_clients(config, round)
    kept = [draw_blocks(config, stage, round, client) for client in clients]
    trained = {name: tensor for name, tensor in state.server.items() if stage.trains(name)}
    final = replace(stage, first=0) if config.calibrate and config.calibrate_at == "round" else stage  # nothing, or what is frozen
    bytes_down = []  # [kept what it received, stateless] a client
    report = np.zeros((len(clients), 4))  # [bytes up, sound, loss, peak memory] a client
    for i, client in enumerate(clients):
        message = broadcast(state.server, stage, kept[i])
        bytes_down.append((nbytes(news(state, final, message, client)), nbytes(message)))
        failed = rng(config, FAILURE, round, client).random() < config.client_failure
        if failed or i % share[1] != share[0]:
            continue
        upload, losses, peak, images = work(stage, message, round, client, progress)
        report[i] = nbytes(upload), sound(upload, trained), losses.mean().item(), peak
        if report[i, 1]:
            average.add(upload, images)
    if share[1] > 1:
        report = average.combine(trained, report)
    answered, accepted = report[:, :2].T > 0
    if answered.any() and not np.isfinite(report[answered, 2]).any():
        raise Diverged(f"the loss became NaN or infinite on every client in round {round}")
    state.server = {**state.server, **average.mean}
    calibrated = calibrate(config, state, stage, work, progress, share)
    state.history.append({
        "round": round, "stage": stage.number, "method": config.method,
        "loss": float(report[accepted, 2].mean()) if accepted.any() else None,
        "active_blocks": list(range(stage.first, stage.present)), "clients": clients, "kept_blocks": kept,
        "lost": np.array(clients)[~answered].tolist(), "rejected": np.array(clients)[answered & ~accepted].tolist(),
        "download_bytes": float(np.mean(bytes_down, 0)[0]), "stateless_download_bytes": float(np.mean(bytes_down, 0)[1]),
        "upload_bytes": float(report[:, 0].mean()), "calibrated": calibrated,
        "macs": float(np.mean([config.local_epochs * macs(config, stage, k, state.shape) for k in kept])),
        "peak_memory_bytes": int(report[:, 3].max()), "seconds": time.perf_counter() - began})
    return state.history[-1]


def calibrate(config, state, stage, work, progress, share):
    """Server-side calibration (Tun et al. 2024): the server trains all present blocks on its own images.

    Its work is a client's, only that everything trains; under torchrun the first process does it for all. After the
    last round it has a cosine of its own, after every round the stage's. Returns whether it did anything."""
    last = config.calibrate_at == "end"
    if not config.calibrate or (last and len(state.history) + 1 < config.rounds):
        return False
    whole, result = replace(stage, first=0, rounds=1 if last else stage.rounds), WeightedMean()
    if share[0] == 0:
        upload, *_ = work(whole, state.server, len(state.history) + 1, SERVER, 0.0 if last else progress)
        if sound(upload, state.server):
            result.add(upload, 1)
    if share[1] > 1:
        result.combine(state.server, np.zeros(0))
    state.server = {**state.server, **result.mean}
    return result.weight > 0


def run_rounds(config, state, work, share=(0, 1), past=None):
    """All rounds that `state` has not seen yet, one after the other; yields each row.

    past: rows whose losses end the stages (with patience), if not those of `state` itself."""
    while len(state.history) < config.rounds:
        done = len(state.history)
        for stage in stages(config, state.history if past is None else past):
            if done < stage.rounds:
                break
            done -= stage.rounds
        if done == 0:
            state.server = grow(config, state.server, state.shape, stage)
        yield run_round(config, state, stage, work, done / stage.rounds, share)


def holdings(config, labels):
    """Who holds which images: client -> indices, and SERVER -> those that the server keeps if it calibrates."""
    kept = round(config.server_share * len(labels)) if config.calibrate else 0
    order = torch.from_numpy(rng(config, SERVER_IMAGES).permutation(len(labels)))
    own, rest = order[:kept], order[kept:].sort().values
    parts = data.partition(labels[rest], config.clients, config.alpha, config.seed)
    if config.calibrate and kept < 2:
        raise InputError(f"a server that calibrates needs at least 2 images: --server-share {config.server_share:g} "
                         f"of {len(labels)} is {kept}")
    return {SERVER: own, **{client: rest[part] for client, part in enumerate(parts)}}


def federate(config, on_round=None, dataset=None, state=None):
    """Train by federated rounds; returns (encoder, history).

    on_round(row, state), if given, is called after every round. A `state` from there, or from a checkpoint, goes on
    where it stopped."""
    check(config)
    device = pick_device(config)
    dataset = dataset or data.load(config.data, config.cache, config.images)
    images = dataset.train_images.to(device)
    parts = holdings(config, dataset.train_labels)
    state = state or State(dataset.shape, initial(config, dataset.shape, stages(config)[0].present))
    state.server = {name: tensor.to(device) for name, tensor in state.server.items()}

    def work(stage, message, round, client, progress):
        mine = images[parts[client].to(device)]
        one = replace(config, local_epochs=config.calibrate, align=0.0) if client == SERVER else config
        return *local_train(one, stage, message, mine, round, client, progress), len(mine)

    share = (rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for row in run_rounds(config, state, work, share):
        if on_round:
            on_round(row, state)
    return encoder_of(config, state.server, dataset.shape), state.history


def encoder_of(config, server, shape):
    """The encoder in a server's state, with all its blocks: evaluation and deployment always use full depth."""
    state = {name.removeprefix("encoder."): t for name, t in server.items() if name.startswith("encoder.")}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    with torch.device("meta"):
        encoder = ViT(shape[1:], config.patch_size, shape[0], config.dim, depth, config.heads, config.pool)
    encoder.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return encoder.eval()


# ----------------------------------------------------------------------------------------------------- cost

def macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image in one local epoch, as Tun et al. 2024 count: two views, forward 1x and
    backward 2x for what trains, forward 1x for what is frozen; linear layers and attention products. Micro-batches
    run what trains, but for the head, forward a second time; alignment runs what was received forward once."""
    channels, height, width = image_shape
    D, patches = config.dim, height * width // config.patch_size**2
    T = patches + 1
    block = T * 12 * D**2 + 2 * T**2 * D  # qkv 3, proj 1, mlp 4 + 4; query-key and attention-value products
    embed = patches * config.patch_size**2 * channels * D
    head = config.head_hidden * (D + config.head_hidden + config.head_dim)
    active, times = stage.present - stage.first, 4 if config.micro_batch else 3
    trained = (1 if stage.first else times) * embed + (len(kept) - active + times * active) * block + 3 * head
    return 2 * (trained + (embed + len(kept) * block + head) * (config.align > 0))


def step_memory(config, stage, kept, image_shape):
    """Peak bytes of a client at this stage, measured by local_train on two blank batches.

    They run on torch's fake tensors, which have shapes and lifetimes but no data: the same bytes as a real step on
    the CPU, in no time and no memory. What a GPU's allocator says of real steps is in the history."""
    state = broadcast(initial(config, image_shape, stage.present, "meta"), stage, kept)
    with FakeTensorMode():
        message = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
        images = torch.zeros(2 * config.batch_size, *image_shape, dtype=torch.uint8)
        return local_train(config, stage, message, images, 0, 0)[2]


def cost(config, method, image_shape, history=()):
    """What a client that takes part in every round pays over the whole training, without training.

    Replays the rounds of `method` with tensors that have shapes but no data. image_shape: (channels, height, width);
    history: the rows of a run with patience, whose losses tell when its stages ended. What the server pays is not in it.
    Returns a dict: download_bytes (a client that keeps what it received), stateless_download_bytes, upload_bytes,
    macs (multiply-accumulates for one image over all local epochs) and peak_memory_bytes."""
    check(replace(config, method=method))
    clients = min(config.clients_per_round or config.clients, 10)  # with depth dropout, the mean over as many draws
    config = replace(config, method=method, clients=clients, clients_per_round=0, client_failure=0.0)
    plan = stages(config)
    work = lambda stage, message, *_: ({n: t.clone() for n, t in message.items() if stage.trains(n)}, torch.zeros(1), 0, 1)
    rows = list(run_rounds(config, State(image_shape, initial(config, image_shape, plan[0].present, "meta")), work, past=history))
    fullest = {row["stage"]: max(row["kept_blocks"], key=len) for row in rows}
    return {**{name: sum(row[name] for row in rows)
               for name in ("download_bytes", "stateless_download_bytes", "upload_bytes", "macs")},
            # in between, stages differ by a frozen block's parameters
            "peak_memory_bytes": max(step_memory(config, s, fullest[s.number], image_shape) for s in {plan[0], plan[-1]})}


# ----------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def features(encoder, images, batch=500):
    """Features of uint8 images [N, C, H, W] -> float32 [N, dim], on the encoder's device."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(data.normalise(part.to(device))) for part in images.split(batch)])


def evaluate(encode, dataset):
    """k-NN and linear-probe accuracy in % of a function uint8 images -> features; test labels choose nothing."""
    train, test = encode(dataset.train_images), encode(dataset.test_images)
    labels = dataset.train_labels.to(train.device), dataset.test_labels.to(train.device)
    return {"knn": knn(train, labels[0], test, labels[1]), "linear_probe": linear_probe(train, labels[0], test, labels[1])}


# ------------------------------------------------------------------------------------- settings that can be run

def check(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    for f in fields(config):
        value, low, choices = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("choices")
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in choices:
            raise InputError(f"{flag} must be one of {', '.join(choices)}, it is {value!r}")
        if low is not None and not (low <= value < math.inf):
            raise InputError(f"{flag} must be at least {low:g}, it is {value:g}")
    for name in ("depth_dropout", "client_failure", "first_share", "server_share"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be in [0, 1), it is {getattr(config, name):g}")
    if config.dim % config.heads:
        raise InputError(f"--dim must be a multiple of --heads, {config.dim} is no multiple of {config.heads}")
    if config.depth % config.blocks_per_stage:
        raise InputError(f"--depth must be a multiple of --blocks-per-stage, "
                         f"{config.depth} is no multiple of {config.blocks_per_stage}")
    if config.labels_per_class and not config.finetune:
        raise InputError("--labels-per-class is for fine-tuning: give its epochs, --finetune 40 for instance")
    if config.clients_per_round > config.clients:
        raise InputError(f"--clients-per-round must be at most --clients ({config.clients}), it is {config.clients_per_round}")
    if config.rounds < len(stages(config)):
        raise InputError(f"--rounds must be at least the number of stages ({len(stages(config))}), it is {config.rounds}")
    pick_device(config)


def pick_device(config):
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(config.device).type not in ("cpu", "cuda"):
            raise ValueError
        return torch.empty(0, device=config.device).device
    except (ValueError, RuntimeError, AssertionError):
        raise InputError(f"there is no device {config.device!r} here: use cpu"
                         + ", cuda" * torch.cuda.is_available() + " or auto") from None


# ------------------------------------------------------------------------------------------- tables of results

def label(config):
    """A method's name in tables."""
    fll = ("FLL" + f", {config.blocks_per_stage} blocks a stage" * (config.blocks_per_stage > 1)
           + f" + FDD {config.depth_dropout:g}" * (config.depth_dropout > 0))
    name = {"fll": fll, "progressive": "progressive", "e2e": "end-to-end" if config.clients > 1 else "centralized"}[config.method]
    return (name + f" + calibration {config.calibrate}" * (config.calibrate > 0) + f" + alignment {config.align:g}" * (config.align > 0)
            + f" + patience {config.patience}" * (config.patience > 0))


COLUMNS = {  # of the tables and of summary.json: (heading, unit's divisor, format)
    "seeds": ("seeds", 1, ".0f"),
    "knn": ("k-NN %", 1, ".1f"), "linear_probe": ("probe %", 1, ".1f"), "finetuned": ("fine-tuned %", 1, ".1f"),
    "peak_memory_bytes": ("peak MiB", 2**20, ".1f"), "macs": ("GMAC/image", 1e9, ".2f"), "download_bytes": ("down MB", 1e6, ".2f"),
    "stateless_download_bytes": ("stateless MB", 1e6, ".2f"), "upload_bytes": ("up MB", 1e6, ".2f"), "seconds": ("seconds", 1, ".0f")}


def table(rows):
    """Rows {name: {column: number, numbers over seeds, or text}} as text, in the order of COLUMNS.

    Numbers over seeds become their mean, accuracies with the standard deviation; {} is a row that was not run."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]

    def cell(column, value):
        heading, unit, form = COLUMNS[column]
        if isinstance(value, str):
            return value
        values = np.atleast_1d(value) / unit
        spread = f" ±{np.std(values, ddof=1):{form}}" if len(values) > 1 and "%" in heading else ""
        return f"{np.mean(values):{form}}" + spread

    width = 2 + max(map(len, rows))
    lines = [" " * width + "".join(f"{COLUMNS[c][0]:>13}" for c in columns)]
    for name, row in rows.items():
        cells = [cell(c, row[c]) if c in row else "-" for c in columns] if row else ["not run"]
        lines.append(f"{name:<{width}}" + "".join(f"{text:>13}" for text in cells))
    return "\n".join(lines)


def show(config, dataset, out, rows, over="", history=()):
    """Print and save a table, with what micro-batches would cost."""
    if not config.micro_batch:
        for one in (replace(config, micro_batch=16), replace(config, micro_batch=16, method="e2e")):
            rows[label(one) + ", micro-batch 16"] = cost(one, one.method, dataset.shape, history if one.patience else ())
    print(f"\nAccuracy on {len(dataset.test_images):,} test images{over}, and what a client paid\n{table(rows)}\n"
          "Costs are one client's over all rounds; GMAC for one image, all epochs; down counts a client that keeps what it\n"
          "received, stateless one that keeps nothing between rounds.")
    rows.pop("ratio", None)
    write(out / "summary.json", rows)


def baseline(key, config, dataset):
    """Accuracies of a row that needs no pre-training: raw pixels, a random encoder, supervised training from scratch."""
    device = pick_device(config)
    if key == "raw":
        return evaluate(lambda images: images.to(device).flatten(1) / 255, dataset)
    random = encoder_of(config, initial(config, dataset.shape, config.depth), dataset.shape).to(device)
    return evaluate(lambda images: features(random, images), dataset) if key == "random" else finetuned(config, random, dataset)


def finetuned(config, encoder, dataset):
    """The column of fine-tuning, if it is asked for."""
    draws = torch.Generator(pick_device(config)).manual_seed(int(rng(config, FINETUNING).integers(2**63)))
    return {"finetuned": finetune(encoder, dataset, data.LIGHT[recipe(config)], draws, config.finetune,
                                  labels_per_class=config.labels_per_class, amp=config.amp)} if config.finetune else {}


def result(config, dataset, encoder, history):
    """The row of a trained method: accuracies, what a client paid, and seconds of training."""
    price = cost(config, config.method, dataset.shape, history)
    if config.clients == 1:  # no federation, nothing is sent
        price = {name: value for name, value in price.items() if "bytes" not in name or "memory" in name}
    return {**evaluate(lambda images: features(encoder, images), dataset), **finetuned(config, encoder, dataset), **price,
            "seconds": sum(row["seconds"] for row in history)}


# ------------------------------------------------------------------------------------------------ run folders

def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: a reader never sees half a file."""
    if rank() == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer) if path.suffix == ".pt" else buffer.write(json.dumps(content, indent=1).encode())
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)


def saved_settings(folder):
    """What config.json of a run folder says, {} where there is nothing yet; InputError for a folder that is no run's."""
    if not folder.exists() or folder.is_dir() and all(p.suffix == ".tmp" for p in folder.iterdir()):
        return {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        saved = json.loads((folder / "config.json").read_text())
        if asdict(Config()).keys() <= saved.keys():
            return saved
    raise InputError(f"{folder} exists and is not a run folder: choose another --out (a comparison goes on by its own command)")


def refuse_changes(path, saved, asked, but=()):
    """Raise InputError if a setting that shapes the result, `but` those named, differs from the saved one."""
    for name, value in asked.items():
        if name not in ("device", "out", "cache", *but) and value != saved.get(name):
            raise InputError(f"--{name.replace('_', '-')} {value} contradicts {path}, which was made with {saved.get(name)}: "
                             "go on without that flag, or start anew with another --out")


def load_checkpoint(folder, config, shape):
    """The State to go on from, of this very configuration (but for device, folders and fine-tuning); None if there is none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = saved["config"], State(saved["shape"], saved["server"], saved["history"],
                                                 {client: set(names) for client, names in saved["held"].items()})
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path} is damaged or not a checkpoint of this program ({type(error).__name__}): "
                         "restore it, or train anew with another --out") from None
    refuse_changes(path, settings, asdict(config), but=("finetune", "labels_per_class"))
    if tuple(state.shape) != shape:
        raise InputError(f"{path} was trained on images of shape {tuple(state.shape)}, --data has {shape}: train anew with another --out")
    return state


def open_folder(folder, config, shape, **more):
    """Make the folder of a training, or find that it cannot be written, before anything is trained."""
    needed = 4 * nbytes(initial(config, shape, config.depth, "meta"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise InputError(f"the disk of {folder} is too full, a run needs {needed / 1e6:.0f} MB: free some or choose another --out")
        write(folder / "config.json", {**asdict(config), "image_shape": shape, **more})
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None


def load_encoder(run):
    """The trained encoder of a run folder, ready for `encoder(data.normalise(images))`."""
    saved = saved_settings(Path(run))
    state = torch.load(Path(run) / "encoder.pt", map_location="cpu", weights_only=True)
    config = Config(**{f.name: saved[f.name] for f in fields(Config)})
    return encoder_of(config, {f"encoder.{name}": tensor for name, tensor in state.items()}, saved["image_shape"])


# ------------------------------------------------------------------------------ what the command line can do

def load_dataset(config):
    """The data set of a configuration that can be run; under torchrun one process of a machine downloads."""
    check(config)
    if config.data in data.ARCHIVES:
        initial(config, (3, 32, 32), 1, "meta")  # before downloading, see that the patch size fits
    later = dist.is_initialized() and int(os.environ["LOCAL_RANK"]) > 0
    if later:
        dist.barrier()
    dataset = data.load(config.data, config.cache, config.images)
    if dist.is_initialized() and not later:
        dist.barrier()
    return dataset


def strip(row):
    """Which blocks each client of a round held: A active, + frozen, . dropped (the first three clients)."""
    strips = ["".join("A" if b in row["active_blocks"] else "+" if b in kept else "."
                      for b in range(1 + max(row["active_blocks"]))) for kept in row["kept_blocks"][:3]]
    return " ".join(strips) + " ..." * (len(row["kept_blocks"]) > 3)


def remarks(row):
    """What was out of the ordinary in a round, in words."""
    said = [f"client {c} lost" for c in row["lost"]] + [f"client {c} rejected: NaN, infinity or a wrong shape" for c in row["rejected"]]
    said += ["no sound answer: the round changes nothing"] * (row["loss"] is None)
    said += ["calibrated"] * row["calibrated"]
    return "  (" + "; ".join(said) + ")" if said else ""


def train(config, dataset, out, state=None):
    """Train one method, from `state` on if given, one line a round, and leave a run folder. Returns (encoder, history)."""
    plan, began, already = stages(config), time.perf_counter(), len(state.history) if state else 0
    work = [macs(config, stage, range(stage.present), dataset.shape) for stage in plan for _ in range(stage.rounds)]
    print(f"\n{label(config)}: {config.rounds} rounds in {len(plan)} stages; blocks are A active, + frozen, . dropped; "
          f"bytes and peak memory are a client's\n{'stage':>6} {'round':>8} {'active':>7} {'clients':>8} {'loss':>6} "
          f"{'down MB':>8} {'up MB':>7} {'peak MiB':>9} {'seconds':>8} {'left s':>7}  blocks of each client")

    def after(row, state):
        write(out / "checkpoint.pt", {"config": asdict(config), "shape": state.shape, "server": state.server,
                                      "history": state.history, "held": {c: sorted(h) for c, h in state.held.items()}})
        done = row["round"]
        left = (time.perf_counter() - began) * sum(work[done:]) / sum(work[already:done])
        first, last = row["active_blocks"][0] + 1, row["active_blocks"][-1] + 1
        answered = len(row["clients"]) - len(row["lost"]) - len(row["rejected"])
        print(f"{row['stage']:>3}/{len(plan):<2} {done:>4}/{config.rounds:<3} {f'{first}-{last}' if last > first else last:>7} "
              f"{answered:>4}/{config.clients:<3} {'  none' if row['loss'] is None else format(row['loss'], '6.3f')} "
              f"{row['download_bytes'] / 1e6:>8.3f} {row['upload_bytes'] / 1e6:>7.3f} "
              f"{row['peak_memory_bytes'] / 2**20:>9.1f} {row['seconds']:>8.2f} {left:>7.0f}  {strip(row)}{remarks(row)}",
              flush=True)

    encoder, history = federate(config, after, dataset, state)
    write(out / "history.json", history)
    write(out / "encoder.pt", {name: tensor.cpu() for name, tensor in encoder.state_dict().items()})
    return encoder, history


def run(config, resume):
    """Train one method, and show it next to what needs no pre-training and to what end-to-end training costs."""
    out = Path(config.out or f"runs/{Path(config.data).stem}-{config.method}-seed{config.seed}")
    dataset = load_dataset(config)
    holdings(config, dataset.train_labels)
    if saved_settings(out).get("compare"):
        raise InputError(f"{out} is a row of the comparison in {out.parent}: choose another --out")
    if not (resume or (out / "summary.json").exists()) and (out / "checkpoint.pt").exists():  # below, summary.json goes last
        raise InputError(f"{out} holds an unfinished run: continue it with --resume {out}, or choose another --out")
    state = load_checkpoint(out, config, dataset.shape) if resume else None
    open_folder(out, config, dataset.shape)
    if not resume and rank() == 0:
        for name in ("checkpoint.pt", "encoder.pt", "history.json", "summary.json"):
            (out / name).unlink(missing_ok=True)
    stop_on_interrupt(f"python fllw.py --resume {out}")
    encoder, history = train(config, dataset, out, state)
    if rank():
        return
    rows = {name: baseline(key, config, dataset) for key, name in BASELINES.items() if key != "scratch" or config.finetune}
    mine = rows[label(config)] = result(config, dataset, encoder, history)
    if config.method != "e2e":
        whole = replace(config, method="e2e")
        rows[label(whole)] = price = cost(whole, "e2e", dataset.shape)
        rows["ratio"] = {c: f"{price[c] / mine[c]:.1f}x" for c in price if mine.get(c)}
    show(config, dataset, out, rows, history=history)
    print(f"Everything is in {out}: summary.json is this table, encoder.pt the encoder, history.json the rounds")


BASELINES = {"raw": "raw pixels", "random": "random encoder", "scratch": "scratch"}
ROWS = (*BASELINES, "centralized", "e2e", "progressive", "fll", "fdd", "fdd-half", "fdd-epochs", "2-blocks", "2-blocks-epochs",
        "align", "patience", "calibrate", "e2e-calibrate", "e2e-bytes", "e2e-compute", "fdd-bytes", "fdd-compute")


def variants(config, shape):
    """The rows of a comparison that these settings allow: key -> (name in the table, settings)."""
    fll = replace(config, method="fll", depth_dropout=0.0, blocks_per_stage=1, calibrate=0, align=0.0, patience=0)
    fdd, e2e, epochs = replace(fll, depth_dropout=0.25), replace(fll, method="e2e"), config.local_epochs
    rows = {
        **dict.fromkeys(BASELINES, config),
        "centralized": replace(e2e, clients=1, clients_per_round=0), "e2e": e2e, "progressive": replace(fll, method="progressive"),
        "fll": fll, "fdd": fdd, "fdd-half": replace(fll, depth_dropout=0.5),
        "fdd-epochs": replace(fdd, local_epochs=3 * epochs),  # spends most of the compute that frozen blocks save
        "2-blocks": replace(fll, blocks_per_stage=2),
        "2-blocks-epochs": replace(fdd, blocks_per_stage=2, local_epochs=2 * epochs),  # likewise
        "align": replace(fll, align=1.0), "patience": replace(fll, patience=3),
        "calibrate": replace(fdd, calibrate=60), "e2e-calibrate": replace(e2e, calibrate=60)}
    names = {key: label(one) + f", {one.local_epochs} local epochs" * (one.local_epochs != epochs) for key, one in rows.items()} | BASELINES
    price = {key: cost(replace(rows[key], seed=0), rows[key].method, shape) for key in ("e2e", "fdd")}
    for mine, other in (("e2e", "fdd"), ("fdd", "e2e")):  # as many rounds as the other method's bytes, or compute, pay for
        for measure, columns in (("bytes", ("download_bytes", "upload_bytes")), ("compute", ("macs",))):
            ratio = sum(price[other][c] for c in columns) / sum(price[mine][c] for c in columns)
            rounds, key = max(len(stages(rows[mine])), round(config.rounds * ratio)), f"{mine}-{measure}"
            rows[key], names[key] = replace(rows[mine], rounds=rounds), f"{names[mine]}, {rounds} rounds: {measure} of {names[other]}"
    odd = config.depth % 2 > 0
    impossible = {"scratch": config.finetune == 0, "2-blocks": odd, "2-blocks-epochs": odd, "centralized": config.clients == 1}
    return {key: (names[key], rows[key]) for key in ROWS if not impossible.get(key)}


def compare(config, keys, seeds):
    """Train the rows `keys` (all if empty) with several seeds, each in a run folder of its own; one table of all that is finished."""
    out = Path(config.out or f"runs/{Path(config.data).stem}-compare")
    dataset = load_dataset(config)
    plan = variants(config, dataset.shape)
    if impossible := [key for key in keys if key not in plan]:
        raise InputError(f"the row {impossible[0]} cannot be run: scratch needs --finetune, 2-blocks an even --depth, centralized --clients above 1")
    there = sorted(out.iterdir()) if out.is_dir() else []
    for path in [p for p in there if not p.name.startswith("summary.json")] or there:  # all are rows, made with these settings
        if saved := saved_settings(path):
            key, seed = saved.get("compare"), saved["seed"]
            if key not in plan or path.name != f"{key}-seed{seed}":
                raise InputError(f"{path} is not a row of this comparison: choose another --out")
            refuse_changes(path, saved, asdict(replace(plan[key][1], seed=seed)))
    jobs, done = [], {}
    for seed, key in itertools.product(seeds, plan):
        folder, one = out / f"{key}-seed{seed}", replace(plan[key][1], seed=seed)
        if key == "raw" and seed != seeds[0]:  # draws nothing
            continue
        if (folder / "summary.json").exists():
            done[key, seed] = json.loads((folder / "summary.json").read_text())
        elif key in (keys or plan):
            holdings(one, dataset.train_labels)
            jobs.append((key, one, folder, load_checkpoint(folder, one, dataset.shape)))
    stop_on_interrupt("the same command")
    for key, one, folder, state in jobs:
        open_folder(folder, one, dataset.shape, compare=key)
        trained = None if key in BASELINES else train(one, dataset, folder, state)
        if rank() == 0:
            done[key, one.seed] = result(one, dataset, *trained) if trained else baseline(key, one, dataset)
            write(folder / "summary.json", done[key, one.seed])
    if rank():
        return
    rows = {}
    for key, (name, _) in plan.items():
        found = [done[key, seed] for seed in seeds if (key, seed) in done]
        rows[name] = {"seeds": len(found), **{c: [row[c] for row in found] for c in found[0]}} if found else {}
    show(config, dataset, out, rows, f", mean ± standard deviation over seeds of {', '.join(map(str, seeds))}" * (len(seeds) > 1))
    print(f"Everything is in {out}: summary.json is this table, the other folders are its rows, seed by seed")


def bare_loop(config, stage, learner, views, steps):
    """What a local step has to compute, and nothing else: no client, no augmentation, no micro-batches, no meter."""
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], fused=True)
    for _ in range(steps):
        with torch.autocast(views.device.type, torch.bfloat16, enabled=config.amp):
            with torch.set_grad_enabled(stage.first == 0):
                tokens = learner.encoder.lower(views, stage.first)
            z = learner.head(learner.encoder.upper(tokens, stage.first))
        optimizer.zero_grad()
        nt_xent(*z.chunk(2), config.temperature).backward()
        optimizer.step()


def benchmark(config, turns=3, steps=3, batches=(64, 256, 512)):
    """Seconds of a local step at the first, middle and last stage of every method (medians of turns, taken in turn),
    next to a bare loop over the same model and to the share that macs() predicts; then the memory of a step."""
    check(config)
    shape = (3, 32, 32) if config.data in data.ARCHIVES else data.load(config.data).shape
    device, batch = pick_device(config), config.batch_size
    images = torch.randint(0, 256, ((2 + steps) * batch, *shape), dtype=torch.uint8, device=device)
    views = data.normalise(images[:batch].repeat(2, 1, 1, 1))
    methods = {}  # name -> [(settings, stage, kept blocks, message)]
    for method, p in (("e2e", 0.0), ("progressive", 0.0), ("fll", 0.0), ("fll", config.depth_dropout or 0.5)):
        one = replace(config, method=method, depth_dropout=p, local_epochs=1)
        plan = stages(one)
        for stage in dict.fromkeys((plan[0], plan[len(plan) // 2], plan[-1])):
            kept = [*range(round((1 - p) * stage.first)), *range(stage.first, stage.present)]  # as many as on average
            message = broadcast(initial(one, shape, stage.present), stage, kept)
            methods.setdefault(label(one), []).append((one, stage, kept, {name: t.to(device) for name, t in message.items()}))

    def clock(function, *arguments):
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        function(*arguments)
        wait()
        return time.perf_counter() - began

    def measure(one, stage, kept, message):
        """[seconds of a local step, as a multiple of a bare one, seconds of broadcasting and averaging, macs of an image]"""
        learner, average = receive(one, message, shape, stage), WeightedMean()
        local, bare = [], []
        for n in (2, 2 + steps):
            local.append(clock(local_train, one, stage, message, images[:n * batch], 1, 0))
            bare.append(clock(bare_loop, one, stage, learner, views, n))
        step, least = (local[1] - local[0]) / steps, (bare[1] - bare[0]) / steps
        server = clock(lambda: [average.add(broadcast(message, stage, kept), 1) for _ in range(2)]) / 2
        return step, step / least, server, macs(one, stage, kept, shape)

    taken = [{name: [measure(*case) for case in cases] for name, cases in methods.items()} for _ in range(turns)]
    spent = {name: np.median([turn[name] for turn in taken], 0) for name in methods}
    whole, *_, whole_macs = next(iter(spent.values()))[0]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{batch} images a step, {shape[0]}x{shape[1]}x{shape[2]}, width {config.dim}, {config.depth} blocks, micro-batch "
          f"{config.micro_batch or 'none'}, on {where}\n"
          f"{'':<18}{'stage':>6}{'s/step':>9}{'images/s':>10}{'TFLOP/s':>9}{'step/bare':>11}{'of e2e':>8}{'predicted':>11}{'server s':>10}")
    for name, cases in methods.items():
        lines = [(stage.number, row) for (_, stage, _, _), row in zip(cases, spent[name])]
        for stage, (step, ratio, server, work) in lines + [("mean", spent[name].mean(0))] * (len(cases) > 1):
            print(f"{name:<18}{stage:>6}{step:>9.3f}{batch / step:>10.0f}{2e-12 * work * batch / step:>9.2f}"
                  f"{ratio:>11.2f}{step / whole:>8.2f}{work / whole_macs:>11.2f}{server:>10.4f}")
    print(f"\nPeak memory of a local step, MiB (at the last stage), plain and with micro-batches of 16 images\n"
          f"{'':<18}{'batch':>6}{'plain':>9}{'ratio':>8}{'micro':>9}{'ratio':>8}")
    for batch, (name, cases) in itertools.product(batches, methods.items()):
        one, stage, kept, _ = cases[-1]
        plain, micro = (step_memory(replace(one, batch_size=batch, micro_batch=m), stage, kept, shape) / 2**20 for m in (0, 16))
        top = plain if one.method == "e2e" else top
        print(f"{name:<18}{batch:>6}{plain:>9.0f}{top / plain:>7.1f}x{micro:>9.0f}{top / micro:>7.1f}x", flush=True)


# ------------------------------------------------------------------------------------------- the command line

def stop_on_interrupt(how):
    """Let Ctrl-C end the program at once and say how to go on: checkpoints are whole at any moment."""
    def stop(*_):
        print(f"\ninterrupted; go on with: {how}", file=sys.stderr, flush=True)
        os._exit(130)
    signal.signal(signal.SIGINT, stop)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(arguments=None):
    """The command line: one flag for every field of Config, and the modes. Returns (function, its arguments)."""
    parser = Parser(prog="fllw.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs="*", choices=ROWS, metavar="ROW", help="train several methods side by side, all or "
                        f"the named ones; the same command goes on and reads back what is finished: {' '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="the seeds of --compare (default: --seed)")
    parser.add_argument("--benchmark", action="store_true", help="measure seconds and memory of a local step of every method")
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from: paper is ViT-Tiny on CIFAR-10 as in Tun et al. 2024")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run from its folder")
    for f in fields(Config):
        form = ({"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else
                {"type": type(f.default), "choices": f.metadata.get("choices")})
        parser.add_argument("--" + f.name.replace("_", "-"), **form, help=f"{f.metadata['help']} (default: {f.default!r})")
    given = vars(parser.parse_args(arguments))
    given = {**PRESETS.get(given.pop("preset", None), {}), **given}
    comparing, seeds, resume = given.pop("compare", None), given.pop("seeds", None), given.pop("resume", None)
    if given.pop("benchmark", False):
        if comparing is not None or seeds or resume:
            raise InputError("--benchmark trains nothing: leave out --compare, --seeds and --resume")
        return benchmark, (Config(**given),)
    if comparing is not None and (own := {"method", "depth_dropout", "blocks_per_stage", "calibrate", "align", "patience"} & given.keys()):
        raise InputError(f"--compare sets --{min(own).replace('_', '-')} itself, row by row: leave it out")
    if seeds and (comparing is None or "seed" in given or min(seeds) < 0 or len(set(seeds)) < len(seeds)):
        raise InputError("--seeds takes the place of --seed for --compare: different whole numbers, from 0 on")
    if resume is not None:
        saved = saved_settings(Path(resume))
        if not saved or saved.get("compare"):
            raise InputError(f"{resume!r} is not a run folder of its own: --resume takes that of a single run, a comparison goes on by its command")
        if comparing is not None or "out" in given:
            raise InputError("--resume goes on with a run as it is, in its own folder: leave out --compare and --out")
        refuse_changes(resume, saved, given, but=("finetune", "labels_per_class"))
        given = {**{f.name: saved[f.name] for f in fields(Config)}, **given, "out": resume}
    config = Config(**given)
    return (run, (config, resume is not None)) if comparing is None else (compare, (config, comparing, seeds or [config.seed]))


def join_processes(config):
    """Under torchrun, join the other processes; the first one alone prints and writes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        cuda = pick_device(config).type == "cuda"
        if cuda:
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                raise InputError(f"there are {torch.cuda.device_count()} GPUs: --nproc-per-node must be at most that, or use --device cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))  # the others wait while the first evaluates
        if rank():
            sys.stdout = open(os.devnull, "w")


def main(arguments=None):
    try:
        function, settings = parse(arguments)
        join_processes(settings[0])
        function(*settings)
    except InputError as error:
        print(f"fllw.py: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"fllw.py: {error}; the rounds before are saved: try anew with another --out and a smaller --lr", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"fllw.py: {error}; what was saved before is whole: --resume, or a comparison's own command, goes on", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before there is anything to save
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
