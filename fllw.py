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
from torch._subclasses.fake_tensor import FakeTensorMode
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
    dim: int = knob(64, "width of the vision transformer", low=1)
    depth: int = knob(4, "number of blocks L", low=1)
    heads: int = knob(4, "attention heads; must divide dim", low=1)
    patch_size: int = knob(7, "side of a patch, pixels; must divide the image", low=1)
    pool: str = knob("mean", "what the loss reads", choices=("mean", "token"))
    head_hidden: int = knob(256, "width of the projection head's two hidden layers", low=1)
    head_dim: int = knob(64, "dimension in which the loss compares views", low=1)
    blocks_per_stage: int = knob(1, "blocks added (and, layer-wise, trained) at each stage; must divide depth", low=1)
    new_block: str = knob("copy", "how a new block starts: as a copy of the one below or fresh", choices=("copy", "fresh"))
    depth_dropout: float = knob(0.25, "probability with which a client drops each frozen block in a round, in [0, 1)")
    clients: int = knob(2, "number of clients N", low=1)
    clients_per_round: int = knob(0, "clients sampled each round; 0 means all", low=0)
    alpha: float = knob(0.0, "Dirichlet concentration of the labels over clients; 0 means IID", low=0)
    rounds: int = knob(96, "federated rounds, shared equally among the stages", low=1)
    local_epochs: int = knob(1, "passes of a client over its images in a round", low=1)
    batch_size: int = knob(64, "images in a local step (each gives two views)", low=2)
    micro_batch: int = knob(0, "images whose graph is held at a time (gradient caching, exact); 0 means the whole batch", low=0)
    lr: float = knob(4e-3, "peak learning rate (AdamW, one cosine per stage)", low=1e-6)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    temperature: float = knob(0.1, "temperature of NT-Xent", low=1e-6)
    augment: str = knob("auto", "recipe of the two views; auto is digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural"))
    seed: int = knob(0, "everything random derives from it", low=0)
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "run folder; by default runs/<data>-<method>-seed<seed>")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")

    @property
    def rounds_clients(self):
        return self.clients_per_round or self.clients


def check(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    for f in fields(config):
        value, low, choices = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("choices")
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in choices:
            raise InputError(f"{flag} must be one of {', '.join(choices)}, it is {value!r}")
        if low is not None and not (low <= value < math.inf):
            raise InputError(f"{flag} must be at least {low:g}, it is {value:g}")
    if not 0 <= config.depth_dropout < 1:
        raise InputError(f"--depth-dropout is a probability in [0, 1), it is {config.depth_dropout:g}")
    if config.dim % config.heads:
        raise InputError(f"--dim must be a multiple of --heads, {config.dim} is no multiple of {config.heads}")
    if config.depth % config.blocks_per_stage:
        raise InputError(f"--depth must be a multiple of --blocks-per-stage, "
                         f"{config.depth} is no multiple of {config.blocks_per_stage}")
    if config.clients_per_round > config.clients:
        raise InputError(f"--clients-per-round must be at most --clients ({config.clients}), it is {config.clients_per_round}")
    if config.rounds < len(stages(config)):
        raise InputError(f"--rounds must be at least the number of stages ({len(stages(config))}), it is {config.rounds}")
    pick_device(config)


def pick_device(config):
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError):
        raise InputError(f"there is no device {config.device!r} here: use cpu"
                         + ", cuda" * torch.cuda.is_available() + " or auto") from None


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
        nn.init.normal_(self.pos_embed, std=0.2)
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
    check(config)
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


# ----------------------------------------------------------------------------------------------------- cost

def macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image in one local epoch, as Tun et al. 2024 count: two views, forward 1x and
    backward 2x for what trains, forward 1x for what is frozen; linear layers and attention products."""
    channels, height, width = image_shape
    D, patches = config.dim, height * width // config.patch_size**2
    T = patches + 1
    block = T * 12 * D**2 + 2 * T**2 * D  # qkv 3, proj 1, mlp 4 + 4; query-key and attention-value products
    embed = patches * config.patch_size**2 * channels * D
    head = config.head_hidden * (D + config.head_hidden + config.head_dim)
    active = stage.present - stage.first
    return 2 * ((1 if stage.first else 3) * embed + (len(kept) - active) * block + 3 * active * block + 3 * head)


def step_memory(config, stage, kept, image_shape):
    """Peak bytes of a client at this stage: two real local steps under a MemoryMeter.

    On a GPU they run on blank images; on the CPU they run on torch's fake tensors, which have shapes, dtypes and
    lifetimes but no data: the same bytes as a real step, in no time and no memory."""
    device = pick_device(config)
    with contextlib.nullcontext() if device.type == "cuda" else FakeTensorMode(), device:
        state = Learner(config, image_shape, stage.present).state_dict()
        images = torch.zeros(2 * config.batch_size, *image_shape, dtype=torch.uint8)
        meter = MemoryMeter(device)
        local_train(config, stage, broadcast(state, stage, kept), images, 0, 0, meter=meter)
    return meter.peak


def cost(config, method, image_shape):
    """What a client that takes part in every round pays over the whole training, without training.

    Replays the rounds of `method` with tensors that have a shape but no data. image_shape: (channels, height, width).
    Returns a dict: download_bytes (a client that keeps what it received), stateless_download_bytes, upload_bytes,
    macs (multiply-accumulates for one image over all local epochs) and peak_memory_bytes."""
    config = replace(config, method=method)
    check(config)
    total = dict.fromkeys(("download_bytes", "stateless_download_bytes", "upload_bytes", "macs"), 0)
    plan, held, round, largest = stages(config), {}, 0, {}
    with torch.device("meta"):
        server = initial(config, image_shape, plan[0].present)
        for stage in plan:
            server = grow(config, server, image_shape, stage)
            for _ in range(stage.rounds):
                round += 1
                clients = sample_clients(config, round)
                upload = {name: tensor.clone() for name, tensor in server.items() if stage.trains(name)}
                for client in clients:
                    kept = draw_blocks(config, stage, round, client)
                    message = broadcast(server, stage, kept)
                    new = news(server, stage, message, held.setdefault(client, set()))
                    largest[stage] = max(kept, largest.get(stage, []), key=len)
                    for name, amount in zip(total, (nbytes(new), nbytes(message), nbytes(upload),
                                                    config.local_epochs * macs(config, stage, kept, image_shape))):
                        total[name] += amount / len(clients)
                server = {**server, **upload}
    peaks = [step_memory(config, stage, largest[stage], image_shape) for stage in {plan[0], plan[-1]}]
    return {**total, "peak_memory_bytes": max(peaks)}  # in between, stages differ by a frozen block's parameters


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


# --------------------------------------------------------------------------------------------- command line

def label(config):
    """A method's name in tables."""
    if config.method == "fll":
        return ("FLL" + f", {config.blocks_per_stage} blocks a stage" * (config.blocks_per_stage > 1)
                + f" + FDD {config.depth_dropout:g}" * (config.depth_dropout > 0))
    return {"e2e": "end-to-end", "progressive": "progressive"}[config.method]


def prepare(config, name):
    """Load the data and make sure that everything fits before anything is written; returns (dataset, run folder)."""
    check(config)
    out = Path(config.out or f"runs/{name}")
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not a run folder: choose another --out")
    dataset = data.load(config.data, config.cache)
    with torch.device("meta"):
        Learner(config, dataset.shape, 1)
    data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "config.json", {**asdict(config), "image_shape": dataset.shape})
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return dataset, out


def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".pt":
        torch.save(content, temporary)
    else:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def load_encoder(run):
    """The trained encoder of a run folder, ready for `encoder(data.normalise(images))`."""
    settings = json.loads((Path(run) / "config.json").read_text())
    shape = settings.pop("image_shape")
    state = torch.load(Path(run) / "encoder.pt", map_location="cpu", weights_only=True)
    return encoder_of(Config(**settings), {f"encoder.{name}": tensor for name, tensor in state.items()}, shape)


def strip(row):
    """Which blocks each client of a round held: A active, + frozen, . dropped (the first three clients)."""
    strips = ["".join("A" if b in row["active_blocks"] else "+" if b in kept else "."
                      for b in range(1 + max(row["active_blocks"]))) for kept in row["kept_blocks"][:3]]
    return " ".join(strips) + " ..." * (len(row["kept_blocks"]) > 3)


def train(config, dataset, out):
    """Train one method, one line a round, and leave a run folder. Returns (encoder, history)."""
    plan, began = stages(config), time.perf_counter()
    work = [macs(config, stage, range(stage.present), dataset.shape) for stage in plan for _ in range(stage.rounds)]
    print(f"\n{label(config)}: {config.rounds} rounds in {len(plan)} stages; blocks are A active, + frozen, . dropped; "
          f"bytes and peak memory are a client's\n{'stage':>6} {'round':>8} {'active':>7} {'clients':>8} {'loss':>6} "
          f"{'down MB':>8} {'up MB':>7} {'peak MiB':>9} {'seconds':>8} {'left s':>7}  blocks of each client")

    def show(row, server):
        done, spent = row["round"], time.perf_counter() - began
        left = spent * sum(work[done:]) / sum(work[:done])
        active = row["active_blocks"]
        span = f"{active[0] + 1}-{active[-1] + 1}" if len(active) > 1 else f"{active[0] + 1}"
        print(f"{row['stage']:>3}/{len(plan):<2} {done:>4}/{config.rounds:<3} {span:>7} "
              f"{len(row['clients']):>4}/{config.clients:<3} {row['loss']:>6.3f} {row['download_bytes'] / 1e6:>8.3f} "
              f"{row['upload_bytes'] / 1e6:>7.3f} {row['peak_memory_bytes'] / 2**20:>9.1f} {row['seconds']:>8.2f} "
              f"{left:>7.0f}  {strip(row)}", flush=True)

    encoder, history = federate(config, show, dataset)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.json", {**asdict(config), "image_shape": dataset.shape})
    write(out / "history.json", history)
    write(out / "encoder.pt", {name: tensor.cpu() for name, tensor in encoder.state_dict().items()})
    return encoder, history


def baselines(config, dataset):
    """Rows that need no training: raw pixels and a randomly initialised encoder of full depth."""
    device = pick_device(config)
    random = encoder_of(config, initial(config, dataset.shape, config.depth), dataset.shape).to(device)
    return {"raw pixels": evaluate(lambda images: images.to(device).flatten(1) / 255, dataset),
            "random encoder": evaluate(lambda images: features(random, images), dataset)}


COLUMNS = {  # of the tables and of summary.json: (heading, unit's divisor, format)
    "knn": ("k-NN %", 1, ".1f"), "linear_probe": ("probe %", 1, ".1f"), "peak_memory_bytes": ("peak MiB", 2**20, ".1f"),
    "macs": ("GMAC/image", 1e9, ".2f"), "download_bytes": ("down MB", 1e6, ".2f"),
    "stateless_download_bytes": ("stateless MB", 1e6, ".2f"), "upload_bytes": ("up MB", 1e6, ".2f"),
    "seconds": ("seconds", 1, ".0f")}


def table(rows):
    """Rows {name: {column: number}} as text, in the order of COLUMNS; a dash where a row has no such number."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]
    width = 2 + max(map(len, rows))
    lines = [" " * width + "".join(f"{COLUMNS[c][0]:>14}" for c in columns)]
    for name, row in rows.items():
        cells = [f"{row[c] / COLUMNS[c][1]:{COLUMNS[c][2]}}" if c in row else "-" for c in columns]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


NOTE = ("Costs are one client's over all rounds; GMAC for one image, all epochs; down counts a client that keeps what it\n"
        "received, stateless one that keeps nothing between rounds.")


def run(config):
    """Train one method and report what was learned and what it cost next to end-to-end training."""
    dataset, out = prepare(config, f"{Path(config.data).stem}-{config.method}-seed{config.seed}")
    encoder, history = train(config, dataset, out)
    seconds = sum(row["seconds"] for row in history)
    learned = {**baselines(config, dataset),
               label(config): evaluate(lambda images: features(encoder, images), dataset)}
    paid = {label(config): cost(config, config.method, dataset.shape)}
    if config.method != "e2e":
        paid["end-to-end"] = cost(config, "e2e", dataset.shape)
        mine, theirs = paid.values()
        ratio = {name: theirs[name] / mine[name] for name in mine}
    print(f"\nWhat was learned: accuracy on {len(dataset.test_images):,} test images\n{table(learned)}")
    print(f"\nWhat it cost\n{table(paid)}")
    if config.method != "e2e":
        print("end-to-end pays " + ", ".join(f"{ratio[c]:.1f}x {COLUMNS[c][0].rsplit(' ', 1)[0]}" for c in ratio))
    print(NOTE)
    write(out / "summary.json", {"method": label(config), "accuracy": learned, "cost": paid, "seconds": seconds})
    print(f"{seconds:.0f} s of training; encoder.pt, config.json, history.json and summary.json are in {out}")


def compare(config):
    """Train every method on the same data, seed and rounds; one table of accuracy and cost."""
    dataset, out = prepare(config, f"{Path(config.data).stem}-compare-seed{config.seed}")
    rows = baselines(config, dataset)
    for method, p in (("e2e", 0.0), ("progressive", 0.0), ("fll", 0.0), ("fll", config.depth_dropout or 0.5)):
        one = replace(config, method=method, depth_dropout=p)
        encoder, history = train(one, dataset, out / (method + "-fdd" * (p > 0)))
        rows[label(one)] = {**evaluate(lambda images: features(encoder, images), dataset),
                            **cost(one, method, dataset.shape), "seconds": sum(row["seconds"] for row in history)}
        write(out / "summary.json", rows)
    print(f"\n{table(rows)}\n{NOTE}\nEvery method has its run folder in {out}, and the table is {out}/summary.json")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def parse(arguments=None):
    """The command line: one flag for every field of Config, and the modes."""
    parser = Parser(prog="fllw.py", description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="train end-to-end, progressive, FLL and FLL + FDD side by side")
    for f in fields(Config):
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default,
                            choices=f.metadata.get("choices"), help=f.metadata["help"])
    settings = vars(parser.parse_args(arguments))
    return settings.pop("compare"), Config(**settings)


def main():
    try:
        comparing, config = parse()
        (compare if comparing else run)(config)
    except InputError as error:
        print(f"fllw.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
