"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

After Guo et al. 2023 (arXiv 2309.05213); accounting after Tun et al. 2024, LW-FedSSL (2401.11647).
Read from top to bottom: settings, model, stages and depth dropout, the server's state, one client,
cost, the rounds; there the method ends, the rest serves the command line. ssl_loss.py has the loss
and the local step (forward and backward), data.py the images and their views.

A run has stages, a stage has rounds. In a stage some blocks are present; of these some are active
(they train), the others frozen, and depth dropout lets a client drop frozen ones. Rounds and
stages count from 1, blocks and clients from 0. Arguments client= and plan= are functions.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import sys
import time
from collections import OrderedDict, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
from data import InputError, in_a_sentence, load_tensors
from ssl_loss import (MemoryMeter, ProjectionHead, allocator_peak, contrastive_step, evaluate,
                      in_three, nt_xent)

# ----------------------------------------------------------------------------------- settings
def knob(default, help, **limits):  # low, high or choices; group: starts one
    return field(default=default, metadata={"help": help, **limits})

@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is generated from these fields."""
    data: str = knob("mnist5k", "mnist5k, cifar10, cifar100 or a FILE.npz", group="data")
    images: int = knob(0, "use so many of the training images; 0 means all", low=0)
    augment: str = knob("auto", "the two views; auto: digits for mnist5k, else natural",
                        choices=("auto", "digits", "natural", "solarised"))
    dim: int = knob(64, "width of the vision transformer", low=1, group="model")
    depth: int = knob(4, "number of blocks L", low=1, high=1000)
    heads: int = knob(8, "attention heads; must divide dim", low=1)
    patch_size: int = knob(7, "side of a patch in pixels; must divide the image", low=1)
    head_hidden: int = knob(256, "width of the projection head's hidden layers", low=1)
    head_dim: int = knob(64, "dimension in which the loss compares views", low=1)
    method: str = knob("fll", "which blocks exist and train at a stage", group="layer-wise",
                       choices=("fll", "e2e", "progressive", "lasting"))
    blocks_per_stage: int = knob(1, "blocks that a stage adds", low=1)
    new_block: str = knob("copy", "its start: copy of the block below, zero (identity) or fresh",
                          choices=("copy", "zero", "fresh"))
    first_share: float = knob(0.0, "share of the rounds for stage 1; 0: equal", low=0, high=0.99)
    depth_dropout: float = knob(0.25, "chance that a frozen block is dropped", low=0, high=0.99)
    clients: int = knob(2, "number of clients N", low=1, group="federation")
    clients_per_round: int = knob(0, "clients sampled each round; 0 means all", low=0)
    alpha: float = knob(0.0, "Dirichlet concentration of labels; 0: IID", low=0, high=1e6)
    rounds: int = knob(96, "federated rounds, shared among the stages", low=1)
    local_epochs: int = knob(1, "passes over a client's images in a round", low=1)
    client_failure: float = knob(0.0, "chance that a client does not answer", low=0, high=0.99)
    batch_size: int = knob(64, "images of a local step; two views each", low=2, group="training")
    micro_batch: int = knob(0, "images whose graph is held at a time (exact); 0: all", low=0)
    lr: float = knob(2e-3, "peak learning rate (AdamW, one cosine a stage)", low=1e-6)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    temperature: float = knob(0.2, "temperature of NT-Xent", low=1e-6)
    amp: bool = knob(False, "bf16 autocast for the model; the loss stays in float32")
    seed: int = knob(0, "everything random derives from it", low=0, group="run")
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "run folder; by default runs/<data>-<method>-seed<seed>")
    cache: str = knob("~/.cache/fllw", "folder for downloaded data sets")

    def learner(self, image_shape):
        """What a client trains; a subclass for another model overrides this and macs()."""
        return Learner(self, image_shape)

    def macs(self, stage, kept, image_shape):
        return macs(self, stage, kept, image_shape)

INIT, SAMPLING, DROPOUT, TRAINING, FAILURE = range(1, 6)  # what a draw is for; 0 is data.partition

def rng(config, *key):
    """A numpy generator for (seed, *key) alone; key: for instance (purpose, round, client)."""
    return np.random.default_rng([config.seed, *key])

def generator(config, device, *key):
    """A torch generator on the device, for (seed, *key) alone."""
    return torch.Generator(device).manual_seed(int(rng(config, *key).integers(2**63)))

def recipe(config):
    """The name of the views' recipe."""
    auto = "digits" if config.data == "mnist5k" else "natural"
    return auto if config.augment == "auto" else config.augment

def pick_device(config):
    """The torch.device of a run."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if config.device == "auto" else config.device)

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
            raise InputError(f"the patch size {patch_size} must divide {height} x {width} pixels")
        patches = (height // patch_size) * (width // patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(channels, dim, patch_size, patch_size)))
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
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(int(rng(config, INIT).integers(2**63)))
        return config.learner(shape).state_dict()

def block_of(name):
    """The block that a tensor of this name belongs to; None: embedding, final norm, head."""
    parts = name.split(".")
    return int(parts[parts.index("blocks") + 1]) if "blocks" in parts else None

def assemble(config, tensors, shape):
    """The learner with these tensors; a block that is not among them is the identity."""
    with torch.device("meta"):
        learner = config.learner(shape)
    for b in set(range(config.depth)) - {block_of(name) for name in tensors}:
        learner.encoder.blocks[b] = nn.Identity()
    own = {name: t.clone() for name, t in tensors.items()}  # training must not change the server's
    learner.load_state_dict(own, assign=True)
    return learner

def encoder_of(config, server, shape):
    """The encoder in a server's state: evaluation and deployment use every block there is."""
    return assemble(config, server, shape).encoder.eval().requires_grad_(False)

# ----------------------------------------------------------------- stages and depth dropout
@dataclass(frozen=True)
class Stage:
    """Which blocks exist and which of them train, ascending."""
    number: int     # counted from 1, as rounds are
    present: tuple  # counted from 0
    active: tuple   # some of those present
    rounds: int

    @property
    def frozen(self):
        return tuple(b for b in self.present if b not in self.active)

    def trains(self, name):
        """Whether a learner's tensor of this name trains; the embedding does with block 0."""
        if block_of(name) is not None:
            return block_of(name) in self.active
        embeds = any(part in name for part in ("patch_embed", "pos_embed", "cls_token"))
        return not embeds or 0 in self.active  # the final norm and the head always train

def stages(config, history=()):
    """The plan of a run, all its stages: the one place where the methods differ.

    history: the rows of the rounds done, unused here; other plans may look at their losses."""
    L, k = config.depth, config.blocks_per_stage
    every, tops = tuple(range(L)), range(k, L + 1, k)
    choices = {  # (present, active), stage by stage
        "e2e": [(every, every)],                                         # everything at once
        "progressive": [(every[:top], every[:top]) for top in tops],     # all so far train
        "fll": [(every[:top], every[top - k:top]) for top in tops],      # only the newest train
        "lasting": [(every[:top] + every[-1:], every[top - k:top] + every[-1:])
                    for top in range(k, L, k)]}  # and the last one, there from the first stage on
    plan, blocks, rounds_left = [], choices[config.method], config.rounds
    for number, (present, active) in enumerate(blocks, 1):
        later = len(blocks) - number  # stages, each with a round at least
        rounds = math.ceil(rounds_left / (later + 1))
        if number == 1 and later and config.first_share:
            rounds = min(max(1, round(config.first_share * rounds_left)), rounds_left - later)
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
    """Federated depth dropout: the blocks that this client keeps in round `number`, drawn from
    (seed, round, client). Each frozen block is dropped with probability depth_dropout."""
    draws = rng(config, DROPOUT, number, client).random(len(stage.frozen))
    dropped = [b for b, u in zip(stage.frozen, draws) if u < config.depth_dropout]
    return tuple(b for b in stage.present if b not in dropped)

def broadcast(server, kept):
    """What a client receives: the server's tensors, less the blocks that it does not keep."""
    return {name: t for name, t in server.items() if block_of(name) in (None, *kept)}

# --------------------------------------------------------------------- what the server holds
ZERO = "zero"  # the version of tensors that everybody knows to be 0, so that nothing is sent

@dataclass
class State:
    """All there is between two rounds."""
    shape: tuple   # (channels, height, width) of an image
    server: dict   # name -> tensor: the encoder so far, and the head
    version: dict  # name -> id of its content, shared by copies: equal ids travel once
    history: list = field(default_factory=list)  # one dict a round, see new_row()
    held: dict = field(default_factory=dict)     # client -> list of versions that it has received
    changes: int = 0                             # how often update() was called

    def update(self, tensors):
        """Put new tensors in place of the server's, each with a version of its own."""
        self.changes += 1
        self.server |= tensors
        self.version |= {name: f"{name}@{self.changes}" for name in tensors}

def start(config, shape, plan=stages, device="cpu"):
    """The state before the first round: the blocks of the first stage, and the head."""
    server = broadcast(initial(config, shape, device), plan(config, ())[0].present)
    return State(shape, server, {name: name for name in server})

def grow(config, state, stage):
    """Add the blocks that are new in this stage: copies of the nearest one below, or else of the
    lowest; with new_block "zero" the output layers of both halves are 0, which is the identity."""
    there = {block_of(name) for name in state.server} - {None}
    device = next(iter(state.server.values())).device
    for b in sorted(set(stage.present) - there):
        source, origin = state.server, max((o for o in there if o < b), default=min(there))
        if config.new_block == "fresh":
            source, origin = initial(config, state.shape), b
        for name, tensor in [(n, t) for n, t in source.items() if block_of(n) == origin]:
            new = name.replace(f"blocks.{origin}.", f"blocks.{b}.")
            version = state.version.get(name, new)  # a fresh block's content is new
            if config.new_block == "zero" and (".attn.proj." in name or ".mlp.fc2." in name):
                tensor, version = torch.zeros_like(tensor), ZERO
            state.server[new], state.version[new] = tensor.to(device), version
        there.add(b)

# --------------------------------------------------------------------------------- one client
def receive(config, message, shape, stage):
    """A client's learner from what it received; a dropped block is the identity."""
    learner = assemble(config, message, shape)
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    return learner

def local_train(config, stage, message, images, number, client, progress=0.0,
                step=contrastive_step):
    """One client's work in round `number`. Returns (upload, losses): what it trained, by name, and
    the loss of every local step [steps].

    message: from broadcast(); images: the client's, uint8 [n, C, H, W], on the device; progress:
    the share of the stage's rounds that is done; step: like contrastive_step. AdamW starts anew
    each round: its moments belong to weights that averaging has replaced, or are long stale."""
    learner = receive(config, message, images.shape[1:], stage)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay,
                                  fused=True)
    below, rest, head = in_three(config, learner, stage)
    changes = data.RECIPES[recipe(config)]
    draws = generator(config, images.device, TRAINING, number, client)

    def criterion(z):  # [2B, head_dim]
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
            loss = step(below, rest, head, data.two_views(images[chosen], changes, draws),
                        criterion, config.micro_batch)  # forward and backward
            losses.append(loss)
            optimizer.step()
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses)

# --------------------------------------------------------------------------------------- cost
REPORT_BYTES = 16  # beside its tensors a client sends its mean loss and its number of images

def download_bytes(state, kept):
    """Bytes down in a round, means over clients: (if they keep what they have, if nothing).

    Equal tensors travel once: a block that starts as a copy is what the client has, or gets
    anyway, by another name. Notes in state.held what each client has now."""
    current, sums = set(state.version.values()), []
    for client, blocks in kept.items():
        message = {state.version[name]: tensor.nbytes
                   for name, tensor in broadcast(state.server, blocks).items()}
        message.pop(ZERO, None)
        held = set(state.held.get(client, ()))
        new = sum(size for version, size in message.items() if version not in held)
        sums.append((new, sum(message.values())))
        state.held[client] = sorted((held | set(message)) & current)
    return np.mean(sums, 0).tolist()

def macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image in one local epoch, as Tun et al. 2024 count them: two
    views; linear layers and attention products; forward 1x, and backward 2x for what trains.

    Micro-batches run what trains, but for the head, forward twice. Through a frozen block above an
    active one the gradient of the activations passes."""
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

def step_memory(config, stage, server, kept, image_shape, images=0, client=local_train):
    """Peak bytes of a client's local step; server: tensors, of which only shapes matter.

    images: how many the client has; 0 means enough for whole batches."""
    first = min(stage.active)  # from here on: what needs the same memory gets one cache entry
    below = [b for b in stage.frozen if b < first]  # these are alike: only how many matters
    kept = (*below[:len([b for b in kept if b < first])], *(b for b in kept if b >= first))
    form = tuple((name, tuple(t.shape)) for name, t in broadcast(server, kept).items())
    config = replace(config, seed=0, rounds=1, depth_dropout=0.0, lr=1e-3, device="cpu", out="")
    stage = replace(stage, number=1, rounds=1)
    return metered_step(config, stage, form, image_shape, images, client).peak

@functools.lru_cache(maxsize=None)
def metered_step(config, stage, form, image_shape, images=0, client=local_train):
    """The MemoryMeter of two local steps (from the second on the optimizer has its state) on fake
    tensors, which have shapes and lifetimes but no data: the bytes of real steps on the CPU, in
    no time. form: pairs (name, shape) of a message."""
    batch = min(config.batch_size, images or config.batch_size)
    config = replace(config, local_epochs=1, batch_size=batch)
    with FakeTensorMode():
        message = {name: torch.zeros(shape) for name, shape in form}
        blank = torch.zeros(2 * batch, *image_shape, dtype=torch.uint8)  # for two steps
        with MemoryMeter() as meter:
            client(config, stage, message, blank, 1, 0)
    return meter

def round_cost(config, state, stage, kept):
    """Bytes and multiply-accumulates of a round, means over its clients, if all answer."""
    down, stateless = download_bytes(state, kept)
    work = [config.macs(stage, blocks, state.shape) for blocks in kept.values()]
    upload = sum(t.nbytes for name, t in state.server.items() if stage.trains(name))
    return {"download_bytes": down, "stateless_download_bytes": stateless,
            "upload_bytes": float(upload + REPORT_BYTES),
            "macs": config.local_epochs * float(np.mean(work))}

def cost(config, image_shape, images=0, client=local_train, plan=stages, history=(), state=None):
    """What a client that takes part in every round pays for the whole training, without training:
    the rounds with tensors that hold no data, and the means over up to ten clients' draws.

    images: how many the client has; history: of a run whose plan looks at it; state: before the
    first round, on the device "meta". Returns round_cost()'s keys and peak_memory_bytes."""
    clients = range(min(config.clients_per_round or config.clients, 10))
    state = state or start(config, image_shape, plan, "meta")
    rows, peak = [], 0
    while True:
        stage, done = stage_of(plan(config, history), len(rows))
        if stage is None:
            return {"peak_memory_bytes": peak,
                    **{name: sum(row[name] for row in rows) for name in rows[0]}}
        if done == 0:
            grow(config, state, stage)
        kept = {one: draw_blocks(config, stage, len(rows) + 1, one) for one in clients}
        rows.append(round_cost(config, state, stage, kept))
        for blocks in set(kept.values()):
            peak = max(peak, step_memory(config, stage, state.server, blocks, image_shape, images,
                                         client))
        state.update({name: t for name, t in state.server.items() if stage.trains(name)})

# --------------------------------------------------------------------------------- the rounds
class Average:
    """FedAvg (McMahan et al. 2017): the mean of what clients sent, weighted by |D_n|, their images.
    A running sum, so memory does not grow with the clients; in float64, so the mean of finite
    uploads is finite."""
    def __init__(self, like):
        self.like, self.images = like, 0
        self.total = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in like.items()}

    def add(self, upload, images):
        self.images += images
        for name, tensor in upload.items():
            self.total[name] += images * tensor.double()

    def mean(self):
        """name -> tensor, or {} if nobody answered."""
        if self.images == 0:
            return {}
        return {n: (t / self.images).to(self.like[n].dtype) for n, t in self.total.items()}

def sound(upload, expected):
    """Whether an upload has exactly the tensors expected, and only finite numbers in them."""
    def form(tensors):
        return {name: (t.shape, t.dtype) for name, t in tensors.items()}
    return form(upload) == form(expected) and all(t.isfinite().all() for t in upload.values())

Report = namedtuple("Report", "accepted loss peak")  # of a client that answered; peak in bytes

def run_round(config, state, stage, progress, kept, images, parts, client=local_train):
    """One round: send, train, collect, for each client; then average. kept: client -> blocks that
    it keeps; parts: client -> which images. Returns client -> Report, of those that answered."""
    number, reports = len(state.history) + 1, {}
    expected = {name: t for name, t in state.server.items() if stage.trains(name)}
    average = Average(expected)
    for one, blocks in kept.items():
        if rng(config, FAILURE, number, one).random() < config.client_failure:
            continue
        message, own = broadcast(state.server, blocks), images[parts[one].to(images.device)]
        with allocator_peak(images.device) as peak:
            upload, losses = client(config, stage, message, own, number, one, progress)
        accepted = sound(upload, expected)
        if accepted:
            average.add(upload, len(own))
        reports[one] = Report(accepted, losses.mean().item(), peak())
    if reports and not any(math.isfinite(report.loss) for report in reports.values()):
        raise FloatingPointError(f"the loss of round {number} is not finite: take a smaller --lr")
    state.update(average.mean())
    return reports

def new_row(number, stage, kept, price, reports, peak, seconds):
    """What the history keeps of a round: numbers are means over its clients, blocks count from 0.

    round, stage (from 1); present_blocks, active_blocks of the stage; clients that were sampled,
    kept_blocks of each; lost: clients without an answer; rejected: whose upload was not sound;
    loss of the uploads accepted, None without any; download_bytes of a client that keeps what it
    received, stateless_download_bytes of one that keeps nothing; upload_bytes with REPORT_BYTES;
    macs for one image, all local epochs; peak_memory_bytes of who needs most; seconds."""
    losses = [report.loss for report in reports.values() if report.accepted]
    return {
        "round": number, "stage": stage.number, "present_blocks": list(stage.present),
        "active_blocks": list(stage.active), "clients": list(kept),
        "kept_blocks": [list(blocks) for blocks in kept.values()],
        "lost": [one for one in kept if one not in reports],
        "rejected": [one for one, report in reports.items() if not report.accepted],
        "loss": sum(losses) / len(losses) if losses else None,
        **price, "upload_bytes": price["upload_bytes"] * len(reports) / len(kept),
        "peak_memory_bytes": peak, "seconds": seconds}

def federate(config, dataset, state=None, on_round=None, client=local_train, plan=stages):
    """Train by federated rounds; returns (encoder, history of rows as in new_row()). config passed
    check(); state: to go on from, of on_round or a checkpoint; on_round(row, state): after every
    round, may change the server by state.update(); client: like local_train; plan: like stages."""
    images = dataset.train_images.to(pick_device(config))
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    state = state or start(config, dataset.shape, plan)
    state.server = {name: t.to(images.device) for name, t in state.server.items()}
    cold = images.is_cuda  # on a GPU, a first step allocates what is no client's memory

    while True:
        number = len(state.history) + 1
        stage, done = stage_of(plan(config, state.history), len(state.history))
        if stage is None:
            return encoder_of(config, state.server, dataset.shape), state.history
        if done == 0:
            grow(config, state, stage)
        kept = {one: draw_blocks(config, stage, number, one)
                for one in sample_clients(config, number)}
        if cold:
            client(config, stage, state.server, images[:config.batch_size], number, 0)
            cold = False
        price = round_cost(config, state, stage, kept)
        began = time.perf_counter()
        reports = run_round(config, state, stage, done / stage.rounds, kept, images, parts, client)
        seconds = time.perf_counter() - began
        peaks = [report.peak for report in reports.values()]
        if not images.is_cuda:
            most = max(len(parts[one]) for one in kept)
            peaks = [step_memory(config, stage, state.server, blocks, state.shape, most, client)
                     for blocks in set(kept.values())]
        row = new_row(number, stage, kept, price, reports, max(peaks, default=0), seconds)
        state.history.append(row)
        if on_round:
            on_round(row, state)

# ------------------------------ here the method ends; what follows serves the command line
def check(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    def must(true, name, rule):
        if not true:
            raise InputError(f"--{name.replace('_', '-')} must be {rule}, it is "
                             f"{getattr(config, name)}")
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        choices = limits.get("choices", (value,))
        must(value in choices, f.name, "one of " + ", ".join(map(str, choices)))
        if "low" in limits:
            low, high = limits["low"], limits.get("high", 1e9)
            must(low <= value <= high, f.name, f"from {low:g} to {high:g}")
    grown = config.depth - (config.method == "lasting")  # block by block
    must(config.method == "e2e" or (grown > 0 and grown % config.blocks_per_stage == 0), "depth",
         f"a multiple of --blocks-per-stage ({config.blocks_per_stage}), plus 1 if lasting")
    must(config.dim % config.heads == 0, "dim", f"a multiple of --heads ({config.heads})")
    must(config.clients_per_round <= config.clients, "clients", "at least --clients-per-round")
    must(config.rounds >= len(stages(config)), "rounds", f"{len(stages(config))} (stages) or more")
    there = False
    with contextlib.suppress(RuntimeError, AssertionError):
        there = torch.empty(0, device=pick_device(config)).device.type in ("cpu", "cuda")
    must(there, "device", f"cpu, or auto to take one of {torch.cuda.device_count()} GPUs")

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
            "e2e": "end-to-end" if config.clients > 1 else "centralized"}[config.method]
    if config.blocks_per_stage > 1 and config.method != "e2e":
        name += f" by {config.blocks_per_stage} blocks"
    if config.depth_dropout and "depth_dropout" not in without_effect(config):
        name += f" + FDD {config.depth_dropout:g}"
    return name

def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: no half file is seen."""
    buffer = io.BytesIO()  # torch.save, interrupted while it writes a file, can abort the process
    if path.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(json.dumps(content, indent=1).encode())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def load_checkpoint(folder, config, shape):
    """The State to go on from, or None; InputError if it is damaged or does not fit."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    with in_a_sentence(f"{path} is no checkpoint of this run", "choose another --out"):
        state, fresh = State(**load_tensors(path)), initial(config, shape, "meta")
        assemble(config, state.server, shape)
        json.dumps([list(row.items()) for row in state.history])  # rows, and plain ones
        if (any(t.dtype != fresh[name].dtype for name, t in state.server.items())
                or state.version.keys() != state.server.keys() or tuple(state.shape) != shape
                or type(state.changes) is not int or {*map(type, state.held.values())} - {list}):
            raise ValueError("its parts do not fit each other")
        return state

def load_encoder(folder):
    """The trained encoder of a run folder, ready for `encoder(data.normalise(images))`."""
    with in_a_sentence(f"{folder} holds no finished run", f"train with --out {folder}"):
        saved = json.loads((Path(folder) / "config.json").read_text())
        config = Config(**{f.name: saved.get(f.name, f.default) for f in fields(Config)})
        tensors = load_tensors(Path(folder) / "encoder.pt")
        named = broadcast(initial(config, saved["image_shape"]), ())  # for the head
        named |= {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        return encoder_of(config, named, saved["image_shape"])

def refuse_another(folder, mine):
    """Raise InputError if the folder exists and belongs to other settings or images."""
    with in_a_sentence(f"{folder} exists and is no run folder", "choose another --out"):
        files = folder.iterdir() if folder.exists() else ()
        used = [p for p in files if p.name != "lock" and p.suffix != ".tmp"]
        saved = json.loads((folder / "config.json").read_text()) if used else mine
        different = [name for name in mine if saved.get(name, "nothing") != mine[name]]
    for name in different:
        raise InputError(f"{folder} belongs to a run with {name} {saved.get(name)}, not "
                         f"{mine[name]}: choose another --out")

@contextlib.contextmanager
def run_folder(config, dataset, experiment=""):
    """Open a run's folder, for this process alone: yields (folder, State to go on from). It belongs
    to settings, images and experiment; others are refused, nothing touched."""
    mine = {k: v for k, v in asdict(config).items() if k not in ("device", "out", "cache")}
    mine |= {"experiment": experiment, "image_shape": list(dataset.shape),
             "images_sha256": dataset.digest()}
    slug = label(config).lower().replace(" + ", "-").replace(" ", "-")
    folder = Path(config.out or f"runs/{Path(config.data).stem}-{slug}-seed{config.seed}")
    initial(config, dataset.shape, "meta")  # raises if the patches or the clients do not fit
    data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    refuse_another(folder, mine)
    with contextlib.ExitStack() as held:
        with in_a_sentence(f"cannot work in {folder}", "choose another --out or wait for it"):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(data.lock(folder / "lock", wait=False))
            refuse_another(folder, mine)  # again, now that the folder is ours
            for left_behind in folder.glob("*.tmp"):
                left_behind.unlink()
            write(folder / "config.json", mine)
        yield folder, load_checkpoint(folder, config, dataset.shape)

COLUMNS = {  # of a table: (heading, unit, digits)
    "knn": ("k-NN %", 1, 1), "linear_probe": ("probe %", 1, 1), "moved_knn": ("moved k-NN", 1, 1),
    "moved_probe": ("moved probe", 1, 1), "ten_labels": ("10 labels", 1, 1),
    "finetuned": ("fine-tuned", 1, 1), "peak_memory_bytes": ("peak MiB", 2**20, 1),
    "macs": ("GMAC/image", 1e9, 2), "download_bytes": ("down MB", 1e6, 1),
    "upload_bytes": ("up MB", 1e6, 1), "stateless_download_bytes": ("stateless MB", 1e6, 1),
    "seconds": ("seconds", 1, 0)}

def cell(value, unit, digits):
    if isinstance(value, str):
        return value
    numbers = np.atleast_1d(value) / unit
    spread = f" ±{np.std(numbers, ddof=1):.{digits}f}" if np.ptp(numbers) > 0 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"

def table(rows, columns=COLUMNS):
    """Rows {name: {column: number, text, or numbers over seeds, for mean ± deviation}}."""
    used = [c for c in columns if any(c in row for row in rows.values())]
    lines = [["", *(columns[c][0] for c in used)]]
    for name, row in rows.items():
        lines.append([name, *(cell(row.get(c, "-"), *columns[c][1:]) for c in used)])
    widths = [max(map(len, cells)) + 2 for cells in zip(*lines)]
    return "\n".join(name.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:]))
                     for name, *cells in lines)

def train(config, dataset, folder, state=None, on_round=None, client=local_train, plan=stages):
    """federate(), with a line and a checkpoint after each round, and the encoder at the end."""
    print(f"\n{label(config)}; blocks are A active, + frozen, . dropped; bytes and peak memory are "
          "a client's\nstage  round    loss  down MB    up MB  peak MiB  seconds  blocks")

    def after(row, state):
        if on_round:
            on_round(row, state)
        write(folder / "checkpoint.pt", vars(state))
        notes = []
        for kept in row["kept_blocks"][:3]:
            notes.append("".join("A" if b in row["active_blocks"] else "+" if b in kept else "."
                                 for b in row["present_blocks"]))
        notes += [f"{what}: client {one}" for what in ("lost", "rejected") for one in row[what]]
        loss = math.nan if row["loss"] is None else row["loss"]
        print(f"{row['stage']:>5} {row['round']:>6} {loss:7.3f} {row['download_bytes'] / 1e6:8.3f} "
              f"{row['upload_bytes'] / 1e6:8.3f} {row['peak_memory_bytes'] / 2**20:9.1f} "
              f"{row['seconds']:8.2f} ", *notes, flush=True)

    encoder, history = federate(config, dataset, state, after, client, plan)
    write(folder / "history.json", history)
    write(folder / "encoder.pt", {name: t.cpu() for name, t in encoder.state_dict().items()})
    return encoder, history

def price_of(config, dataset, client=local_train, plan=stages, history=()):
    """cost() of a run on these images."""
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    price = cost(config, dataset.shape, max(map(len, parts)), client, plan, history)
    if config.clients == 1:  # no federation, nothing is sent
        price = {k: v for k, v in price.items() if k in ("macs", "peak_memory_bytes")}
    return price

def result(config, dataset, encoder, history, client=local_train, plan=stages):
    """The row of a trained method: accuracies, what a client paid, and seconds of training."""
    judged = evaluate(encoder.to(pick_device(config)), dataset, recipe(config))
    seconds = sum(row["seconds"] for row in history)
    return judged | price_of(config, dataset, client, plan, history) | {"seconds": seconds}

def run(config):
    """Train one method, and show it beside raw pixels and what end-to-end training costs."""
    dataset = data.load(config.data, config.cache, config.images)
    with run_folder(config, dataset) as (out, state):
        summary = out / "summary.json"
        if summary.exists():
            with in_a_sentence(f"{summary} is damaged", "delete it, and run the same command"):
                saved = table(json.loads(summary.read_text()))
            print(f"{out} is finished:\n{saved}")
            return
        encoder, history = train(config, dataset, out, state)
        raw = evaluate(None, dataset, recipe(config), pick_device(config))
        rows = {"raw pixels": raw, label(config): result(config, dataset, encoder, history)}
        if config.method != "e2e":
            price, whole = rows[label(config)], price_of(replace(config, method="e2e"), dataset)
            ratio = {c: f"{whole[c] / price[c]:.1f}x" for c in whole if price[c]}
            rows |= {"end-to-end": whole, "ratio": ratio}
        write(summary, rows)
        print(f"\n{table(rows)}\n{len(dataset.test_images):,} test images; moved: under one random "
              f"view each. Costs are a client's.\nEncoder, rounds and this table are in {out}")

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
    try:
        body()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{error} and another --out")
    except OSError as error:
        sys.exit(f"{error}: what was saved before is whole, the same command goes on")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)

def main(arguments=None):
    given = vars(Parser(__doc__.split("\n\n")[0]).parse_args(arguments))
    config = Config(**given)
    check(config)
    for name in without_effect(config):
        if name in given:
            raise InputError(f"--{name.replace('_', '-')} changes nothing here: leave it out")
    run(config)

if __name__ == "__main__":
    command(main)
