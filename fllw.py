"""Federated layer-wise learning (FLL) with federated depth dropout (FDD), from scratch.

The method (Guo et al. 2023, arXiv 2309.05213) reads from top to bottom: settings, model, stages and
depth dropout, one client, the loop. Then follow its costs and the command.

A run is cut into stages, a stage into rounds. Each stage adds blocks to the model and trains the
newest ones. The blocks below are frozen: they only run forward, and with depth dropout a client
skips some of them. Rounds and stages are counted from 1, blocks and clients from 0."""
import argparse
import functools
import json
import math
import threading
import time
import weakref
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
from ssl_loss import ProjectionHead, evaluate, micro_batched_step, nt_xent, table

# ----------------------------------------------------------------------------------- settings
def setting(default, help, **limits):
    """A field of Config. limits: low and high, or choices."""
    return field(default=default, metadata={"help": help, **limits})

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The command's flags are made from these fields."""
    # the images
    data: str = setting("mnist5k", "mnist5k, cifar10, cifar100 or a FILE.npz")
    images: int = setting(0, "use at most this many training images; 0: all", low=0)
    augment: str = setting("auto", "views; auto: by --data", choices=("auto", "digits", "natural"))
    # the model
    dim: int = setting(64, "width of the vision transformer", low=1)
    depth: int = setting(4, "number of blocks L", low=1, high=1000)
    heads: int = setting(8, "attention heads; must divide the width", low=1)
    patch_size: int = setting(7, "side of a patch in pixels; must divide height and width", low=1)
    head_hidden: int = setting(256, "width of the projection head's hidden layers", low=1)
    head_dim: int = setting(64, "dimension in which the loss compares views", low=1)
    # layer by layer
    method: str = setting("fll", "fll trains the newest blocks, progressive all so far, e2e all",
                          choices=("fll", "progressive", "e2e"))
    blocks_per_stage: int = setting(1, "blocks that a stage adds", low=1)
    depth_dropout: float = setting(0.25, "chance that an older block is dropped", low=0, high=0.99)
    # the federation
    clients: int = setting(2, "number of clients N", low=1)
    clients_per_round: int = setting(0, "clients sampled each round; 0: all", low=0)
    alpha: float = setting(0.0, "Dirichlet alpha: small skews the labels; 0: IID", low=0, high=1e6)
    rounds: int = setting(96, "federated rounds, shared among the stages", low=1)
    local_epochs: int = setting(1, "passes over a client's images in a round", low=1)
    # the training of a client
    batch_size: int = setting(64, "images per local step; each gives two views", low=2)
    micro_batch: int = setting(0, "images per backward pass, same gradients; 0: whole batch", low=0)
    lr: float = setting(2e-3, "peak learning rate (AdamW, one cosine per stage)", low=1e-6)
    weight_decay: float = setting(1e-4, "AdamW weight decay", low=0)
    temperature: float = setting(0.2, "temperature of NT-Xent", low=1e-6)
    amp: bool = setting(False, "bf16 autocast for the model; the loss stays in float32")
    # the run
    seed: int = setting(0, "seed of the split among clients and of all training", low=0)
    device: str = setting("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")
    workers: int = setting(0, "threads that train clients; 0: one per core, or 1 on a GPU", low=0)
    out: str = setting("", "run folder; default: under runs/, named after data, method and seed")
    cache: str = setting("~/.cache/fllw", "folder for downloaded data sets")

# A generator is seeded with [config.seed, purpose, ...]; data.partition() has purpose 0.
INIT, SAMPLING, DROPOUT, TRAINING = range(1, 5)

def rng(config, *key):
    """A numpy generator that depends on (seed, *key) alone; key: purpose[, round[, client]]."""
    return np.random.default_rng([config.seed, *key])

def pick_device(config):
    """The torch.device on which clients train."""
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
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

class Block(nn.Module):
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
    image_shape: (channels, height, width); blocks: the numbers of its blocks. Names and arithmetic
    are those of timm's VisionTransformer(num_classes=0, global_pool="avg", fc_norm=False)."""
    def __init__(self, config, image_shape, blocks):
        super().__init__()
        (channels, height, width), dim, patch = image_shape, config.dim, config.patch_size
        if height % patch or width % patch:
            raise data.InputError(f"--patch-size {patch} must divide the images' height and width: "
                                  f"read as [N, H, W, C] they are {height} x {width}, C {channels}")
        patches = (height // patch) * (width // patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, dim, patch, patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.blocks = nn.ModuleDict({str(b): Block(dim, config.heads) for b in blocks})
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.pos_embed, std=0.5)  # usually 0.02; chosen by early trials on digits
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    # The forward pass is cut in two: what lies below the first block that trains needs no gradient.
    def lower(self, images, first):
        """Patch embedding, blocks below `first`: [B, C, H, W] -> tokens [B, T = 1 + patches, D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, patches, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for number, block in self.blocks.items():
            if int(number) < first:
                x = block(x)
        return x

    def upper(self, x, first):
        """Blocks from `first` on, final norm, pooling: tokens [B, T, D] -> features [B, D]."""
        for number, block in self.blocks.items():
            if int(number) >= first:
                x = block(x)
        return self.norm(x)[:, 1:].mean(1)  # patch tokens; the class token only joins attention

    def forward(self, images):
        return self.upper(self.lower(images, 0), 0)

class Learner(nn.Module):
    """What is trained: the encoder, and the projection head that is thrown away afterwards."""
    def __init__(self, config, image_shape, blocks):
        super().__init__()
        self.encoder = ViT(config, image_shape, blocks)
        self.head = ProjectionHead(config.dim, config.head_hidden, config.head_dim)

Config.learner = Learner  # not a setting; a subclass of Config may have another, without buffers

def block_of(name):
    """"encoder.blocks.3.norm1.bias" -> 3; None for the embedding, the final norm and the head."""
    _, found, rest = name.partition("blocks.")
    return int(rest.split(".")[0]) if found else None

def learner_of(config, tensors, image_shape):
    """The learner that has these tensors ({name: tensor}, not copied), and no other block."""
    blocks = sorted({block_of(name) for name in tensors} - {None})
    with torch.device("meta"):  # shapes without data, so nothing is drawn and nothing is filled
        learner = config.learner(config, tuple(image_shape), blocks)
    learner.load_state_dict(tensors, assign=True)
    return learner

# ------------------------------------------------------------------ stages and depth dropout
@dataclass(frozen=True)
class Stage:
    """Blocks below `first` are frozen, blocks from `first` to `stop - 1` train, later ones do not
    exist yet. Blocks from `newest` on are new. In FLL first == newest; otherwise first == 0."""
    number: int
    first: int
    newest: int
    stop: int
    rounds: range  # the stage's rounds, numbered from the start of the run

    def trains(self, name):
        """Whether a learner's tensor of this name trains."""
        embedding = any(part in name for part in ("patch_embed", "pos_embed", "cls_token"))
        block = 0 if embedding else block_of(name)  # the embedding trains with block 0
        return block is None or block >= self.first  # the final norm and the head always train

def stages(config):
    """The plan of a run, a list of stages: the one place where the methods differ."""
    L, k = config.depth, config.blocks_per_stage
    cuts = [0, L] if config.method == "e2e" else [*range(0, L, k), L]
    if config.rounds < len(cuts) - 1:
        raise data.InputError(f"--rounds must be at least {len(cuts) - 1}, the number of stages")
    shares = np.array_split(range(1, config.rounds + 1), len(cuts) - 1)
    return [Stage(number, {"fll": newest, "progressive": 0, "e2e": 0}[config.method], newest, stop,
                  range(share[0], share[-1] + 1))
            for number, newest, stop, share in zip(range(1, L + 1), cuts, cuts[1:], shares)]

def sample_clients(config, round_number):
    """The clients of a round, ascending: a function of (seed, round)."""
    size = config.clients_per_round or config.clients
    chosen = rng(config, SAMPLING, round_number).choice(config.clients, size, replace=False)
    return sorted(chosen.tolist())

def sample_kept_blocks(config, stage, round_number, client):
    """Federated depth dropout: the blocks that this client keeps in this round. It drops each older
    block with probability depth_dropout, a new block never. In FLL the older blocks are frozen (Guo
    et al.), in progressive training they train (Tun et al. 2024, arXiv 2401.11647)."""
    draws = rng(config, DROPOUT, round_number, client).random(stage.newest)
    return [b for b in range(stage.stop) if b >= stage.newest or draws[b] >= config.depth_dropout]

# --------------------------------------------------------------------------------- one client
def local_step(config, learner, stage, views):
    """Forward and backward of one local step; returns the loss. views: float32 [2B, C, H, W], as
    from data.two_views(). ssl_loss.micro_batched_step() does the same in less memory."""
    with torch.autocast(views.device.type, torch.bfloat16, enabled=config.amp):
        with torch.set_grad_enabled(stage.first == 0):  # the embedding trains with block 0
            tokens = learner.encoder.lower(views, stage.first)  # if frozen, nothing is stored
        z = learner.head(learner.encoder.upper(tokens, stage.first))  # [2B, head_dim]
    loss = nt_xent(*z.chunk(2), config.temperature)
    del z  # it is freed before the backward pass, whose graph holds what is needed of it
    loss.backward()
    return loss.detach()

def local_train(config, stage, message, images, round_number, client, step=None):
    """One client's work in one round, on the message (the tensors that it keeps, by name) and its
    own images, uint8 [n, C, H, W]. step: like local_step(). Returns its upload (what it trained, by
    name), the loss of every local step [steps], and its number of images."""
    step = step or (micro_batched_step if config.micro_batch else local_step)
    device = pick_device(config)
    images = images.to(device)
    mine = {name: tensor.to(device, copy=True) for name, tensor in message.items()}
    learner = learner_of(config, mine, images.shape[1:])
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}

    # AdamW starts anew every round: its moments belong to weights that averaging has replaced.
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=config.weight_decay, fused=True)
    seed = rng(config, TRAINING, round_number, client).integers(2**63)
    draws = torch.Generator(device).manual_seed(int(seed))
    recipe = data.RECIPES[data.recipe_name(config)]
    batch = min(config.batch_size, len(images))
    steps = len(images) // batch  # of an epoch; what is left over waits for the next shuffle
    done, losses = stage.rounds.index(round_number) / len(stage.rounds), []

    for epoch in range(config.local_epochs):
        order = torch.randperm(len(images), device=device, generator=draws)
        for number, chosen in enumerate(order[:steps * batch].split(batch), epoch * steps):
            share = done + number / (config.local_epochs * steps) / len(stage.rounds)  # 0 to 1
            optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * share)) / 2
            optimizer.zero_grad()
            losses.append(step(config, learner, stage,
                               data.two_views(images[chosen], recipe, draws)))
            optimizer.step()
    upload = {name: parameter.detach().cpu() for name, parameter in trained.items()}
    return upload, torch.stack(losses), len(images)

# ----------------------------------------------------------------------------------- the loop
@dataclass
class State:
    """All there is between two rounds."""
    server: dict = field(default_factory=dict)   # name -> tensor, on the CPU: the model so far
    history: list = field(default_factory=list)  # a row for every round done, made in federate()

def initial(config, image_shape):
    """State dict of a fresh learner with all its blocks, from the seed. Not thread-safe."""
    with torch.random.fork_rng(devices=[]):  # modules draw from torch's global generator
        torch.default_generator.manual_seed(int(rng(config, INIT).integers(2**63)))
        return config.learner(config, tuple(image_shape), range(config.depth)).state_dict()

def grow(server, stage):
    """Add to `server` the blocks that it lacks in this stage. Each starts with the tensors of the
    block below: sharing is safe, because training replaces tensors and never writes into them."""
    for b in range(1, stage.stop):
        for name in [name for name in server if block_of(name) == b - 1]:
            server.setdefault(name.replace(f"blocks.{b - 1}.", f"blocks.{b}."), server[name])

def broadcast(server, kept):
    """What a client receives: the server's tensors, less the blocks that it does not keep."""
    return {name: t for name, t in server.items() if block_of(name) in (None, *kept)}

def federate(config, clients, state=None, plan=None, train_client=local_train, on_round=None):
    """Train by federated rounds; returns the State, or raises FloatingPointError on divergence.
    clients: a list of each client's images, uint8 [n, C, H, W]; state: one to resume, changed in
    place; plan: an iterable of stages; train_client: like local_train(), never writes into message,
    may return None (client lost) or a partial upload; on_round: called with the state."""
    if len(clients) != config.clients:
        raise ValueError(f"images of {len(clients)} clients; config.clients is {config.clients}")
    state, image_shape = state or State(), clients[0].shape[1:]
    cores = torch.get_num_threads()  # that torch sees; OMP_NUM_THREADS limits them
    workers = config.workers or (cores if pick_device(config).type == "cpu" else 1)
    # Each worker runs torch on one thread: the last bits of a result depend on that number.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=[1]) as pool:
        for stage in plan or stages(config):
            if not state.server:
                state.server |= broadcast(initial(config, image_shape), range(stage.stop))
            grow(state.server, stage)
            for round_number in stage.rounds:
                if round_number <= len(state.history):
                    continue  # it was done before an interruption
                began = time.perf_counter()
                kept = {client: sample_kept_blocks(config, stage, round_number, client)
                        for client in sample_clients(config, round_number)}

                def work(client):  # in a thread of the pool
                    message = broadcast(state.server, kept[client])
                    own = clients[client]
                    return train_client(config, stage, message, own, round_number, client)

                # FedAvg (McMahan et al. 2017): each tensor's mean over the clients that sent it,
                # weighted by images. Running sums save memory; their order fixes the last bits.
                sums, counts, losses = {}, Counter(), {}
                for client, answer in zip(kept, pool.map(work, kept)):
                    if answer is None:
                        continue  # it was lost
                    upload, step_losses, count = answer
                    losses[client] = step_losses.mean().item()
                    for name, tensor in upload.items():
                        sums[name] = sums.get(name, 0) + count * tensor.double()
                        counts[name] += count
                if not all(tensor.isfinite().all() for tensor in sums.values()):
                    raise FloatingPointError(f"round {round_number} diverged: take a smaller --lr")
                state.server |= {name: (sums[name] / counts[name]).float() for name in sums}
                state.history.append({"round": round_number, "stage": stage.number, "kept": kept,
                                      "losses": losses, "seconds": time.perf_counter() - began})
                if on_round:
                    on_round(state)
    torch.set_num_threads(cores)  # or later threads would have the workers' one
    return state

# ---------------------------------------------------- here the method ends; then what it costs
def count_macs(config, stage, kept, image_shape):
    """Multiply-accumulates for one image that a local epoch uses, counted as in Tun et al. 2024:
    linear layers and attention products, for two views; backward, what trains costs twice its
    forward pass. With micro-batches, all that trains except the head runs forward twice."""
    D, T = config.dim, 1 + math.prod(image_shape[1:]) // config.patch_size**2  # T: tokens
    embed = math.prod(image_shape) * D  # each pixel value is multiplied by D weights
    block = T * 12 * D**2 + 2 * T**2 * D  # qkv 3, proj 1, mlp 4 + 4; attention's two products
    head = config.head_hidden * (D + config.head_hidden + config.head_dim)
    trained = 4 if config.micro_batch else 3
    blocks = sum(block * (trained if b >= stage.first else 1) for b in kept)
    return 2 * (embed * (trained if stage.first == 0 else 1) + blocks + 3 * head)

Config.macs = count_macs  # for another model, a subclass of Config defines its own macs()

def replay(config, image_shape, rows, plan=None):
    """Yield, for each row of a history, the mean cost of a client that was asked, {column: number},
    as if it had answered in full. A tensor's version, (name, round of its last change), identifies
    its values; a copied block has the version of its source. A client keeps what it receives, so it
    downloads each version once."""
    stage_of = {stage.number: stage for stage in plan or stages(config)}
    sizes = {name: tensor.nbytes for name, tensor in initial(config, image_shape).items()}
    server, held = {}, defaultdict(set)  # name -> version; client -> the versions that it has
    for row in rows:
        stage, paid, changed = stage_of[row["stage"]], Counter(), set()
        server = server or {name: (name, 0) for name in broadcast(sizes, range(stage.stop))}
        grow(server, stage)
        for client, kept in row["kept"].items():
            message = broadcast(server, kept)
            needed, sent = set(message.values()), set(filter(stage.trains, message))
            paid.update(download_bytes=sum(sizes[name] for name, _ in needed - held[client]),
                        stateless_download_bytes=sum(sizes[name] for name, _ in needed),
                        upload_bytes=sum(sizes[name] for name in sent),
                        macs=config.local_epochs * config.macs(stage, kept, image_shape))
            held[client] |= needed
            changed |= sent
        server |= {name: (name, row["round"]) for name in changed}
        yield {column: total / len(row["kept"]) for column, total in paid.items()}

def storages(tree):
    """The memory behind the tensors in nested lists and dicts: identity -> storage."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(tree)
               if isinstance(t, torch.Tensor) and t.device.type != "meta"]  # meta has no data
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}

class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns, until it is freed: parameters,
    gradients, optimizer state, activations and temporaries, the same on every machine."""
    def __init__(self):
        super().__init__()
        self.live = [0]  # bytes, at the start, and after every allocation and release

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in given:  # new memory: no view of an argument, not changed in place
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        return result

    def change(self, nbytes):
        self.live.append(self.live[-1] + nbytes)

def live_bytes(config, stage, image_shape, train_client=local_train):
    """MemoryMeter.live over two local steps; the second starts with the optimizer's state. Tensors
    are fake, with shapes and lifetimes but no data: bytes are counted, nothing is computed."""
    config = replace(config, device="cpu", local_epochs=1)
    server = broadcast(initial(config, image_shape), range(stage.stop))
    with FakeTensorMode():
        message = {name: torch.zeros(tensor.shape) for name, tensor in server.items()}
        images = torch.zeros(2 * config.batch_size, *image_shape, dtype=torch.uint8)
        with MemoryMeter() as meter:
            train_client(config, stage, message, images, stage.rounds[0], 0)
    return meter.live

@functools.lru_cache
def peak_memory(config, stage, image_shape, train_client=local_train):
    """Peak bytes of a local step on a full batch, if nothing is dropped; None: not measurable."""
    try:
        return max(live_bytes(config, stage, image_shape, train_client))
    except Exception as error:  # e.g. from .item(): fake tensors hold no numbers
        print(f"note: no peak memory: the client fails on fake tensors ({type(error).__name__})")

def cost(config, image_shape, plan=None, train_client=local_train):
    """The cost of a run to a client that takes part in every round: peak_memory_bytes (left out if
    not measurable), macs for one image, download_bytes, upload_bytes, and stateless_download_bytes
    (had it kept nothing between rounds). Nothing is trained. At most ten clients are averaged."""
    plan, total = list(plan or stages(config)), Counter()
    clients = range(min(config.clients_per_round or config.clients, 10))
    rows = ({"round": number, "stage": stage.number,
             "kept": {c: sample_kept_blocks(config, stage, number, c) for c in clients}}
            for stage in plan for number in stage.rounds)
    for paid in replay(config, image_shape, rows, plan):
        total.update(paid)
    peaks = [peak_memory(config, stage, tuple(image_shape), train_client) for stage in plan]
    return ({} if None in peaks else {"peak_memory_bytes": max(peaks)}) | dict(total)

# -------------------------------------------------------------------------------- the command
def validate(config):
    """Raise InputError, one sentence, for settings that cannot be run."""
    for f in fields(config):
        low, high = f.metadata.get("low"), f.metadata.get("high", 1e9)
        value = getattr(config, f.name)
        if low is not None and not low <= value <= high:  # NaN is in no range
            flag = f.name.replace("_", "-")
            raise data.InputError(f"--{flag} must be from {low:g} to {high:g}, not {value}")
    if config.dim % config.heads:
        raise data.InputError(f"--heads {config.heads} must divide --dim {config.dim}")
    if config.clients_per_round > config.clients:
        raise data.InputError(f"--clients-per-round must be at most --clients {config.clients}")
    stages(config)  # raises if the rounds are too few
    with data.friendly_errors(f"--device {config.device} cannot be used", "try cpu or auto"):
        torch.zeros(1, device=pick_device(config)).item()

def label(config):
    """A method's name in tables."""
    k, p = config.blocks_per_stage, config.depth_dropout
    name = {"fll": "FLL", "progressive": "progressive", "e2e": "end-to-end"}[config.method]
    if config.method != "e2e":
        name += f" by {k} blocks" * (k > 1) + f" + FDD {p:g}" * (p > 0 and k < config.depth)
    return name

def write(path, content):
    """Write tensors (.pt) or JSON under a temporary name, then rename: no file is half written."""
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}.tmp")
    with data.friendly_errors(f"{path} cannot be written", "check disk space and permissions"):
        if path.suffix == ".pt":
            torch.save(content, temporary)
        else:
            temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)

def open_run(config, dataset):
    """(folder, checkpoint) of a new run, or of one to resume. Raises InputError for a folder that
    belongs to other settings or images, or holds other files, and leaves it as it is."""
    config.learner(config, dataset.shape, ())  # this and split() refuse bad input before any write
    data.split(dataset, config.clients, config.alpha, config.seed)
    same = replace(config, data="", images=0, workers=0, out="", cache="")  # these change no result
    settings = asdict(same) | {"device": pick_device(config).type, "sha256": dataset.digest(),
                               "augment": data.recipe_name(config), "image_shape": [*dataset.shape]}
    slug = label(config).lower().replace(" + ", "-").replace(" ", "-")
    folder = Path(config.out or f"runs/{Path(config.data).stem}-{slug}-seed{config.seed}")
    with data.friendly_errors(f"{folder} cannot be a run folder", "choose another --out"):
        folder = folder.expanduser()
        path = folder / "checkpoint.pt"
        folder.mkdir(parents=True, exist_ok=True)
        others = [other.name for other in folder.iterdir() if other.suffix != ".tmp"]
        if not others:
            write(path, {"settings": settings, "server": {}, "history": []})
        elif not path.exists():
            raise data.InputError(f"{folder} holds other files ({others[0]}): choose another --out")
        checkpoint = torch.load(path, "cpu", weights_only=True)
        theirs = checkpoint["settings"]
        other = {name: theirs.get(name) for name in settings if theirs.get(name) != settings[name]}
        if other:
            raise data.InputError(f"{folder} has a run with other settings, {other}: change --out")
        return folder, checkpoint

def encoder_of(config, server, image_shape):
    """The encoder among the server's tensors, not copied: evaluation uses every block."""
    return learner_of(config, server, image_shape).encoder.eval().requires_grad_(False)

def load_encoder(folder):
    """A run's encoder so far: encoder(data.normalise(uint8 [N, C, H, W])) -> float32 [N, dim]."""
    with data.friendly_errors(f"{folder} cannot be read as a run folder", "rerun its command"):
        saved = torch.load(Path(folder).expanduser() / "checkpoint.pt", "cpu", weights_only=True)
        config = Config(**{name: saved["settings"][name] for name in vars(Config())})
        return encoder_of(config, saved["server"], saved["settings"]["image_shape"])

def train(config, dataset):
    """federate() in a run folder: a line and a checkpoint per round, the encoder at the end."""
    folder, checkpoint = open_run(config, dataset)
    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    state = State(checkpoint["server"], checkpoint["history"])
    plan, costs = stages(config), replay(config, dataset.shape, state.history)
    for _ in state.history:
        next(costs)  # paid before an interruption; replay() goes on with the list as it grows

    def after(state):
        write(folder / "checkpoint.pt", checkpoint | vars(state))
        row, paid = state.history[-1], next(costs)
        stage = plan[row["stage"] - 1]
        blocks = ["".join("." if b not in kept else "A" if b >= stage.first else "+"
                          for b in range(stage.stop)) for kept in row["kept"].values()]
        print(f"{row['stage']:>5} {row['round']:>6} {np.mean(list(row['losses'].values())):7.3f} "
              f"{paid['download_bytes'] / 1e6:8.3f} {paid['upload_bytes'] / 1e6:8.3f} "
              f"{(peak_memory(config, stage, dataset.shape) or math.nan) / 2**20:9.1f} "
              f"{row['seconds']:8.2f}  {' '.join(blocks[:3])}", flush=True)

    print(f"\n{label(config)}. Blocks of up to 3 clients: A trains, + is frozen, . is dropped. MB "
          "and MiB: per client.\nstage  round    loss  down MB    up MB  peak MiB  seconds  blocks")
    federate(config, clients, state, on_round=after)
    write(folder / "encoder.pt", encoder_of(config, state.server, dataset.shape).state_dict())
    return state

def result(config, dataset, state, plan=None, train_client=local_train):
    """The row of a trained method: accuracies, a client's costs, and seconds of training."""
    encoder = encoder_of(config, state.server, dataset.shape).to(pick_device(config))
    scores = evaluate(encoder, dataset, data.recipe_name(config), pick_device(config))
    seconds = sum(row["seconds"] for row in state.history)
    return scores | cost(config, dataset.shape, plan, train_client) | {"seconds": seconds}

def make_parser(description, prog=None):
    """A flag for every field of Config."""
    parser = argparse.ArgumentParser(prog, "%(prog)s [--FLAG VALUE ...]; --help lists the flags",
                                     description, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"type": f.type, "choices": f.metadata.get("choices")})
        parser.add_argument("--" + f.name.replace("_", "-"), **kind,
                            help=f"{f.metadata['help']} (default: {f.default!r})")
    return parser

def main(arguments=None):
    """Train one method, and show it beside raw pixels and what end-to-end training costs."""
    parser = make_parser((__doc__ or "").split("\n\n")[0])
    given = vars(parser.parse_args(arguments))
    with data.sentences(parser):
        config = Config(**given)
        validate(replace(config, clients_per_round=0))  # the file may set the number of clients
        dataset = data.load(config.data, config.cache, config.images)
        config = replace(config, **data.own_split(dataset, given))
        validate(config)
        summary = open_run(config, dataset)[0] / "summary.json"
        if summary.exists():
            print(f"{summary.parent} is finished:\n{table(json.loads(summary.read_text()))}")
            return
        mine = result(config, dataset, train(config, dataset))
        raw = evaluate(None, dataset, data.recipe_name(config), pick_device(config))
        rows = {"raw pixels": raw, label(config): mine}
        if config.method != "e2e":
            whole = cost(replace(config, method="e2e"), dataset.shape)
            ratio = {name: f"{whole[name] / mine[name]:.1f}x" for name in whole if name in mine}
            rows |= {"end-to-end": whole, "ratio": ratio}
        write(summary, rows)
        share = 100 * dataset.test_labels.bincount().max() / len(dataset.test_labels)
        print(f"\n{table(rows)}\nThe largest class has {share:.0f} % of the test images. moved: on "
              f"random views of them; raw pixels: at most 64 x 64.\nAll files: {summary.parent}")

if __name__ == "__main__":
    main()
