"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

The method is that of Guo et al. 2023 (arXiv 2309.05213). Read from top to bottom: settings, model,
stages and depth dropout, one client, the loop. There the method ends; then come what it costs, and
the command. ssl_loss.py has the loss and the projection head, data.py the images and their views.

A run is cut into stages, a stage into rounds. In a stage some blocks of the model are *present*.
Some of those are *active*: they train. The others are *frozen*: they only run forward, and with
depth dropout a client skips some of them. The blocks that are not present do not exist yet.
Rounds and stages are counted from 1, blocks and clients from 0.
"""
import argparse
import contextlib
import fcntl
import functools
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections import OrderedDict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from data import InputError, friendly_errors
from ssl_loss import ProjectionHead, contrastive_loss, evaluate, micro_batched_step, table

# ----------------------------------------------------------------------------------- settings
def knob(default, help, **more):
    """A field of Config. more: its limits (low, high or choices); group: starts a group."""
    return field(default=default, metadata={"help": help, **more})

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The command's flags are made from these fields."""
    data: str = knob("mnist5k", "mnist5k, cifar10, cifar100 or a FILE.npz", group="data")
    images: int = knob(0, "use so many of the training images; 0: all", low=0)
    augment: str = knob("auto", "the two views; auto: digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural", "solarised"))
    dim: int = knob(64, "width of the vision transformer", low=1, group="model")
    depth: int = knob(4, "number of blocks L", low=1, high=1000)
    heads: int = knob(8, "attention heads; must divide dim", low=1)
    patch_size: int = knob(7, "side of a patch in pixels; must divide the image", low=1)
    head_hidden: int = knob(256, "width of the projection head's hidden layers", low=1)
    head_dim: int = knob(64, "dimension in which the loss compares views", low=1)
    method: str = knob("fll", "which blocks exist and train in a stage", group="layer-wise",
                       choices=("fll", "e2e", "progressive", "lasting"))
    blocks_per_stage: int = knob(1, "blocks that a stage adds", low=1)
    new_block: str = knob("copy", "start as a copy of the block below, the identity, or fresh",
                          choices=("copy", "zero", "fresh"))
    first_share: float = knob(0.0, "share of the rounds for stage 1; 0: equal", low=0, high=0.99)
    depth_dropout: float = knob(0.25, "chance that a frozen block is dropped", low=0, high=0.99)
    clients: int = knob(2, "number of clients N", low=1, group="federation")
    clients_per_round: int = knob(0, "clients sampled each round; 0: all", low=0)
    alpha: float = knob(0.0, "Dirichlet concentration of labels; 0: IID", low=0, high=1e6)
    server_momentum: float = knob(0.0, "share of its last step that the server repeats; 0: none",
                                  low=0, high=0.99)
    rounds: int = knob(96, "federated rounds, shared among the stages", low=1)
    local_epochs: int = knob(1, "passes over a client's images in a round", low=1)
    batch_size: int = knob(64, "images of a local step; two views each", low=2, group="training")
    micro_batch: int = knob(0, "images whose graph is held at a time, exactly; 0: all", low=0)
    lr: float = knob(2e-3, "peak learning rate (AdamW, one cosine per stage)", low=1e-6)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    temperature: float = knob(0.2, "temperature of NT-Xent", low=1e-6)
    amp: bool = knob(False, "bf16 autocast for the model; the loss stays in float32")
    seed: int = knob(0, "everything random derives from it", low=0, group="run")
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    workers: int = knob(0, "processes that train clients; 0: one per core, on a GPU none", low=0)
    out: str = knob("", "run folder; by default one under runs/, named after data and method")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")

    def learner(self, image_shape):
        """What a client trains. Another model: a subclass that overrides this and macs()."""
        return Learner(self, image_shape)

    def macs(self, stage, kept, image_shape):
        """Multiply-accumulates for one image in a local epoch."""
        return count_macs(self, stage, kept, image_shape)

# The second number of a seed says what is drawn with it. 0 is for data.partition().
INIT, SAMPLING, DROPOUT, TRAINING = range(1, 5)

def rng(config, *key):
    """A numpy generator for (seed, *key) alone; key: for instance (purpose, round, client)."""
    return np.random.default_rng([config.seed, *key])

def generator(config, device, *key):
    """A torch generator on the device, for (seed, *key) alone."""
    return torch.Generator(device).manual_seed(int(rng(config, *key).integers(2**63)))

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

class Block(nn.Module):  # pre-norm; where both halves give 0 it is the identity
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):  # [B, T, D]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021): images [B, C, H, W] -> features [B, dim].

    Names and arithmetic are those of timm's VisionTransformer with num_classes=0,
    global_pool="avg", fc_norm=False. image_size: (height, width), pixels."""
    def __init__(self, image_size, patch_size, channels, dim, depth, heads):
        super().__init__()
        height, width = image_size
        if height % patch_size or width % patch_size:
            raise InputError(f"--patch-size {patch_size} must divide the images; read as [N, H, W, "
                             f"C], they have {height} x {width} pixels and {channels} channels")
        patches = (height // patch_size) * (width // patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(channels, dim, patch_size, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.pos_embed, std=0.5)  # usually 0.02; chosen by early trials on digits
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    # The forward pass is cut in two: what lies below the first active block needs no gradients.
    def lower(self, images, stop):
        """Patch embedding and the first `stop` blocks: [B, C, H, W] -> tokens [B, T, D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, patches, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks[:stop]:
            x = block(x)
        return x

    def upper(self, x, start):
        """Blocks from `start` on, final norm, pooling: tokens [B, T, D] -> features [B, D]."""
        for block in self.blocks[start:]:
            x = block(x)
        return self.norm(x)[:, 1:].mean(1)  # of patches; the class token serves attention only

    def forward(self, images):
        return self.upper(self.lower(images, 0), 0)

class Learner(nn.Module):
    """What is trained: the encoder, and the projection head that is thrown away afterwards."""
    def __init__(self, config, image_shape):
        super().__init__()
        channels, *size = image_shape
        self.encoder = ViT(size, config.patch_size, channels, config.dim, config.depth,
                           config.heads)
        self.head = ProjectionHead(config.dim, config.head_hidden, config.head_dim)

def initial(config, shape, device="cpu"):
    """State dict of a fresh learner, all its blocks; on device "meta", shapes without data."""
    # Modules draw from torch's own generator: seed it, and leave it afterwards as it was.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(int(rng(config, INIT).integers(2**63)))
        return config.learner(tuple(shape)).state_dict()

@functools.lru_cache(maxsize=None)
def block_of(name):
    """The block that a tensor of this name belongs to; None: embedding, final norm, head."""
    found = re.search(r"\bblocks\.(\d+)\.", name)
    return int(found[1]) if found else None

@functools.lru_cache(maxsize=8)
def blank_learner(config, shape):
    """A learner whose tensors have shapes but no data: PyTorch's device "meta"."""
    with torch.device("meta"):
        return config.learner(shape)

def assemble(config, tensors, shape, trains=lambda name: True):
    """The learner that has clones of these tensors, as a client makes it from what it receives.

    shape: (channels, height, width) of an image; trains: name -> whether the tensor has gradients.
    A block that is not among the tensors, dropped or not yet there, becomes the identity: so a
    model of any depth runs through the same lower() and upper()."""
    absent = set(range(config.depth)) - {block_of(name) for name in tensors}

    # This does what load_state_dict() does, in a third of its time, which counts where clients are
    # small. All but parameters and children is shared with the blank learner: it has no buffers.
    def fill(blank, prefix):
        if block_of(prefix) in absent:
            return nn.Identity()
        parameters, children = dict(blank._parameters), {}
        for name, parameter in parameters.items():
            if parameter is not None:
                full_name = prefix + name
                parameters[name] = nn.Parameter(tensors[full_name].clone(), trains(full_name))
        for name, child in blank._modules.items():
            children[name] = fill(child, f"{prefix}{name}.")
        module = object.__new__(type(blank))
        module.__dict__ = blank.__dict__ | {"_parameters": parameters, "_modules": children}
        return module

    return fill(blank_learner(config, tuple(shape)), "")

def encoder_of(config, server, shape):
    """The encoder among the server's tensors: evaluation and deployment use every block."""
    return assemble(config, server, shape).encoder.eval().requires_grad_(False)

# ------------------------------------------------------------------ stages and depth dropout
@dataclass(frozen=True)
class Stage:
    """One stage of the plan; blocks are numbers, ascending."""
    number: int
    present: tuple  # the blocks that exist
    active: tuple   # those of them that train
    rounds: int

    @property
    def frozen(self):
        return tuple(b for b in self.present if b not in self.active)

    def trains(self, name):
        """Whether a learner's tensor of this name trains."""
        if any(part in name for part in ("patch_embed", "pos_embed", "cls_token")):
            return 0 in self.active  # the embedding trains with block 0
        block = block_of(name)
        return block is None or block in self.active  # the final norm and the head always train

def stages(config, history=()):
    """The plan of a run, all its stages: the one place where the methods differ.

    history: the rows of the rounds done. Not used here; another plan may end a stage early."""
    L, k = config.depth, config.blocks_per_stage
    every, tops = tuple(range(L)), range(k, L + 1, k)  # where the blocks of each stage end
    choices = {  # (present, active), stage by stage
        "e2e": [(every, every)],                                         # everything at once
        "progressive": [(every[:top], every[:top]) for top in tops],     # all so far train
        "fll": [(every[:top], every[top - k:top]) for top in tops],      # only the newest train
        # the newest and the last block, which is there from the first stage on:
        "lasting": [(every[:top] + every[-1:], every[top - k:top] + every[-1:])
                    for top in range(k, L, k)]}
    plan, pairs, rounds_left = [], choices[config.method], config.rounds
    for number, (present, active) in enumerate(pairs, 1):
        later = len(pairs) - number  # stages, each with a round at least
        rounds = math.ceil(rounds_left / (later + 1))
        if number == 1 and later and config.first_share:
            rounds = min(max(1, round(config.first_share * rounds_left)), rounds_left - later)
        plan.append(Stage(number, present, active, rounds))
        rounds_left -= rounds
    return plan

def stage_progress(plan, rounds_done):
    """The next round's stage, and the share of its rounds that is done; (None, 0) at the end."""
    for stage in plan:
        if rounds_done < stage.rounds:
            return stage, rounds_done / stage.rounds
        rounds_done -= stage.rounds
    return None, 0

def sample_clients(config, round_number):
    """The clients of a round, ascending: a function of (seed, round)."""
    size = config.clients_per_round or config.clients
    chosen = rng(config, SAMPLING, round_number).choice(config.clients, size, replace=False)
    return sorted(chosen.tolist())

def sample_kept_blocks(config, stage, round_number, client):
    """Federated depth dropout: the blocks that this client keeps in this round, ascending.

    Each frozen block is dropped with probability depth_dropout, an active block never. The draw
    is a function of (seed, round, client)."""
    draws = rng(config, DROPOUT, round_number, client).random(len(stage.frozen))
    dropped = [b for b, u in zip(stage.frozen, draws) if u < config.depth_dropout]
    return tuple(b for b in stage.present if b not in dropped)

def broadcast(server, kept):
    """What a client receives: the server's tensors, less the blocks that it does not keep."""
    return {name: t for name, t in server.items() if block_of(name) in (None, *kept)}

# --------------------------------------------------------------------------------- one client
def learning_rate(config, share):
    """A cosine from lr to 0 over a stage; share: how much of the stage is done, 0 to 1."""
    return config.lr * ((1 + math.cos(math.pi * share)) / 2)

def local_batches(config, images, draws):
    """Yield (share of the round that is done, indices of a batch), shuffled every epoch."""
    batch = min(config.batch_size, len(images))
    steps = len(images) // batch  # of an epoch; what is left over waits for the next shuffle
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(images), device=images.device, generator=draws)
        for step, chosen in enumerate(order[:steps * batch].view(steps, batch)):
            yield (epoch * steps + step) / (config.local_epochs * steps), chosen

def local_step(config, learner, stage, views, criterion=contrastive_loss):
    """Forward and backward of one local step; returns the loss. Gradients land in what trains.

    views: float32 [2B, C, H, W], as from data.two_views(); criterion: like contrastive_loss. In
    less memory: ssl_loss.micro_batched_step."""
    first = min(stage.active)  # the blocks below it are frozen
    autocast = torch.autocast(views.device.type, torch.bfloat16, enabled=config.amp)
    with autocast:
        with torch.set_grad_enabled(first == 0):  # the embedding trains with block 0
            tokens = learner.encoder.lower(views, first)  # frozen: no graph, nothing is stored
        z = learner.head(learner.encoder.upper(tokens, first))  # with a graph; [2B, head_dim]
    loss = criterion(config, z, [tokens if first else views])  # a list, as of micro-batches
    del z  # it is freed before the backward pass, whose graph holds what is needed of it
    loss.backward()
    return loss.detach()

def local_train(config, stage, message, images, round_number, client, progress=0.0,
                make_views=data.two_views, criterion=contrastive_loss):
    """One client's work in one round. Returns (upload, losses): what it trained, by name, and the
    loss of every local step [steps].

    message: from broadcast(); images: the client's own, uint8 [n, C, H, W], on the same device;
    progress: the share of the stage's rounds that is done; make_views: like data.two_views."""
    learner = assemble(config, message, images.shape[1:], stage.trains)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    # AdamW starts anew every round: its moments belong to weights that averaging has replaced.
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=config.weight_decay, fused=True)
    draws = generator(config, images.device, TRAINING, round_number, client)
    recipe = data.RECIPES[recipe_name(config)]
    losses = []
    step = micro_batched_step if config.micro_batch else local_step

    for share, chosen in local_batches(config, images, draws):
        share_of_stage = progress + share / stage.rounds
        optimizer.param_groups[0]["lr"] = learning_rate(config, share_of_stage)
        optimizer.zero_grad()
        loss = step(config, learner, stage, make_views(images[chosen], recipe, draws), criterion)
        losses.append(loss)
        optimizer.step()
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses)

# ----------------------------------------------------------------------------------- the loop
@dataclass
class State:
    """All there is between two rounds."""
    server: dict = field(default_factory=dict)   # name -> tensor, on the CPU: the model so far
    history: list = field(default_factory=list)  # a row for every round done, made in federate()
    steps: dict = field(default_factory=dict)    # name -> the last step, with server momentum

# What a client answers: {name: tensor}; mean loss of its local steps, in nats; how many it has.
Answer = namedtuple("Answer", "upload loss images")

def grow(config, server, stage, shape, device="cpu"):
    """Add the stage's new blocks to the dict `server`, in place; if none is new, do nothing.

    The first stage starts from initial(). A new block starts as a copy of the nearest block below
    (or else of the lowest); "zero" then sets the output layers of both its halves to 0, which
    makes it the identity; "fresh" takes it from initial()."""
    if not server:
        server |= broadcast(initial(config, shape, device), stage.present)
    there = {block_of(name) for name in server} - {None}
    for b in sorted(set(stage.present) - there):
        if config.new_block == "fresh":
            source, origin = initial(config, shape, device), b
        else:
            source, origin = server, max((o for o in there if o < b), default=min(there))
        for name, tensor in [(n, t) for n, t in source.items() if block_of(n) == origin]:
            if config.new_block == "zero" and (".attn.proj." in name or ".mlp.fc2." in name):
                tensor = torch.zeros_like(tensor)
            # A copy is the same object, not a clone: training replaces tensors, and the Ledger sees
            # by identity what a client has already.
            server[name.replace(f"blocks.{origin}.", f"blocks.{b}.")] = tensor
        there.add(b)

class Average:
    """FedAvg (McMahan et al. 2017): each tensor's mean over the clients that sent it, weighted by
    their numbers of images. A tensor that nobody sent is not in the mean.

    It keeps running sums, so memory does not grow with the number of clients. They are float64, so
    that finite uploads have a finite mean."""
    def __init__(self):
        self.sums, self.images = {}, {}

    def add(self, upload, images):
        for name, tensor in upload.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                self.images[name] = 0
            self.sums[name].add_(tensor, alpha=images)
            self.images[name] += images

    def mean(self):
        return {name: (total / self.images[name]).float() for name, total in self.sums.items()}

def server_step(config, state, mean):
    """Put the clients' mean in place of the server's tensors. With server momentum (FedAvgM, Hsu et
    al. 2019, arXiv 1909.06335) a step is what the mean changes, and a share of the step before."""
    if config.server_momentum:
        state.steps = {name: tensor - state.server[name]
                       + config.server_momentum * state.steps.get(name, 0)
                       for name, tensor in mean.items()}
        mean = {name: state.server[name] + step for name, step in state.steps.items()}
    state.server |= mean

# federate() takes these functions, beside train_client, so that an experiment can bring its own:
#   plan(config, history) lists the stages; the history may change their rounds, nothing else.
#   ask(stage, round_number, progress, messages) reaches the clients. messages: an iterator of pairs
#       (client, message). It yields pairs (client, Answer) in that order; who is left out was lost.
#   on_round(row, state) is called after every round. It may replace tensors of the server (never
#       change one in place: a copied block shares it with the block below), and then appends their
#       names to row["changed"].
def in_turn(config, images, parts, train_client=local_train):
    """Makes the default `ask` of federate(): the clients of this process, one after the other.

    images: uint8 [N, C, H, W], of all clients; parts: client -> indices of its images, as from
    data.partition(); both tensors or arrays; train_client: like local_train, which leaves the
    tensors of a message as they are."""
    images = torch.as_tensor(images, device=pick_device(config))

    def ask(stage, round_number, progress, messages):
        for client, message in messages:
            own = images[torch.as_tensor(parts[client], device=images.device)]
            message = {name: tensor.to(images.device) for name, tensor in message.items()}
            with one_thread():
                upload, losses = train_client(config, stage, message, own, round_number, client,
                                              progress)
            upload = {name: tensor.cpu() for name, tensor in upload.items()}
            yield client, Answer(upload, losses.mean().item(), len(own))
    return ask

def federate(config, dataset, state=None, train_client=local_train, ask=None, plan=stages,
             on_round=None):
    """Train by federated rounds; returns (encoder, history). config: one that passed validate();
    state: a State to resume from, changed in place; train_client: like local_train, for the default
    ask."""
    if ask is None:
        ask = in_turn(config, dataset.train_images, parts_of(config, dataset), train_client)
    state = state or State()

    while True:
        began, round_number = time.perf_counter(), len(state.history) + 1
        stage, progress = stage_progress(plan(config, state.history), len(state.history))
        if stage is None:
            return encoder_of(config, state.server, dataset.shape), state.history
        grow(config, state.server, stage, dataset.shape)  # if the stage is new

        # Send each sampled client the model, without the blocks that it drops.
        kept = {client: sample_kept_blocks(config, stage, round_number, client)
                for client in sample_clients(config, round_number)}
        messages = ((client, broadcast(state.server, blocks)) for client, blocks in kept.items())

        # Each trains the active blocks, the final norm and the head (with block 0 the embedding as
        # well), and sends them back. Average the uploads as they come in.
        expected = {name: t for name, t in state.server.items() if stage.trains(name)}
        average, answers = Average(), []
        for client, answer in ask(stage, round_number, progress, messages):
            valid = 0 < answer.images < math.inf and is_valid(answer.upload, expected)
            if valid:
                average.add(answer.upload, answer.images)
            answers.append({"client": client, "loss": answer.loss, "images": answer.images,
                            "valid": valid, "missing": sorted(expected.keys() - answer.upload)})
        stop_if_diverged(round_number, answers)
        server_step(config, state, average.mean())

        row = {"round": round_number, "stage": stage.number,  # counted from 1
               "clients": list(kept),  # who was sampled, and below which blocks each was sent
               "kept_blocks": [list(blocks) for blocks in kept.values()],
               "answers": answers,     # of those who answered; "missing": trained, but not sent
               "changed": [],          # on_round notes here which tensors it has replaced
               "seconds": time.perf_counter() - began}
        state.history.append(row)
        if on_round:
            on_round(row, state)

# ------------------------------------- here the method ends; small helpers of what is above
def recipe_name(config):
    """Which recipe makes the two views; digits are not flipped, photographs are."""
    auto = "digits" if config.data.lower() == "mnist5k" else "natural"
    return auto if config.augment == "auto" else config.augment

def pick_device(config):
    """The torch.device on which clients train."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if config.device == "auto" else config.device)

def parts_of(config, dataset):
    """Which training images each client has: a list of index tensors, one a client."""
    return data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)

def is_valid(upload, expected):
    """Whether an upload holds only tensors that were expected, in their shapes, all finite."""
    for name, tensor in upload.items():
        if name not in expected or tensor.shape != expected[name].shape:
            return False
        if tensor.dtype != expected[name].dtype:
            return False
    flat = torch.cat([tensor.flatten() for tensor in upload.values()] or [torch.zeros(1)])
    return bool(flat.abs().max().isfinite())  # NaN anywhere makes the maximum NaN

@contextlib.contextmanager
def one_thread():
    """Run on one CPU thread, as every worker process does: the last bits of a result depend on
    the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

def stop_if_diverged(round_number, answers):
    """Raise FloatingPointError if no client's loss is a number any more."""
    if answers and not any(math.isfinite(answer["loss"]) for answer in answers):
        raise FloatingPointError(f"the loss of round {round_number} is not finite: take a smaller "
                                 "--lr or --weight-decay")

# ---------------------------------------------------------------------------------- its costs
REPORT_BYTES = 16  # beside its tensors a client sends its mean loss and its number of images

def count_macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image in one local epoch, as Tun et al. 2024 count them: two
    views; linear layers and attention products; forward 1x, and backward 2x for what trains.

    Micro-batches run what trains, except the head, forward twice. A frozen block above an active
    one passes gradients on: backward 2x for attention products, 1x for linear layers, whose weights
    need no gradient."""
    channels, height, width = image_shape
    D, patches = config.dim, height * width // config.patch_size**2
    T, first = patches + 1, min(stage.active)
    linear = T * 12 * D**2  # qkv 3, proj 1, mlp 4 + 4
    block = linear + 2 * T**2 * D  # and attention's two products
    embed = patches * config.patch_size**2 * channels * D
    head = config.head_hidden * (D + config.head_hidden + config.head_dim)
    trained = 4 if config.micro_batch else 3
    total = (trained if first == 0 else 1) * embed + 3 * head
    for b in kept:
        total += block if b < first else trained * block
        if b > first and b not in stage.active:
            total -= linear  # its weights need no gradient
    return 2 * total

class Ledger:
    """What rounds cost: replays the rows of a history, on tensors that have no data.

    Identity stands for content: a tensor that changes is replaced by another object, and sets of
    tensors go by identity. A client that keeps what it received downloads only what is not in its
    set. New blocks it makes itself: copies are objects that it has, and zeros need no sending. A
    "stateless" client keeps nothing and downloads all that it uses in every round.
    plan: the list of stages, by default that of the settings."""
    def __init__(self, config, shape, plan=None):
        self.config, self.shape = config, tuple(shape)
        self.stages = {stage.number: stage for stage in plan or stages(config)}
        self.server, self.zeros = {}, set()
        self.held = {}  # client -> the tensors that it has received

    def add(self, row):
        """The costs of the next row: means over its sampled clients. In bytes: download_bytes,
        stateless_download_bytes, upload_bytes; macs: for one image in all local epochs."""
        config, stage = self.config, self.stages[row["stage"]]
        before = set(self.server.values())
        grow(config, self.server, stage, self.shape, "meta")
        current = set(self.server.values())
        if before and config.new_block == "zero":  # what grow() did not copy, it set to 0
            self.zeros |= current - before

        down = stateless = macs = up = 0
        for client, kept in zip(row["clients"], row["kept_blocks"]):
            message = set(broadcast(self.server, kept).values())
            held = self.zeros | self.held.get(client, set())
            down += sum(t.nbytes for t in message - held)
            stateless += sum(t.nbytes for t in message - self.zeros)
            self.held[client] = (held | message) & current
            macs += config.local_epochs * config.macs(stage, kept, self.shape)

        trained = {name for name in self.server if stage.trains(name)}
        changed = set(row["changed"])
        for answer in row["answers"]:
            sent = trained - set(answer["missing"])
            up += REPORT_BYTES + sum(self.server[name].nbytes for name in sent)
            if answer["valid"]:
                changed |= sent
        self.server |= {name: torch.empty_like(self.server[name]) for name in changed}

        count = len(row["clients"])
        return {"download_bytes": down / count, "stateless_download_bytes": stateless / count,
                "upload_bytes": up / count, "macs": macs / count}

def planned_rows(config, plan=None):
    """Rows of a run in which a round's clients, at most ten, take part in every round and answer:
    enough for a mean over the draws of depth dropout. plan: the list of stages."""
    clients, rows = range(min(config.clients_per_round or config.clients, 10)), []
    for stage in plan or stages(config):
        for number in range(len(rows) + 1, len(rows) + 1 + stage.rounds):
            kept = [sample_kept_blocks(config, stage, number, client) for client in clients]
            answers = [{"valid": True, "missing": []} for _ in clients]
            rows.append({"round": number, "stage": stage.number, "clients": list(clients),
                         "kept_blocks": kept, "answers": answers, "changed": []})
    return rows

def cost(config, shape, train_client=local_train, plan=None):
    """What a client that takes part in every round pays for a whole run, without training: the
    sums of Ledger.add() over planned_rows(), and peak_memory_bytes of its largest step.

    shape: (channels, height, width) of an image; plan: the list of stages. A client has a batch of
    images at least."""
    ledger, total, steps = Ledger(config, shape, plan), {}, set()
    for row in planned_rows(config, plan):
        for name, value in ledger.add(row).items():
            total[name] = total.get(name, 0) + value
        steps |= {(ledger.stages[row["stage"]], tuple(kept)) for kept in row["kept_blocks"]}
    peak = max(peak_memory(config, stage, shape, kept, train_client) for stage, kept in steps)
    return {"peak_memory_bytes": peak, **total}

def peak_memory(config, stage, shape, kept=None, train_client=local_train):
    """Peak bytes of a client's local step; kept: its blocks, by default all that are present."""
    first = min(stage.active)
    kept = stage.present if kept is None else kept
    below = len([b for b in kept if b < first])  # frozen blocks are alike: only how many matters
    kept = (*range(below), *(b for b in kept if b >= first))
    # What changes no memory, and differs between runs, gets one value: metered_step() is cached.
    canonical = replace(config, seed=0, rounds=1, local_epochs=1, depth_dropout=0.0, lr=1e-3,
                        device="cpu", out="", server_momentum=0.0)
    stage = replace(stage, number=1, rounds=1, present=kept)
    return metered_step(canonical, stage, tuple(shape), train_client).peak

@functools.lru_cache(maxsize=None)
def metered_step(config, stage, shape, train_client):
    """The MemoryMeter of two local steps of a client that holds the blocks stage.present; from the
    second step on the optimizer has its state.

    The tensors are fake: they have shapes and lifetimes but no data. So nothing is computed, and
    the bytes are those of real steps on the CPU."""
    config = replace(config, local_epochs=1)
    form = broadcast(initial(config, shape, "meta"), stage.present)
    with FakeTensorMode():
        message = {name: torch.zeros(t.shape) for name, t in form.items()}
        blank = torch.zeros(2 * config.batch_size, *shape, dtype=torch.uint8)  # for two steps
        with MemoryMeter() as meter:
            train_client(config, stage, message, blank, 1, 0)
    return meter

class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns, until it is freed: parameters,
    gradients, optimizer state, activations and temporaries, the same on every machine.

    live_bytes: one number at the start and after every allocation and release."""
    def __init__(self):
        super().__init__()
        self.live_bytes = [0]
        self.seen = {}  # id of a storage -> what tells when it is freed

    @property
    def peak(self):
        return max(self.live_bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in self.seen and key not in given:  # new memory: no view, not in place
                self.seen[key] = weakref.finalize(storage, self.freed, key, storage.nbytes())
                self.live_bytes.append(self.live_bytes[-1] + storage.nbytes())
        return result

    def freed(self, key, nbytes):
        del self.seen[key]
        self.live_bytes.append(self.live_bytes[-1] - nbytes)

def storages(tree):
    """The memory behind the tensors in nested lists and dicts: identity -> storage."""
    found = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":  # meta holds no data
            found[leaf.untyped_storage()._cdata] = leaf.untyped_storage()
    return found

# -------------------------------------------------------------------------------- the command
def validate(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    def must(holds, name, rule):
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} must be {rule}, it is "
                             f"{getattr(config, name)}")
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        choices = limits.get("choices", (value,))
        must(value in choices, f.name, "one of " + ", ".join(map(str, choices)))
        if "low" in limits:
            low, high = limits["low"], limits.get("high", 1e9)
            must(low <= value <= high, f.name, f"from {low:g} to {high:g}")
    grown = config.depth - (config.method == "lasting")  # its last block is there from the start
    must(config.method == "e2e" or (grown > 0 and grown % config.blocks_per_stage == 0), "depth",
         f"a multiple of --blocks-per-stage ({config.blocks_per_stage}), plus 1 if lasting")
    must(config.dim % config.heads == 0, "dim", f"a multiple of --heads ({config.heads})")
    must(config.clients_per_round <= config.clients, "clients_per_round",
         f"at most --clients ({config.clients})")
    must(config.rounds >= len(stages(config)), "rounds", f"{len(stages(config))} (stages) or more")
    usable = False
    with contextlib.suppress(RuntimeError, AssertionError):
        usable = torch.empty(0, device=pick_device(config)).device.type in ("cpu", "cuda")
    must(usable, "device", f"auto, cpu, or one of {torch.cuda.device_count()} CUDA GPUs (no other "
         "kind is supported)")

def without_effect(config):
    """The settings that change nothing here: nobody should believe that they were measured."""
    plan = stages(config)
    useless = [] if any(stage.frozen for stage in plan) else ["depth_dropout"]
    if len(plan) == 1:
        useless += ["new_block", "first_share"]
    if config.method == "e2e":
        useless += ["blocks_per_stage"]
    return useless

def label(config):
    """A method's name in tables."""
    name = {"fll": "FLL", "progressive": "progressive", "lasting": "lasting top",
            "e2e": "end-to-end"}[config.method]
    if config.blocks_per_stage > 1 and config.method != "e2e":
        name += f" by {config.blocks_per_stage} blocks"
    if config.depth_dropout and "depth_dropout" not in without_effect(config):
        name += f" + FDD {config.depth_dropout:g}"
    if config.server_momentum:
        name += f" + momentum {config.server_momentum:g}"
    return name

# -- worker processes
def start_worker(make_ask):
    """Runs once in every worker process, and keeps its `ask` where work() finds it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    parent = multiprocessing.parent_process()  # if it dies, so does this worker
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    work.ask = make_ask()

def work(stage, round_number, progress, message):
    """One client's round in a worker process; message: a pair (client, {name: numpy array}).

    Tensors travel as numpy arrays: torch would open a file descriptor for each."""
    client, arrays = message
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    _, answer = next(work.ask(stage, round_number, progress, [(client, tensors)]))
    return client, answer._replace(upload=as_arrays(answer.upload))

def as_arrays(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}

@contextlib.contextmanager
def reach_clients(config, dataset, train_client=local_train, parts=None):
    """Yields the `ask` of --workers: it trains the clients of a round side by side, in processes.

    The answers equal those of in_turn() bit for bit, whatever the number of workers: every client
    runs on one thread, and answers are yielded in the order asked. train_client must be a function
    of a module, or a functools.partial of one; parts: as for in_turn(), by default parts_of()."""
    parts = parts or parts_of(config, dataset)
    cores = torch.get_num_threads()  # that torch sees; OMP_NUM_THREADS limits them
    automatic = cores if pick_device(config).type == "cpu" else 1
    workers = min(config.workers or automatic, config.clients_per_round or config.clients)
    if workers == 1:
        yield in_turn(config, dataset.train_images, parts, train_client)
        return

    images, parts = dataset.train_images.numpy(), [part.numpy() for part in parts]
    make_ask = functools.partial(in_turn, config, images, parts, train_client)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker, [make_ask])

    def ask(stage, round_number, progress, messages):
        messages = [(client, as_arrays(tensors)) for client, tensors in messages]
        task = functools.partial(work, stage, round_number, progress)
        for client, answer in pool.map(task, messages):
            upload = {name: torch.from_numpy(array) for name, array in answer.upload.items()}
            yield client, answer._replace(upload=upload)

    try:
        yield ask
    except BaseException:  # Ctrl-C above all: leave no process behind
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)

# -- run folders
def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: no half file is seen."""
    buffer = io.BytesIO()  # torch.save, interrupted while it writes a file, can abort the process
    if path.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(json.dumps(content, indent=1).encode())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)

def read(path, advice="delete it and rerun the command"):
    """What write() wrote; InputError if the file is damaged."""
    with friendly_errors(f"{path} cannot be read", advice):
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        return dict(json.loads(path.read_text()))  # a list is damage as well

def load_state(folder, config, shape):
    """The State to resume from; an empty one before the first round."""
    path, advice = folder / "checkpoint.pt", "choose another --out"
    if not path.exists():
        return State()
    saved = read(path, advice)
    with friendly_errors(f"{path} is no checkpoint of this run", advice):
        state = State(**saved)
        form = initial(config, shape, "meta")
        if not (is_valid(state.server, form) and is_valid(state.steps, form)):
            raise ValueError("a tensor is not one of this model")
        assemble(config, state.server, shape)  # raises if one is missing
        return state

def load_encoder(folder):
    """The trained encoder of a run folder, ready for `encoder(data.normalise(images))`."""
    folder = Path(folder).expanduser()
    if not (folder / "encoder.pt").exists():
        raise InputError(f"{folder} holds no finished run: rerun its command, or train with --out")
    saved, tensors = read(folder / "config.json"), read(folder / "encoder.pt")
    maker = saved.get("experiment")
    reason = f"was made by experiments.{maker}" if maker else "is damaged"
    advice = "load it there" if maker else "delete it and rerun the command"
    with friendly_errors(f"{folder}/encoder.pt {reason}", advice):
        config = Config(**{f.name: saved.get(f.name, f.default) for f in fields(Config)})
        shape = saved["image_shape"]
        encoder = encoder_of(config, initial(config, shape), shape)
        encoder.load_state_dict(tensors)  # raises unless they are all of its tensors
        return encoder

def identity(config, dataset, experiment):
    """What a run folder belongs to: settings, experiment, and the content of the images."""
    # Left out: workers, out and cache change no result; data and images show in the images.
    elsewhere = ("data", "images", "workers", "out", "cache")
    settings = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return settings | {"augment": recipe_name(config), "device": pick_device(config).type,
                       "experiment": experiment, "image_shape": list(dataset.shape),
                       "images_sha256": dataset.digest()}

def claim(folder, lock, mine):
    """Lock a run folder and mark it as that of identity `mine`; InputError if it is another's."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process lets go of it as well
    except BlockingIOError:
        raise InputError(f"another process works in {folder}: wait for it, or choose another "
                         "--out") from None
    owner = folder / "config.json"
    if not owner.exists():
        if [path for path in folder.iterdir() if path.suffix != ".tmp"]:
            raise InputError(f"{folder} holds other files: choose another --out")
        write(owner, mine)
    saved = read(owner, "choose another --out")  # as JSON gives it back, also what was just written
    for name in mine:
        if saved.get(name, "nothing") != mine[name]:
            raise InputError(f"{folder} belongs to a run with {name} {saved.get(name)}, not "
                             f"{mine[name]}: choose another --out")

@contextlib.contextmanager
def run_folder(config, dataset, experiment=""):
    """Open a run's folder for this process alone: yields (folder, State to resume from).

    A folder of other settings, images or experiments is refused, and nothing is touched."""
    # Settings that do not fit the images are refused before anything is touched.
    initial(config, dataset.shape, "meta")
    if len(dataset.train_labels):  # a server may have none
        parts_of(config, dataset)
    slug = label(config).lower().replace(" + ", "-").replace(" ", "-")
    folder = Path(config.out or f"runs/{Path(config.data).stem}-{slug}-seed{config.seed}")
    folder = folder.expanduser()

    with contextlib.ExitStack() as stack:
        with friendly_errors(f"{folder} cannot be a run folder", "choose another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            claim(folder, lock, identity(config, dataset, experiment))
        yield folder, load_state(folder, config, dataset.shape)

# -- the command itself
def round_line(row, stage, costs, peak):
    """What train() prints after a round; of blocks, those of the first three clients."""
    blocks = ["".join("A" if b in stage.active else "+" if b in kept else "."
                      for b in stage.present) for kept in row["kept_blocks"][:3]]
    answered = {answer["client"] for answer in row["answers"]}
    notes = [f"lost: client {client}" for client in row["clients"] if client not in answered]
    notes += [f"rejected: client {a['client']}" for a in row["answers"] if not a["valid"]]
    return (f"{row['stage']:>5} {row['round']:>6} {mean_loss(row):7.3f} "
            f"{costs['download_bytes'] / 1e6:8.3f} {costs['upload_bytes'] / 1e6:8.3f} "
            f"{peak / 2**20:9.1f} {row['seconds']:8.2f}  {' '.join(blocks + notes)}")

def mean_loss(row):
    """Mean loss of the clients whose upload was valid; NaN without any."""
    losses = [answer["loss"] for answer in row["answers"] if answer["valid"]]
    return sum(losses) / len(losses) if losses else math.nan

def train(config, dataset, folder, state, train_client=local_train, ask=None, plan=stages,
          on_round=None):
    """federate(), with a line and a checkpoint after each round, and the encoder at the end."""
    channels, height, width = dataset.shape
    print(f"\n{label(config)}; images of {height} x {width} pixels, channels: {channels}\n"
          "Blocks are A active, + frozen, . dropped; bytes and peak memory are one client's.\n"
          "stage  round    loss  down MB    up MB  peak MiB  seconds  blocks", flush=True)
    ledger = Ledger(config, dataset.shape, plan(config, ()))
    for row in state.history:
        ledger.add(row)

    def after(row, state):
        if on_round:
            on_round(row, state)
        write(folder / "checkpoint.pt", vars(state))
        stage = ledger.stages[row["stage"]]
        peak = max(peak_memory(config, stage, dataset.shape, tuple(kept), train_client)
                   for kept in row["kept_blocks"])
        print(round_line(row, stage, ledger.add(row), peak), flush=True)

    with contextlib.ExitStack() as stack:
        ask = ask or stack.enter_context(reach_clients(config, dataset, train_client))
        encoder, history = federate(config, dataset, state, ask=ask, plan=plan, on_round=after)
    write(folder / "encoder.pt", encoder.state_dict())
    return encoder, history

def result(config, dataset, encoder, history, train_client=local_train, plan=stages):
    """The row of a trained method: accuracies, a client's costs, and seconds of training."""
    accuracies = evaluate(encoder.to(pick_device(config)), dataset, recipe_name(config))
    seconds = sum(row["seconds"] for row in history)
    costs = cost(config, dataset.shape, train_client, plan(config, history))
    return accuracies | costs | {"seconds": seconds}

def run(config):
    """Train one method, and show it beside raw pixels and what end-to-end training costs."""
    dataset = data.load(config.data, config.cache, config.images)
    with run_folder(config, dataset) as (out, state):
        summary = out / "summary.json"
        if summary.exists() and (out / "encoder.pt").exists():
            print(f"{out} is finished:\n{table(read(summary))}")
            return
        encoder, history = train(config, dataset, out, state)
        raw = evaluate(None, dataset, recipe_name(config), pick_device(config))
        rows = {"raw pixels": raw, label(config): result(config, dataset, encoder, history)}
        if config.method != "e2e":
            price, whole = rows[label(config)], cost(replace(config, method="e2e"), dataset.shape)
            ratio = {c: f"{whole[c] / price[c]:.1f}x" for c in whole if price[c]}
            rows |= {"end-to-end": whole, "ratio": ratio}
        write(summary, rows)
        print(f"\n{table(rows)}\n{len(dataset.test_images):,} test images; moved: under one random "
              f"view each. Costs are one client's.\nEncoder, checkpoint and table are in {out}")
        if dataset.train_labels.bincount().min() < 10:
            print("Some class has fewer than 10 training images: '10 labels' takes all of its.")

class Parser(argparse.ArgumentParser):
    """A flag for every field of Config, in groups; wrong ones raise InputError."""
    def __init__(self, description, **more):
        super().__init__(description=description, argument_default=argparse.SUPPRESS, **more)
        for f in fields(Config):
            if "group" in f.metadata:
                group = self.add_argument_group(f.metadata["group"])
            form = dict(type=type(f.default), choices=f.metadata.get("choices"))
            if isinstance(f.default, bool):
                form = dict(action=argparse.BooleanOptionalAction)
            group.add_argument("--" + f.name.replace("_", "-"), **form,
                               help=f"{f.metadata['help']} (default: {f.default!r})")

    def error(self, message):
        raise InputError(message)

def command(body):
    """Run a command: wrong input is one sentence and exit status 2, what fails is status 1."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know the sign for plus or minus
    try:
        body()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{error} and another --out")
    except BrokenProcessPool:
        sys.exit("a worker process was killed: rerun the command to resume, with fewer --workers "
                 "if memory was short")
    except OSError as error:
        sys.exit(f"{error}: what was saved before is whole, rerun the command to resume")
    except KeyboardInterrupt:
        print("interrupted; rerun the command to resume", file=sys.stderr)
        sys.exit(130)

def main(arguments=None):
    given = vars(Parser(__doc__.split("\n\n")[0]).parse_args(arguments))
    config = Config(**given)
    validate(config)
    for name in without_effect(config):
        if name in given:
            print(f"note: --{name.replace('_', '-')} changes nothing here")
    run(config)

if __name__ == "__main__":
    command(main)
