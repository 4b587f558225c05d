"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

Guo et al. 2023, "Towards Federated Learning Under Resource Constraints via Layer-wise Training
and Depth Dropout" (arXiv 2309.05213); accounting after Tun et al. 2024, "LW-FedSSL" (2401.11647).

Read it from top to bottom: settings, model, stages and depth dropout, one client, the server,
cost, evaluation. There the method ends; what follows serves the command line.

    python fllw.py             # train on the embedded digits, two minutes on two CPU cores
    python fllw.py --help
"""
import argparse
import contextlib
import functools
import hashlib
import io
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
from ssl_loss import (MemoryMeter, ProjectionHead, contrastive_step, few_labels, finetune, knn,
                      linear_probe, nt_xent)

# ----------------------------------------------------------------------------------- settings


def knob(default, help, **more):  # group opens a group of flags; low <= value <= high, or < below
    return field(default=default, metadata={"help": help, "low": -math.inf, "high": 1e9, **more})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is generated from these fields."""
    data: str = knob("mnist5k", "mnist5k, cifar10, cifar100 or FILE.npz with your images",
                     group="data")
    images: int = knob(0, "use so many of the training images; 0 means all", low=0)
    augment: str = knob("auto", "recipe of the two views; auto: digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural"))
    dim: int = knob(64, "width of the vision transformer", low=1, group="model")
    depth: int = knob(4, "number of blocks L", low=1)
    heads: int = knob(8, "attention heads; must divide dim", low=1)
    patch_size: int = knob(7, "side of a patch in pixels; must divide the image", low=1)
    pool: str = knob("mean", "what the loss reads: all patches or the class token",
                     choices=("mean", "token"))
    head_hidden: int = knob(256, "width of the projection head's hidden layers", low=1)
    head_dim: int = knob(64, "dimension in which the loss compares views", low=1)
    method: str = knob("fll", "which blocks exist and train at a stage", group="layer-wise",
                       choices=("fll", "e2e", "progressive", "lasting"))
    blocks_per_stage: int = knob(1, "blocks that a stage adds", low=1)
    new_block: str = knob("copy", "how a new block starts: as a copy of the one below, as one "
                          "whose outputs are 0, or fresh", choices=("copy", "zero", "fresh"))
    first_share: float = knob(0.0, "share of the rounds for the first stage, which trains the "
                              "embedding; 0 means an equal share", low=0, below=1)
    depth_dropout: float = knob(0.25, "probability with which a client drops each frozen block in "
                                "a round", low=0, below=1)
    clients: int = knob(2, "number of clients N", low=1, group="federation")
    clients_per_round: int = knob(0, "clients sampled each round; 0 means all", low=0)
    alpha: float = knob(0.0, "Dirichlet concentration of the labels over clients; 0 means IID",
                        low=0, high=1e6)
    rounds: int = knob(96, "federated rounds, shared among the stages", low=1)
    local_epochs: int = knob(1, "passes over a client's images in a round", low=1)
    client_failure: float = knob(0.0, "probability that a sampled client drops out of a round "
                                 "before uploading", low=0, below=1)
    batch_size: int = knob(64, "images in a local step; each gives two views", low=2,
                           group="training")
    micro_batch: int = knob(0, "images whose graph is held at a time (gradient caching, exact); 0 "
                            "means the whole batch", low=0)
    lr: float = knob(2e-3, "peak learning rate (AdamW, one cosine a stage)", low=1e-6)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    temperature: float = knob(0.2, "temperature of NT-Xent", low=1e-6)
    amp: bool = knob(False, "bf16 autocast for the model; the loss stays in float32")
    seed: int = knob(0, "everything random derives from it", low=0, high=2**63, group="run")
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "run folder; by default runs/<data>-<method>-seed<seed>")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")


INIT, SAMPLING, DROPOUT, TRAINING, FAILURE = range(1, 6)  # what a draw is for


def rng(config, *key):
    """A numpy generator for (seed, *key) alone; key is for instance (purpose, round, client)."""
    return np.random.default_rng([config.seed, *key])


def generator(config, device, *key):
    """A torch generator for (seed, *key) alone."""
    return torch.Generator(device).manual_seed(int(rng(config, *key).integers(2**63)))


def recipe(config):
    """The name of the views' recipe."""
    if config.augment == "auto":
        return "digits" if config.data == "mnist5k" else "natural"
    return config.augment


# -------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # [B, T, D]
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
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
    """Pre-norm transformer block; without its two halves it is the identity."""

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

    image_size: a side in pixels or (height, width). Names and arithmetic are those of timm's
    VisionTransformer with num_classes=0: pool="token" as it comes, pool="mean" as with
    global_pool="avg", fc_norm=False."""

    def __init__(self, image_size=32, patch_size=4, channels=3, dim=192, depth=12, heads=3,
                 pool="token"):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise InputError(f"the patch size {patch_size} must divide the image, which is "
                             f"{height} x {width} pixels")
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
        """Blocks from `start` on, final norm, pooling: tokens [B, T, D] -> features [B, D]."""
        for block in self.blocks[start:]:
            x = block(x)
        x = self.norm(x)
        return x[:, 1:].mean(1) if self.pool == "mean" else x[:, 0]

    def forward(self, images):
        return self.upper(self.lower(images, 0), 0)


class Learner(nn.Module):
    """What is trained: the encoder and, on top, the projection head, thrown away afterwards."""

    def __init__(self, config, shape):
        super().__init__()
        channels, height, width = shape
        self.encoder = ViT((height, width), config.patch_size, channels, config.dim, config.depth,
                           config.heads, config.pool)
        self.head = ProjectionHead(config.dim, config.head_hidden, config.head_dim)


def initial(config, shape, device="cpu"):
    """State dict of a fresh learner with all its blocks; torch's own randomness stays as it was.

    On the device "meta" tensors have shapes but hold no data."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(int(rng(config, INIT).integers(2**63)))
        return Learner(config, shape).state_dict()


def block_of(name):
    """The number of the block that a tensor of this name belongs to, or None."""
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None


def assemble(config, tensors, shape):
    """The learner with these tensors; a block that is not among them is the identity."""
    with torch.device("meta"):
        learner = Learner(config, shape)
    there = {block_of(name) for name in tensors}
    for b in range(config.depth):
        if b not in there:
            learner.encoder.blocks[b] = nn.Identity()
    learner.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
    return learner


# --------------------------------------------------------------- stages and depth dropout

@dataclass(frozen=True)
class Stage:
    """Which blocks exist and which of them train, by their numbers from 0, for some rounds.

    The final norm and the head always train; patch embedding, positions and class token while
    block 0 does."""
    number: int     # counted from 1
    present: tuple  # ascending
    active: tuple   # ascending, some of those present
    rounds: int

    @property
    def frozen(self):
        return tuple(b for b in self.present if b not in self.active)

    def trains(self, name):
        """Whether the tensor of this name in a learner's state dict trains."""
        if block_of(name) is not None:
            return block_of(name) in self.active
        if any(part in name for part in ("patch_embed", "pos_embed", "cls_token")):
            return 0 in self.active
        return True


def stages(config, history=()):
    """The plan of a run: its stages, from the first to the last. Here the methods differ.

    history: the rows of the rounds done; a plan may look at them (this one does not)."""
    L, k = config.depth, config.blocks_per_stage
    whole = tuple(range(L))
    if config.method == "e2e":  # everything, in a single stage
        blocks = [(whole, whole)]
    if config.method == "fll":  # the newest k blocks train on top of frozen ones
        blocks = [(whole[:top], whole[top - k:top]) for top in range(k, L + 1, k)]
    if config.method == "progressive":  # the same blocks, but all of them train
        blocks = [(whole[:top], whole[:top]) for top in range(k, L + 1, k)]
    if config.method == "lasting":  # block L is there from the start and stays on top, training
        blocks = [(whole[:top] + whole[-1:], whole[top - k:top] + whole[-1:])
                  for top in range(k, L, k)]
    plan, rounds_left = [], config.rounds
    for number, (present, active) in enumerate(blocks, 1):
        later = len(blocks) - number
        rounds = math.ceil(rounds_left / (later + 1))
        if number == 1 and later and config.first_share:
            rounds = min(max(1, round(config.first_share * config.rounds)), rounds_left - later)
        plan.append(Stage(number, present, active, rounds))
        rounds_left -= rounds
    return plan


def stage_of(plan, rounds_done):
    """The stage of the next round and how many of its rounds are done; (None, 0) at the end."""
    for stage in plan:
        if rounds_done < stage.rounds:
            return stage, rounds_done
        rounds_done -= stage.rounds
    return None, 0


def sample_clients(config, number):
    """The clients of round `number`, ascending: a function of (seed, round)."""
    size = config.clients_per_round or config.clients
    chosen = rng(config, SAMPLING, number).choice(config.clients, size, replace=False)
    return sorted(chosen.tolist())


def draw_blocks(config, stage, number, client):
    """Federated depth dropout: the blocks that this client keeps in round `number`.

    Every frozen block is dropped with probability depth_dropout, independently; active blocks
    never are. A function of (seed, round, client)."""
    draws = rng(config, DROPOUT, number, client).random(len(stage.frozen))
    dropped = [b for b, u in zip(stage.frozen, draws) if u < config.depth_dropout]
    return tuple(b for b in stage.present if b not in dropped)


def broadcast(server, kept):
    """What a client receives: the server's tensors, less the blocks that it does not keep."""
    return {name: t for name, t in server.items() if block_of(name) in (None, *kept)}


# --------------------------------------------------------------------------------- one client

def receive(config, message, shape, stage):
    """A client's learner from what it received; a dropped block is the identity."""
    learner = assemble(config, message, shape)
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    return learner


def in_three(config, learner, stage):
    """The learner as three functions: the frozen part, without a graph, the active part, the head.

    The frozen part is what lies below the first active block. The loss stays in float32."""
    encoder, first = learner.encoder, min(stage.active)
    kind = next(learner.parameters()).device.type

    def frozen(images):
        if first == 0:
            return images
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=config.amp):
            return encoder.lower(images, first)

    def active(x):
        with torch.autocast(kind, torch.bfloat16, enabled=config.amp):
            return encoder(x) if first == 0 else encoder.upper(x, first)

    def head(features):
        with torch.autocast(kind, torch.bfloat16, enabled=config.amp):
            return learner.head(features)

    return frozen, active, head


def local_train(config, stage, message, images, number, client, progress=0.0,
                step=contrastive_step):
    """One client's work in round `number`.

    message: what broadcast() handed over; images: the client's, uint8 [n, C, H, W], on the device;
    progress: the share of the stage's rounds that is done; step: what a local step does. AdamW
    starts anew each round: its moments belong to weights that averaging has replaced, and a
    client that is sampled now and then could not keep them. Returns (upload, losses): the trained
    tensors, and the loss of every local step [steps]."""
    learner = receive(config, message, images.shape[1:], stage)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay,
                                  fused=True)
    frozen, active, head = in_three(config, learner, stage)
    views_of, draws = data.RECIPES[recipe(config)], generator(config, images.device, TRAINING,
                                                              number, client)

    def criterion(z):  # [2B, D]
        return nt_xent(*z.chunk(2), config.temperature)

    batch = min(config.batch_size, len(images))
    steps = len(images) // batch  # in an epoch; what is left over waits for the next shuffle
    losses = []
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(images), device=images.device, generator=draws)
        for chosen in order[:steps * batch].view(steps, batch):
            in_round = len(losses) / (config.local_epochs * steps)
            cosine = (1 + math.cos(math.pi * (progress + in_round / stage.rounds))) / 2
            optimizer.param_groups[0]["lr"] = config.lr * cosine
            optimizer.zero_grad()
            losses.append(step(frozen, active, head,
                               data.two_views(images[chosen], views_of, draws), criterion,
                               config.micro_batch))
            optimizer.step()
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses)


# --------------------------------------------------------------------------------- the server

@dataclass
class State:
    """All there is between two rounds."""
    shape: tuple   # (channels, height, width) of an image
    server: dict   # name -> tensor: the encoder so far, and the head
    version: dict  # name -> which tensor that is; equal versions are equal tensors
    history: list = field(default_factory=list)  # one dict a round, see row_of()
    held: dict = field(default_factory=dict)     # client -> versions that it has received
    changes: int = 0                             # how often update() was called

    def update(self, tensors):
        """Put new tensors in place of the server's; whoever changes the server does it so."""
        self.changes += 1
        self.server |= tensors
        self.version |= {name: f"{name}@{self.changes}" for name in tensors}


def start(config, shape, plan=stages, device="cpu"):
    """The state before the first round: the blocks of the first stage, and the head."""
    present = plan(config, ())[0].present
    server = broadcast(initial(config, shape, device), present)
    return State(shape, server, {name: name for name in server})


def grow(config, state, stage):
    """Add the blocks that are new in this stage to the server's state.

    A new block is a copy of the nearest one below it. "zero" is a copy whose two output layers
    are 0: at first it is the identity, and features go on where they were."""
    there = {block_of(name) for name in state.server} - {None}
    for b in [b for b in stage.present if b not in there]:
        source, origin = state.server, max((o for o in there if o < b), default=min(there))
        if config.new_block == "fresh":
            source, origin = initial(config, state.shape, state.server["head.0.weight"].device), b
        for name in [name for name in source if block_of(name) == origin]:
            new = name.replace(f"blocks.{origin}.", f"blocks.{b}.")
            state.server[new], state.version[new] = source[name], state.version.get(name, new)
            if config.new_block == "zero" and (".attn.proj." in name or ".mlp.fc2." in name):
                state.server[new], state.version[new] = torch.zeros_like(source[name]), ZERO
        there.add(b)


class Average:
    """FedAvg (McMahan et al. 2017): the sum of |D_n| times what client n sent, over all |D_n|.

    A running sum, so that memory does not grow with the clients; in float64, so that one process
    and many get the same."""

    def __init__(self, like):
        self.like, self.weight, self.total = like, 0.0, {}

    def add(self, upload, images):
        self.weight += images
        for name, tensor in upload.items():
            self.total[name] = self.total.get(name, 0) + images * tensor.double()

    def gather(self, reports):
        """Over the processes of torchrun: one all-reduce of sums, weight and reports."""
        sums = [self.total.get(n, torch.zeros_like(t, dtype=torch.float64)).flatten()
                for n, t in self.like.items()]
        device = sums[0].device
        numbers = torch.tensor([self.weight], dtype=torch.float64, device=device)
        everything = torch.cat([*sums, reports.to(device).flatten(), numbers])
        dist.all_reduce(everything)
        split = everything.split([*map(len, sums), reports.numel(), 1])
        self.weight = split[-1].item()
        self.total = {n: s.view_as(t) for (n, t), s in zip(self.like.items(), split)}
        return split[-2].view_as(reports).cpu()

    def mean(self):
        """name -> tensor, or {} if nobody answered."""
        if not self.weight:
            return {}
        return {n: (total / self.weight).to(self.like[n].dtype) for n, total in self.total.items()}


def sound(upload, expected):
    """Whether an upload has exactly the tensors expected, and only finite numbers in them."""
    def form(tensors):
        return {name: (t.shape, t.dtype) for name, t in tensors.items()}
    return form(upload) == form(expected) and all(t.isfinite().all() for t in upload.values())


class Diverged(Exception):
    """The loss became NaN or infinite on every client of a round."""


ANSWERED, ACCEPTED, LOSS, UPLOAD, PEAK = range(5)  # the columns of a round's reports


def run_round(config, state, stage, progress, kept, images_of, client=local_train):
    """One round: send, train, collect, for each client; then average.

    kept: client -> blocks that it keeps; images_of: client -> images. Under torchrun each of K
    processes does every K-th client. Returns the reports, a row of five numbers a client."""
    number = len(state.history) + 1
    expected = {name: t for name, t in state.server.items() if stage.trains(name)}
    average, reports = Average(expected), torch.zeros(len(kept), 5, dtype=torch.float64)
    for report, one in [*zip(reports, kept)][rank()::processes()]:
        if rng(config, FAILURE, number, one).random() < config.client_failure:
            continue
        message, images = broadcast(state.server, kept[one]), images_of(one)
        with allocator_peak(images.device) as peak:
            upload, losses = client(config, stage, message, images, number, one, progress)
        report[ANSWERED], report[LOSS], report[PEAK] = 1, losses.mean().item(), peak()
        report[UPLOAD] = sum(t.nbytes for t in upload.values()) + REPORT_BYTES
        if sound(upload, expected):
            report[ACCEPTED] = 1
            average.add(upload, len(images))
    if processes() > 1:
        reports = average.gather(reports)
    answered = reports[reports[:, ANSWERED] > 0]
    if len(answered) and not answered[:, LOSS].isfinite().any():
        raise Diverged(f"the loss became NaN or infinite on every client in round {number}")
    state.update(average.mean())
    return reports


def federate(config, dataset, state=None, on_round=None, client=local_train, plan=stages):
    """Train by federated rounds, and return (encoder, history).

    state: from on_round or a checkpoint, to go on from there. on_round(row, state) is called after
    every round and may change the server's tensors, by state.update(). client: what a client does
    (local_train). plan(config, history): the stages (stages). Settings must have passed check()."""
    device = pick_device(config)
    images = dataset.train_images.to(device)
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    state = state or start(config, dataset.shape, plan)
    state.server = {name: t.to(device) for name, t in state.server.items()}
    same_start(config, dataset, state)

    began_here = len(state.history)

    def images_of(one):
        return images[parts[one].to(device)]

    while True:
        began, number = time.perf_counter(), len(state.history) + 1
        stage, done = stage_of(plan(config, state.history), number - 1)
        if stage is None:
            return encoder_of(config, state.server, dataset.shape), state.history
        if done == 0:
            grow(config, state, stage)
        kept = {one: draw_blocks(config, stage, number, one)
                for one in sample_clients(config, number)}
        if device.type == "cuda" and began_here == len(state.history):  # libraries' workspaces
            client(config, stage, state.server, images[:2], number, 0)  # are no client's memory
        down, stateless = download_bytes(state, kept)
        reports = run_round(config, state, stage, done / stage.rounds, kept, images_of, client)
        if device.type == "cpu":
            most = max(len(parts[one]) for one in kept)
            fullest = max(kept.values(), key=len)
            reports[:, PEAK] = step_memory(config, stage, state.server, fullest, dataset.shape,
                                           most, client)
        row = row_of(config, state, stage, kept, reports, down, stateless)
        row["seconds"] = time.perf_counter() - began
        state.history.append(row)
        if on_round:
            on_round(row, state)


def row_of(config, state, stage, kept, reports, down, stateless):
    """What is noted of a round, the same names everywhere; numbers are means over its clients.

    round, stage              counted from 1
    loss                      over the local steps of the uploads accepted; None if there are none
    present_blocks, active_blocks  those of the stage
    clients, kept_blocks      who was sampled, and the blocks that each kept
    lost, rejected            clients that did not answer, and whose upload was not sound
    download_bytes            for a client that keeps what it has received
    stateless_download_bytes  for a client that keeps nothing between rounds
    upload_bytes              its tensors, mean loss and number of images
    macs                      multiply-accumulates for one image, all local epochs
    peak_memory_bytes         of the client that needs most
    seconds                   of the round"""
    answered, accepted = reports[:, ANSWERED] > 0, reports[:, ACCEPTED] > 0
    clients = np.array(list(kept))
    work = [macs(config, stage, blocks, state.shape) for blocks in kept.values()]
    return {
        "round": len(state.history) + 1, "stage": stage.number,
        "loss": reports[accepted, LOSS].mean().item() if accepted.any() else None,
        "present_blocks": list(stage.present), "active_blocks": list(stage.active),
        "clients": clients.tolist(), "kept_blocks": [list(blocks) for blocks in kept.values()],
        "lost": clients[~answered.numpy()].tolist(),
        "rejected": clients[(answered & ~accepted).numpy()].tolist(),
        "download_bytes": down, "stateless_download_bytes": stateless,
        "upload_bytes": reports[:, UPLOAD].mean().item(),
        "macs": config.local_epochs * float(np.mean(work)),
        "peak_memory_bytes": int(reports[:, PEAK].max())}


def encoder_of(config, server, shape):
    """The encoder in a server's state: evaluation and deployment use every block there is."""
    return assemble(config, server, shape).encoder.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- cost

REPORT_BYTES = 16  # beside its tensors a client sends its mean loss and its number of images
ZERO = "zero"      # the version of tensors that everybody knows to be 0: nothing is sent


def download_bytes(state, kept):
    """Bytes that a round sends down, means over clients: (keeping what it has, stateless).

    Equal tensors travel once: a block that starts as a copy is what the client has, or gets
    anyway, by another name. Notes in state.held what each client has now."""
    current, sums = set(state.version.values()), []
    for client, blocks in kept.items():
        message = {state.version[name]: tensor.nbytes
                   for name, tensor in broadcast(state.server, blocks).items()}
        message.pop(ZERO, None)
        held = state.held.get(client, set())
        new = sum(size for version, size in message.items() if version not in held)
        sums.append((new, sum(message.values())))
        state.held[client] = (held | set(message)) & current
    return np.mean(sums, 0).tolist()


def macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image in one local epoch, as Tun et al. 2024 count them.

    Two views; forward 1x and backward 2x for what trains, forward 1x for what is frozen; linear
    layers and attention products. Micro-batches run what trains, but for the head, forward twice;
    through a frozen block above an active one the gradient passes, 1x."""
    channels, height, width = image_shape
    D, patches = config.dim, height * width // config.patch_size**2
    T, first = patches + 1, min(stage.active)
    block = T * 12 * D**2 + 2 * T**2 * D  # qkv 3, proj 1, mlp 4 + 4; attention's two products
    embed = patches * config.patch_size**2 * channels * D
    head = config.head_hidden * (D + config.head_hidden + config.head_dim)
    trained = 4 if config.micro_batch else 3
    total = (trained if first == 0 else 1) * embed + 3 * head
    for b in kept:
        if b in stage.active:
            total += trained * block
        else:
            total += (1 if b < first else trained - 1) * block
    return 2 * total


def step_memory(config, stage, server, kept, image_shape, images=0, client=local_train):
    """Peak bytes of a client's local step; server: tensors, of which only shapes matter.

    images: how many the client has; 0 means enough for whole batches."""
    kept = stage.frozen[:len(kept) - len(stage.active)] + stage.active  # which ones does not matter
    form = tuple((name, tuple(t.shape)) for name, t in broadcast(server, kept).items())
    return metered_step(config, stage, form, image_shape, images, client).peak


@functools.lru_cache(maxsize=None)
def metered_step(config, stage, form, image_shape, images=0, client=local_train):
    """The MemoryMeter of two local steps: from the second on the optimizer has its state.

    They run on torch's fake tensors, which have shapes and lifetimes but no data: the same bytes
    as real steps on the CPU, in no time and no memory. form: pairs (name, shape) of a message."""
    batch = min(config.batch_size, images or config.batch_size)
    one = replace(config, local_epochs=1, batch_size=batch)
    with FakeTensorMode():
        message = {name: torch.zeros(shape) for name, shape in form}
        blank = torch.zeros(2 * batch, *image_shape, dtype=torch.uint8)
        with MemoryMeter() as meter:
            client(one, stage, message, blank, 1, 0, 0.0)
    return meter


@contextlib.contextmanager
def allocator_peak(device):
    """Yields a function for the peak bytes of a GPU's allocator since then; 0 on the CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


def cost(config, image_shape, images=0, client=local_train, plan=stages, history=(), state=None):
    """What a client that takes part in every round pays for the whole training, without training.

    Replays the rounds with tensors that have shapes but no data; with depth dropout, the mean over
    up to ten clients' draws. images: how many the client has; history: of a run whose plan looks
    at it; state: where to start, on the device "meta". Returns download_bytes (of a client that
    keeps what it received), stateless_download_bytes, upload_bytes, macs (for one image, over all
    local epochs) and peak_memory_bytes."""
    clients = min(config.clients_per_round or config.clients, 10)
    config = replace(config, clients=clients, clients_per_round=0, device="cpu", out="")
    state = state or start(config, image_shape, plan, "meta")
    sums, peak = np.zeros(4), 0
    for number in range(1, 1 + sum(stage.rounds for stage in plan(config, history))):
        stage, done = stage_of(plan(config, history), number - 1)
        if done == 0:
            grow(config, state, stage)
        kept = {one: draw_blocks(config, stage, number, one) for one in range(clients)}
        trained = {name: t for name, t in state.server.items() if stage.trains(name)}
        upload = sum(t.nbytes for t in trained.values()) + REPORT_BYTES
        work = np.mean([macs(config, stage, blocks, image_shape) for blocks in kept.values()])
        sums += [*download_bytes(state, kept), upload, config.local_epochs * work]
        peak = max(peak, step_memory(config, stage, state.server, max(kept.values(), key=len),
                                     image_shape, images, client))
        state.update(trained)
    names = ("download_bytes", "stateless_download_bytes", "upload_bytes", "macs")
    return {**dict(zip(names, sums.tolist())), "peak_memory_bytes": peak}


# --------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def features(encoder, images, batch=500):
    """Features of uint8 images [N, C, H, W] -> float32 [N, dim], on the encoder's device."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(data.normalise(part.to(device))) for part in images.split(batch)])


def evaluate(encode, dataset, recipe):
    """Accuracies in % of a function uint8 images -> features; test labels choose nothing.

    knn and linear_probe on the test images; the same on test images under one random view each
    (moved_knn, moved_probe); a linear probe with ten labels a class (ten_labels)."""
    train, test = encode(dataset.train_images), encode(dataset.test_images)
    moved = encode(data.moved(dataset.test_images, recipe))
    labels, answers = dataset.train_labels.to(train.device), dataset.test_labels.to(train.device)
    probe, moved_probe = linear_probe(train, labels, (test, answers), (moved, answers))
    return {"knn": knn(train, labels, test, answers), "linear_probe": probe,
            "moved_knn": knn(train, labels, moved, answers), "moved_probe": moved_probe,
            "ten_labels": few_labels(train, labels, test, answers)}


# ----------------------------------------- here the method ends; settings that can be run

def check(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    for f in fields(config):
        value, limits, flag = getattr(config, f.name), f.metadata, "--" + f.name.replace("_", "-")
        if limits.get("choices") and value not in limits["choices"]:
            raise InputError(f"{flag} must be one of {', '.join(limits['choices'])}, it is {value}")
        if isinstance(value, (int, float)):
            if not limits["low"] <= value <= limits["high"]:
                raise InputError(f"{flag} must be from {limits['low']:g} to {limits['high']:g}, "
                                 f"it is {value:g}")
            if not value < limits.get("below", math.inf):
                raise InputError(f"{flag} must be below {limits['below']}, it is {value:g}")
    L, k = config.depth, config.blocks_per_stage
    if config.dim % config.heads:
        raise InputError(f"--dim must be a multiple of --heads ({config.heads}), it is "
                         f"{config.dim}")
    if config.clients_per_round > config.clients:
        raise InputError(f"--clients-per-round must be at most --clients ({config.clients}), "
                         f"it is {config.clients_per_round}")
    if config.method == "lasting" and (L == 1 or (L - 1) % k):
        raise InputError("with a lasting top block, --depth must be 1 above a multiple of "
                         f"--blocks-per-stage ({k}), it is {L}")
    if config.method in ("fll", "progressive") and L % k:
        raise InputError(f"--depth must be a multiple of --blocks-per-stage ({k}), it is {L}")
    needed = len(stages(config))
    if config.rounds < needed:
        raise InputError(f"--rounds must be at least the number of stages ({needed}), it is "
                         f"{config.rounds}")
    pick_device(config)


def without_effect(config):
    """The settings that change nothing here: nobody should believe that they were measured."""
    plan = stages(config)
    useless = [] if any(stage.frozen for stage in plan) else ["depth_dropout"]
    if len(plan) == 1:
        useless += ["new_block", "first_share"]
    return useless + ["blocks_per_stage"] * (config.method == "e2e")


def pick_device(config):
    if config.device == "auto":
        config = replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        if device.type == "cuda" and device.index is None:  # under torchrun, each its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.type not in ("cpu", "cuda"):
            raise ValueError
        return torch.empty(0, device=device).device
    except (ValueError, RuntimeError, AssertionError):
        raise InputError(f"there is no device {config.device} here: use cpu, auto or one of "
                         f"{torch.cuda.device_count()} GPUs") from None


# ------------------------------------------------------------------- several processes

def rank():
    """This process among those that torchrun started."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(config):
    """Under torchrun, join the other processes; the first one alone prints and writes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        device = pick_device(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # they wait for evaluations
        if rank():
            sys.stdout = open(os.devnull, "w")


def same_start(config, dataset, state):
    """Raise InputError unless all processes start from the same round, settings and tensors."""
    if processes() == 1:
        return
    sums = [tensor.double().sum().item() for tensor in state.server.values()]
    settings = {**belongs_to(config, dataset), "held": sorted(map(str, state.held.items()))}
    text = json.dumps([len(state.history), settings, sums], sort_keys=True, default=str)
    mine = list(hashlib.sha256(text.encode()).digest())
    least = torch.tensor(mine, device=next(iter(state.server.values())).device)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise InputError("the processes differ in round, settings, images or checkpoint (this one "
                         f"has done {len(state.history)} rounds): give all the same files")


# ------------------------------------------------------------------------- run folders

def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: no half file is seen."""
    if rank():
        return
    buffer = io.BytesIO()
    if path.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(json.dumps(content, indent=1).encode())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def belongs_to(config, dataset, experiment=""):
    """What a run folder belongs to: settings, images, and the experiment that made it."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("device", "out", "cache")}
    return {**settings, "experiment": experiment, "image_shape": list(dataset.shape),
            "images_sha256": dataset.digest()}


def saved_settings(folder):
    """The config.json of a run folder, {} where there is nothing yet; else InputError."""
    try:
        if not folder.exists() or not any(p.suffix != ".tmp" and p.name != "lock"
                                          for p in folder.iterdir()):
            return {}
        saved = json.loads((folder / "config.json").read_text())
        if {"experiment", "images_sha256", "image_shape"} <= saved.keys():
            return saved
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(f"{folder} exists and is not a run folder: choose another --out")


def refuse_another(folder, mine):
    """Raise InputError if the folder belongs to other settings or images."""
    saved = saved_settings(folder)
    for name in mine if saved else ():
        if saved.get(name) != mine[name]:
            what = {"images_sha256": "other images", "image_shape": "other images"}.get(
                name, f"{name.replace('_', '-')} {saved.get(name)!r}, not {mine[name]!r}")
            raise InputError(f"{folder} holds a run with {what}: choose another --out")


@contextlib.contextmanager
def run_folder(config, dataset, experiment=""):
    """Open the folder of a run for this process alone: yields (folder, State to go on from).

    The folder belongs to settings and images; others are refused before anything is touched."""
    mine = belongs_to(config, dataset, experiment)
    default = f"{Path(config.data).stem}-{label(config)}-seed{config.seed}".lower()
    folder = Path(config.out or "runs/" + default.replace(" ", "-").replace("+-", ""))
    refuse_another(folder, mine)
    needed = 5 * sum(t.nbytes for t in initial(config, dataset.shape, "meta").values())
    with contextlib.ExitStack() as stack:
        if rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(folder).free < needed:
                    raise InputError(f"the disk of {folder} is too full, a run needs "
                                     f"{needed / 1e6:.0f} MB: free some or choose another --out")
                stack.enter_context(data.lock(folder / "lock", wait=False))
                refuse_another(folder, mine)
                for left_behind in folder.glob("*.tmp"):
                    left_behind.unlink()
                write(folder / "config.json", mine)
            except BlockingIOError:
                raise InputError(f"another process is at work in {folder}: wait for it or choose "
                                 "another --out") from None
            except OSError as error:
                raise InputError(f"cannot write to {folder} ({error.strerror}): choose another "
                                 "--out") from None
        if processes() > 1:
            dist.barrier()
        yield folder, load_checkpoint(folder, config, dataset.shape)


def load_checkpoint(folder, config, shape):
    """The State to go on from, or None; InputError if it is damaged or does not fit."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state = State(**torch.load(path, map_location="cpu", weights_only=True))
        state.held = {one: set(versions) for one, versions in state.held.items()}
        expected = initial(config, shape, "meta")
        for name, tensor in state.server.items():
            like = expected.get(name, tensor)  # an experiment may have tensors of its own
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"{name} has the wrong shape")
        if state.version.keys() != state.server.keys() or tuple(state.shape) != shape:
            raise ValueError("its parts do not fit each other")
        encoder_of(config, state.server, shape)
        return state
    except Exception as error:  # torch.load raises many kinds
        raise InputError(f"{path} is damaged or not a checkpoint of this run "
                         f"({type(error).__name__}): restore it, or choose another --out") from None


def load_encoder(folder):
    """The trained encoder of a run folder, ready for `encoder(data.normalise(images))`."""
    saved, path = saved_settings(Path(folder)), Path(folder) / "encoder.pt"
    try:
        config = Config(**{f.name: saved.get(f.name, f.default) for f in fields(Config)})
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        named = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        head = {n: t for n, t in initial(config, saved["image_shape"]).items() if "head." in n[:5]}
        return encoder_of(config, named | head, saved["image_shape"])
    except Exception as error:
        raise InputError(f"{folder} holds no whole run ({type(error).__name__}): train it with "
                         f"python fllw.py --out {folder}") from None


# ------------------------------------------------------------------- the command line

COLUMNS = {  # of a table: (heading, unit's divisor, format)
    "knn": ("k-NN %", 1, ".1f"), "linear_probe": ("probe %", 1, ".1f"),
    "moved_knn": ("moved k-NN", 1, ".1f"), "moved_probe": ("moved probe", 1, ".1f"),
    "ten_labels": ("10 labels", 1, ".1f"), "finetuned": ("fine-tuned", 1, ".1f"),
    "peak_memory_bytes": ("peak MiB", 2**20, ".1f"), "macs": ("GMAC/image", 1e9, ".2f"),
    "download_bytes": ("down MB", 1e6, ".1f"), "upload_bytes": ("up MB", 1e6, ".1f"),
    "stateless_download_bytes": ("stateless MB", 1e6, ".1f"), "seconds": ("seconds", 1, ".0f")}


def table(rows):
    """Rows {name: {column: number or text}} as text, in the order of COLUMNS."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    width = 2 + max(map(len, rows))
    lines = [" " * width + "".join(f"{COLUMNS[c][0]:>13}" for c in columns)]
    for name, row in rows.items():
        cells = []
        for c in columns:
            value, (_, unit, form) = row.get(c, "-"), COLUMNS[c]
            cells.append(value if isinstance(value, str) else format(value / unit, form))
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def label(config):
    """A method's name in tables."""
    names = {"fll": "FLL", "progressive": "progressive", "lasting": "lasting top",
             "e2e": "end-to-end" if config.clients > 1 else "centralized"}
    name = names[config.method]
    if config.blocks_per_stage > 1 and "blocks_per_stage" not in without_effect(config):
        name += f" {config.blocks_per_stage} blocks a stage"
    if config.depth_dropout and "depth_dropout" not in without_effect(config):
        name += f" + FDD {config.depth_dropout:g}"
    return name


def load_dataset(config):
    """The data set of settings that can be run; of several processes one downloads."""
    check(config)
    if config.data in data.ARCHIVES:
        initial(config, (3, 32, 32), "meta")  # before downloading, see that the patch size fits
    return data.load(config.data, config.cache, config.images)


def strip(row):
    """Which blocks each of a round's first three clients held: A active, + frozen, . dropped."""
    strips = []
    for kept in row["kept_blocks"][:3]:
        strips.append("".join("A" if b in row["active_blocks"] else "+" if b in kept else "."
                              for b in row["present_blocks"]))
    more = " ..." if len(row["kept_blocks"]) > 3 else ""
    for what in ("lost", "rejected"):
        if row[what]:
            more += f"  ({what}: {', '.join(map(str, row[what]))})"
    return " ".join(strips) + more


def train(config, dataset, folder, state=None, on_round=None, client=local_train, plan=stages):
    """federate(), one line a round, leaving a checkpoint after each and the encoder at the end."""
    print(f"\n{label(config)}; blocks are A active, + frozen, . dropped; bytes and peak memory are "
          f"a client's\nstage  round  clients   loss  down MB    up MB  peak MiB  seconds  blocks")

    def after(row, state):
        if on_round:
            on_round(row, state)
        write(folder / "checkpoint.pt", {**vars(state), "held": {
            one: sorted(versions) for one, versions in state.held.items()}})
        answered = len(row["clients"]) - len(row["lost"]) - len(row["rejected"])
        loss = "  none" if row["loss"] is None else f"{row['loss']:6.3f}"
        print(f"{row['stage']:>5} {row['round']:>6} {answered:>8} {loss} "
              f"{row['download_bytes'] / 1e6:>8.3f} {row['upload_bytes'] / 1e6:>8.3f} "
              f"{row['peak_memory_bytes'] / 2**20:>9.1f} {row['seconds']:>8.2f}  {strip(row)}",
              flush=True)

    encoder, history = federate(config, dataset, state, after, client, plan)
    write(folder / "history.json", history)
    write(folder / "encoder.pt", {name: t.cpu() for name, t in encoder.state_dict().items()})
    return encoder, history


def result(config, dataset, encoder, history, client=local_train, plan=stages):
    """The row of a trained method: accuracies, what a client paid, and seconds of training."""
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    price = cost(config, dataset.shape, max(map(len, parts)), client, plan, history)
    if config.clients == 1:  # no federation, nothing is sent
        price = {k: v for k, v in price.items() if k in ("macs", "peak_memory_bytes")}
    return {**evaluate(lambda images: features(encoder, images), dataset, recipe(config)), **price,
            "seconds": sum(row["seconds"] for row in history)}


def baseline(name, config, dataset):
    """Accuracies of what needs no training: "raw" pixels or the "random" encoder."""
    device = pick_device(config)
    if name == "raw":
        return evaluate(lambda x: x.to(device).flatten(1) / 255, dataset, recipe(config))
    encoder = encoder_of(config, initial(config, dataset.shape), dataset.shape).to(device)
    return evaluate(lambda images: features(encoder, images), dataset, recipe(config))


def run(config):
    """Train one method, and show it beside raw pixels and what end-to-end training costs."""
    dataset = load_dataset(config)
    with run_folder(config, dataset) as (out, state):
        if (out / "summary.json").exists():
            print(f"{out} is finished:\n{table(json.loads((out / 'summary.json').read_text()))}")
            return
        stop_on_interrupt()
        encoder, history = train(config, dataset, out, state)
        if rank():
            return
        rows = {"raw pixels": baseline("raw", config, dataset),
                "random encoder": baseline("random", config, dataset)}
        mine = rows[label(config)] = result(config, dataset, encoder, history)
        if config.method != "e2e":
            whole = replace(config, method="e2e")
            price = rows["end-to-end"] = cost(whole, dataset.shape)
            rows["ratio"] = {c: f"{price[c] / mine[c]:.1f}x" for c in price if mine.get(c)}
        print(f"\nAccuracy on {len(dataset.test_images):,} test images, and what a client paid\n"
              f"{table(rows)}\nCosts are one client's over all rounds; GMAC for one image, all "
              "epochs; down counts a client that\nkeeps what it received, stateless one that keeps "
              "nothing between rounds; moved: each test image\nunder a random view.")
        write(out / "summary.json", rows)
        print(f"Everything is in {out}: summary.json is this table, encoder.pt the encoder, "
              "history.json the rounds")


def stop_on_interrupt():
    """Let Ctrl-C end the program at once and say how to go on: checkpoints are always whole."""
    def stop(*_):
        print("\ninterrupted; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)
    signal.signal(signal.SIGINT, stop)


class Parser(argparse.ArgumentParser):
    """A flag for every field of Config, in groups; `settings` makes a Config of them."""

    def __init__(self, description, **more):
        super().__init__(description=description, argument_default=argparse.SUPPRESS, **more)
        for f in fields(Config):
            if "group" in f.metadata:
                group = self.add_argument_group(f.metadata["group"])
            form = dict(type=type(f.default), choices=f.metadata.get("choices"))
            if isinstance(f.default, bool):
                form = dict(action=argparse.BooleanOptionalAction)
            text = f"{f.metadata['help']} (default: {f.default!r})"
            group.add_argument("--" + f.name.replace("_", "-"), help=text, **form)

    def error(self, message):
        raise InputError(message)


def command(body):
    """Run a command: a wrong input is one sentence and exit status 2, what fails is status 1."""
    try:
        body()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        sys.exit(f"{error}; the rounds before are saved: try another --out and a smaller --lr")
    except OSError as error:
        sys.exit(f"{error}; what was saved before is whole: the same command goes on")
    except KeyboardInterrupt:  # before there is anything to save
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments=None):
    given = vars(Parser(__doc__.split("\n\n")[0]).parse_args(arguments))
    config = Config(**given)
    check(config)
    for name in without_effect(config):
        if name in given:
            raise InputError(f"--{name.replace('_', '-')} changes nothing with --method "
                             f"{config.method} and --depth {config.depth}: leave it out")
    join_processes(config)
    run(config)


if __name__ == "__main__":
    command(main)
