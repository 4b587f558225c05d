"""Tests of ssl_loss.py, fllw.py and data.py. Run: pytest test_fllw.py

Wherever there is an oracle, a test compares with it: brute force, a plain loop, a published table,
what another library printed, or another route to the same number. The tests stand in the order
loss, model, stages, loop, clients, workers, costs, memory, evaluation, data, wrong input, run
folder, GPU. Read "the whole method, once more" to see all of FLL on one page."""
import copy
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from collections import defaultdict
from dataclasses import fields, replace
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import fllw
import ssl_loss
from fllw import Config, InputError, Stage

torch.set_num_threads(1)  # the tensors are tiny; and bits depend on the number of threads
HERE = Path(__file__).resolve().parent
SMALL = Config(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, clients=3,
               rounds=6, batch_size=8, depth_dropout=0.5, device="cpu", augment="digits", workers=1)
TINY = ("--dim 16 --depth 3 --heads 2 --head-hidden 24 --head-dim 8 --clients 3 --rounds 6 "
        "--batch-size 8 --device cpu --workers 1").split()  # the same, for the command
PAPER = Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256, clients=10,
               rounds=180, local_epochs=3, batch_size=512, depth_dropout=0.0, device="cpu")
SHAPE = (1, 14, 14)
METHODS = ["fll", "e2e", "progressive", "lasting"]


def images(n=60, shape=SHAPE, classes=5, seed=0):
    """Random images, for what does not depend on their content."""
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    return data.Dataset(pixels, torch.arange(n) % classes, pixels[:20], torch.arange(20) % classes)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(shape, phase):
    """Numbers that a formula gives in every library alike."""
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + phase).view(shape).float()


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def timeless(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def parts_of(config, dataset):
    return data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)


def federated(config, dataset, **joints):
    """(encoder, history, the server's tensors after every round)"""
    servers = []
    also = joints.pop("on_round", lambda row, state: None)

    def on_round(row, state):
        also(row, state)
        servers.append(dict(state.server))

    encoder, history = fllw.federate(config, dataset, on_round=on_round, **joints)
    return encoder, history, servers


def client_of(config, stage, kept, shape=SHAPE):
    """A client's learner with the blocks `kept`, from the seed."""
    message = fllw.broadcast(fllw.initial(config, shape), kept)
    return fllw.receive(config, message, shape, stage)


def run_here(capsys, *arguments):
    """What the command prints, run in this process, which need not start first."""
    fllw.main(list(map(str, arguments)))
    return capsys.readouterr().out


@pytest.fixture
def unmetered(monkeypatch):
    """Leave out the measuring of memory, which takes longer than these rounds."""
    monkeypatch.setattr(fllw, "peak_memory", lambda *arguments, **more: 0)


# ----------------------------------------------------------------------------------------- loss

def brute_nt_xent(z1, z2, t):
    z, n, total = [v / v.norm() for v in torch.cat([z1, z2]).double()], len(z1), 0.0
    for i in range(2 * n):
        others = sum(math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / t) / others)
    return total / (2 * n)


@pytest.mark.parametrize("n, d, t", [(1, 3, 0.5), (2, 4, 0.1), (7, 16, 0.1), (5, 2, 1.0)])
def test_nt_xent_equals_a_double_loop(n, d, t):
    z1, z2 = normal(2, n, d, seed=n)
    loss = ssl_loss.nt_xent(z1, z2, t).item()
    assert loss == pytest.approx(brute_nt_xent(z1, z2, t), rel=1e-5, abs=1e-6)
    assert ssl_loss.nt_xent(3 * z2, z1, t).item() == pytest.approx(loss, rel=1e-5, abs=1e-6)


def test_nt_xent_by_hand():
    """The docstring's example: two perfect views, everything else orthogonal."""
    loss = ssl_loss.nt_xent(torch.eye(4), torch.eye(4), 0.5).item()
    assert loss == pytest.approx(math.log(math.e**2 + 6) - 2, abs=1e-6)


@pytest.mark.parametrize("t, expected", [(0.1, 0.45006483793258667), (0.5, 1.0748012065887451)])
def test_nt_xent_equals_what_lightly_printed(t, expected):
    """lightly 1.6.0: NTXentLoss(t)(wave((5, 4), 0), wave((5, 4), 0.3)).item()"""
    loss = ssl_loss.nt_xent(wave((5, 4), 0), wave((5, 4), 0.3), t).item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("z1, z2, t", [
    ((4, 3), (4, 2), 0.1), ((4, 3), (3, 3), 0.1), ((4,), (4,), 0.1), ((0, 3), (0, 3), 0.1),
    ((4, 3), (4, 3), 0.0), ((4, 3), (4, 3), math.nan)])
def test_nt_xent_refuses_what_it_cannot_compare(z1, z2, t):
    with pytest.raises(ValueError):
        ssl_loss.nt_xent(torch.ones(z1), torch.ones(z2), t)


@pytest.mark.parametrize("present, active, kept", [
    ((0, 1, 2), (0, 1, 2), (0, 1, 2)), ((0,), (0,), (0,)), ((0, 1, 2), (2,), (0, 2)),
    ((0, 1, 2), (1,), (0, 1, 2)), ((0, 1, 2), (0,), (0, 2))],
    ids=["end-to-end", "first stage", "dropped", "in the middle", "frozen above"])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_micro_batches_give_the_plain_loss_and_gradients(present, active, kept, micro):
    """The saving of memory is exact: it changes the order of the work, not its result."""
    stage, results = Stage(1, present, active, 1), []
    for step, m in ((fllw.local_step, 0), (ssl_loss.micro_batched_step, micro)):
        learner = client_of(SMALL, stage, kept)
        loss = step(replace(SMALL, micro_batch=m), learner, stage, normal(16, *SHAPE))
        gradients = [p.grad.flatten() for p in learner.parameters() if p.requires_grad]
        results.append((loss, torch.cat(gradients)))
    (plain, expected), (cached, gradient) = results
    assert cached.item() == pytest.approx(plain.item(), rel=1e-5)
    assert expected.norm() > 0.1 and (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_bf16_autocast_stays_close_and_keeps_the_loss_in_float32():
    _, plain = fllw.federate(SMALL, images())
    encoder, amp = fllw.federate(replace(SMALL, amp=True, micro_batch=4), images())
    losses, others = [list(map(fllw.mean_loss, history)) for history in (plain, amp)]
    assert others == pytest.approx(losses, rel=0.05) and others[0] != losses[0]
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    z1, z2 = normal(2, 8, 16).bfloat16()
    assert ssl_loss.nt_xent(z1, z2, 0.1).dtype == torch.float32


# ---------------------------------------------------------------------------------------- model

def torch_layer(block, dim, heads):
    """The same block as torch's own encoder layer."""
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, activation="gelu",
                                       norm_first=True, batch_first=True, layer_norm_eps=1e-6)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    mine = block.state_dict()
    layer.load_state_dict({theirs + kind: mine[ours + kind] for theirs, ours in names.items()
                           for kind in ("weight", "bias")})
    return layer


def test_vit_equals_torchs_own_encoder_layers():
    vit = fllw.ViT((8, 12), 4, 3, dim=24, depth=2, heads=3)
    with torch.no_grad():
        for i, p in enumerate(vit.parameters()):
            p += 0.1 * normal(*p.shape, seed=i)
    x = normal(5, 3, 8, 12)
    patches = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    tokens = torch.cat([vit.cls_token.repeat(5, 1, 1), tokens], 1) + vit.pos_embed
    for block in vit.blocks:
        tokens = torch_layer(block, 24, 3)(tokens)
    tokens = nn.functional.layer_norm(tokens, (24,), vit.norm.weight, vit.norm.bias, 1e-6)
    assert torch.allclose(vit(x), tokens[:, 1:].mean(1), atol=1e-5)


def test_vit_equals_what_timm_printed():
    """timm 1.0.19:

    vit = VisionTransformer(img_size=(8, 12), patch_size=4, embed_dim=6, depth=2, num_heads=3,
                            num_classes=0, global_pool="avg", fc_norm=False).eval()
    for phase, (name, p) in enumerate(sorted(vit.named_parameters())):
        p.data = wave(p.shape, phase)
    print([round(v, 5) for v in vit(wave((1, 3, 8, 12), 0.5))[0].tolist()])"""
    expected = [-0.92517, 1.20557, 1.23566, 0.78338, 0.15466, -0.41602]
    vit = fllw.ViT((8, 12), 4, 3, dim=6, depth=2, heads=3)
    for phase, (_, p) in enumerate(sorted(vit.named_parameters())):
        p.data = wave(p.shape, phase)
    assert vit(wave((1, 3, 8, 12), 0.5))[0].tolist() == pytest.approx(expected, abs=2e-5)


def test_vit_tiny_has_timms_names_and_sizes():
    """So that its weights load into timm's model, and timm's into this one."""
    with torch.device("meta"):
        state = fllw.ViT((32, 32), 4, 3, 192, 12, 3).state_dict()
    assert sum(t.numel() for t in state.values()) == 5_360_832
    assert sum(t.numel() for n, t in state.items() if n.startswith("blocks.5.")) == 444_864
    layers = "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()
    names = {f"blocks.{i}.{layer}" for i in range(12) for layer in layers}
    names |= {"patch_embed.proj", "norm"}
    assert set(state) == {"cls_token", "pos_embed"} | {f"{n}.{kind}" for n in names
                                                       for kind in ("weight", "bias")}
    assert state["cls_token"].shape == (1, 1, 192) and state["pos_embed"].shape == (1, 65, 192)
    assert state["patch_embed.proj.weight"].shape == (192, 3, 4, 4)


def test_a_fresh_learner_depends_on_its_seed_alone():
    before = torch.random.get_rng_state()
    first = fllw.initial(SMALL, SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)  # the global generator must not matter
    assert same_tensors(first, fllw.initial(replace(SMALL, rounds=9), SHAPE))
    assert not same_tensors(first, fllw.initial(replace(SMALL, seed=1), SHAPE))


# ----------------------------------------------------------------------------------------- stages

def test_stages_are_those_of_the_papers():
    table = {"e2e": [(0, 12)], "progressive": [(0, s) for s in range(1, 13)],
             "fll": [(s - 1, s) for s in range(1, 13)]}
    for method, blocks in table.items():
        plan = fllw.stages(replace(PAPER, method=method))
        assert [(s.active, s.present) for s in plan] == [
            (tuple(range(first, stop)), tuple(range(stop))) for first, stop in blocks]
        assert sum(s.rounds for s in plan) == 180
        assert [s.number for s in plan] == list(range(1, len(plan) + 1))
    by_four = fllw.stages(replace(PAPER, blocks_per_stage=4))
    assert [s.active for s in by_four] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    lasting = fllw.stages(replace(PAPER, depth=4, method="lasting"))
    assert [(s.present, s.active) for s in lasting] == [
        ((0, 3), (0, 3)), ((0, 1, 3), (1, 3)), ((0, 1, 2, 3), (2, 3))]
    lasting = fllw.stages(replace(PAPER, depth=5, method="lasting", blocks_per_stage=2))
    assert [s.active for s in lasting] == [(0, 1, 4), (2, 3, 4)]


def test_rounds_are_shared_equally_or_as_asked():
    def rounds_of(**more):
        return [s.rounds for s in fllw.stages(replace(SMALL, **more))]

    for rounds in range(5, 60):
        equal = list(map(len, np.array_split(range(rounds), 5)))
        assert rounds_of(depth=5, rounds=rounds) == equal
    assert rounds_of(rounds=12, first_share=0.5) == [6, 3, 3]
    assert rounds_of(rounds=12, first_share=0.5, method="progressive") == [6, 3, 3]
    assert rounds_of(rounds=4, first_share=0.9) == [2, 1, 1]
    assert rounds_of(rounds=40, first_share=0.01) == [1, 20, 19]


def test_stage_progress_equals_a_list_of_all_rounds():
    plan = fllw.stages(replace(SMALL, rounds=8))
    everything = [(stage, done / stage.rounds) for stage in plan for done in range(stage.rounds)]
    assert [fllw.stage_progress(plan, done) for done in range(8)] == everything
    assert fllw.stage_progress(plan, 8) == (None, 0)


def test_depth_dropout_drops_frozen_blocks_at_its_rate_and_only_those():
    config = replace(SMALL, depth=12, depth_dropout=0.3)
    stage = Stage(9, tuple(range(9)), (2, 8), 1)
    kept = [fllw.sample_kept_blocks(config, stage, r, c) for r in range(200) for c in range(10)]
    counts = np.bincount(np.concatenate(kept), minlength=9)
    frozen = np.delete(counts, [2, 8])
    assert counts[2] == counts[8] == 2000 and len(counts) == 9
    assert np.all(np.abs(frozen / 2000 - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000))
    assert len(set(kept)) > 100  # drawn anew for every client and round
    assert all(list(blocks) == sorted(blocks) for blocks in kept)
    never = replace(config, depth_dropout=0.0)
    assert all(fllw.sample_kept_blocks(never, stage, r, 0) == stage.present for r in range(9))


def test_a_dropped_block_is_neither_sent_nor_run():
    stage, server = Stage(3, (0, 1, 2), (2,), 1), fllw.initial(SMALL, SHAPE)
    message = fllw.broadcast(server, (0, 2))
    assert set(message) == {name for name in server if ".blocks.1." not in name}
    learner = fllw.receive(SMALL, message, SHAPE, stage)
    full = fllw.encoder_of(SMALL, server, SHAPE)
    x = normal(3, *SHAPE)
    assert not torch.allclose(learner.encoder(x), full(x))
    full.blocks = nn.ModuleList([full.blocks[0], full.blocks[2]])
    assert torch.equal(learner.encoder(x), full(x))


def test_clients_are_sent_no_block_that_they_dropped():
    received = []

    def train_client(config, stage, message, images, round_number, client, progress):
        blocks = {fllw.block_of(name) for name in message} - {None}
        received.append((round_number, client, blocks))
        return fllw.local_train(config, stage, message, images, round_number, client, progress)

    _, history = fllw.federate(replace(SMALL, rounds=9), images(), train_client=train_client)
    expected = [(row["round"], client, set(kept)) for row in history
                for client, kept in zip(row["clients"], row["kept_blocks"])]
    assert received == expected and any(len(kept) < 3 for *_, kept in received[-9:])


EMBEDDING = ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")


def names_that_train(names, active):
    """The head and the final norm always train, the embedding does with block 0."""
    starts = ["head.", "encoder.norm."] + [f"encoder.blocks.{b}." for b in active]
    starts += EMBEDDING if 0 in active else []
    return [name for name in names if name.startswith(tuple(starts))]


def overlapping(config, history):
    """A plan: each stage trains its block and the one below."""
    return [Stage(1, (0,), (0,), 1), Stage(2, (0, 1), (0, 1), 2), Stage(3, (0, 1, 2), (1, 2), 2)]


def top_down(config, history):
    """A plan: all blocks from the start; they train one at a time, the last one first."""
    return [Stage(1, (0, 1, 2), (2,), 1), Stage(2, (0, 1, 2), (1,), 2),
            Stage(3, (0, 1, 2), (0,), 1)]


PLANS = {**{method: (method, fllw.stages) for method in METHODS},
         "overlapping": ("fll", overlapping), "top-down": ("fll", top_down)}


@pytest.mark.parametrize("case", PLANS)
def test_a_round_changes_exactly_what_trains(case):
    method, plan = PLANS[case]
    config = replace(SMALL, method=method, depth_dropout=0.3)
    _, history, servers = federated(config, images(), plan=plan)
    of_number = {stage.number: stage for stage in plan(config, [])}
    assert {row["stage"] for row in history} == of_number.keys()
    for row, before, after in zip(history[1:], servers, servers[1:]):
        stage = of_number[row["stage"]]
        assert {fllw.block_of(name) for name in after} - {None} == set(stage.present)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == names_that_train(before, stage.active)


@pytest.mark.parametrize("case", PLANS)
def test_no_gradient_reaches_what_is_frozen(case):
    method, plan = PLANS[case]
    config = replace(SMALL, method=method)
    for stage in plan(config, []):
        learner = client_of(config, stage, stage.present)
        fllw.local_step(config, learner, stage, normal(8, *SHAPE))
        parameters = dict(learner.named_parameters())
        trained = names_that_train(parameters, stage.active)
        assert [name for name, p in parameters.items() if p.grad is not None] == trained
        assert [name for name in parameters if stage.trains(name)] == trained


def test_frozen_blocks_keep_no_graph():
    """The saving of memory: nothing of the blocks below is stored for the backward pass."""
    stage, seen = Stage(3, (0, 1, 2), (2,), 1), []

    def criterion(config, z, chunks):
        seen.append((chunks, z.requires_grad))
        return z.square().sum()

    fllw.local_step(SMALL, client_of(SMALL, stage, (0, 1, 2)), stage, normal(4, *SHAPE), criterion)
    ((tokens,), has_graph), = seen
    assert tokens.shape == (4, 5, 16) and not tokens.requires_grad and has_graph


def test_the_encoder_is_a_plain_vit_with_every_block():
    """Depth dropout is for training; evaluation and deployment use the whole model."""
    for config in (replace(SMALL, depth_dropout=0.9), replace(SMALL, method="lasting")):
        encoder, _, servers = federated(config, images())
        plain = fllw.ViT((14, 14), 7, 1, 16, 3, 2)
        plain.load_state_dict({name.removeprefix("encoder."): t for name, t in servers[-1].items()
                               if name.startswith("encoder.")}, strict=True)
        x = normal(4, *SHAPE)
        assert torch.equal(encoder(x), plain(x))
        assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def block_tensors(server, b):
    return {name.split(f"blocks.{b}.")[1]: t for name, t in server.items()
            if f"blocks.{b}." in name}


@pytest.mark.parametrize("kind", ["copy", "zero", "fresh"])
@pytest.mark.parametrize("method, present", [("fll", (0, 1)), ("lasting", (0, 1, 2))])
def test_a_new_block_starts_as_asked(method, present, kind):
    """Block 1 is new here; block 0 is the nearest below it, also where block 2 exists already."""
    config, first = replace(SMALL, method=method, new_block=kind), {}
    fllw.grow(config, first, fllw.stages(config)[0], SHAPE)
    initial = fllw.initial(config, SHAPE)
    assert same_tensors(first, fllw.broadcast(initial, fllw.stages(config)[0].present))
    server = dict(first)
    fllw.grow(config, server, Stage(2, present, present[1:], 1), SHAPE)
    assert same_tensors(first, {name: server[name] for name in first})
    expected = block_tensors(initial if kind == "fresh" else first, 1 if kind == "fresh" else 0)
    if kind == "zero":
        ends = [name for name in expected if name.startswith(("attn.proj.", "mlp.fc2."))]
        expected |= {name: torch.zeros_like(expected[name]) for name in ends}
    assert same_tensors(block_tensors(server, 1), expected)


def test_a_zero_block_changes_no_feature_until_it_trains():
    config, d, stage = replace(SMALL, new_block="zero"), images(), Stage(2, (0, 1), (1,), 1)
    server = {}
    fllw.grow(config, server, Stage(1, (0,), (0,), 1), SHAPE)
    before = ssl_loss.features(fllw.encoder_of(config, server, SHAPE), d.train_images)
    fllw.grow(config, server, stage, SHAPE)
    after = ssl_loss.features(fllw.encoder_of(config, server, SHAPE), d.train_images)
    assert torch.equal(before, after)
    upload, _ = fllw.local_train(config, stage, server, d.train_images, 1, 0)
    assert upload["encoder.blocks.1.mlp.fc2.weight"].abs().min() > 0
    assert not server["encoder.blocks.1.mlp.fc2.weight"].any()  # the server's own are untouched


# ------------------------------------------------------------- the whole method, once more

def bare_plan(config):
    """(present, active) of every stage, as the papers say it."""
    L = config.depth
    everything = list(range(L))
    return {"e2e": [(everything, everything)],
            "fll": [(everything[:s + 1], [s]) for s in everything],
            "progressive": [(everything[:s + 1], everything[:s + 1]) for s in everything],
            "lasting": [(everything[:s + 1] + [L - 1], [s, L - 1]) for s in everything[:-1]],
            }[config.method]


def bare_client(config, learner, trained, own, key, done):
    """Local epochs on a plain model; done: rounds of the stage before this one, and in all."""
    seed = np.random.default_rng([config.seed, fllw.TRAINING, *key]).integers(2**63)
    draws = torch.Generator().manual_seed(int(seed))
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay, fused=True)
    batch = min(config.batch_size, len(own))
    steps = len(own) // batch
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(own), generator=draws)
        for i in range(steps):
            now = done[0] + (epoch * steps + i) / (steps * config.local_epochs)
            lr = config.lr / 2 * (1 + math.cos(math.pi * now / done[1]))
            optimizer.param_groups[0]["lr"] = lr
            chosen = own[order[i * batch:(i + 1) * batch]]
            views = data.two_views(chosen, data.RECIPES["digits"], draws)
            z = learner.head(learner.encoder(views))
            optimizer.zero_grad()
            ssl_loss.nt_xent(z[:batch], z[batch:], config.temperature).backward()
            optimizer.step()


def bare_round(config, server, present, active, number, done, dataset, parts, lost):
    """One round on whole models: deep copies, plain float64 sums; returns what is averaged."""
    total, weight = defaultdict(float), 0
    frozen = [b for b in present if b not in active]
    for client in fllw.sample_clients(config, number):
        if (number, client) in lost:
            continue
        draws = np.random.default_rng([config.seed, fllw.DROPOUT, number, client])
        draws = draws.random(len(frozen))
        dropped = [b for b, draw in zip(frozen, draws) if draw < config.depth_dropout]
        learner = copy.deepcopy(server)
        trained = dict(learner.named_parameters())
        trained = {name: trained[name] for name in names_that_train(trained, active)}
        learner.encoder.blocks = nn.ModuleList(
            block for b, block in enumerate(learner.encoder.blocks)
            if b in present and b not in dropped)
        own = dataset.train_images[parts[client]]
        bare_client(config, learner, trained.values(), own, (number, client), done)
        weight += len(own)
        for name, p in trained.items():
            total[name] += len(own) * p.detach().double()
    return {name: (t / weight).float() for name, t in total.items()}


def bare_loop(config, dataset, lost=()):
    """The method in plain loops over whole models, with none of the federated machinery."""
    server = fllw.Learner(config, dataset.shape)
    server.load_state_dict(fllw.initial(config, dataset.shape))
    blocks, number, there = server.encoder.blocks, 0, []
    plan = bare_plan(config)
    for (present, active), rounds in zip(plan, np.array_split(range(config.rounds), len(plan))):
        for b in present:
            if there and b not in there:
                blocks[b].load_state_dict(blocks[b - 1].state_dict())
        there = present
        for done in range(len(rounds)):
            number += 1
            mean = bare_round(config, server, present, active, number, (done, len(rounds)),
                              dataset, parts_of(config, dataset), lost)
            server.load_state_dict(server.state_dict() | mean)
    return server.encoder


def losing(ask, lost):
    """An `ask` whose clients in `lost`, pairs (round, client), train but never answer."""
    def ask_and_lose(stage, round_number, progress, messages):
        for client, answer in ask(stage, round_number, progress, messages):
            if (round_number, client) not in lost:
                yield client, answer
    return ask_and_lose


BARE = {"fll": dict(alpha=0.5), "e2e": dict(alpha=0.5, rounds=3), "progressive": dict(rounds=5),
        "lasting": dict(alpha=0.5, depth=4),
        "sampled": dict(clients=6, clients_per_round=2, alpha=1.0, local_epochs=2, rounds=5),
        "centralized": dict(method="e2e", clients=1, rounds=3, local_epochs=2)}


@pytest.mark.parametrize("lost", [set(), {(1, 0), (3, 0), (3, 1), (4, 2)}], ids=["all", "some lost"])
@pytest.mark.parametrize("case", BARE)
def test_federate_equals_a_bare_loop(case, lost):
    config = replace(SMALL, method=case if case in METHODS else "fll")
    config, d = replace(config, **BARE[case]), images(90)
    ask = losing(fllw.in_turn(config, d.train_images, parts_of(config, d)), lost)
    encoder, history = fllw.federate(config, d, ask=ask)
    expected = bare_loop(config, d, lost).state_dict()
    assert expected.keys() == encoder.state_dict().keys()
    for name, p in encoder.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6), name


def test_fll_with_one_stage_of_all_blocks_is_end_to_end():
    whole, staged = (fllw.federate(replace(SMALL, rounds=2, **more), images())
                     for more in (dict(method="e2e"), dict(blocks_per_stage=3)))
    assert same_tensors(whole[0].state_dict(), staged[0].state_dict())
    assert timeless(whole[1]) == timeless(staged[1])


def test_same_seed_same_numbers_and_another_seed_others():
    results = [fllw.federate(replace(SMALL, seed=seed), images()) for seed in (1, 1, 2)]
    (a, first), (b, second), (c, _) = results
    assert timeless(first) == timeless(second)
    assert same_tensors(a.state_dict(), b.state_dict())
    assert not torch.equal(a.pos_embed, c.pos_embed)


def test_training_resumes_from_any_round_to_the_same_bits():
    config, d, states = replace(SMALL, rounds=7), images(), []

    def on_round(row, state):  # a copy by way of JSON, as in a run folder: nothing is shared
        server = {name: t.clone() for name, t in state.server.items()}
        states.append(fllw.State(server, json.loads(json.dumps(state.history))))

    encoder, history = fllw.federate(config, d, on_round=on_round)
    assert len(states) == 7
    for state in states:
        again, longer = fllw.federate(config, d, state)
        assert timeless(longer) == timeless(history)
        assert same_tensors(encoder.state_dict(), again.state_dict())


def test_what_on_round_changes_is_what_the_next_round_starts_from():
    started = []

    def zero_the_head(row, state):
        state.server["head.6.weight"] = torch.zeros_like(state.server["head.6.weight"])
        row["changed"].append("head.6.weight")

    def train_client(config, stage, message, images, round_number, client, progress):
        started.append(message["head.6.weight"].abs().sum().item())
        return fllw.local_train(config, stage, message, images, round_number, client, progress)

    fllw.federate(replace(SMALL, rounds=3), images(), train_client=train_client,
                  on_round=zero_the_head)
    assert all(started[:3]) and not any(started[3:])


def test_a_plan_may_look_at_the_history():
    def impatient(config, history):
        """The first stage ends after its second round; the second has the rest."""
        first = 4 if len(history) < 2 else 2
        return [Stage(1, (0,), (0,), first), Stage(2, (0, 1, 2), (1, 2), 6 - first)]

    _, history = fllw.federate(SMALL, images(), plan=impatient)
    assert [row["stage"] for row in history] == [1, 1, 2, 2, 2, 2]
    assert history[2]["kept_blocks"] != history[0]["kept_blocks"]


def test_a_row_holds_what_happened():
    config, d = replace(SMALL, clients=5, clients_per_round=3, alpha=0.5), images()
    _, history = fllw.federate(config, d)
    sizes = list(map(len, parts_of(config, d)))
    for number, row in enumerate(history, 1):
        assert row.keys() == fllw.ROW.keys() and row["round"] == number
        assert row["clients"] == [answer["client"] for answer in row["answers"]]
        assert [answer["images"] for answer in row["answers"]] == [sizes[c] for c in row["clients"]]
        assert all(a["valid"] and a["missing"] == [] and a["loss"] > 0 for a in row["answers"])


# -------------------------------------------------------------------------------------- clients

def constant(sends=lambda client, name: True):
    """A client that fills each tensor that it sends with its own number."""
    def train_client(config, stage, message, images, round_number, client, progress):
        upload = {name: torch.full_like(t, client) for name, t in message.items()
                  if stage.trains(name) and sends(client, name)}
        return upload, torch.tensor([float(client)])
    return train_client


def unequal():
    """Settings, images, and the three clients' different numbers of images."""
    config, d = replace(SMALL, method="e2e", alpha=0.5, rounds=8), images(120)
    sizes = np.array(list(map(len, parts_of(config, d))))
    assert len(set(sizes)) == 3
    return config, d, sizes


def test_a_clients_result_depends_on_seed_round_and_client_alone():
    d, stage = images(), Stage(2, (0, 1), (1,), 3)
    message = fllw.broadcast(fllw.initial(SMALL, SHAPE), (0, 1))

    def uploads(order):
        return {client: fllw.local_train(SMALL, stage, message, d.train_images, 4, client)[0]
                for client in order}

    forward = uploads([0, 1, 2])
    torch.rand(5), np.random.rand(5)  # global generators must not matter
    backward = uploads([2, 1, 0])
    assert all(same_tensors(forward[client], backward[client]) for client in range(3))
    assert not torch.equal(forward[0]["head.0.weight"], forward[1]["head.0.weight"])
    assert same_tensors(message, fllw.broadcast(fllw.initial(SMALL, SHAPE), (0, 1)))


def test_each_client_trains_on_its_own_images():
    config, d, _ = unequal()
    owner = {bytes(d.train_images[i].numpy()): client
             for client, part in enumerate(parts_of(config, d)) for i in part}
    seen = defaultdict(set)

    def train_client(config, stage, message, images, round_number, client, progress):
        def make_views(batch, recipe, draws):
            seen[client].update(owner[bytes(image.numpy())] for image in batch)
            return data.two_views(batch, recipe, draws)
        return fllw.local_train(config, stage, message, images, round_number, client, progress,
                                make_views=make_views)

    fllw.federate(config, d, train_client=train_client)
    assert seen == {0: {0}, 1: {1}, 2: {2}}


def test_the_average_equals_the_plain_weighted_mean():
    uploads = [{"a": normal(3, 2, seed=s), "b": normal(4, seed=9 + s)} for s in range(5)]
    weights, average = [3, 1, 7, 2, 2], fllw.Average()
    for upload, weight in zip(uploads, weights):
        average.add(upload, weight)
    for name, mean in average.mean().items():
        plain = sum(w * u[name].double() for u, w in zip(uploads, weights)) / sum(weights)
        assert torch.equal(mean, plain.float())
    assert fllw.Average().mean() == {}


def test_huge_finite_uploads_do_not_make_the_server_infinite():
    """Their sum does not fit into float32, their mean does."""
    average = fllw.Average()
    for sign, images_of_it in ((1, 10), (1, 20), (-1, 30)):
        average.add({"a": torch.full((2,), sign * 3e38)}, images_of_it)
    assert average.mean()["a"].tolist() == [0.0, 0.0]


def test_each_tensor_is_averaged_over_the_clients_that_sent_it():
    """Uploads may be partial; a tensor that nobody sent stays as it was."""
    config, d, sizes = unequal()
    senders = {"head.0.weight": [0, 1, 2], "head.3.weight": [1, 2], "encoder.norm.bias": [2],
               "encoder.blocks.1.norm1.bias": [0, 2], "head.6.weight": []}
    client = constant(lambda client, name: client in senders.get(name, [0, 1, 2]))
    _, history, servers = federated(config, d, train_client=client)
    untouched = fllw.initial(config, SHAPE)["head.6.weight"]
    for name, who in senders.items():
        mean = torch.tensor(np.average(who, weights=sizes[who])).float() if who else untouched
        assert all(torch.allclose(server[name], mean) for server in servers), name
    for answer in history[0]["answers"]:
        missing = [name for name, who in senders.items() if answer["client"] not in who]
        assert answer["missing"] == sorted(missing) and answer["valid"]


def test_lost_clients_are_left_out_and_the_weights_renormalised():
    """Round r loses the clients whose bit is set in r - 1: in eight rounds, every subset."""
    config, d, sizes = unequal()
    lost = {(r, client) for r in range(1, 9) for client in range(3) if (r - 1) >> client & 1}
    ask = losing(fllw.in_turn(config, d.train_images, parts_of(config, d), constant()), lost)
    _, history, servers = federated(config, d, ask=ask)
    for row, server in zip(history, servers):
        here = [client for client in range(3) if (row["round"], client) not in lost]
        assert row["clients"] == [0, 1, 2] and [a["client"] for a in row["answers"]] == here
        value = np.average(here, weights=sizes[here]) if here else value  # of the round before
        assert torch.allclose(server["head.0.weight"], torch.tensor(value).float())
        loss = np.mean(here) if here else math.nan
        assert fllw.mean_loss(row) == pytest.approx(loss, nan_ok=True)


SPOILED = {
    "nan": lambda u: {**u, "head.0.weight": u["head.0.weight"] * math.nan},
    "infinity": lambda u: {**u, "head.0.weight": u["head.0.weight"] + math.inf},
    "shape": lambda u: {**u, "head.0.weight": u["head.0.weight"][..., :1]},
    "dtype": lambda u: {**u, "head.0.weight": u["head.0.weight"].double()},
    "unknown": lambda u: {**u, "head.7.weight": torch.ones(16)},
    "not there yet": lambda u: {**u, "encoder.blocks.2.norm1.weight": torch.ones(16)}}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_upload_is_rejected_as_a_whole_and_the_round_goes_on(case):
    def train_client(config, stage, message, images, round_number, client, progress):
        upload, loss = constant()(config, stage, message, images, round_number, client, progress)
        return SPOILED[case](upload) if client == 1 else upload, loss

    _, history, servers = federated(replace(SMALL, rounds=3), images(), train_client=train_client)
    for row in history:
        assert [answer["valid"] for answer in row["answers"]] == [True, False, True]
        assert fllw.mean_loss(row) == 1.0  # of 0 and 2
    assert all(torch.allclose(t, torch.ones(())) for t in servers[0].values())


def test_a_frozen_tensor_in_an_upload_is_rejected():
    stage, server = Stage(2, (0, 1), (1,), 1), fllw.initial(SMALL, SHAPE)
    expected = {name: t for name, t in server.items() if stage.trains(name)}
    assert fllw.is_valid(expected, expected)
    frozen = "encoder.blocks.0.norm1.weight"
    assert not fllw.is_valid({**expected, frozen: server[frozen]}, expected)


def test_nan_on_every_client_stops_with_the_last_round_kept():
    def train_client(config, stage, message, images, round_number, client, progress):
        factor = math.nan if round_number == 3 else 1.0
        upload = {n: t * factor for n, t in message.items() if stage.trains(n)}
        return upload, torch.tensor([factor])

    state = fllw.State({}, [])
    with pytest.raises(FloatingPointError, match="round 3.*--lr"):
        fllw.federate(SMALL, images(), state, train_client)
    assert len(state.history) == 2 and all(t.isfinite().all() for t in state.server.values())


def test_sampling_covers_all_clients_and_ten_thousand_work():
    config = replace(SMALL, clients=10, clients_per_round=4)
    seen = [fllw.sample_clients(config, r) for r in range(300)]
    assert all(len(set(s)) == 4 for s in seen)
    assert np.bincount(np.concatenate(seen)).min() > 300 * 0.4 * 0.7
    many = replace(SMALL, clients=10_000, clients_per_round=2, rounds=3)
    _, history = fllw.federate(many, images(20_000, (1, 7, 7)))
    assert [len(row["clients"]) for row in history] == [2, 2, 2]


# -------------------------------------------------------------------------------------- workers
# A function that a worker runs must be one of a module.

def first_is_last(config, stage, message, images, round_number, client, progress):
    """Client 0 is the slowest, so the answers of a round arrive in another order than asked."""
    time.sleep(0.4 if client == 0 else 0)
    return fllw.local_train(config, stage, message, images, round_number, client, progress)


def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def never_answers(*_):
    time.sleep(600)


def test_worker_processes_give_the_bits_of_one_process():
    config, d = replace(SMALL, rounds=3, alpha=0.5), images()
    given = config, d.train_images, parts_of(config, d)
    expected, history = fllw.federate(config, d, ask=fllw.in_turn(*given))
    for workers in (1, 2, 3):
        with fllw.in_processes(*given, workers, first_is_last) as ask:
            encoder, again = fllw.federate(config, d, ask=ask)
        assert timeless(again) == timeless(history)  # so the answers came in the order asked
        assert same_tensors(encoder.state_dict(), expected.state_dict())
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("train_client, status, sentence", [
    (dies, 1, "a worker process was killed: rerun"), (never_answers, 130, "interrupted; rerun")])
def test_a_killed_worker_or_ctrl_c_ends_the_command_and_leaves_no_process(
        train_client, status, sentence, capsys):
    def body():
        with fllw.in_processes(SMALL, images().train_images, parts_of(SMALL, images()), 2,
                               train_client) as ask:
            fllw.federate(SMALL, images(), ask=ask)

    ctrl_c = threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT))
    if train_client is never_answers:
        ctrl_c.start()
    with pytest.raises(SystemExit) as stop:
        fllw.command(body)
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    code = 1 if isinstance(stop.value.code, str) else stop.value.code  # a text exits with 1
    assert code == status and said.startswith(sentence) and len(said.splitlines()) == 1
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------- costs

PUBLISHED = [("e2e", 8.03, 1185, 1169), ("fll", 1.29, 281, 278), ("progressive", 4.68, 643, 635)]


@pytest.mark.parametrize("method, sent, computed, published", PUBLISHED)
def test_cost_reproduces_the_published_table(method, sent, computed, published, unmetered):
    """Tun et al. 2024, a client's 180 rounds: 1000 MiB sent, and 10^9 MACs for one image."""
    paid = fllw.cost(replace(PAPER, method=method), (3, 32, 32))
    both = paid["download_bytes"] + paid["upload_bytes"] - 180 * fllw.REPORT_BYTES
    assert both / (1000 * 2**20) == pytest.approx(sent, rel=0.01)
    assert paid["macs"] / 1e9 == pytest.approx(published, rel=0.025)
    assert paid["macs"] / 1e9 == pytest.approx(computed, rel=0.002)


def noisy(initial):
    """initial() whose tensors all differ, the zeros and ones too: content tells them apart."""
    @wraps(initial)
    def with_noise(config, shape, device="cpu"):
        tensors = initial(config, shape, device)
        if str(device) == "meta":
            return tensors
        return {name: t + 0.01 * normal(*t.shape, seed=i)
                for i, (name, t) in enumerate(tensors.items())}
    return with_noise


class CountingClient:
    """A client that keeps everything, by its content. What it has not had before must be sent.

    It trains by adding noise; sends: which of its tensors it uploads; spoils: whether it sends
    NaN in them."""

    def __init__(self, sends=lambda client, name: True, spoils=lambda round_number, client: False):
        self.sends, self.spoils = sends, spoils
        self.had, self.rows = defaultdict(set), defaultdict(list)

    def __call__(self, config, stage, message, images, round_number, client, progress):
        content = {hashlib.sha256(t.numpy()).digest(): t.nbytes for t in message.values()
                   if t.any()}  # that a tensor is 0 is known to all
        new = sum(size for key, size in content.items() if key not in self.had[client])
        self.had[client] |= content.keys()

        noise = torch.Generator().manual_seed(1000 * round_number + client)
        upload = {name: t + 0.01 * torch.randn(t.shape, generator=noise)
                  for name, t in message.items() if stage.trains(name) and self.sends(client, name)}
        if self.spoils(round_number, client):
            upload = {name: t * math.nan for name, t in upload.items()}
        report = np.float64(0).nbytes + np.int64(0).nbytes  # mean loss, number of images
        kept = sorted({fllw.block_of(name) for name in message} - {None})
        self.rows[round_number].append({
            "client": client, "download_bytes": new,
            "stateless_download_bytes": sum(content.values()),
            "upload_bytes": sum(t.nbytes for t in upload.values()) + report,
            "macs": config.local_epochs * fllw.count_macs(config, stage, kept, SHAPE)})
        return upload, torch.ones(1)


def assert_ledger_counts(client, config, history, plan=fllw.stages):
    """Twice, since a query must not change what it looks at."""
    for ledger in (fllw.Ledger(config, SHAPE, plan), fllw.Ledger(config, SHAPE, plan)):
        for row in json.loads(json.dumps(history)):
            counted, paid = client.rows[row["round"]], ledger.add(row)
            answered = {answer["client"] for answer in row["answers"]}
            for key, value in paid.items():
                total = sum(one[key] for one in counted
                            if key != "upload_bytes" or one["client"] in answered)
                assert value == pytest.approx(total / len(counted)), (key, row["round"])


LOST = {(r, client) for r in range(1, 10) for client in range(6) if (r + client) % 4 == 0}
WITHOUT_HEAD = {"sends": lambda client, name: client % 2 or not name.startswith("head.")}
SENDING = {"all answer": ({}, set()), "some lost": ({}, LOST), "partial": (WITHOUT_HEAD, LOST),
           "rejected": ({"spoils": lambda round_number, client: (round_number + client) % 3}, LOST)}


@pytest.mark.parametrize("sending", SENDING)
@pytest.mark.parametrize("who", [{}, {"clients": 6, "clients_per_round": 2}], ids=["all", "sampled"])
@pytest.mark.parametrize("new_block", ["copy", "zero", "fresh"])
@pytest.mark.parametrize("case", PLANS)
def test_the_ledger_counts_the_content_handed_over(case, new_block, who, sending, monkeypatch):
    """Bytes that a client has not had, by their hash, without any idea of stages or growth."""
    monkeypatch.setattr(fllw, "initial", noisy(fllw.initial))
    method, plan = PLANS[case]
    config, d = replace(SMALL, method=method, new_block=new_block, rounds=9, **who), images()
    behaviour, lost = SENDING[sending]
    client = CountingClient(**behaviour)
    ask = losing(fllw.in_turn(config, d.train_images, parts_of(config, d), client), lost)
    _, history = fllw.federate(config, d, ask=ask, plan=plan)
    assert_ledger_counts(client, config, history, plan)


def test_what_on_round_changed_is_sent_again(monkeypatch):
    """Also a frozen tensor, which nobody trained."""
    monkeypatch.setattr(fllw, "initial", noisy(fllw.initial))
    client, name = CountingClient(), "encoder.blocks.0.norm1.weight"

    def on_round(row, state):
        if row["round"] % 2:
            state.server[name] = state.server[name] + 1
            row["changed"] = [name]

    config = replace(SMALL, rounds=9, clients_per_round=2)
    _, history = fllw.federate(config, images(), train_client=client, on_round=on_round)
    assert_ledger_counts(client, config, history)


@pytest.mark.parametrize("method", METHODS)
def test_cost_is_what_a_real_run_paid(method, unmetered):
    config = replace(SMALL, method=method, local_epochs=2)
    _, history = fllw.federate(config, images())
    ledger, paid = fllw.Ledger(config, SHAPE), fllw.cost(config, SHAPE)
    rows = [ledger.add(row) for row in history]
    for key in rows[0]:
        assert paid[key] == pytest.approx(sum(row[key] for row in rows)), key
    assert paid == fllw.cost(config, SHAPE)


def test_a_client_that_keeps_everything_receives_each_frozen_block_once(unmetered):
    """The formula by hand: eight rounds, two in each of four stages."""
    config = replace(SMALL, depth=4, rounds=8, depth_dropout=0.0, clients=1)
    block = sum(p.nbytes for p in fllw.Block(16, 2).parameters())
    embed, report = 4 * (16 * 49 + 16 + 16 + 5 * 16), 16
    always = 4 * (2 * 16 + 16 * 24 + 24 * 24 + 24 * 8 + 4 * 24)  # norm and head
    paid = fllw.cost(config, SHAPE)
    # a frozen block is the very thing that the next one starts from: no extra bytes
    assert paid["download_bytes"] == 8 * (block + always) + 3 * embed
    assert paid["upload_bytes"] == 8 * (block + always + report) + 2 * embed
    # stateless: the blocks below in each round, less the copy in each stage's first round
    below = block * (2 * (1 + 2 + 3 + 4) - 3)
    assert paid["stateless_download_bytes"] == 8 * (always + embed) + below


def counted_macs(config, stage, kept, n):
    """Multiply-accumulates that torch counts over one local step with n images."""
    step = ssl_loss.micro_batched_step if config.micro_batch else fllw.local_step
    learner = client_of(config, stage, kept)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(config, learner, stage, normal(2 * n, *SHAPE))
    similarities = 3 * (2 * n) ** 2 * config.head_dim  # of the loss: forward, and backward twice
    return counter.get_total_flops() // 2 - similarities


@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("present, active, kept", [
    ((0, 1, 2), (0, 1, 2), (0, 1, 2)), ((0,), (0,), (0,)), ((0, 1, 2), (2,), (0, 1, 2)),
    ((0, 1, 2), (2,), (2,)), ((0, 1, 2), (1, 2), (0, 1, 2)), ((0, 2), (0, 2), (0, 2))],
    ids=["end-to-end", "first stage", "last stage", "all dropped", "overlapping", "lasting"])
def test_macs_equal_what_torch_counts_over_a_local_step(present, active, kept, micro):
    config, stage, n = replace(SMALL, micro_batch=micro), Stage(1, present, active, 1), 16
    expected = n * fllw.count_macs(config, stage, kept, SHAPE)
    if 0 in active:  # the paper counts a gradient of the images, which nobody needs
        expected -= 2 * n * 4 * 49 * config.dim
    assert counted_macs(config, stage, kept, n) == expected


def test_macs_through_a_frozen_block_above():
    stage, n = Stage(1, (0, 1, 2), (1,), 1), 16
    expected = n * fllw.count_macs(SMALL, stage, (0, 1, 2), SHAPE)
    assert counted_macs(SMALL, stage, (0, 1, 2), n) == expected


def test_depth_dropout_saves_the_forward_pass_of_what_it_drops():
    stage = Stage(3, (0, 1, 2), (2,), 1)
    row = {"round": 1, "stage": 3, "clients": [0], "answers": [], "changed": []}
    full, dropped = (fllw.Ledger(SMALL, SHAPE).add(row | {"kept_blocks": [kept]})["macs"]
                     for kept in ([0, 1, 2], [2]))
    block = 2 * (5 * 12 * 16**2 + 2 * 5**2 * 16)  # two views, forward alone
    assert full - dropped == 2 * block
    assert full == fllw.count_macs(SMALL, stage, (0, 1, 2), SHAPE)


# --------------------------------------------------------------------------------------- memory

def test_memory_meter_counts_by_hand():
    with fllw.MemoryMeter() as meter:
        a = torch.zeros(1000)      # 4000 bytes
        b = a + 1                  # 8000
        a.add_(1), b.view(10, 100)  # in place and views take nothing
        del a                      # 4000
        c = b * 2                  # 8000
        d = (c + 1) * 3            # c + 1 and its triple: 16000 at the peak
    assert meter.peak == 16000
    del b, c, d
    assert meter.live_bytes == [0, 4000, 8000, 4000, 8000, 12000, 16000, 12000, 8000, 4000, 0]


@pytest.mark.parametrize("n", [32, 9], ids=["whole batches", "a small client"])
def test_memory_of_fake_and_real_steps_is_the_same(n):
    config = replace(SMALL, batch_size=16, local_epochs=2)
    for stage in fllw.stages(config)[::2]:
        message, own = fllw.broadcast(fllw.initial(config, SHAPE), stage.present), images(n)
        with fllw.MemoryMeter() as meter:
            fllw.local_train(config, stage, message, own.train_images, 1, 0)
        predicted = fllw.peak_memory(config, stage, SHAPE, images=n)
        # more images than in two steps: a longer order in which they come, and more losses
        assert abs(meter.peak - predicted) <= 8 * 32 + 8 * 4


def test_it_does_not_matter_which_frozen_blocks_below_are_kept():
    """peak_memory() measures one step for all choices of as many; here each is measured."""
    stage = Stage(1, (0, 1, 2), (2,), 1)
    for kept in ((0, 2), (1, 2), (0, 1, 2), (2,)):
        exact = fllw.metered_step(SMALL, replace(stage, present=kept), SHAPE).peak
        assert fllw.peak_memory(SMALL, stage, SHAPE, kept) == exact


def test_the_memory_of_a_run_is_that_of_its_largest_step():
    """Its largest client holds fewer images than a batch; the stage in the middle needs most."""
    def whole_in_the_middle(config, history):
        return [Stage(1, (0, 1), (1,), 1), Stage(2, (0, 1), (0, 1), 1), Stage(3, (0, 1), (1,), 1)]

    config = replace(SMALL, batch_size=64, clients=6, depth=2, depth_dropout=0.0)
    peaks = [fllw.peak_memory(config, stage, SHAPE, images=10)
             for stage in whole_in_the_middle(config, ())]
    price = fllw.price_of(config, images(60), plan=whole_in_the_middle)
    assert peaks[1] > 1.2 * peaks[0] and price["peak_memory_bytes"] == max(peaks)
    plenty = fllw.cost(config, SHAPE, plan=whole_in_the_middle)["peak_memory_bytes"]
    assert plenty > 2 * max(peaks)


def test_the_readmes_memory_picture():
    """ViT-Tiny on CIFAR-10's images in batches of 128: the figures that the README shows."""
    config, blocks = replace(PAPER, batch_size=128), tuple(range(12))
    whole, last = (fllw.peak_memory(config, Stage(1, blocks, active, 1), (3, 32, 32)) / 2**20
                   for active in (blocks, blocks[-1:]))
    assert (whole, last) == (pytest.approx(2479, rel=0.005), pytest.approx(291, rel=0.005))


def test_memory_with_micro_batches_grows_by_the_cached_tokens_and_features_alone():
    config, stage = replace(SMALL, dim=32, micro_batch=4), Stage(3, (0, 1, 2), (2,), 1)
    learner, peaks = client_of(config, stage, (0, 1, 2), (1, 28, 28)), []
    for n in (64, 128):
        views = normal(2 * n, 1, 28, 28)
        learner.zero_grad()
        with fllw.MemoryMeter() as meter:
            ssl_loss.micro_batched_step(config, learner, stage, views,
                                        lambda config, z, chunks: z.square().mean())
        peaks.append(meter.peak)
    tokens, feature = 4 * 17 * 32, 4 * 32  # bytes a view
    assert 128 * tokens < peaks[1] - peaks[0] <= 128 * (tokens + 4 * feature)


# ----------------------------------------------------------------------------------- evaluation

def test_knn_equals_a_loop():
    train, test = normal(50, 6), normal(30, 6, seed=1)
    labels, truth = torch.arange(50) % 4, torch.arange(30) % 4
    right = 0
    for x, y in zip(test, truth):
        cosines = nn.functional.cosine_similarity(x[None], train).tolist()
        votes = [0.0] * 4
        for s, c in sorted(zip(cosines, labels.tolist()), reverse=True)[:7]:
            votes[c] += math.exp(s / 0.07)
        right += votes.index(max(votes)) == y
    assert ssl_loss.knn(train, labels, test, truth, k=7) == pytest.approx(100 * right / 30)


def test_logistic_regression_is_at_its_optimum():
    x, y = normal(80, 5), torch.arange(80) % 3
    w, b = (p.double().requires_grad_() for p in ssl_loss.logistic(x, y, 0.01))
    loss = nn.functional.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
    assert all(grad.abs().max() < 1e-3 for grad in torch.autograd.grad(loss, (w, b)))


def test_linear_probe_finds_what_is_linearly_there():
    labels = torch.arange(300) % 3
    noise = normal(300, 10)
    x = noise + 4 * nn.functional.one_hot(labels, 10)
    found, lost = ssl_loss.linear_probe(x[:200], labels[:200], (x[200:], labels[200:]),
                                        (x[200:], labels[200:].roll(1)))
    assert found > 95 and lost < 5
    chance, = ssl_loss.linear_probe(noise[:200], labels[:200], (noise[200:], labels[200:]))
    assert chance < 55


def fits_of(monkeypatch):
    """What logistic() is called with from now on: (labels, penalty) of every fit."""
    fits, original = [], ssl_loss.logistic

    def logistic(x, y, penalty):
        fits.append((torch.bincount(y).tolist(), penalty))
        return original(x, y, penalty)

    monkeypatch.setattr(ssl_loss, "logistic", logistic)
    return fits


def test_few_labels_learn_from_ten_of_each_class(monkeypatch):
    labels, fits = torch.arange(300) % 3, fits_of(monkeypatch)
    x = normal(300, 10) + 2 * nn.functional.one_hot(labels, 10)
    assert ssl_loss.few_labels(x[:200], labels[:200], x[200:], labels[200:]) > 80
    assert fits[-1][0] == [10, 10, 10] and all(sum(counts) <= 30 for counts, _ in fits)


def test_evaluation_leaves_the_encoder_alone_and_chooses_nothing_by_test_labels(monkeypatch):
    d, fits = images(), fits_of(monkeypatch)
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    for labels in (d.test_labels, 4 - d.test_labels):
        found = ssl_loss.evaluate(encoder, d._replace(test_labels=labels), "digits")
    assert set(found) == {"knn", "linear_probe", "moved_knn", "moved_probe", "ten_labels"}
    assert same_tensors(before, encoder.state_dict())
    half = len(fits) // 2
    assert fits[:half] == fits[half:] and len({penalty for _, penalty in fits}) > 1


def test_moved_images_are_the_same_every_time_and_tell_invariance():
    d = data.load("mnist5k", images=400)
    x = d.test_images[:40]
    moved = data.moved(x, "digits")
    assert torch.equal(moved, data.moved(x, "digits")) and moved.dtype == torch.uint8
    assert moved.shape == x.shape and not torch.equal(moved, x)
    few = d._replace(test_images=d.test_images[::5], test_labels=d.test_labels[::5])
    scores = ssl_loss.evaluate(None, few, "digits")
    assert scores["moved_knn"] < scores["knn"] - 5  # raw pixels mind where a digit is


# ----------------------------------------------------------------------------------------- data

def test_embedded_digits():
    d = data.load("mnist5k")
    assert d.train_images.shape == (4000, 1, 28, 28) and d.test_images.shape == (1000, 1, 28, 28)
    assert d.train_images.dtype == torch.uint8 and d.classes == 10
    assert torch.bincount(d.train_labels).tolist() == [400] * 10
    assert torch.bincount(d.test_labels).tolist() == [100] * 10
    few, fewer = data.load("MNIST5K", images=500), data.load("mnist5k", images=100)
    assert few.classes == 10 and len(few.test_images) == 1000
    small, large, whole = ({bytes(i.numpy()) for i in part.train_images}
                           for part in (fewer, few, d))
    assert len(small) == 100 and small < large < whole and len(large) == 500
    assert not {bytes(i.numpy()) for i in d.test_images} & whole


def test_the_digest_tells_any_other_content():
    d = images()
    others = [d._replace(train_images=d.train_images.flip(0)),
              d._replace(train_labels=d.train_labels.roll(1)),
              d._replace(test_images=d.test_images.transpose(2, 3).contiguous()),
              d._replace(test_labels=d.test_labels[:-1]),
              d._replace(train_images=d.train_images.view(60, 1, 7, 28))]
    assert d.digest() == images().digest() == copy.deepcopy(d).digest()
    assert len({d.digest(), *(other.digest() for other in others)}) == 6


@pytest.mark.parametrize("clients", [1, 7, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 100.0])
def test_partition_gives_every_image_to_one_client(clients, alpha):
    labels = torch.arange(150) % 10
    parts = data.partition(labels, clients, alpha, seed=3)
    assert len(parts) == clients and min(map(len, parts)) >= 2
    assert torch.cat(parts).sort().values.tolist() == list(range(150))
    assert all(map(torch.equal, parts, data.partition(labels, clients, alpha, seed=3)))
    if clients > 1:
        others = data.partition(labels, clients, alpha, seed=4)
        assert not all(torch.equal(a, b) for a, b in zip(parts, others))


def test_small_alpha_means_few_classes_a_client():
    labels = torch.arange(4000) % 10

    def classes(alpha):
        return np.mean([len(labels[p].unique()) for p in data.partition(labels, 10, alpha)])
    assert classes(0.0) == 10 and classes(0.05) < 5 < classes(1.0)


@pytest.mark.parametrize("recipe", data.RECIPES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 24, 40), (5, 16, 16), (3, 4, 128)])
def test_two_views_are_in_range_and_follow_their_generator(recipe, shape):
    batch = images(12, shape).train_images

    def views(seed):
        draws = torch.Generator().manual_seed(seed)
        return data.two_views(batch, data.RECIPES[recipe], draws)
    x = views(0)
    assert x.shape == (24, *shape) and x.dtype == torch.float32 and batch.dtype == torch.uint8
    assert x.min() >= -1 - 1e-5 and x.max() <= 1 + 1e-5
    assert torch.equal(x, views(0)) and not torch.equal(x, views(1))
    assert not torch.allclose(x[:12], x[12:])


def test_row_i_and_row_b_plus_i_come_from_image_i():
    batch = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    for i in range(6):
        batch[i, :, 8:20, 8:20] = 40 * (i + 1)
    views = data.two_views(batch, data.RECIPES["digits"], torch.Generator().manual_seed(0))
    expected = torch.tensor([40.0 * (i + 1) for i in range(6)] * 2) / 127.5 - 1
    assert torch.allclose(views.amax((1, 2, 3)), expected, atol=1e-4)


def test_recipes_of_one_part():
    batch, plain = images(8, (3, 10, 14)).train_images, data.Recipe(area=(1, 1), aspect=1)
    expected = data.normalise(batch).repeat(2, 1, 1, 1)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    inverted = torch.where(expected > 0, -expected, expected)
    luma = (expected * weights).sum(1, keepdim=True).expand_as(expected)
    for recipe, result in ((plain, expected), (replace(plain, flip=1.0), expected.flip(3)),
                           (replace(plain, grey=1.0), luma),
                           (replace(plain, solarise=1.0), inverted)):
        views = data.two_views(batch, recipe, torch.Generator())
        assert torch.allclose(views, result, atol=1e-4)


@pytest.mark.parametrize("height, width", [(32, 128), (128, 32), (64, 64)])
@pytest.mark.parametrize("part", ["rotate", "shear"])
def test_a_turn_is_a_turn_in_pixels_on_any_shape(part, height, width):
    def highest(low, high):
        """In place of a draw: the upper end of its range."""
        return torch.full((1,), float(high))

    x = torch.zeros(1, 1, height, width)
    x[..., width // 2 - 1:width // 2 + 1] = 1  # a vertical bar
    recipe = data.Recipe(area=(1, 1), aspect=1, **{part: 15.0})
    y = data.warp(x, recipe, highest)[0, 0, height // 4:height - height // 4]
    rows = torch.arange(len(y)).float()
    middle = (y * torch.arange(width)).sum(1) / y.sum(1)  # where the bar is in each row
    slope = np.polyfit(rows.numpy(), middle.numpy(), 1)[0]
    assert math.degrees(math.atan(abs(slope))) == pytest.approx(15, abs=0.5)


def test_blur_equals_a_gaussian_convolution():
    def middle(low, high):
        return torch.full((1,), (low + high) / 2)

    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    y = data.blur(x, data.Recipe((1, 1), 1, blur=1.0), middle)
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.05) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    assert torch.allclose(y, nn.functional.conv2d(padded, kernel), atol=1e-5)


def cifar_archive(archive):
    """A .tar.gz in the official format with 20 records a member."""
    buffer, dice = io.BytesIO(), np.random.default_rng(0)
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in (*archive.train, *archive.test):
            records = dice.integers(0, 256, (20, archive.label_bytes + 3072), dtype=np.uint8)
            records[:, :archive.label_bytes] %= 10
            info = tarfile.TarInfo(member)
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    return buffer.getvalue()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in place of the web site: small archives of both data sets, by file:// URLs."""
    folder, archives = tmp_path / "site", {}
    folder.mkdir()
    for name, archive in data.ARCHIVES.items():
        path, body = folder / archive.url.rsplit("/", 1)[1], cifar_archive(archive)
        path.write_bytes(body)
        archives[name] = archive._replace(url=path.as_uri(), size=len(body),
                                          sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data, "ARCHIVES", archives)
    return folder


@pytest.mark.parametrize("name, train", [("cifar10", 100), ("CIFAR100", 20)])
def test_cifar_is_downloaded_once_and_read_record_by_record(name, train, site, tmp_path):
    d, archive = data.load(name, tmp_path / "cache"), data.ARCHIVES[name.lower()]
    assert d.train_images.shape == (train, 3, 32, 32) and d.test_images.shape == (20, 3, 32, 32)
    source = site / archive.url.rsplit("/", 1)[1]
    with tarfile.open(source) as tar:
        raw = tar.extractfile(archive.train[0]).read()
    start = 3 * (archive.label_bytes + 3072) + archive.label_bytes
    assert d.train_labels[3] == raw[start - 1]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):
        assert d.train_images[3, c, y, x] == raw[start + c * 1024 + y * 32 + x]
    source.unlink()  # from now on there is only the cache
    assert data.load(name, tmp_path / "cache").digest() == d.digest()
    assert os.listdir(tmp_path / "cache") == [source.name]


def test_what_cannot_be_downloaded_or_is_damaged_is_one_sentence(site, tmp_path):
    cache, name = tmp_path / "cache", data.ARCHIVES["cifar10"].url.rsplit("/", 1)[1]
    good = (site / name).read_bytes()

    def load(there):
        """What is said when the site has these bytes; the cache then holds nothing."""
        (site / name).write_bytes(there) if there else (site / name).unlink()
        with pytest.raises(InputError) as said:
            data.load("cifar10", cache)
        assert os.listdir(cache) == []
        return str(said.value)

    assert "could not download" in load(b"")
    assert "does not match its SHA-256" in load(good[:-100])  # cut off
    assert "does not match its SHA-256" in load(bytes(len(good)))
    (cache / name).write_bytes(good[:-1])  # damaged later
    with pytest.raises(InputError, match="does not match its SHA-256"):
        data.load("cifar10", cache)


def save_npz(path, dataset, **more):
    """A file in MedMNIST's layout: images [N, H, W], labels [N, 1], and what else is wanted."""
    arrays = {"train_images": dataset.train_images[:, 0], "test_images": dataset.test_images[:, 0],
              "train_labels": dataset.train_labels[:, None],
              "test_labels": dataset.test_labels[:, None]}
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()} | more)
    return path


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    return save_npz(tmp_path_factory.mktemp("npz") / "tiny.npz", images(), val_images=np.zeros(3))


@pytest.mark.parametrize("train, test", [(np.int64, np.int64), (np.int64, np.uint64),
                                         (np.uint64, np.int32), (np.uint8, np.int64)])
def test_labels_may_be_any_whole_numbers(train, test, tmp_path):
    """Joined as they are, int64 and uint64 become float64, in which 2^60 and 2^60 + 1 are one."""
    d = images()
    labels = [part.numpy() + (2**60 if np.iinfo(kind).max > 2**60 else 0)
              for part, kind in ((d.train_labels, train), (d.test_labels, test))]
    again = data.load(save_npz(tmp_path / "l.npz", d, train_labels=labels[0].astype(train),
                               test_labels=labels[1].astype(test)))
    assert torch.equal(again.train_labels.unique(return_inverse=True)[1], d.train_labels)
    expected = np.unique(np.concatenate([part.astype(object) for part in labels]))
    assert again.classes == len(expected)


def test_npz_reads_medmnist_layout_colour_and_any_spelling(npz, tmp_path, monkeypatch):
    d = data.load(str(npz))
    assert d.shape == SHAPE and all(torch.equal(a, b) for a, b in zip(d, images()))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "TINY.NPZ").write_bytes(npz.read_bytes())
    assert data.load("~/TINY.NPZ").digest() == d.digest()
    rgb = images(30, (3, 8, 12))
    pixels = {f"{split}_images": getattr(rgb, f"{split}_images").permute(0, 2, 3, 1).numpy()
              for split in ("train", "test")}
    path = save_npz(tmp_path / "rgb.npz", rgb, **pixels)
    assert torch.equal(data.load(str(path)).train_images, rgb.train_images)


# ---------------------------------------------------------------------------------- wrong input

def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(tmp_path, *arguments, out="out"):
    """What the command says: one sentence. It touches nothing."""
    before = files(tmp_path)
    given = ["--device", "cpu", "--workers", 1, *arguments, "--out", tmp_path / out]
    with pytest.raises(InputError) as said:
        fllw.main(list(map(str, given)))
    text = str(said.value)
    assert len(text) > 20 and "\n" not in text and files(tmp_path) == before
    return text


WRONG = """
--data imagenet: mnist5k
--data nowhere.npz: nowhere.npz
--patch-size 5: patch
--dim 30: --heads
--depth 3 --blocks-per-stage 2: --blocks-per-stage
--method lasting --depth 1: lasting
--method lasting --depth 4 --blocks-per-stage 2: lasting
--depth-dropout 1: --depth-dropout
--depth-dropout -0.1: --depth-dropout
--depth-dropout nan: --depth-dropout
--clients 3 --clients-per-round 5: 5
--rounds 3: stages
--first-share 1: --first-share
--dim 0: --dim
--depth -1: --depth
--heads 0: --heads
--patch-size 0: --patch-size
--clients 0: --clients
--rounds 0: --rounds
--local-epochs 0: --local-epochs
--batch-size 1: --batch-size
--lr 0: --lr
--lr nan: --lr
--lr inf: --lr
--temperature 0: --temperature
--alpha -1: --alpha
--alpha 1e308: --alpha
--micro-batch -1: --micro-batch
--workers -1: --workers
--head-dim 0: --head-dim
--seed -1: --seed
--rounds many: --rounds
--method magic: magic
--speed 3: --speed
--images 5000: 4,000
--device tpu9: tpu9
--device meta: meta
--device cuda:99: cuda:99
--clients 2001: 4002
--clients 2001 --alpha 1: 4002
--images 3 --clients 2: 4
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_setting_is_one_sentence(case, tmp_path):
    arguments, word = case.rsplit(": ", 1)
    assert word in refused(tmp_path, *arguments.split())


def numbers(n, **more):
    return np.zeros(n, **more)


BROKEN = {"pickled": dict(train_labels=np.array([{}] * 60, dtype=object)),
          "float images": dict(train_images=numbers((60, 14, 14))),
          "short labels": dict(test_labels=numbers(19, dtype=int)),
          "float labels": dict(train_labels=numbers(60)),
          "other shape": dict(test_images=numbers((20, 7, 14), dtype=np.uint8)),
          "beyond int64": dict(test_labels=np.full(20, 2**63, dtype=np.uint64)),
          "empty": dict(train_images=numbers((0, 14, 14), dtype=np.uint8),
                        train_labels=numbers(0, dtype=int)),
          "no pixels": dict(train_images=numbers((60, 0, 14), dtype=np.uint8)),
          "scalar": dict(train_images=np.uint8(3)), "no labels": {}, "no zip": {}, "cut": {}}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_npz_is_one_sentence(case, tmp_path):
    path = save_npz(tmp_path / "broken.npz", images(), **BROKEN[case])
    if case == "no labels":
        np.savez(path, train_images=images().train_images[:, 0].numpy())
    if case == "no zip":
        path.write_text("hello")
    if case == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    assert "broken.npz" in refused(tmp_path, "--data", path)


def test_images_with_channels_first_are_named_as_what_they_look_like(tmp_path):
    """[N, 3, 14, 14] reads as 3 x 14 pixels with 14 channels; the sentence says so."""
    first = {f"{split}_images": images(n, (3, 14, 14)).train_images.numpy()
             for split, n in (("train", 60), ("test", 20))}
    path = save_npz(tmp_path / "first.npz", images(), **first)
    said = refused(tmp_path, "--data", path)
    assert "[N, H, W, C]" in said and "3 x 14" in said and "14 channels" in said


@pytest.mark.parametrize("arguments, name", [
    ("--method e2e --depth-dropout 0.5", "depth-dropout"),
    ("--method progressive --depth-dropout 0.5", "depth-dropout"),
    ("--method e2e --blocks-per-stage 2", "blocks-per-stage"),
    ("--method e2e --first-share 0.5", "first-share"),
    ("--method e2e --new-block zero", "new-block"),
    ("--blocks-per-stage 4 --first-share 0.5", "first-share"), ("--depth-dropout 0.5", None)])
def test_a_flag_without_effect_is_answered_with_a_note(arguments, name, monkeypatch, capsys):
    monkeypatch.setattr(fllw, "run", lambda config: None)
    expected = f"note: --{name} changes nothing here\n" if name else ""
    assert run_here(capsys, *arguments.split()) == expected


@pytest.mark.parametrize("name", ["config", "nested", "history", "foreign", "file", "below"])
def test_a_folder_that_is_no_run_is_refused(name, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for kind, text in (("config", '{"vocab_size": 1}'), ("history", "[")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{kind}.json").write_text(text)
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text("[" * 100_000)
    (tmp_path / "file").write_text("hello")
    said = refused(tmp_path, out="file/below" if name == "below" else name)
    assert re.search("no run folder|cannot be a run|belongs to a run|is damaged", said)


def raises(error):
    raise error


@pytest.mark.parametrize("error, status", [
    (InputError("a sentence"), 2), (OSError("disk full"), 1), (FloatingPointError("round 3"), 1),
    (KeyboardInterrupt(), 130)], ids=lambda value: type(value).__name__)
def test_whatever_ends_a_command_is_one_sentence_and_a_status(error, status, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["there/fllw.py"])
    with pytest.raises(SystemExit) as stop:
        fllw.command(partial(raises, error))
    said = capsys.readouterr().err or str(stop.value.code)
    code = stop.value.code if isinstance(stop.value.code, int) else 1  # a text exits with 1
    assert code == status and len(said.strip().splitlines()) == 1
    assert status != 2 or said == "fllw.py: a sentence\n"


def test_a_terminal_that_knows_only_ascii_still_shows_a_table(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as PYTHONIOENCODING=ascii makes
    monkeypatch.setattr(sys, "stdout", terminal)
    fllw.command(lambda: print(fllw.table({"a": {"knn": [90.0, 92.0]}}), flush=True))
    assert "91.0 ?1.4" in terminal.buffer.getvalue().decode()


def test_another_data_py_in_front_is_named(monkeypatch):
    """`import data` may find a file of that name in the reader's own project."""
    other = types.ModuleType("data")
    other.__file__ = "/project/data.py"
    monkeypatch.setitem(sys.modules, "data", other)
    spec = importlib.util.spec_from_file_location("fllw_again", HERE / "fllw.py")
    with pytest.raises(ImportError, match="found /project/data.py: run from the folder of fllw.py"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def mutated(content, dice):
    """The bytes with a few of them changed, lost or repeated."""
    bad = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at, size = dice.randrange(len(bad)), dice.randint(1, 8)
        kind = dice.randrange(4)
        if kind < 2:
            bad[at:at + size] = dice.randbytes(size)[:max(0, len(bad) - at)]
        elif kind == 2:
            del bad[at:at + size]
        else:
            bad[at:at] = bad[at:at + size]
    return bytes(bad)


# ----------------------------------------------------------------- run folders and the command

@pytest.fixture(scope="session")
def finished(npz, tmp_path_factory):
    """A finished run, by the command in a process of its own: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, HERE / "fllw.py", "--data", npz, *TINY, "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run without what its end added."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt", "history.jsonl"):
        (folder / name).write_bytes((finished[0] / name).read_bytes())
    return folder


@pytest.fixture
def fast(monkeypatch, unmetered):
    """Leave out the evaluation as well."""
    monkeypatch.setattr(fllw, "evaluate", lambda *_: {"knn": 50.0})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def tensors_of(folder):
    return torch.load(folder / "encoder.pt", weights_only=True)


def opened(npz, folder):
    """The State that `fllw.py --data npz TINY --out folder` would resume from."""
    config = replace(SMALL, augment="auto", depth_dropout=0.25, data=str(npz), out=str(folder))
    with fllw.run_folder(config, data.load(npz)) as (_, state):
        return state


def test_the_command_leaves_a_run_folder(npz, finished):
    folder, printed = finished
    assert set(os.listdir(folder)) == {"config.json", "history.jsonl", "checkpoint.pt",
                                       "encoder.pt", "summary.json"}
    history, summary = rows_of(folder), json.loads((folder / "summary.json").read_text())
    assert [row["round"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == fllw.ROW.keys() for row in history)
    assert len(re.findall(r"^ +\d +\d +\d\.\d{3} ", printed, re.M)) == 6
    assert all(words in printed for words in ("raw pixels", "FLL + FDD 0.25", "end-to-end"))
    encoder = fllw.load_encoder(folder)
    assert same_tensors(encoder.state_dict(), tensors_of(folder))
    scores = ssl_loss.evaluate(encoder, data.load(npz), "natural")
    assert scores == {key: summary["FLL + FDD 0.25"][key] for key in scores}


def test_a_finished_run_shows_its_table_and_is_left_as_it_was(npz, finished, capsys):
    folder, printed = finished
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = run_here(capsys, "--data", npz, *TINY, "--out", folder)
    table = fllw.table(json.loads((folder / "summary.json").read_text()))
    assert "finished" in again and table in again and table in printed
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_round_line_says_who_kept_which_block_and_who_failed():
    answers = [{"client": 0, "loss": 2.0, "images": 9, "valid": True},
               {"client": 2, "loss": 7.0, "images": 9, "valid": False}]
    row = {"round": 5, "stage": 3, "clients": [0, 1, 2], "answers": answers, "seconds": 1.5,
           "kept_blocks": [[0, 1, 2], [2], [1, 2]]}
    line = fllw.round_line(SMALL, row, Stage(3, (0, 1, 2), (2,), 1),
                           {"download_bytes": 3e6, "upload_bytes": 4e3}, 5 * 2**20)
    assert line.split() == ("3 5 2.000 3.000 0.004 5.0 1.50 ++A ..A .+A "
                            "lost: client 1 rejected: client 2").split()


def test_a_run_killed_while_it_trains_resumes_to_the_same_bits(npz, tmp_path, capsys, fast):
    arguments = ["--data", npz, *TINY, "--rounds", 60]
    folder = tmp_path / "killed"
    command = [sys.executable, HERE / "fllw.py", *arguments, "--out", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(rows_of(folder)) < 60
    for name in ("killed", "whole"):
        run_here(capsys, *arguments, "--out", tmp_path / name)
    assert timeless(rows_of(folder)) == timeless(rows_of(tmp_path / "whole"))
    assert same_tensors(tensors_of(folder), tensors_of(tmp_path / "whole"))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("left", ['{"round": 7, "sta', '{"round": 7}\n', '\n'],
                         ids=["torn", "surplus", "empty"])
def test_a_line_of_the_history_without_a_checkpoint_is_dropped(left, npz, unfinished):
    """A kill can come while a row is written, or between the row and its checkpoint."""
    rows = unfinished / "history.jsonl"
    before = rows.read_text()
    rows.write_text(before + left)
    assert len(opened(npz, unfinished).history) == 6 and rows.read_text() == before
    (unfinished / "checkpoint.pt").unlink()  # before the first checkpoint, nothing counts
    assert opened(npz, unfinished) is None and not rows.exists()


def test_a_folder_belongs_to_its_settings(npz, finished):
    for other in (["--rounds", 3], ["--seed", 1], ["--lr", 0.5], ["--method", "e2e"]):
        said = refused(finished[0].parent, "--data", npz, *TINY, *other, out="run")
        assert "belongs to a run" in said and other[0][2:] in said


def test_a_folder_belongs_to_the_content_of_its_images(npz, finished, tmp_path, capsys):
    """The same images under another path show the run; other images of that name do not."""
    folder, _ = finished
    (tmp_path / "elsewhere.npz").write_bytes(npz.read_bytes())
    again = run_here(capsys, "--data", tmp_path / "elsewhere.npz", *TINY, "--out", folder)
    assert "finished" in again
    other = save_npz(tmp_path / npz.name, images(seed=1))
    assert "images" in refused(folder.parent, "--data", other, *TINY, out="run")


def test_the_same_images_under_another_path_continue_the_run(npz, finished, unfinished, tmp_path,
                                                             capsys, fast):
    (tmp_path / "elsewhere.npz").write_bytes(npz.read_bytes())
    printed = run_here(capsys, "--data", tmp_path / "elsewhere.npz", *TINY, "--out", unfinished)
    assert not re.findall(r"^ +\d +\d +\d\.\d{3} ", printed, re.M)  # no round is trained again
    assert same_tensors(tensors_of(unfinished), tensors_of(finished[0]))


def test_default_folders_tell_methods_apart(npz, tmp_path, monkeypatch, capsys, fast):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--depth-dropout", 0], ["--method", "e2e"], ["--seed", 1]):
        run_here(capsys, "--data", npz, *TINY, "--rounds", 3, *more)
    assert sorted(os.listdir("runs")) == ["tiny-end-to-end-seed0", "tiny-fll-fdd-0.25-seed0",
                                          "tiny-fll-fdd-0.25-seed1", "tiny-fll-seed0"]


def test_one_process_at_a_time_in_a_folder(tmp_path):
    config, d = replace(SMALL, out=str(tmp_path / "run")), images()
    with fllw.run_folder(config, d):
        with pytest.raises(InputError, match="another process works in"):
            with fllw.run_folder(config, d):
                pass
    with fllw.run_folder(config, d) as (folder, state):
        assert state is None and folder == tmp_path / "run"


def test_a_folder_notes_its_experiment(tmp_path):
    config, d = replace(SMALL, out=str(tmp_path / "run")), images()
    with fllw.run_folder(config, d, "calibration 2") as (folder, _):
        fllw.write(folder / "encoder.pt", {"conv.weight": torch.zeros(3)})  # another model
    for other in ("", "calibration 3"):
        with pytest.raises(InputError, match="experiment"):
            with fllw.run_folder(config, d, other):
                pass
    with pytest.raises(InputError, match="made by experiments.calibration .* load it there"):
        fllw.load_encoder(tmp_path / "run")


def test_an_encoder_that_is_not_there_is_one_sentence(unfinished):
    for folder, advice in (("nowhere", "train with --out"), (__file__, "train with --out"),
                           (unfinished, "rerun its command")):
        with pytest.raises(InputError, match=f"no finished run: {advice}"):
            fllw.load_encoder(folder)


def test_a_diverged_run_ends_with_the_advice_to_take_a_smaller_lr(npz, tmp_path, monkeypatch):
    """The loss was finite, the features are not: no traceback of the probe's optimizer."""
    arguments = ["--data", npz, *TINY, "--method", "e2e", "--rounds", 1, "--images", 20, "--lr",
                 1e7, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as stop:
        fllw.command(partial(fllw.main, list(map(str, arguments))))
    assert re.fullmatch(".*not finite: take a smaller --lr.*", stop.value.code)


CHECKPOINTS = {
    "a name": lambda s: s["server"].update(nobody=s["server"].pop("head.0.weight")),
    "a tensor less": lambda s: s["server"].pop("encoder.norm.bias"),
    "a shape": lambda s: s["server"].update({"head.0.weight": torch.zeros(2, 2)}),
    "a type": lambda s: s["server"].update({"head.0.weight": torch.zeros(24, 16).double()}),
    "no tensor": lambda s: s["server"].update({"head.0.weight": 3}),
    "more rounds than rows": lambda s: s.update(rounds=7),
    "no number": lambda s: s.update(rounds="many")}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused(case, npz, unfinished):
    path = unfinished / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    CHECKPOINTS[case](content)
    torch.save(content, path)
    with pytest.raises(InputError, match="no checkpoint of this run"):
        opened(npz, unfinished)


def test_fuzzed_files(npz, finished, unfinished, tmp_path):
    """Every file that is read: damaged bytes are refused in one sentence, or do no harm."""
    for name in ("encoder.pt", "summary.json"):
        (unfinished / name).write_bytes((finished[0] / name).read_bytes())
    (tmp_path / "bad.npz").write_bytes(npz.read_bytes())
    show = ["--data", str(npz), *TINY, "--out", str(unfinished)]
    readers = {tmp_path / "bad.npz": lambda: data.load(tmp_path / "bad.npz"),
               unfinished / "encoder.pt": lambda: fllw.load_encoder(unfinished),
               unfinished / "summary.json": lambda: fllw.main(show),
               **{unfinished / name: lambda: opened(npz, unfinished)
                  for name in ("checkpoint.pt", "history.jsonl", "config.json")}}
    dice = random.Random(0)
    for path, read in readers.items():
        good, refusals = path.read_bytes(), 0
        for _ in range(40):
            path.write_bytes(mutated(good, dice))
            try:
                read()
            except InputError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                refusals += 1
            for other in (unfinished / "history.jsonl", unfinished / "config.json"):
                assert other == path or other.exists()
        path.write_bytes(good)
        assert refusals > 5, path
        read()


@pytest.mark.parametrize("name", ["checkpoint.pt", "encoder.pt"])
def test_a_flipped_byte_in_a_tensor_is_noticed(name, npz, finished, unfinished):
    """torch.load itself does not check the sums that the file carries."""
    content = bytearray((finished[0] / name).read_bytes())
    tensor = tensors_of(finished[0])["blocks.2.mlp.fc1.weight"]
    content[content.index(tensor.numpy().tobytes()) + tensor.nbytes // 2] ^= 255
    (unfinished / name).write_bytes(content)
    with pytest.raises(InputError):
        fllw.load_encoder(unfinished) if name == "encoder.pt" else opened(npz, unfinished)


def test_nothing_is_unpickled(npz, unfinished, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"server": Trap()}, unfinished / "checkpoint.pt")
    torch.save({"norm.bias": Trap()}, unfinished / "encoder.pt")
    np.savez(tmp_path / "trap.npz", train_labels=np.array([Trap()], dtype=object))
    for call in (partial(opened, npz, unfinished), partial(fllw.load_encoder, unfinished),
                 partial(data.load, tmp_path / "trap.npz")):
        with pytest.raises(InputError):
            call()
    assert not (tmp_path / "sprung").exists()


def test_an_interrupted_or_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk shows at fsync; Ctrl-C can come while torch packs tensors."""
    path = tmp_path / "checkpoint.pt"
    fllw.write(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    for module, name, error in ((torch, "save", KeyboardInterrupt()), (os, "fsync", OSError(28))):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, lambda *_: raises(error))
            with pytest.raises(type(error)):
                fllw.write(path, {"a": torch.zeros(1)})
        assert path.read_bytes() == before


def test_help_explains_every_setting_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        fllw.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and repr(f.default) in text
    places = [text.index(group) for group in ("data:", "model:", "layer-wise:", "federation:",
                                              "training:", "run:")]
    assert places == sorted(places)


def test_tables_show_means_and_spreads():
    text = fllw.table({"a": {"knn": [90.0, 92.0], "macs": [1e9, 3e9]}, "b": {"knn": 50.0},
                       "ratio": {"macs": "2.0x"}})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["a", "91.0", "±1.4", "2.00", "±1.41"], ["b", "50.0", "-"], ["ratio", "-", "2.0x"]]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_labels_name_what_has_an_effect():
    names = {"FLL + FDD 0.5": {}, "end-to-end": dict(method="e2e"),
             "centralized": dict(method="e2e", clients=1),
             "progressive": dict(method="progressive"),
             "lasting top + FDD 0.5": dict(method="lasting"),
             "FLL": dict(depth_dropout=0.0), "FLL by 3 blocks": dict(blocks_per_stage=3)}
    assert names == {fllw.label(replace(SMALL, **more)): more for more in names.values()}


# ------------------------------------------------------------------------------------ on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("more", [{}, {"micro_batch": 3}, {"amp": True, "micro_batch": 4},
                                  {"augment": "natural"}], ids=str)
def test_a_local_step_on_a_gpu_waits_for_nothing(more):
    config, stage = replace(SMALL, device="cuda", **more), Stage(2, (0, 1), (1,), 1)
    own = images(32, (3, 14, 14)).train_images.cuda()
    message = fllw.broadcast(fllw.initial(config, (3, 14, 14)), (0, 1))
    message = {name: t.cuda() for name, t in message.items()}
    fllw.local_train(config, stage, message, own, 1, 0)  # libraries start
    torch.cuda.set_sync_debug_mode("error")
    try:
        upload, losses = fllw.local_train(config, stage, message, own, 1, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all() and all(t.is_cuda for t in upload.values())


@needs_gpu
def test_a_gpu_trains_as_a_cpu_does():
    """Draws differ between devices, so losses are only close; who did what is the same."""
    (_, cpu), (encoder, gpu) = (fllw.federate(replace(SMALL, device=device, rounds=3), images())
                                for device in ("cpu", "cuda"))
    assert encoder.pos_embed.device.type == "cpu"
    for a, b in zip(cpu, gpu, strict=True):
        assert all(a[key] == b[key] for key in ("stage", "clients", "kept_blocks"))
        assert fllw.mean_loss(a) == pytest.approx(fllw.mean_loss(b), rel=0.3)


@needs_gpu
@pytest.mark.parametrize("more", [{}, {"amp": True}, {"micro_batch": 4}], ids=str)
def test_training_resumes_from_a_checkpoint_on_a_gpu(more, tmp_path):
    config, d = replace(SMALL, device="cuda", out=str(tmp_path / "run"), **more), images()
    _, history = fllw.federate(config, d)

    def stop(row, state):
        if row["round"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), fllw.run_folder(config, d) as (folder, state):
        fllw.train(config, d, folder, state, on_round=stop)
    with fllw.run_folder(config, d) as (folder, state):
        assert len(state.history) == 3
        _, longer = fllw.train(config, d, folder, state)
    for a, b in zip(history, longer, strict=True):
        assert fllw.mean_loss(a) == pytest.approx(fllw.mean_loss(b), rel=1e-2)
