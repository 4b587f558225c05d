"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

Guo et al. 2023, "Towards Federated Learning Under Resource Constraints via Layer-wise Training and Depth Dropout"
(arXiv 2309.05213); resource accounting after Tun et al. 2024, "LW-FedSSL" (arXiv 2401.11647).

Read it from top to bottom: configuration, model, stages and depth dropout, one client, the server, cost,
evaluation, command line.

    python fllw.py             # train on the embedded digits, about two minutes on two CPU cores
    python fllw.py --compare   # every method side by side
    python fllw.py --help
"""
import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
import weakref
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
from data import InputError
from ssl_loss import ProjectionHead, contrastive_step, nt_xent

# -------------------------------------------------------------------------------------------- configuration


def knob(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is generated from these fields."""
    data: str = knob("mnist5k", "mnist5k, cifar10, cifar100 or a FILE.npz of your own images")
    method: str = knob("fll", "which blocks exist and train at a stage", choices=("fll", "e2e", "progressive"))
    dim: int = knob(64, "width of the vision transformer")
    depth: int = knob(4, "number of blocks L")
    heads: int = knob(4, "attention heads; must divide dim")
    patch_size: int = knob(7, "side of a patch, pixels; must divide the image")
    pool: str = knob("mean", "what the loss reads", choices=("mean", "token"))
    head_hidden: int = knob(256, "width of the projection head's two hidden layers")
    head_dim: int = knob(64, "dimension in which the loss compares views")
    blocks_per_stage: int = knob(1, "blocks added (and, layer-wise, trained) at each stage; must divide depth")
    new_block: str = knob("copy", "how a new block starts: as a copy of the one below or fresh", choices=("copy", "fresh"))
    depth_dropout: float = knob(0.25, "probability with which a client drops each frozen block in a round, in [0, 1)")
    clients: int = knob(2, "number of clients N")
    clients_per_round: int = knob(0, "clients sampled each round; 0 means all")
    alpha: float = knob(0.0, "Dirichlet concentration of the labels over clients; 0 means IID")
    rounds: int = knob(96, "federated rounds, shared equally among the stages")
    local_epochs: int = knob(1, "passes of a client over its images in a round")
    batch_size: int = knob(64, "images in a local step (each gives two views)")
    micro_batch: int = knob(0, "images whose graph is held at a time (gradient caching, exact); 0 means the whole batch")
    lr: float = knob(4e-3, "peak learning rate (AdamW, one cosine per stage)")
    weight_decay: float = knob(1e-4, "AdamW weight decay")
    temperature: float = knob(0.1, "temperature of NT-Xent")
    augment: str = knob("auto", "recipe of the two views; auto is digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural"))
    seed: int = knob(0, "everything random derives from it")
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "run folder; by default runs/<data>-<method>-seed<seed>")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")

    @property
    def rounds_clients(self):
        return self.clients_per_round or self.clients


def rng(config, *key):
    """A numpy generator for (seed, *key) alone; key is for instance (purpose, round, client)."""
    return np.random.default_rng([config.seed, *key])


SAMPLING, DROPOUT, TRAINING, INIT = 1, 2, 3, 4  # purposes of a draw


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
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
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


def initial(config, shape, depth):
    """State dict of a freshly initialised learner with `depth` blocks; torch's own randomness is left as it was."""
    with torch.random.fork_rng(devices=[]):
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


def stages(config):
    """The stages of a run: the one place where the methods differ."""
    L, k = config.depth, config.blocks_per_stage
    if config.method == "e2e":
        blocks = [(0, L)]
    elif config.method == "progressive":
        blocks = [(0, s * k) for s in range(1, L // k + 1)]
    else:
        blocks = [((s - 1) * k, s * k) for s in range(1, L // k + 1)]
    rounds = [len(part) for part in np.array_split(np.arange(config.rounds), len(blocks))]
    return [Stage(i + 1, *blocks[i], rounds[i]) for i in range(len(blocks))]


def sample_clients(config, round):
    """The clients of a round, in ascending order: a function of (seed, round)."""
    chosen = rng(config, SAMPLING, round).choice(config.clients, config.rounds_clients, replace=False)
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

    A copy is the very tensors of the last block trained before, so broadcasting it costs one block, not two."""
    server = dict(server)
    have = 1 + max(int(name.split(".")[2]) for name in server if name.startswith("encoder.blocks."))
    fresh = initial(config, shape, stage.present) if config.new_block == "fresh" and have < stage.present else {}
    for block in range(have, stage.present):
        for name in [name for name in server if name.startswith(f"encoder.blocks.{have - 1}.")]:
            new = name.replace(f".{have - 1}.", f".{block}.", 1)
            server[new] = fresh.get(new, server[name])
    return server


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


def learning_rate(config, progress):
    """One cosine from lr to 0 over a stage; progress runs from 0 to 1 within the stage."""
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def local_train(config, stage, message, images, round, client, progress=0.0, meter=None):
    """One client's work in one round.

    message: what broadcast() handed over; images: uint8 [n, C, H, W], on the device; progress: how much of the
    stage's rounds is done. Returns (upload, loss): the trained tensors and the mean loss over the local steps."""
    meter = meter or MemoryMeter(images.device)
    with meter:
        learner = receive(config, message, images.shape[1:], stage)
        trained = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)
    frozen, active = split(learner.encoder, stage)
    recipe = data.RECIPES[data.recipe_for(config.data) if config.augment == "auto" else config.augment]
    draws = torch.Generator(images.device).manual_seed(int(rng(config, TRAINING, round, client).integers(2**63)))
    criterion = lambda z: nt_xent(*z.chunk(2), config.temperature)
    batch = min(config.batch_size, len(images))
    steps = config.local_epochs * (len(images) // batch)
    total = 0.0
    for step in range(steps):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images), device=images.device, generator=draws)
        chosen = order[step % (len(images) // batch) * batch:][:batch]
        with meter if step < 2 else contextlib.nullcontext():  # the second step has the optimizer's state as well
            views = data.two_views(images[chosen], recipe, draws)
            optimizer.param_groups[0]["lr"] = learning_rate(config, progress + step / steps / stage.rounds)
            optimizer.zero_grad()
            total += contrastive_step(frozen, active, learner.head, views, criterion, config.micro_batch)
            optimizer.step()
            del views
    upload = {name: p.detach() for name, p in learner.named_parameters() if p.requires_grad}
    return upload, total / steps


def split(encoder, stage):
    """The encoder as two functions: the frozen part, which keeps no graph, and the active part."""
    if stage.first == 0:
        return (lambda images: images), encoder
    return torch.no_grad()(lambda images: encoder.lower(images, stage.first)), lambda x: encoder.upper(x, stage.first)


class MemoryMeter(TorchDispatchMode):
    """Peak bytes of memory taken while it is active: `with meter: ...`, as often as needed, then `meter.peak`.

    On a GPU the allocator's own statistics. On the CPU every storage that an operation returns is counted until
    it is freed: parameters, gradients, optimizer state, activations and temporaries, exact and machine-independent."""

    def __init__(self, device):
        super().__init__()
        self.cuda = device if torch.device(device).type == "cuda" else None
        self.live = self.peak = 0
        self.seen = {}  # id of a storage -> what tells when it is freed
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.before = torch.cuda.memory_allocated(self.cuda)

    def __enter__(self):
        return self if self.cuda else super().__enter__()

    def __exit__(self, *error):
        if not self.cuda:
            return super().__exit__(*error)
        self.peak = torch.cuda.max_memory_allocated(self.cuda) - self.before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self.seen:
                self.seen[storage._cdata] = weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, nbytes):
        del self.seen[key]
        self.live -= nbytes


def tensors(tree):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        yield from tensors(tuple(tree.values()))


# ---------------------------------------------------------------------------------------------- the server

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
            else:
                self.mean[name].lerp_(tensor, weight / self.weight)


def nbytes(state):
    """Bytes of a message; a tensor that goes by two names travels once."""
    return sum({id(t): t.numel() * t.element_size() for t in state.values()}.values())


def news(server, stage, message, held):
    """The part of a message that a client which keeps what it received does not hold yet.

    held: set of names of final tensors; those of this message are added to it. Only frozen tensors stay final."""
    first_name = {}
    for name, tensor in server.items():
        first_name.setdefault(id(tensor), name)  # a block that starts as a copy goes by the original's name
    new = {name: tensor for name, tensor in message.items() if first_name[id(tensor)] not in held}
    held.update(first_name[id(t)] for t in message.values() if not stage.trains(first_name[id(t)]))
    return new


def run_round(config, server, stage, round, parts, dataset, held, progress=0.0):
    """One round: broadcast, local training of the sampled clients, upload, average.

    server: the global state dict; parts: the clients' image indices; held: client -> names of the frozen tensors it
    already has, updated. Returns (the new server state, the round's row of the history)."""
    began = time.perf_counter()
    average, rows = WeightedMean(), []
    for client in sample_clients(config, round):
        kept = draw_blocks(config, stage, round, client)
        message = broadcast(server, stage, kept)
        download = nbytes(news(server, stage, message, held.setdefault(client, set())))
        images = dataset.train_images[parts[client].to(dataset.train_images.device)]
        meter = MemoryMeter(images.device)
        upload, loss = local_train(config, stage, message, images, round, client, progress, meter)
        average.add(upload, len(images))
        rows.append((client, kept, float(loss), download, nbytes(message), nbytes(upload), meter.peak))
    clients, kept, losses, down, stateless, up, peaks = zip(*rows)
    return {**server, **average.mean}, {
        "round": round, "stage": stage.number, "method": config.method, "loss": float(np.mean(losses)),
        "active_blocks": list(range(stage.first, stage.present)), "clients": clients, "kept_blocks": kept,
        "download_bytes": float(np.mean(down)), "stateless_download_bytes": float(np.mean(stateless)),
        "upload_bytes": float(np.mean(up)), "peak_memory_bytes": max(peaks), "seconds": time.perf_counter() - began}


def federate(config, on_round=None, dataset=None):
    """Train by federated rounds; returns (encoder, history).

    on_round(row, server), if given, is called after every round with its row and the server's state."""
    dataset = dataset or data.load(config.data, config.cache)
    check(config, dataset)
    device = pick_device(config)
    dataset = dataset._replace(train_images=dataset.train_images.to(device))
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    plan = stages(config)
    server = {k: v.to(device) for k, v in initial(config, dataset.shape, plan[0].present).items()}
    history, held = [], {}
    for stage in plan:
        server = grow(config, server, dataset.shape, stage)
        for i in range(stage.rounds):
            server, row = run_round(config, server, stage, len(history) + 1, parts, dataset, held, i / stage.rounds)
            history.append(row)
            if on_round:
                on_round(row, server)
    return encoder_of(config, server, dataset.shape), history


def encoder_of(config, server, shape):
    """The encoder in a server's state, with all its blocks: evaluation and deployment always use full depth."""
    state = {name.removeprefix("encoder."): t for name, t in server.items() if name.startswith("encoder.")}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    encoder = ViT(shape[1:], config.patch_size, shape[0], config.dim, depth, config.heads, config.pool)
    encoder.load_state_dict(state)
    return encoder.to(next(iter(state.values())).device).eval()


def pick_device(config):
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)

def check(config, dataset):
    pass


# ----------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def features(encoder, images, batch=500):
    """Features of uint8 images [N, C, H, W] -> float32 [N, dim], on the encoder's device."""
    device = next(encoder.parameters()).device
    return torch.cat([encoder(data.normalise(part.to(device))) for part in images.split(batch)])


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Accuracy in % of k nearest neighbours: cosine similarity, votes weighted exp(similarity / temperature).

    train: [N, D], test: [M, D], labels: int64. After Wu et al. 2018, as usual for self-supervised features."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train))
    correct = 0
    for part, labels in zip(test.split(500), test_labels.split(500)):
        similarity, neighbours = (part @ train.T).topk(k)
        votes = torch.zeros(len(part), int(train_labels.max()) + 1, device=train.device)
        votes.scatter_add_(1, train_labels[neighbours], torch.exp(similarity / temperature))
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test)


def linear_probe(train, train_labels, test, test_labels, penalties=(1e-4, 1e-3, 1e-2, 1e-1), seed=0):
    """Accuracy in % of a logistic regression on frozen, standardised features, fitted by L-BFGS.

    The L2 penalty is chosen on a fifth of the *training* features, then all of them are used. train: [N, D]."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, fit = order[:len(train) // 5], order[len(train) // 5:]
    accuracy = lambda w, x, y: 100 * (torch.addmm(w[1], x, w[0]).argmax(1) == y).float().mean().item()
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    best = max(penalties, key=lambda p: accuracy(logistic(train[fit], train_labels[fit], classes, p),
                                                 train[held], train_labels[held]))
    return accuracy(logistic(train, train_labels, classes, best), test, test_labels)


def logistic(x, y, classes, penalty):
    """Weights [D, classes] and bias [classes] of a multinomial logistic regression with an L2 penalty."""
    weights = [torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True),
               torch.zeros(classes, device=x.device, requires_grad=True)]
    optimizer = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(weights[1], x, weights[0]), y) + penalty / 2 * weights[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [w.detach() for w in weights]


def evaluate(encode, dataset):
    """k-NN and linear-probe accuracy in % of a function uint8 images -> features; test labels choose nothing."""
    train, test = encode(dataset.train_images), encode(dataset.test_images)
    labels = dataset.train_labels.to(train.device), dataset.test_labels.to(train.device)
    return {"knn": knn(train, labels[0], test, labels[1]), "linear_probe": linear_probe(train, labels[0], test, labels[1])}
