"""Tests against oracles: brute force, a plain loop, a published table, another road to a number."""
import ast
import copy
import functools
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tarfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, fields, replace
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
from experiments import (alignment, benchmark, calibration, compare, early_stopping, multimodal,
                         objectives, paper_scale)
from fllw import Config, InputError, Stage

torch.set_num_threads(1)  # the tensors are tiny; and bits depend on the number of threads
HERE = Path(__file__).resolve().parent
SMALL = Config(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, clients=3,
               rounds=6, batch_size=8, depth_dropout=0.5, device="cpu", augment="digits")
SHAPE = (1, 14, 14)
PAPER = Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256, clients=10,
               rounds=180, local_epochs=3, batch_size=512, depth_dropout=0.0, device="cpu")
METHODS = ["fll", "e2e", "progressive", "lasting"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(n=60, shape=SHAPE, classes=5, seed=0):
    """Random images, for what does not depend on their content."""
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))
    return data.Dataset(pixels, torch.arange(n) % classes, pixels[:20], torch.arange(20) % classes)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wave(shape, phase):
    """Numbers that a formula gives everywhere alike."""
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + phase).view(shape).float()


def copied(state):
    """A state that shares nothing with the other, as after a checkpoint."""
    return fllw.State(state.shape, {name: t.clone() for name, t in state.server.items()},
                      dict(state.version), copy.deepcopy(state.history),
                      copy.deepcopy(state.held), state.changes)


def timeless(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def no_memory(*arguments, **more):
    return 0


@pytest.fixture
def unmetered(monkeypatch):
    """Leave out the measuring of memory, which takes longer than these rounds."""
    monkeypatch.setattr(fllw, "step_memory", no_memory)


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


TINY = ("--dim 16 --depth 3 --heads 2 --head-hidden 24 --head-dim 8 --clients 3 --rounds 6 "
        "--batch-size 8 --device cpu").split()


def run_here(capsys, *arguments):
    """What the command prints, run in this process, which need not start first."""
    fllw.main(list(map(str, arguments)))
    return capsys.readouterr().out


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


def square_loss(z):
    return ssl_loss.nt_xent(*z.chunk(2), 0.1)


def client_of(config, stage, kept, shape=SHAPE):
    """A client's learner with the blocks `kept`, from the seed."""
    message = fllw.broadcast(fllw.initial(config, shape), kept)
    return fllw.receive(config, message, shape, stage)


@pytest.mark.parametrize("present, active, kept", [
    ((0, 1, 2), (0, 1, 2), (0, 1, 2)), ((0,), (0,), (0,)), ((0, 1, 2), (2,), (0, 2)),
    ((0, 1, 2), (1,), (0, 1, 2)), ((0, 1, 2), (0,), (0, 2))],
    ids=["end-to-end", "first stage", "dropped", "in the middle", "frozen above"])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_micro_batches_give_the_plain_loss_and_gradients(present, active, kept, micro):
    config, stage, results = SMALL, Stage(1, present, active, 1), []
    for m in (0, micro):
        learner = client_of(config, stage, kept)
        parts = fllw.in_three(config, learner, stage)
        loss = ssl_loss.contrastive_step(*parts, normal(16, *SHAPE), square_loss, m)
        trained = [p.grad.flatten() for p in learner.parameters() if p.requires_grad]
        results.append((loss, torch.cat(trained)))
    (plain, expected), (cached, gradient) = results
    assert cached.item() == pytest.approx(plain.item(), rel=1e-5)
    assert expected.norm() > 0.1 and (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_bf16_autocast_stays_close_and_keeps_the_loss_in_float32(unmetered):
    _, plain = fllw.federate(SMALL, images())
    encoder, amp = fllw.federate(replace(SMALL, amp=True, micro_batch=4), images())
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    assert [r["loss"] for r in amp] == pytest.approx([r["loss"] for r in plain], rel=0.05)
    assert amp[0]["loss"] != plain[0]["loss"]
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
    torch.rand(3)
    assert same_tensors(first, fllw.initial(replace(SMALL, rounds=9), SHAPE))
    assert not same_tensors(first, fllw.initial(replace(SMALL, seed=1), SHAPE))
    torch.random.set_rng_state(before)
    fllw.initial(SMALL, SHAPE)
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------------- stages, depth dropout

def test_stages_are_the_family():
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
    for rounds in range(5, 60):
        plan = fllw.stages(replace(SMALL, depth=5, rounds=rounds))
        assert [s.rounds for s in plan] == list(map(len, np.array_split(range(rounds), 5)))

    def rounds_of(**more):
        return [s.rounds for s in fllw.stages(replace(SMALL, **more))]
    assert rounds_of(rounds=12, first_share=0.5) == [6, 3, 3]
    assert rounds_of(rounds=12, first_share=0.5, method="progressive") == [6, 3, 3]
    assert rounds_of(rounds=4, first_share=0.9) == [2, 1, 1]
    assert rounds_of(rounds=40, first_share=0.01) == [1, 20, 19]


def test_stage_of_equals_a_list_of_all_rounds():
    plan = fllw.stages(replace(SMALL, rounds=8))
    everything = [(stage, done) for stage in plan for done in range(stage.rounds)]
    assert [fllw.stage_of(plan, done) for done in range(8)] == everything
    assert fllw.stage_of(plan, 8) == (None, 0)


def test_depth_dropout_drops_frozen_blocks_at_its_rate_and_only_those():
    config = replace(SMALL, depth=12, depth_dropout=0.3)
    stage = Stage(9, tuple(range(9)), (2, 8), 1)
    kept = [fllw.draw_blocks(config, stage, r, c) for r in range(200) for c in range(10)]
    counts = np.bincount(np.concatenate(kept), minlength=9)
    frozen = np.delete(counts, [2, 8])
    assert counts[2] == counts[8] == 2000 and len(counts) == 9
    assert np.all(np.abs(frozen / 2000 - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000))
    assert len(set(kept)) > 100  # drawn anew for every client and round
    assert all(list(blocks) == sorted(blocks) for blocks in kept)
    never = replace(config, depth_dropout=0.0)
    assert all(fllw.draw_blocks(never, stage, r, 0) == stage.present for r in range(9))


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


def test_clients_are_sent_no_block_that_they_dropped(unmetered):
    received = []

    def client(config, stage, message, images, number, one, progress=0.0):
        received.append((number, one, {fllw.block_of(name) for name in message} - {None}))
        return fllw.local_train(config, stage, message, images, number, one, progress)

    _, history = fllw.federate(replace(SMALL, rounds=9), images(), client=client)
    expected = [(row["round"], one, set(kept)) for row in history
                for one, kept in zip(row["clients"], row["kept_blocks"])]
    assert received == expected and any(len(kept) < 3 for *_, kept in received[-9:])


EMBEDDING = {"encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed"}


def overlapping(config, history):
    """Each stage trains its block and the one below."""
    return [Stage(1, (0,), (0,), 1), Stage(2, (0, 1), (0, 1), 2), Stage(3, (0, 1, 2), (1, 2), 2)]


def top_down(config, history):
    """All blocks from the start; they train one at a time, the last one first."""
    return [Stage(1, (0, 1, 2), (2,), 1), Stage(2, (0, 1, 2), (1,), 2),
            Stage(3, (0, 1, 2), (0,), 1)]


PLANS = [(method, fllw.stages) for method in METHODS] + [
    ("fll", overlapping), ("fll", top_down)]
PLAN_NAMES = [*METHODS, "overlapping", "top-down"]


@pytest.mark.parametrize("method, plan", PLANS, ids=PLAN_NAMES)
def test_a_round_changes_exactly_what_trains(method, plan, unmetered):
    config = replace(SMALL, method=method, depth_dropout=0.3)
    before, seen = {}, set()

    def compare(row, state):
        trained = {"head", "encoder.norm"} | {f"encoder.blocks.{b}" for b in row["active_blocks"]}
        if 0 in row["active_blocks"]:
            trained |= EMBEDDING
        assert {fllw.block_of(n) for n in state.server} - {None} == set(row["present_blocks"])
        for name in before.keys() & state.server.keys():
            changes = name.startswith(tuple(f"{part}." for part in trained)) or name in trained
            assert torch.equal(before[name], state.server[name]) != changes, name
        seen.add(row["stage"])
        before.update({name: t.clone() for name, t in state.server.items()})

    encoder, _ = fllw.federate(config, images(), on_round=compare, plan=plan)
    assert len(seen) == len(plan(config, [])) and len(encoder.blocks) == 3


@pytest.mark.parametrize("method, plan", PLANS, ids=PLAN_NAMES)
def test_no_gradient_reaches_what_is_frozen(method, plan):
    config = replace(SMALL, method=method)
    for stage in plan(config, []):
        learner = client_of(config, stage, stage.present)
        frozen, active, head = fllw.in_three(config, learner, stage)
        head(active(frozen(normal(4, *SHAPE)))).square().sum().backward()
        for name, p in learner.named_parameters():
            block = fllw.block_of(name)
            embeds = name.startswith(tuple(EMBEDDING))
            trains = block in stage.active if block is not None else 0 in stage.active or not embeds
            assert (p.grad is not None) == p.requires_grad == trains == stage.trains(name), name


def test_the_frozen_part_keeps_no_graph():
    stage = Stage(3, (0, 1, 2), (2,), 1)
    frozen, active, _ = fllw.in_three(SMALL, client_of(SMALL, stage, (0, 1, 2)), stage)
    tokens = frozen(normal(4, *SHAPE))
    assert not tokens.requires_grad and tokens.shape == (4, 5, 16) and active(tokens).requires_grad


def test_the_encoder_is_a_plain_vit_with_every_block(unmetered):
    for config in (replace(SMALL, depth_dropout=0.9), replace(SMALL, method="lasting")):
        servers = []
        encoder, _ = fllw.federate(config, images(),
                                   on_round=lambda row, state: servers.append(dict(state.server)))
        plain = fllw.ViT((14, 14), 7, 1, 16, 3, 2)
        plain.load_state_dict({name.removeprefix("encoder."): t for name, t in servers[-1].items()
                               if name.startswith("encoder.")}, strict=True)
        x = normal(4, *SHAPE)
        assert torch.equal(encoder(x), plain(x))
        assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def block_tensors(server, b):
    return {name.split(f"blocks.{b}.")[1]: t for name, t in server.items()
            if f"blocks.{b}." in name}


@pytest.mark.parametrize("method, new, source, stage", [
    ("fll", 1, 0, Stage(2, (0, 1), (1,), 1)), ("lasting", 1, 0, Stage(2, (0, 1, 2), (1, 2), 1))])
def test_a_new_block_starts_as_asked(method, new, source, stage):
    config = replace(SMALL, method=method)
    first = fllw.start(config, SHAPE)
    assert set(first.server) == set(fllw.broadcast(fllw.initial(config, SHAPE),
                                                   fllw.stages(config)[0].present))
    for kind in ("copy", "zero", "fresh"):
        state = copied(first)
        fllw.grow(replace(config, new_block=kind), state, stage)
        assert same_tensors(first.server, {n: state.server[n] for n in first.server})
        mine, below = block_tensors(state.server, new), block_tensors(first.server, source)
        expected = dict(below)
        if kind == "fresh":
            expected = block_tensors(fllw.initial(config, SHAPE), new)
        if kind == "zero":
            ends = [name for name in below if name.startswith(("attn.proj.", "mlp.fc2."))]
            expected |= {name: torch.zeros_like(below[name]) for name in ends}
        assert same_tensors(mine, expected) and state.version.keys() == state.server.keys()


def test_a_zero_block_changes_no_feature_until_it_trains():
    config, d, stage = replace(SMALL, new_block="zero"), images(), Stage(2, (0, 1), (1,), 1)
    state = fllw.start(config, SHAPE)
    before = ssl_loss.features(fllw.encoder_of(config, state.server, SHAPE), d.train_images)
    fllw.grow(config, state, stage)
    after = ssl_loss.features(fllw.encoder_of(config, state.server, SHAPE), d.train_images)
    upload, _ = fllw.local_train(config, stage, state.server, d.train_images, 1, 0)
    assert torch.equal(before, after)
    assert upload["encoder.blocks.1.mlp.fc2.weight"].abs().min() > 0
    assert not state.server["encoder.blocks.1.mlp.fc2.weight"].any()


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


def bare_client(config, learner, trained, images, key, done):
    """Local epochs on a plain model; done: from (rounds of the stage before) to (rounds)."""
    seed = np.random.default_rng([config.seed, fllw.TRAINING, *key]).integers(2**63)
    draws, optimizer = torch.Generator().manual_seed(int(seed)), torch.optim.AdamW(
        trained, weight_decay=config.weight_decay, fused=True)
    batch = min(config.batch_size, len(images))
    steps = len(images) // batch
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(images), generator=draws)
        for i in range(steps):
            now = done[0] + (epoch * steps + i) / (steps * config.local_epochs)
            lr = config.lr / 2 * (1 + math.cos(math.pi * now / done[1]))
            optimizer.param_groups[0]["lr"] = lr
            chosen = images[order[i * batch:(i + 1) * batch]]
            views = data.two_views(chosen, data.RECIPES["digits"], draws)
            z = learner.head(learner.encoder(views))
            optimizer.zero_grad()
            ssl_loss.nt_xent(z[:batch], z[batch:], config.temperature).backward()
            optimizer.step()


def bare_names(server, active):
    """The names of what trains."""
    starts = ["head.", "encoder.norm."] + [f"encoder.blocks.{b}." for b in active]
    if 0 in active:
        starts += EMBEDDING
    return [name for name in server if name.startswith(tuple(starts))]


def bare_round(config, server, present, active, number, done, dataset, parts):
    """One round on whole models: deep copies, plain float64 sums; returns what is averaged."""
    total, weight = defaultdict(float), 0
    frozen = [b for b in present if b not in active]
    for one in fllw.sample_clients(config, number):
        random_of = lambda kind: np.random.default_rng([config.seed, kind, number, one])
        if random_of(fllw.FAILURE).random() < config.client_failure:
            continue
        draws = random_of(fllw.DROPOUT).random(len(frozen))
        dropped = [b for b, draw in zip(frozen, draws) if draw < config.depth_dropout]
        learner = copy.deepcopy(server)
        trained = dict(learner.named_parameters())
        trained = {name: trained[name] for name in bare_names(trained, active)}
        learner.encoder.blocks = nn.ModuleList(
            block for b, block in enumerate(learner.encoder.blocks)
            if b in present and b not in dropped)
        own = dataset.train_images[parts[one]]
        bare_client(config, learner, trained.values(), own, (number, one), done)
        weight += len(own)
        for name, p in trained.items():
            total[name] += len(own) * p.detach().double()
    return {name: (t / weight).float() for name, t in total.items()}


def bare_loop(config, dataset):
    """The method in plain loops over whole models, with none of the federated machinery."""
    server = fllw.Learner(config, dataset.shape)
    server.load_state_dict(fllw.initial(config, dataset.shape))
    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    blocks, number, there = server.encoder.blocks, 0, []
    plan = bare_plan(config)
    for (present, active), rounds in zip(plan, np.array_split(range(config.rounds), len(plan))):
        for b in present:
            if b not in there and there:
                blocks[b].load_state_dict(blocks[b - 1].state_dict())
        there = there + [b for b in present if b not in there] if there else list(present)
        for done in range(len(rounds)):
            number += 1
            mean = bare_round(config, server, present, active, number, (done, len(rounds)),
                              dataset, parts)
            server.load_state_dict(server.state_dict() | mean)
    return server.encoder


BARE = {"fll": dict(alpha=0.5), "e2e": dict(alpha=0.5, rounds=3), "progressive": dict(rounds=5),
        "lasting": dict(alpha=0.5, depth=4, client_failure=0.3),
        "sampled": dict(clients=6, clients_per_round=2, alpha=1.0, local_epochs=2, rounds=5),
        "centralized": dict(method="e2e", clients=1, rounds=3, local_epochs=2)}


@pytest.mark.parametrize("case", BARE)
def test_federate_equals_a_bare_loop(case, unmetered):
    config = replace(SMALL, method=case if case in METHODS else "fll")
    config, d = replace(config, **BARE[case]), images(90)
    encoder, history = fllw.federate(config, d)
    expected = bare_loop(config, d).state_dict()
    assert expected.keys() == encoder.state_dict().keys()
    for name, p in encoder.named_parameters():
        assert torch.allclose(p, expected[name], atol=1e-6), name
    assert config.client_failure == 0 or any(row["lost"] for row in history)


def test_fll_with_one_stage_of_all_blocks_is_end_to_end(unmetered):
    whole, staged = (fllw.federate(replace(SMALL, rounds=2, **more), images())
                     for more in (dict(method="e2e"), dict(blocks_per_stage=3)))
    assert same_tensors(whole[0].state_dict(), staged[0].state_dict())
    assert [r["loss"] for r in whole[1]] == [r["loss"] for r in staged[1]]


def test_same_seed_same_numbers_and_another_seed_others(unmetered):
    results = [fllw.federate(replace(SMALL, seed=seed), images()) for seed in (1, 1, 2)]
    (a, first), (b, second), (c, _) = results
    assert timeless(first) == timeless(second)
    assert same_tensors(a.state_dict(), b.state_dict())
    assert not torch.equal(a.pos_embed, c.pos_embed)


def test_a_clients_result_depends_on_seed_round_and_client_alone():
    d, stage, message = images(), Stage(2, (0, 1), (1,), 3), fllw.initial(SMALL, SHAPE)
    message = fllw.broadcast(message, (0, 1))

    def uploads(order):
        return {one: fllw.local_train(SMALL, stage, message, d.train_images, 4, one)[0]
                for one in order}
    forward = uploads([0, 1, 2])
    torch.rand(5), np.random.rand(5)  # global generators must not matter
    backward = uploads([2, 1, 0])
    assert all(same_tensors(forward[one], backward[one]) for one in range(3))
    assert not torch.equal(forward[0]["head.0.weight"], forward[1]["head.0.weight"])


def test_training_goes_on_from_any_round_to_the_same_bits(unmetered):
    config = replace(SMALL, client_failure=0.2, rounds=7)
    states, d = [], images()
    encoder, history = fllw.federate(
        config, d, on_round=lambda row, state: states.append(copied(state)))
    for state in states:  # a copy shares no memory: nothing may hang on that
        again, longer = fllw.federate(config, d, state)
        assert timeless(longer) == timeless(history)
        assert same_tensors(encoder.state_dict(), again.state_dict())


def test_what_on_round_changes_is_what_the_next_round_starts_from(unmetered):
    started = []

    def zero_the_head(row, state):
        state.update({"head.6.weight": torch.zeros_like(state.server["head.6.weight"])})

    def client(config, stage, message, images, number, one, progress=0.0):
        started.append(message["head.6.weight"].abs().sum().item())
        return fllw.local_train(config, stage, message, images, number, one, progress)

    fllw.federate(replace(SMALL, rounds=3), images(), None, zero_the_head, client)
    assert started[0] > 0 and not any(started[3:])


def test_a_plan_may_look_at_the_history(unmetered):
    def impatient(config, history):
        """The first stage ends after its second round; the second has the rest."""
        first = 4 if len(history) < 2 else 2
        return [Stage(1, (0,), (0,), first), Stage(2, (0, 1, 2), (1, 2), 6 - first)]

    _, history = fllw.federate(SMALL, images(), plan=impatient)
    assert [row["stage"] for row in history] == [1, 1, 2, 2, 2, 2]
    assert history[2]["kept_blocks"] != history[0]["kept_blocks"]


# --------------------------------------------------------------------------------------- server

def test_fedavg_equals_the_plain_weighted_mean():
    states = [{"a": normal(3, 2, seed=s), "b": normal(4, seed=9 + s)} for s in range(5)]
    weights, average = [3, 1, 7, 2, 2], fllw.Average(states[0])
    for state, weight in zip(states, weights):
        average.add(state, weight)
    for name, mean in average.mean().items():
        plain = sum(w * s[name].double() for s, w in zip(states, weights)) / sum(weights)
        assert torch.equal(mean, plain.float())
    assert fllw.Average(states[0]).mean() == {}


def test_huge_finite_uploads_do_not_make_the_server_infinite():
    """Their float32 mean, taken step by step, was infinite."""
    def client(config, stage, message, images, number, one, progress):
        sign = (1, -1, 1)[one]
        return {n: torch.full_like(t, sign * 3e38) for n, t in message.items()}, torch.ones(1)

    stage, state = fllw.stages(SMALL)[0], fllw.start(SMALL, SHAPE)
    parts = torch.arange(60).split([10, 20, 30])
    kept = {one: stage.present for one in range(3)}
    reports = fllw.run_round(SMALL, state, stage, 0.0, kept, images(60).train_images, parts, client)
    assert [report.accepted for report in reports.values()] == [True, True, True]
    expected = torch.tensor(3e38 * (10 - 20 + 30) / 60)
    assert all(torch.allclose(t, expected) for t in state.server.values())


SPOILED = {
    "nan": lambda u: {**u, "head.0.weight": u["head.0.weight"] * math.nan},
    "infinity": lambda u: {**u, "head.0.weight": u["head.0.weight"] + math.inf},
    "shape": lambda u: {**u, "head.0.weight": u["head.0.weight"][..., :1]},
    "dtype": lambda u: {**u, "head.0.weight": u["head.0.weight"].double()},
    "a tensor missing": lambda u: {n: t for n, t in u.items() if n != "head.0.weight"},
    "one too many": lambda u: {**u, "encoder.blocks.7.norm1.weight": torch.ones(16)}}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_upload_is_rejected_counted_and_the_round_goes_on(case, unmetered):
    def client(config, stage, message, images, number, one, progress=0.0):
        upload = {n: torch.full_like(t, one) for n, t in message.items() if stage.trains(n)}
        return SPOILED[case](upload) if one == 1 else upload, torch.tensor([1.0 + one])

    states = []
    config = replace(SMALL, rounds=3)
    _, history = fllw.federate(config, images(), None,
                               lambda row, state: states.append(dict(state.server)), client)
    assert [(row["rejected"], row["lost"], row["loss"]) for row in history] == [([1], [], 2.0)] * 3
    assert all(torch.allclose(t, torch.ones(())) for t in states[0].values())  # of 0 and 2


def test_nan_on_every_client_stops_with_the_last_round_kept(unmetered):
    def client(config, stage, message, images, number, one, progress=0.0):
        factor = math.nan if number == 3 else 1.0
        upload = {n: t * factor for n, t in message.items() if stage.trains(n)}
        return upload, torch.tensor([factor])

    def after(row, state):
        states.append(copied(state))

    states = []
    with pytest.raises(FloatingPointError, match="round 3"):
        fllw.federate(SMALL, images(), None, after, client)
    assert len(states) == 2 and all(t.isfinite().all() for t in states[-1].server.values())


def test_lost_clients_are_left_out_and_the_weights_renormalised(unmetered):
    config, patterns, before = replace(SMALL, client_failure=0.5, rounds=90), set(), {}

    def client(config, stage, message, images, number, one, progress=0.0):
        upload = {n: torch.full_like(t, one) for n, t in message.items() if stage.trains(n)}
        return upload, torch.tensor([float(one)])

    def after(row, state):
        here, bias = [c for c in range(3) if c not in row["lost"]], state.server["head.0.weight"]
        patterns.add(tuple(here))
        if not here:
            assert row["loss"] is None and row["upload_bytes"] == 0
            assert "bias" not in before or torch.equal(bias, before["bias"])
        else:
            assert bias[0, 0].item() == pytest.approx(np.average(here, weights=sizes[here]))
            assert row["loss"] == np.mean(here)
        before["bias"] = bias.clone()

    d = images(120)
    config = replace(config, alpha=0.5)
    sizes = np.array(list(map(len, data.partition(d.train_labels, 3, 0.5, 0))))
    assert len(set(sizes)) == 3
    fllw.federate(config, d, None, after, client)
    assert len(patterns) == 8


def test_sampling_covers_all_clients_and_ten_thousand_work(unmetered):
    config = replace(SMALL, clients=10, clients_per_round=4)
    seen = [fllw.sample_clients(config, r) for r in range(300)]
    assert all(len(set(s)) == 4 for s in seen)
    assert np.bincount(np.concatenate(seen)).min() > 300 * 0.4 * 0.7
    many = replace(SMALL, clients=10_000, clients_per_round=2, rounds=3)
    _, history = fllw.federate(many, images(20_000, (1, 7, 7)))
    assert [len(row["clients"]) for row in history] == [2, 2, 2]


# ----------------------------------------------------------------------------------------- cost

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
    @functools.wraps(initial)
    def with_noise(config, shape, device="cpu"):
        tensors = initial(config, shape, device)
        if str(device) == "meta":
            return tensors
        return {name: t + 0.01 * normal(*t.shape, seed=i)
                for i, (name, t) in enumerate(tensors.items())}
    return with_noise


class Counting:
    """A client that hashes what it receives: what it has not had before has to be sent."""

    def __init__(self):
        self.had, self.rows = defaultdict(set), defaultdict(list)

    def __call__(self, config, stage, message, images, number, one, progress=0.0):
        content = {hashlib.sha256(t.numpy()).digest(): t.nbytes for t in message.values()
                   if t.any()}  # that a tensor is 0 is known to all
        upload, losses = fllw.local_train(config, stage, message, images, number, one, progress)
        new = sum(size for key, size in content.items() if key not in self.had[one])
        self.had[one] |= content.keys()
        report = np.float64(0).nbytes + np.int64(0).nbytes  # mean loss, number of images
        self.rows[number].append((new, sum(content.values()),
                                  sum(t.nbytes for t in upload.values()) + report))
        return upload, losses


def no_two_alike(row, state):
    """Equal versions are equal tensors, and different ones are not."""
    content = defaultdict(set)
    for name, tensor in state.server.items():
        content[state.version[name]].add(hashlib.sha256(tensor.numpy()).digest())
    assert all(len(found) == 1 for found in content.values())
    assert len(set.union(*content.values())) == len(content)


BYTES = {"fll": {}, "e2e": dict(rounds=2), "progressive": {},
         "lasting": dict(depth=4), "zero": dict(new_block="zero"), "fresh": dict(new_block="fresh"),
         "sampled": dict(clients=6, clients_per_round=2, alpha=1.0, rounds=12),
         "overlapping": {}, "top-down": {}, "one": dict(clients=1, depth_dropout=0.0)}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_are_those_of_the_content_handed_over(case, unmetered, monkeypatch):
    monkeypatch.setattr(fllw, "initial", noisy(fllw.initial))
    config = replace(SMALL, rounds=9, method=case if case in METHODS else "fll")
    config = replace(config, **BYTES[case])
    plan = {"overlapping": overlapping, "top-down": top_down}.get(case, fllw.stages)
    client = Counting()
    _, history = fllw.federate(config, images(), None, no_two_alike, client, plan)
    for row in history:
        counted = np.mean(client.rows[row["round"]], 0)
        for key, value in zip(("download", "stateless_download", "upload"), counted):
            assert row[f"{key}_bytes"] == pytest.approx(value), (key, row["round"])
    if case != "sampled":  # cost() asks what one that is always there pays
        paid = fllw.cost(config, SHAPE, plan=plan)
        for key in ("download_bytes", "stateless_download_bytes", "upload_bytes", "macs"):
            assert paid[key] == pytest.approx(sum(row[key] for row in history))


def test_a_client_that_keeps_everything_receives_each_frozen_block_once(unmetered):
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


def counted_flops(config, stage, kept, n=16):
    """Multiply-accumulates that torch counts over one local step with n images."""
    counted = []

    def step(*arguments):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = ssl_loss.contrastive_step(*arguments)
        counted.append(counter.get_total_flops() // 2)
        return loss

    config = replace(config, batch_size=n, local_epochs=1)
    message = fllw.broadcast(fllw.initial(config, SHAPE), kept)
    fllw.local_train(config, stage, message, images(n).train_images, 1, 0, step=step)
    similarities = 3 * (2 * n) ** 2 * config.head_dim  # of the loss: forward, and backward twice
    return counted[0] - similarities


@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("present, active, kept", [
    ((0, 1, 2), (0, 1, 2), (0, 1, 2)), ((0,), (0,), (0,)), ((0, 1, 2), (2,), (0, 1, 2)),
    ((0, 1, 2), (2,), (2,)), ((0, 1, 2), (1, 2), (0, 1, 2)), ((0, 2), (0, 2), (0, 2))],
    ids=["end-to-end", "first stage", "last stage", "all dropped", "overlapping", "lasting"])
def test_macs_equal_what_torch_counts_over_a_local_step(present, active, kept, micro):
    config, stage, n = replace(SMALL, micro_batch=micro), Stage(1, present, active, 1), 16
    counted = counted_flops(config, stage, kept, n)
    expected = n * fllw.macs(config, stage, kept, SHAPE)
    if 0 in active:  # the paper counts a gradient of the images, which nobody needs
        expected -= 2 * n * 4 * 49 * config.dim
    assert counted == expected


def test_macs_through_a_frozen_block_above():
    stage, n = Stage(1, (0, 1, 2), (1,), 1), 16
    counted = counted_flops(SMALL, stage, (0, 1, 2), n)
    assert n * fllw.macs(SMALL, stage, (0, 1, 2), SHAPE) == counted


def test_macs_of_a_run_follow_depth_dropout_and_epochs(unmetered):
    config = replace(SMALL, local_epochs=2)
    _, history = fllw.federate(config, images())
    for row, stage in zip(history, [s for s in fllw.stages(config) for _ in range(s.rounds)]):
        each = [fllw.macs(config, stage, kept, SHAPE) for kept in row["kept_blocks"]]
        assert row["macs"] == 2 * np.mean(each)
    block = 2 * (5 * 12 * 16**2 + 2 * 5**2 * 16)  # two views, forward alone
    full, dropped = (fllw.macs(config, stage, kept, SHAPE) for kept in ((0, 1, 2), (2,)))
    assert full - dropped == 2 * block


# --------------------------------------------------------------------------------------- memory

def test_memory_meter_counts_by_hand():
    with ssl_loss.MemoryMeter() as meter:
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
        with ssl_loss.MemoryMeter() as meter:
            fllw.local_train(config, stage, message, own.train_images, 1, 0)
        predicted = fllw.step_memory(config, stage, message, stage.present, SHAPE, n)
        # more images than in two steps: a longer order in which they come, and more losses
        assert abs(meter.peak - predicted) <= 8 * 32 + 8 * 4


def test_memory_of_the_table_is_the_memory_of_the_history():
    """Clients that hold fewer images than a batch; a stage in the middle that needs most."""
    def whole_in_the_middle(config, history):
        return [Stage(1, (0, 1), (1,), 1), Stage(2, (0, 1), (0, 1), 1), Stage(3, (0, 1), (1,), 1)]

    config, d = replace(SMALL, batch_size=64, clients=6, depth=2, depth_dropout=0.0), images()
    encoder, history = fllw.federate(config, d, plan=whole_in_the_middle)
    row = fllw.result(config, d, encoder, history, plan=whole_in_the_middle)
    peaks = [one["peak_memory_bytes"] for one in history]
    assert peaks[1] > 1.2 * peaks[0] and row["peak_memory_bytes"] == max(peaks)
    full = fllw.cost(config, SHAPE, plan=whole_in_the_middle)["peak_memory_bytes"]
    assert full > 2 * max(peaks)


def test_the_peak_is_that_of_the_client_that_needs_most():
    """Through a frozen block above the active one flows a gradient; one below costs less."""
    config, server = replace(SMALL, rounds=4), fllw.initial(SMALL, SHAPE)
    _, history = fllw.federate(config, images(), plan=top_down)
    for row in history[1:3]:
        stage = top_down(config, history)[1]
        peaks = [fllw.step_memory(config, stage, server, tuple(kept), SHAPE, 20)
                 for kept in row["kept_blocks"]]
        assert row["peak_memory_bytes"] == max(peaks)
    assert min(peaks) < max(peaks)


def peak(config, number, shape=(3, 32, 32)):
    """Peak memory of stage `number` of FLL with blocks of ViT-Tiny; 0 is end-to-end."""
    whole = tuple(range(config.depth))
    stage = Stage(1, whole, whole, 1)
    if number:
        stage = Stage(1, whole[:number], whole[number - 1:number], 1)
    server = fllw.initial(config, shape, "meta")
    return fllw.step_memory(config, stage, server, stage.present, shape)


def test_memory_of_layer_wise_training_and_micro_batches():
    config = replace(PAPER, batch_size=128)
    whole = peak(config, 0)
    assert whole == pytest.approx(2.48 * 2**30, rel=0.03)
    assert all(whole / peak(config, s) >= 8 for s in (1, 12))
    cached = peak(replace(PAPER, batch_size=256, micro_batch=32), 12)
    assert 2 * whole / cached >= 35  # end-to-end grows with its batch


def test_memory_with_micro_batches_grows_by_the_cached_tokens_and_features_alone():
    config, stage, peaks = replace(SMALL, dim=32), Stage(3, (0, 1, 2), (2,), 1), []
    learner = client_of(config, stage, (0, 1, 2), (1, 28, 28))
    for n in (64, 128):
        views = normal(2 * n, 1, 28, 28)
        learner.zero_grad()
        with ssl_loss.MemoryMeter() as meter:
            ssl_loss.contrastive_step(*fllw.in_three(config, learner, stage), views,
                                      lambda z: z.square().mean(), 4)
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


def test_few_labels_learn_from_ten_of_each_class(monkeypatch):
    labels, fitted = torch.arange(300) % 3, []
    x = normal(300, 10) + 2 * nn.functional.one_hot(labels, 10)
    original = ssl_loss.logistic
    monkeypatch.setattr(ssl_loss, "logistic", lambda x, y, penalty: fitted.append(
        torch.bincount(y).tolist()) or original(x, y, penalty))
    assert ssl_loss.few_labels(x[:200], labels[:200], x[200:], labels[200:]) > 80
    assert fitted[-1] == [10, 10, 10] and all(sum(counts) <= 30 for counts in fitted)


def test_evaluation_leaves_the_encoder_alone_and_chooses_nothing_by_test_labels(monkeypatch):
    d = images()
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    before, fitted = {n: t.clone() for n, t in encoder.state_dict().items()}, []
    original = ssl_loss.logistic
    monkeypatch.setattr(ssl_loss, "logistic",
                        lambda *a: fitted.append(a[2]) or original(*a))
    for labels in (d.test_labels, 4 - d.test_labels):
        found = fllw.evaluate(encoder, d._replace(test_labels=labels), "digits")
    assert set(found) == {"knn", "linear_probe", "moved_knn", "moved_probe", "ten_labels"}
    assert same_tensors(before, encoder.state_dict())
    assert all(p.grad is None for p in encoder.parameters())
    half = len(fitted) // 2
    assert fitted[:half] == fitted[half:] and len(set(fitted)) > 1


def test_moved_images_are_the_same_every_time_and_tell_invariance():
    d = data.load("mnist5k")
    x = d.test_images[:40]
    moved = data.moved(x, "digits")
    assert torch.equal(moved, data.moved(x, "digits")) and moved.dtype == torch.uint8
    assert moved.shape == x.shape and not torch.equal(moved, x)
    assert not torch.equal(moved, data.moved(x, "digits", seed=1))
    few = data.load("mnist5k", images=400)
    few = few._replace(test_images=few.test_images[::5], test_labels=few.test_labels[::5])
    scores = fllw.evaluate(None, few, "digits")
    assert scores["moved_knn"] < scores["knn"] - 5  # raw pixels mind where a digit is


# ----------------------------------------------------------------------------------------- data

def test_embedded_digits():
    d = data.load("mnist5k")
    assert d.train_images.shape == (4000, 1, 28, 28) and d.test_images.shape == (1000, 1, 28, 28)
    assert d.train_images.dtype == torch.uint8 and d.classes == 10
    assert torch.bincount(d.train_labels).tolist() == [400] * 10
    assert torch.bincount(d.test_labels).tolist() == [100] * 10
    few, fewer = data.load("mnist5k", images=500), data.load("mnist5k", images=100)
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
def test_two_views(recipe, shape):
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


def highest(low, high):
    """In place of a draw: the upper end of its range."""
    return torch.full((1,), float(high))


@pytest.mark.parametrize("height, width", [(32, 128), (128, 32), (64, 64)])
@pytest.mark.parametrize("part", ["rotate", "shear"])
def test_a_turn_is_a_turn_in_pixels_on_any_shape(part, height, width):
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


def cifar_archive(archive, seed=0):
    """A .tar.gz in the official format with 20 records a member."""
    buffer, dice = io.BytesIO(), np.random.default_rng(seed)
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in (*archive.train, *archive.test):
            records = dice.integers(0, 256, (20, archive.label_bytes + 3072), dtype=np.uint8)
            records[:, :archive.label_bytes] %= 10
            info = tarfile.TarInfo(member)
            info.size = records.size
            tar.addfile(info, io.BytesIO(records.tobytes()))
    return buffer.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.bodies; server.fault breaks what is sent."""

    def do_GET(self):
        httpd = self.server
        body, start = httpd.bodies[self.path], 0
        httpd.requests.append(int((self.headers.get("Range") or "bytes=0-")[6:-1]))
        if httpd.fault != "no ranges":
            start = httpd.requests[-1]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        half = start + (len(body) - start) // 2
        sent = {"cut": body[start:half], "damaged": bytes(len(body) - start)}
        time.sleep(httpd.slow)
        self.wfile.write(sent.get(httpd.fault, body[start:]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The two CIFAR archives, small, on loopback."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.fault, httpd.slow, httpd.requests, httpd.bodies = "", 0, [], {}
    httpd.cache = tmp_path / "cache"
    archives = {}
    for name, archive in data.ARCHIVES.items():
        body, path = cifar_archive(archive), "/" + archive.url.rsplit("/", 1)[1]
        httpd.bodies[path] = body
        archives[name] = archive._replace(url=f"http://127.0.0.1:{httpd.server_port}{path}",
                                          size=len(body), sha256=hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(data, "ARCHIVES", archives)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("name, train", [("cifar10", 100), ("cifar100", 20)])
def test_cifar_is_downloaded_once_and_read_record_by_record(server, name, train):
    d, archive = data.load(name, server.cache), data.ARCHIVES[name]
    assert d.train_images.shape == (train, 3, 32, 32) and d.test_images.shape == (20, 3, 32, 32)
    body = server.bodies["/" + archive.url.rsplit("/", 1)[1]]
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        raw = tar.extractfile(archive.train[0]).read()
    start = 3 * (archive.label_bytes + 3072) + archive.label_bytes
    assert d.train_labels[3] == raw[start - 1]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):
        assert d.train_images[3, c, y, x] == raw[start + c * 1024 + y * 32 + x]
    data.load(name, server.cache)
    assert server.requests == [0]


@pytest.mark.parametrize("then", ["", "no ranges"])
def test_an_interrupted_download_is_resumed_or_starts_again(server, then):
    server.fault = "cut"
    with pytest.raises(InputError, match="resume"):
        data.load("cifar10", server.cache)
    server.fault = then
    assert len(data.load("cifar10", server.cache).train_images) == 100
    assert server.requests[0] == 0 < server.requests[1]


def test_what_does_not_match_its_checksum_is_never_read(server):
    server.fault = "damaged"
    with pytest.raises(InputError, match="SHA-256"):
        data.load("cifar10", server.cache)
    server.fault = ""
    data.load("cifar10", server.cache)
    path = server.cache / data.ARCHIVES["cifar10"].url.rsplit("/", 1)[1]
    body, dice = path.read_bytes(), random.Random(0)
    for _ in range(50):  # a byte here, a byte there, and some bytes less
        bad = bytearray(body[:dice.choice([len(body), dice.randrange(len(body))])])
        if bad:
            bad[dice.randrange(len(bad))] ^= 1 + dice.randrange(255)
        path.write_bytes(bad)
        with pytest.raises(InputError, match="does not match its SHA-256"):
            data.load("cifar10", server.cache)
    assert path.read_bytes() == bytes(bad) and server.requests == [0, 0]


def test_of_two_that_load_at_once_one_downloads(server):
    server.slow, loaded = 0.3, []

    def load():
        loaded.append(data.load("cifar10", server.cache).digest())

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 3 and len(set(loaded)) == 1 and server.requests == [0]


def test_no_network_is_one_sentence(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="could not download"):
        data.load("cifar10", server.cache)


@pytest.mark.parametrize("train, test", [(np.int64, np.int64), (np.int64, np.uint64),
                                         (np.uint64, np.int32), (np.uint8, np.int64)])
def test_labels_may_be_any_whole_numbers(train, test, tmp_path):
    """Joined as they are, int64 and uint64 become float64, in which 2^60 and 2^60 + 1 are one."""
    d = images()
    big, small = 2**60, 0
    numbers = [d.train_labels.numpy() + (small if np.iinfo(train).max < big else big),
               d.test_labels.numpy() + (small if np.iinfo(test).max < big else big)]
    path = save_npz(tmp_path / "l.npz", d, train_labels=numbers[0].astype(train),
                    test_labels=numbers[1].astype(test))
    again = data.load(str(path))
    assert torch.equal(again.train_labels.unique(return_inverse=True)[1], d.train_labels)
    expected = np.unique(np.concatenate([part.astype(object) for part in numbers]))
    assert again.classes == len(expected)


def test_npz_reads_medmnist_layout_and_colour(npz, tmp_path):
    d = data.load(str(npz))
    assert d.shape == SHAPE and d.train_labels.shape == (60,)
    assert all(torch.equal(a, b) for a, b in zip(d, images()))
    rgb = images(30, (3, 8, 12))
    pixels = {f"{split}_images": getattr(rgb, f"{split}_images").permute(0, 2, 3, 1).numpy()
              for split in ("train", "test")}
    path = save_npz(tmp_path / "rgb.npz", rgb, **pixels)
    assert torch.equal(data.load(str(path)).train_images, rgb.train_images)


# ---------------------------------------------------------------------------------- wrong input

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


def broken_npz(path, case):
    save_npz(path, images(), **BROKEN[case])
    if case == "no labels":
        np.savez(path, train_images=images().train_images[:, 0].numpy())
    if case == "no zip":
        path.write_text("hello")
    if case == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    return path


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(tmp_path, *arguments, out="out"):
    """The command says one sentence and touches nothing."""
    before = files(tmp_path)
    given = ["--device", "cpu", *arguments]
    if out:
        given += ["--out", tmp_path / out]
    with pytest.raises(InputError) as said:
        fllw.main(list(map(str, given)))
    text = str(said.value)
    assert len(text) > 20 and "\n" not in text and files(tmp_path) == before
    return text


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_npz_is_refused(case, tmp_path):
    assert "broken.npz" in refused(tmp_path, "--data", broken_npz(tmp_path / "broken.npz", case))


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
--client-failure 1.5: --client-failure
--clients 2001: 4002
--clients 2001 --alpha 1: 4002
--clients 4 --clients-per-round 5: --clients
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
--head-dim 0: --head-dim
--seed -1: --seed
--rounds many: --rounds
--method magic: magic
--speed 3: --speed
--images 5000: 4,000
--images 3 --clients 2: 4
--device tpu9: tpu9
--device meta: meta
--device cuda:99: cuda:99
--resume here: --resume
--depth 1 --depth-dropout 0.5 --rounds 9: --depth-dropout
--method e2e --depth-dropout 0.5: --depth-dropout
--method progressive --depth-dropout 0.5: --depth-dropout
--method e2e --blocks-per-stage 2: --blocks-per-stage
--method e2e --first-share 0.5: --first-share
--method e2e --new-block zero: --new-block
--blocks-per-stage 4 --first-share 0.5: --first-share
"""


@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_or_useless_setting_is_refused(case, tmp_path):
    arguments, word = case.rsplit(": ", 1)
    assert word in refused(tmp_path, *arguments.split())


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
    assert re.search("no run folder|cannot work|belongs to a run", said)


def raises(error):
    raise error


def test_a_wrong_command_is_one_sentence_and_exit_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["there/fllw.py", "--dim", "30"])
    for error, status in ((None, 2), (InputError("a sentence"), 2), (OSError("disk full"), 1),
                          (FloatingPointError("round 3"), 1), (KeyboardInterrupt(), 130)):
        body = fllw.main if error is None else functools.partial(raises, error)
        with pytest.raises(SystemExit) as stop:
            fllw.command(body)
        said = capsys.readouterr().err or str(stop.value.code)
        code = stop.value.code if isinstance(stop.value.code, int) else 1  # a text exits with 1
        assert code == status and len(said.strip().splitlines()) == 1
        assert status != 2 or said.startswith("fllw.py: ")


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


def test_fuzzed_npz_files(npz, tmp_path):
    good, dice, refusals = npz.read_bytes(), random.Random(0), 0
    for _ in range(200):
        (tmp_path / "bad.npz").write_bytes(mutated(good, dice))
        try:
            d = data.load(str(tmp_path / "bad.npz"))
            assert d.train_images.dtype == torch.uint8 and len(d.train_labels) == 60
        except InputError as error:
            assert "bad.npz" in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 100


FUZZ_VALUES = ("0 1 2 3 5 8 64 -1 0.5 1e-9 1e9 1e308 1e400 inf nan -0 x '' 0x10 9999999999 "
               "fll e2e lasting progressive copy zero auto token cpu cuda:7 meta mnist5k").split()


def test_fuzzed_command_lines(monkeypatch):
    """What is accepted can be planned and named; anything else is an InputError."""
    accepted, dice = [], random.Random(0)
    monkeypatch.setattr(fllw, "run", accepted.append)
    flags = ["--" + f.name.replace("_", "-") for f in fields(Config) if f.name != "depth"]
    said = set()
    for _ in range(600):
        arguments = []
        for flag in dice.sample(flags, dice.randint(0, 4)):
            arguments += [flag, dice.choice(FUZZ_VALUES)][:dice.choice([1, 2, 2, 2, 2, 2])]
        try:
            fllw.main(["--device", "cpu", *arguments])
        except InputError as error:
            assert "\n" not in str(error)
            said.add(str(error).split(" it is")[0])
    assert len(accepted) > 100 and len(said) > 30
    for config in accepted:
        assert sum(stage.rounds for stage in fllw.stages(config)) == config.rounds
        assert fllw.label(config)


# ----------------------------------------------------------------- run folders and the command

ROW = {"round", "stage", "present_blocks", "active_blocks", "clients", "kept_blocks", "loss",
       "download_bytes", "stateless_download_bytes", "upload_bytes", "macs", "peak_memory_bytes",
       "lost", "rejected", "seconds"}


def child(arguments, output, env, dies_at, metered, room):
    """In a process of its own: the command, which at its dies_at-th write kills itself.

    room: bytes that a file may have, 0 for any number, as on a disk that is nearly full."""
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    sys.argv = ["fllw.py"]
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w")
    writes, fsync = iter(range(1, 1000)), os.fsync

    def dying(descriptor):
        if next(writes) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying
    if not metered:
        fllw.step_memory = no_memory
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    fllw.command(functools.partial(fllw.main, list(map(str, arguments))))


TORCHS = re.compile(r"\[[WE]\d")


class Children:
    """Commands in processes that are forked from one which has imported torch: that is quick."""

    def __init__(self, folder):
        self.context, self.folder, self.count = multiprocessing.get_context("forkserver"), folder, 0
        self.context.set_forkserver_preload(["pytest", "torch._dynamo", "fllw"])

    def start(self, *arguments, env=(), dies_at=0, metered=False, room=0):
        self.count += 1
        output = self.folder / f"output{self.count}"
        everything = (arguments, output, dict(env), dies_at, metered, room)
        process = self.context.Process(target=child, args=everything)
        process.start()
        process.output = output
        return process

    def run(self, *arguments, **more):
        """(exit status, all that was printed but for torch's own notes)"""
        return self.end(self.start(*arguments, **more))

    def end(self, process):
        process.join(300)
        process.kill()
        lines = process.output.read_text().splitlines()
        return process.exitcode, "\n".join(line for line in lines if not TORCHS.match(line))


@pytest.fixture(scope="session")
def children(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(HERE))
        yield Children(tmp_path_factory.mktemp("children"))


@pytest.fixture(scope="session")
def finished(npz, children, tmp_path_factory):
    """A finished run: its folder and what the command printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    status, printed = children.run("--data", npz, *TINY, "--out", folder, metered=True)
    assert status == 0, printed
    return folder, printed


def saved_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def saved_tensors(folder):
    return torch.load(folder / "encoder.pt", weights_only=True)


def test_the_command_leaves_a_run_folder(npz, finished, unmetered, tmp_path, capsys):
    folder, printed = finished
    assert {"config.json", "history.json", "summary.json", "encoder.pt"} < set(os.listdir(folder))
    assert not list(folder.glob("*.tmp"))
    history, summary = saved_json(folder, "history"), saved_json(folder, "summary")
    assert [row["round"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == ROW for row in history)
    assert len(re.findall(r"^ +\d +\d +\d\.\d{3} ", printed, re.M)) == 6
    assert all(words in printed for words in ("raw pixels", "FLL + FDD 0.25", "end-to-end"))
    encoder, d = fllw.load_encoder(folder), data.load(str(npz))
    assert same_tensors(encoder.state_dict(), saved_tensors(folder))
    scores = fllw.evaluate(encoder, d, "natural")
    assert scores == {key: summary["FLL + FDD 0.25"][key] for key in scores}
    run_here(capsys, "--data", npz, *TINY, "--out", tmp_path / "again")  # the same everywhere
    assert same_tensors(saved_tensors(tmp_path / "again"), saved_tensors(folder))
    for row, again in zip(history, saved_json(tmp_path / "again", "history")):
        assert all(row[key] == again[key] for key in ROW - {"seconds", "peak_memory_bytes"})


def test_a_finished_run_shows_its_table_and_is_left_as_it_was(npz, finished, capsys):
    folder, printed = finished
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    again = run_here(capsys, "--data", npz, *TINY, "--out", folder)
    table = fllw.table(saved_json(folder, "summary"))
    assert "finished" in again and table in again and table in printed
    assert before == {path: path.read_bytes() for path in folder.glob("*.*")}


def test_a_folder_belongs_to_its_settings_and_images(npz, finished):
    folder, _ = finished
    before = files(folder)
    for other in (["--rounds", 3], ["--seed", 1], ["--lr", 0.5], ["--method", "e2e"]):
        assert other[0][2:] in refused(folder.parent, "--data", npz, *TINY, *other, out="run")
    swapped = npz.read_bytes()
    try:  # another file of the same name and shape
        save_npz(npz, images(seed=1))
        assert "images" in refused(folder.parent, "--data", npz, *TINY, out="run")
    finally:
        npz.write_bytes(swapped)
    assert files(folder) == before


def test_default_folders_tell_methods_apart_and_keep_a_finished_run(npz, tmp_path, monkeypatch,
                                                                    unmetered, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fllw, "evaluate", lambda *_: {"knn": 50.0})
    for more in ([], ["--depth-dropout", 0], ["--method", "e2e"], ["--seed", 1]):
        run_here(capsys, "--data", npz, *TINY, "--rounds", 3, *more)
    assert len(os.listdir("runs")) == 4
    before = files(tmp_path)
    refused(tmp_path, "--data", npz, *TINY, "--rounds", 4, "--dim", 32, out=None)
    assert files(tmp_path) == before


def test_one_process_at_a_time_in_a_folder(npz, tmp_path):
    config, d = replace(SMALL, out=str(tmp_path / "run")), images()
    with fllw.run_folder(config, d):
        with pytest.raises(InputError, match="temporarily unavailable") as said:
            with fllw.run_folder(config, d):
                pass
        assert "\n" not in str(said.value)
    with fllw.run_folder(config, d) as (folder, state):
        assert state is None and folder == tmp_path / "run"


def test_a_folder_notes_its_experiment(tmp_path):
    config, d = replace(SMALL, out=str(tmp_path / "run")), images()
    with fllw.run_folder(config, d, "calibrate 2"):
        pass
    for other in ("", "calibrate 3"):
        with pytest.raises(InputError, match="experiment"):
            with fllw.run_folder(config, d, other):
                pass


CHECKPOINTS = {
    "a name": lambda s: s["server"].update(nobody=s["server"].pop("head.0.weight")),
    "a tensor less": lambda s: s["server"].pop("encoder.norm.bias"),
    "a shape": lambda s: s["server"].update({"head.0.weight": torch.zeros(2, 2)}),
    "a type": lambda s: s["server"].update({"head.0.weight": torch.zeros(24, 16).double()}),
    "a block too many": lambda s: s["server"].update({"encoder.blocks.7.norm1.weight":
                                                      torch.zeros(16)}),
    "no tensor": lambda s: s["server"].update({"head.0.weight": 3}),
    "versions": lambda s: s["version"].popitem(),
    "image shape": lambda s: s.update(shape=(1, 14, 15)),
    "no history": lambda s: s.update(history=5),
    "strange rows": lambda s: s.update(history=[torch.zeros(2)]),
    "held": lambda s: s.update(held=[1]),
    "changes": lambda s: s.update(changes="many"),
    "a key less": lambda s: s.pop("server"),
    "a key more": lambda s: s.update(weights=1)}


@pytest.fixture
def unfinished(npz, finished, tmp_path):
    """A copy of the finished run without what its end added."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in ("config.json", "checkpoint.pt"):
        (folder / name).write_bytes((finished[0] / name).read_bytes())
    return folder


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused(case, npz, unfinished, unmetered, monkeypatch):
    path = unfinished / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    CHECKPOINTS[case](content)
    torch.save(content, path)
    monkeypatch.setattr(fllw, "evaluate", lambda *_: {"knn": 50.0})
    with pytest.raises(InputError, match="no checkpoint of this run"):
        fllw.main(list(map(str, ["--data", npz, *TINY, "--out", unfinished])))


def test_fuzzed_checkpoints_and_settings(npz, unfinished):
    """Every file of a run folder: what is damaged is refused in one sentence."""
    dice, config = random.Random(0), replace(SMALL, augment="auto", depth_dropout=0.25)
    d = data.load(str(npz))
    config = replace(config, data=str(npz), out=str(unfinished))
    for name, times in (("checkpoint.pt", 60), ("config.json", 60)):
        path, refusals = unfinished / name, 0
        good = path.read_bytes()
        for _ in range(times):
            path.write_bytes(mutated(good, dice))
            try:
                with fllw.run_folder(config, d) as (_, state):
                    assert len(state.history) == 6
            except InputError as error:
                assert "\n" not in str(error)
                refusals += 1
        path.write_bytes(good)
        assert refusals > times / 2, name
    with fllw.run_folder(config, d) as (_, state):
        assert len(state.history) == 6


@pytest.mark.parametrize("content", [b"", b"[]", b'{"raw pixels": 3}', b'{"a": {"knn": [{}]}}'])
def test_a_damaged_table_is_one_sentence(content, npz, unfinished):
    (unfinished / "summary.json").write_bytes(content)
    with pytest.raises(InputError) as said:
        fllw.main(list(map(str, ["--data", npz, *TINY, "--out", unfinished])))
    assert "summary.json" in str(said.value) and "\n" not in str(said.value)


def test_an_encoder_that_is_not_there_or_damaged_is_one_sentence(finished, unfinished):
    dice, good = random.Random(0), (finished[0] / "encoder.pt").read_bytes()
    for folder in ("nowhere", str(unfinished), __file__):
        with pytest.raises(InputError, match="no finished run"):
            fllw.load_encoder(folder)
    for _ in range(60):
        (unfinished / "encoder.pt").write_bytes(mutated(good, dice))
        try:
            fllw.load_encoder(unfinished)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["checkpoint.pt", "encoder.pt"])
def test_a_flipped_byte_in_a_tensor_is_noticed(name, finished, unfinished):
    content = bytearray((finished[0] / name).read_bytes())
    tensor = saved_tensors(finished[0])["blocks.2.mlp.fc1.weight"]
    content[content.index(tensor.numpy().tobytes()) + tensor.nbytes // 2] ^= 255
    (unfinished / name).write_bytes(content)
    with pytest.raises(InputError):
        if name == "encoder.pt":
            fllw.load_encoder(unfinished)
        fllw.load_checkpoint(unfinished, SMALL, SHAPE)


def test_nothing_is_unpickled(unfinished, npz, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"server": Trap()}, unfinished / "checkpoint.pt")
    torch.save({"norm.bias": Trap()}, unfinished / "encoder.pt")
    np.savez(tmp_path / "trap.npz", train_labels=np.array([Trap()], dtype=object))
    for call in (functools.partial(fllw.load_checkpoint, unfinished, SMALL, SHAPE),
                 functools.partial(fllw.load_encoder, unfinished),
                 functools.partial(data.load, str(tmp_path / "trap.npz"))):
        with pytest.raises(InputError):
            call()
    assert not (tmp_path / "sprung").exists()


def test_help_explains_every_setting_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        fllw.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and repr(f.default) in text
        assert len(f.metadata["help"]) > 10
    groups = ["data:", "model:", "layer-wise:", "federation:", "training:", "run:"]
    places = [text.index(group) for group in groups]
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


# --------------------------------------------------- several processes, killed or side by side

def test_a_run_killed_at_every_kind_of_write_goes_on_to_the_same_bits(npz, children, tmp_path):
    arguments = ["--data", npz, *TINY, "--client-failure", 0.3, "--local-epochs", 2, "--out"]
    assert children.run(*arguments, tmp_path / "whole")[0] == 0
    folder, killed = tmp_path / "killed", 0
    for dies_at in (1, 2, 3, 4, 5, 3, 4, 1):  # the settings, rounds, history, encoder, table
        status, _ = children.run(*arguments, folder, dies_at=dies_at)
        killed += status == -signal.SIGKILL
        left = {path.name for path in folder.glob("*.json")}
        assert all(saved_json(folder, name[:-5]) is not None for name in left)
    assert killed == 8
    status, printed = children.run(*arguments, folder)
    assert status == 0, printed
    assert timeless(saved_json(folder, "history")) == timeless(saved_json(tmp_path / "whole",
                                                                          "history"))
    assert same_tensors(saved_tensors(folder), saved_tensors(tmp_path / "whole"))
    assert not list(folder.glob("*.tmp"))


def test_a_run_killed_at_random_moments_goes_on(npz, children, tmp_path):
    arguments = ["--data", npz, *TINY, "--rounds", 90, "--local-epochs", 4, "--out", tmp_path / "r"]
    dice, done = random.Random(0), -1
    for _ in range(3):
        process = children.start(*arguments)
        while not (tmp_path / "r" / "checkpoint.pt").exists():
            time.sleep(0.01)
        time.sleep(dice.random())
        process.kill()
        process.join()
        state = fllw.load_checkpoint(tmp_path / "r", SMALL, SHAPE)
        assert 90 > len(state.history) >= done
        assert [row["round"] for row in state.history] == list(range(1, len(state.history) + 1))
        done = len(state.history)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(npz, children, finished, tmp_path):
    arguments = ["--data", npz, *TINY, "--out", tmp_path / "run"]
    for room in (300, 20_000):  # too little for the settings; for a checkpoint
        status, printed = children.run(*arguments, room=room)
        assert status in (1, 2) and "Traceback" not in printed, printed
        assert len(re.findall("File too large", printed)) == 1
    assert children.run(*arguments)[0] == 0
    assert same_tensors(saved_tensors(tmp_path / "run"), saved_tensors(finished[0]))


def test_an_interrupt_while_tensors_are_packed_leaves_no_file(monkeypatch, tmp_path):
    def interrupted(content, file):
        file.write(b"half of them")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fllw.write(tmp_path / "checkpoint.pt", {})
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_one_sentence(npz, children, tmp_path):
    process = children.start("--data", npz, *TINY, "--rounds", 900, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    status, printed = children.end(process)
    assert status == 130 and "the same command goes on" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_two_of_one_command_at_once(npz, children, tmp_path):
    arguments = ["--data", npz, *TINY, "--rounds", 30, "--out", tmp_path / "run"]
    first, second = children.start(*arguments), children.start(*arguments)
    ends = sorted([children.end(first), children.end(second)])
    assert [status for status, _ in ends] == [0, 2], ends
    assert "temporarily unavailable" in ends[1][1] and len(ends[1][1].strip().splitlines()) == 1
    assert len(saved_json(tmp_path / "run", "history")) == 30


def test_no_reader_ever_sees_half_a_file(tmp_path):
    path, seen, stop = tmp_path / "a.json", set(), threading.Event()
    contents = [[i] * 20_000 for i in range(2)]
    fllw.write(path, contents[0])

    def read():
        while not stop.is_set():
            seen.add(hashlib.sha256(path.read_bytes()).digest())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        fllw.write(path, contents[i % 2])
    stop.set()
    reader.join()
    expected = {hashlib.sha256(json.dumps(c, indent=1).encode()).digest() for c in contents}
    assert seen <= expected and os.listdir(tmp_path) == ["a.json"]


def test_two_writers_do_not_take_each_others_file(tmp_path, monkeypatch):
    """Between opening and renaming, another process writes the same file."""
    path, replaced, others = tmp_path / "a.json", os.replace, []

    def meanwhile(source, target):
        if not others:
            others.append(source)
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                fllw.write(path, ["other"])
        replaced(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    fllw.write(path, ["mine"])
    assert json.loads(path.read_text()) == ["mine"] and os.listdir(tmp_path) == ["a.json"]


# ------------------------------------------------------------------------------------ on a GPU

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
    states = {}
    for device in ("cpu", "cuda"):
        config = replace(SMALL, device=device, rounds=3)
        encoder, history = fllw.federate(config, images())
        states[device] = history
        assert next(encoder.parameters()).device.type == device
        assert all(row["peak_memory_bytes"] > 0 for row in history)
    for a, b in zip(*states.values()):  # draws differ, costs do not
        assert all(a[key] == b[key] for key in ROW - {"loss", "seconds", "peak_memory_bytes"})
        assert a["loss"] == pytest.approx(b["loss"], rel=0.3)


@needs_gpu
@pytest.mark.parametrize("more", [{}, {"amp": True}, {"micro_batch": 4}], ids=str)
def test_training_goes_on_from_a_checkpoint_on_a_gpu(more, tmp_path):
    config, d = replace(SMALL, device="cuda", out=str(tmp_path / "run"), **more), images()
    whole, history = fllw.federate(config, d)

    def stop(row, state):
        if row["round"] == 4:
            raise KeyboardInterrupt

    for on_round in (stop, None):
        with fllw.run_folder(config, d) as (folder, state):
            try:
                again, longer = fllw.train(config, d, folder, state, on_round)
            except KeyboardInterrupt:
                assert state is None
    for a, b in zip(history, longer, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["download_bytes"] == b["download_bytes"]
    assert fllw.load_encoder(folder).pos_embed.device.type == "cpu"


@needs_gpu
def test_memory_on_a_gpu_is_a_clients_own():
    config = replace(SMALL, device="cuda", dim=64, batch_size=32, rounds=3, depth_dropout=0.0)
    keep = torch.empty(2**28, device="cuda")  # that others hold something is not the client's
    _, history = fllw.federate(config, images(200))
    expected = fllw.cost(config, SHAPE)["peak_memory_bytes"]
    assert all(row["peak_memory_bytes"] < 4 * expected for row in history) and keep.numel()


# ------------------------------------------------------------------- the notebook and the code

MODULES = ("fllw", "ssl_loss", "data")


def notebook():
    return (HERE / "demo.ipynb").read_text()


def imports(source):
    """The modules that a text imports, by their first names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_notebook_is_committed_executed_and_clean():
    text = notebook()
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5 and len(text) < 2e6
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert not [kind for kind in kinds if "javascript" in kind or "widget" in kind]
    source = "\n".join("".join(c["source"]) for c in cells if "".join(c["source"])[:1] not in "%!")
    allowed = {*MODULES, "experiments", "matplotlib", "numpy", "torch", "IPython"}
    assert imports(source) <= allowed | set(sys.stdlib_module_names)
    assert not [path for path in ("/work/", "/tmp/", "/home/", "/root/") if path in text]


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_numpy_torch_and_the_standard_library(module):
    allowed = {"numpy", "torch", *MODULES} | set(sys.stdlib_module_names)
    assert imports((HERE / f"{module}.py").read_text()) <= allowed  # and so not experiments


def test_no_line_is_over_100_columns():
    lines = [(path.name, line) for path in [*HERE.glob("*.py"), *HERE.glob("experiments/*.py")]
             for line in path.read_text().splitlines()]
    for i, cell in enumerate(json.loads(notebook())["cells"]):
        lines += [(f"cell {i}", line) for line in "".join(cell["source"]).splitlines()]
    assert not [line for line in lines if len(line[1]) > 100]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_over_40_lines(module):
    tree = ast.parse((HERE / f"{module}.py").read_text())
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)}
    assert not {name: size for name, size in sizes.items() if size > 40}


# --- experiments

def bright_bars(n=200):
    """Images in which the place of a bright bar tells the class."""
    d = images(n)
    for pixels, labels in ((d.train_images, d.train_labels), (d.test_images, d.test_labels)):
        pixels //= 4
        for i, label in enumerate(labels):
            pixels[i, :, 2 * label:2 * label + 4] += 160
    return d


def test_fine_tuning_learns_follows_its_schedule_and_leaves_the_encoder_alone(monkeypatch):
    d, rates, plain = bright_bars(), [], data.Recipe(area=(1, 1), aspect=1)
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    before, step = {n: t.clone() for n, t in encoder.state_dict().items()}, torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        self.param_groups[0]["lr"]) or step(self))
    accuracy = compare.finetune(encoder, d, plain, torch.Generator().manual_seed(0), 16, 2, 50,
                                 3e-3)
    assert accuracy > 90
    now = np.arange(1, 65) / 4  # epochs
    expected = 3e-3 * np.where(now < 2, now / 2, (1 + np.cos(np.pi * (now - 2) / 14)) / 2)
    assert rates == pytest.approx(expected)
    assert same_tensors(before, encoder.state_dict()) and not encoder.training
    assert all(p.grad is None for p in encoder.parameters())


def test_fine_tuning_with_few_labels_sees_so_many_of_each_class(monkeypatch):
    d, seen = bright_bars(), []
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    monkeypatch.setattr(data, "view", lambda x, *_: seen.append(x) or data.normalise(x))
    compare.finetune(encoder, d, None, torch.Generator().manual_seed(0), 2, labels_per_class=3)
    assert [len(x) for x in seen] == [15, 15] and torch.equal(*[x.sort(0).values for x in seen])
    places = {bytes(image.numpy()): label.item()
              for image, label in zip(d.train_images, d.train_labels)}
    assert np.bincount([places[bytes(i.numpy())] for i in seen[0]]).tolist() == [3] * 5


def small(experiment, **changes):
    """Settings of an experiment that train within a second."""
    settings = {**asdict(SMALL), "clients": 2, "rounds": 3, "depth_dropout": 0.0, **changes}
    return experiment.Settings(**settings)


def half_done_and_resumed(config, dataset, **joints):
    """State dicts of the encoder of a whole run, and of one resumed after its second round."""
    saved = []
    whole, history = fllw.federate(config, dataset, on_round=lambda row, state: saved.append(
        copy.deepcopy(state)), **joints)
    again, history_again = fllw.federate(config, dataset, saved[1], **joints)
    assert [row["loss"] for row in history] == [row["loss"] for row in history_again]
    return whole.state_dict(), again.state_dict()


def command_of(experiment, monkeypatch, tmp_path, *flags):
    """What an experiment's command would save, at a tiny size and for one seed."""
    d, saved = images(60, SHAPE), []
    monkeypatch.setattr(fllw, "step_memory", no_memory)
    monkeypatch.setattr(fllw, "evaluate", lambda encode, dataset, _: {
        "knn": float(ssl_loss.features(encode, dataset.test_images).std())})
    monkeypatch.setattr(experiment, "save", lambda *given: saved.append(given))
    np.savez(tmp_path / "bars.npz", **{name: part.squeeze(1).numpy() if part.ndim == 4 else part
                                       for name, part in zip(data.KEYS, d)})
    experiment.main(["--data", str(tmp_path / "bars.npz"), "--out", str(tmp_path / "runs"),
                     "--seeds", "1", "--images", "0", "--rounds", "2", "--depth", "2", "--dim",
                     "8", "--heads", "2", "--head-hidden", "8", "--head-dim", "4", "--batch-size",
                     "8", "--device", "cpu", "--augment", "digits", *flags])
    return saved[0][2]


def test_losses_of_the_other_objectives_against_loops_over_images():
    q, k, B, t = normal(6, 5), normal(6, 5, seed=1), 3, 0.3
    pairs = [(i, (i + B) % (2 * B)) for i in range(2 * B)]

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    expected = np.mean([2 - 2 * cosine(q[i], k[j]) for i, j in pairs])
    assert float(objectives.byol(q, k, t)) == pytest.approx(expected, rel=1e-5)
    total = 0
    for i, j in pairs:
        targets = k[B:] if i < B else k[:B]  # those of the other view
        total -= cosine(q[i], k[j]) / t - math.log(sum(math.exp(cosine(q[i], target) / t)
                                                       for target in targets))
    assert float(objectives.moco_v3(q, k, t)) == pytest.approx(2 * t * total / B, rel=1e-5)
    expected = 25 * np.mean([float(q[i, d] - q[i + B, d])**2 for i in range(B) for d in range(5)])
    for view in (q[:B].numpy(), q[B:].numpy()):
        c = np.cov(view.T)
        expected += 25 * np.mean([max(0, 1 - math.sqrt(c[d, d] + 1e-4)) for d in range(5)])
        expected += sum(c[d, e]**2 for d in range(5) for e in range(5) if d != e) / 5
    assert float(objectives.vicreg(q)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective, number", [("byol", 1), ("moco_v3", 2)])
def test_a_momentum_encoder_follows_every_step_and_gets_no_gradient(unmetered, objective,
                                                                    number):
    config, d = small(objectives, objective=objective), images(24)
    stage, state = fllw.stages(config)[number - 1], fllw.start(config, SHAPE)
    fllw.grow(config, state, stage)
    upload, losses = objectives.momentum_train(config, stage, state.server, d.train_images, 1, 0)
    online = fllw.receive(config, state.server, SHAPE, stage)  # the same with whole copies
    target = copy.deepcopy(online)
    del target.head.predictor
    follower = dict(target.named_parameters())
    optimizer = torch.optim.AdamW([p for p in online.parameters() if p.requires_grad],
                                  weight_decay=config.weight_decay)
    draws = fllw.generator(config, "cpu", fllw.TRAINING, 1, 0)
    for step, chosen in enumerate(torch.randperm(24, generator=draws).view(3, 8)):
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / 3)) / 2
        views = data.two_views(d.train_images[chosen], data.RECIPES["digits"], draws)
        loss = objectives.LOSSES[objective](online.head(online.encoder(views)),
                                            target.head(target.encoder(views)).detach(), 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step].item() == pytest.approx(loss.item(), rel=1e-4)
        assert all(p.grad is None for p in follower.values())
        assert all(p.grad.abs().sum() > 0 for p in online.head.predictor.parameters())
        for name, parameter in online.named_parameters():
            if name in follower:
                follower[name].data = 0.99 * follower[name].data + 0.01 * parameter.data
    trained = {name: p for name, p in online.named_parameters() if stage.trains(name)}
    assert upload.keys() == trained.keys() and "head.predictor.0.weight" in upload
    for name, parameter in trained.items():
        if not name.endswith(("qkv.bias", "encoder.norm.bias")):  # no gradient but rounding: keys'
            # bias moves no softmax, and batch norm takes a shift of all features away
            torch.testing.assert_close(upload[name], parameter.detach(), rtol=1e-3, atol=2e-5)


def test_published_communication_of_other_objectives(unmetered):
    """Tun et al. 2024: SimCLR 8.03 and 1.29, MoCo v3 and BYOL 8.40 and 1.66 (1000 MiB)."""
    prices = {}
    for objective in ("nt_xent", "byol", "moco_v3"):
        for method in ("e2e", "fll"):
            config = objectives.Settings(**{**asdict(PAPER), "clients": 1, "batch_size": 2,
                                            "method": method, "objective": objective})
            start = fllw.start(config, (3, 32, 32), device="meta")
            prices[objective, method] = fllw.cost(config, (3, 32, 32), state=start,
                                                  client=lambda *_: None)
    unit, sent = 1000 * 2**20, {}
    for key, price in prices.items():
        sent[key] = (price["download_bytes"] + price["upload_bytes"]) / unit
    assert sent["nt_xent", "e2e"] == pytest.approx(8.03, abs=0.015)
    assert sent["nt_xent", "fll"] == pytest.approx(1.29, abs=0.01)
    for objective in ("byol", "moco_v3"):
        assert sent[objective, "e2e"] == pytest.approx(8.40, abs=0.015)
        assert sent[objective, "fll"] == pytest.approx(1.66, abs=0.01)
        share = sent[objective, "fll"] / sent[objective, "e2e"]
        assert share == pytest.approx(1.66 / 8.40, abs=0.001)
        # ours: two views through online branch and target; 586 is one view, without the target
        plain, predictor = prices["nt_xent", "e2e"]["macs"], 540 * 3 * 2 * 256 * 512
        assert prices[objective, "e2e"]["macs"] == pytest.approx(plain * 4 / 3 + 2 * predictor)
        assert plain / 2 + predictor == pytest.approx(586e9, rel=0.02)


def test_a_momentum_encoder_copies_no_frozen_block():
    config, more = small(objectives, batch_size=2), []
    for stage in fllw.stages(config)[1:]:
        memory = {}
        for objective in ("nt_xent", "byol"):
            one = replace(config, objective=objective)
            server = fllw.initial(one, SHAPE, "meta")
            memory[objective] = fllw.step_memory(one, stage, server, stage.present, SHAPE, 0,
                                                 objectives.CLIENTS[objective])
        more.append(memory["byol"] - memory["nt_xent"])
    block = sum(t.nbytes for name, t in server.items() if fllw.block_of(name) == 0)
    predictor = sum(t.nbytes for name, t in server.items() if "predictor" in name)
    assert more[0] > block + 4 * predictor  # it and its gradient and two moments
    assert abs(more[1] - more[0]) < block / 4


@pytest.mark.parametrize("objective", ["byol", "vicreg"])
def test_other_objectives_resume_exactly_and_leave_frozen_blocks(unmetered, objective):
    joints = {"client": objectives.CLIENTS[objective]}
    config = small(objectives, objective=objective)
    assert same_tensors(*half_done_and_resumed(config, images(40), **joints))
    kept = []
    fllw.federate(config, images(40), on_round=lambda row, state: kept.append(
        {n: t for n, t in state.server.items() if fllw.block_of(n) == 0}), **joints)
    assert same_tensors(kept[0], kept[1]) and same_tensors(kept[0], kept[2])


def test_sensors_of_grey_and_colour_images():
    grey = images(4, (1, 15, 14)).train_images
    halves = multimodal.split(grey)
    assert torch.equal(halves[:, 0], grey[:, 0, :7]) and torch.equal(halves[:, 1], grey[:, 0, 8:])
    colour = grey.repeat(1, 3, 1, 1)  # without colour: luma is the grey, both chromas 128
    parts = multimodal.split(colour)
    assert (parts[:, 0].int() - grey[:, 0].int()).abs().max() <= 1 and (parts[:, 1:] == 128).all()
    red = multimodal.split(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1))
    assert red.flatten().tolist() == [76, 85, 255]  # JPEG's, by hand


def test_clip_loss_and_retrieval_against_loops(unmetered):
    z, t, B = normal(8, 5), 0.3, 4
    first, second = torch.nn.functional.normalize(z, dim=1).chunk(2)
    total = 0
    for a, b in ((first, second), (second, first)):
        for i in range(B):
            total -= math.log(math.exp(float(a[i] @ b[i]) / t)
                              / sum(math.exp(float(a[i] @ b[c]) / t) for c in range(B)))
    assert float(multimodal.clip(z, t)) == pytest.approx(total / (2 * B), rel=1e-5)
    config, d = small(multimodal), images(30, (2, 7, 14))
    server = fllw.initial(config, (2, 7, 14))
    found = multimodal.retrieval(config, server, d)
    learner = fllw.assemble(config, server, (2, 7, 14))
    with torch.no_grad():
        z = learner.head(learner.encoder(data.normalise(d.test_images)))
    a, b = torch.nn.functional.normalize(z, dim=1).chunk(2)
    places = [sorted(range(20), key=lambda c: -float(b[i] @ a[c])).index(i) for i in range(20)]
    assert found == pytest.approx({"top1": 100 * np.mean([p < 1 for p in places]),
                                   "top5": 100 * np.mean([p < 5 for p in places])})


@pytest.mark.parametrize("client, there", [(0, {"first", "second"}), (2, {"first"}),
                                           (3, {"second"})])
def test_a_client_trains_the_sensors_it_has_and_reads_no_other(unmetered, client, there):
    shape, pixels = (2, 7, 14), images(24, (2, 7, 14)).train_images
    config = small(multimodal)
    stage, state = fllw.stages(config)[1], fllw.start(config, shape)
    fllw.grow(config, state, stage)
    received = {name: t.clone() for name, t in state.server.items()}
    upload, _ = multimodal.two_sensor_train(config, stage, state.server, pixels, 1, client)
    assert same_tensors(received, state.server)
    assert {fllw.block_of(name) for name in upload} == {None, 1}  # block 0 is frozen, both halves
    for name, tensor in upload.items():
        changed = any(f".{sensor}." in name for sensor in there)
        assert changed != torch.equal(tensor, received[name]), name
    if len(there) == 1:
        other = pixels.clone()
        other[:, 1 if there == {"first"} else 0] = 7
        again, _ = multimodal.two_sensor_train(config, stage, state.server, other, 1, client)
        assert same_tensors(upload, again)


def test_two_sensors_resume_exactly_and_leave_frozen_blocks(unmetered):
    d, joints = images(48, (2, 7, 14)), {"client": multimodal.two_sensor_train}
    config = small(multimodal, clients=4, batch_size=4)
    assert same_tensors(*half_done_and_resumed(config, d, **joints))
    kept = []
    fllw.federate(config, d, on_round=lambda row, state: kept.append(
        {n: t for n, t in state.server.items() if fllw.block_of(n) == 0}), **joints)
    assert {n.split(".")[3] for n in kept[0]} == {"first", "second"}
    assert same_tensors(kept[0], kept[1]) and same_tensors(kept[0], kept[2])


def test_early_stopping_against_a_history_made_by_hand():
    follow = early_stopping.follow
    assert follow([3, 2, 1], 2, 0.1) == (0, None)
    assert follow([3, 2, 1.95, 1.89, 1.85, 1.84], 2, 0.1) == (3, 6)  # 1.89 falls by 0.11 of 2
    assert follow([3, 3, 2, 2, 2, 0], 2, 0.1) == (3, 5)
    assert follow([3, 3, 2, 2, 1], 3, 0.1) == (2, None)
    config = small(early_stopping, rounds=12, lr=1.0, tolerance=0.1)
    losses = {1: [3, 3, 3], 2: [5, 4, 4]}
    history = [{"stage": s, "loss": loss} for s, row in losses.items() for loss in row]
    plan = early_stopping.plan(config, history)
    assert [stage.rounds for stage in plan] == [3, 4, 4]
    assert [stage.rate for stage in plan] == [0.5, 1.0, 2.0]
    assert fllw.stage_of(plan, 6) == (plan[1], 3) and fllw.stage_of(plan, 7) == (plan[2], 0)


@pytest.mark.parametrize("encoder", ["vit", "cnn"])
def test_a_stage_ends_early_its_held_out_images_train_nothing(unmetered, encoder):
    joints = {"client": early_stopping.early_train, "plan": early_stopping.plan}
    config = small(early_stopping, rounds=12, tolerance=100.0, encoder=encoder,
                   new_block={"vit": "copy", "cnn": "fresh"}[encoder])
    d, kept = images(48), []  # 24 a client: 2 are held out
    assert same_tensors(*half_done_and_resumed(config, d, **joints))
    _, history = fllw.federate(config, d, on_round=lambda row, state: kept.append(
        {n: t for n, t in state.server.items() if fllw.block_of(n) == 0}), **joints)
    assert [row["stage"] for row in history] == [1] * 3 + [2] * 3 + [3] * 3  # not 4 each
    assert all(same_tensors(kept[2], later) for later in kept[3:])
    stage, state = early_stopping.plan(config, ())[0], fllw.start(config, SHAPE)
    other = d.train_images[:24].clone()
    other[:2] = 255 - other[:2]
    upload, loss = early_stopping.early_train(config, stage, state.server, d.train_images[:24],
                                              1, 0)
    again, another = early_stopping.early_train(config, stage, state.server, other, 1, 0)
    assert same_tensors(upload, again) and loss.item() != another.item()


def test_compute_of_the_cnn_against_a_flop_counter(unmetered):
    config = small(early_stopping, encoder="cnn", new_block="fresh")
    learner, plan = config.learner(SHAPE), early_stopping.plan(config, ())
    learner.load_state_dict(fllw.initial(config, SHAPE))
    forward = []
    for blocks in range(1, config.depth + 1):
        with FlopCounterMode(display=False) as flops:
            learner.encoder.lower(torch.zeros(1, *SHAPE), blocks)
        forward.append(flops.get_total_flops() / 2 - sum(forward))
    head = sum(p.numel() for p in learner.head.parameters() if p.ndim == 2)
    assert config.macs(plan[2], plan[2].present, SHAPE) == 2 * (
        forward[0] + forward[1] + 3 * forward[2] + 3 * head)


@pytest.mark.parametrize("experiment, flags, rows", [
    (objectives, (), 12), (multimodal, ("--patch-size", "7"), 3),
    (early_stopping, ("--encoders", "cnn", "--rounds", "4"), 5)])
def test_commands_of_the_family(monkeypatch, tmp_path, experiment, flags, rows):
    found = command_of(experiment, monkeypatch, tmp_path, *flags)
    assert len(found) == rows
    for row in found.values():
        assert all(np.isfinite(row[column]).all() for column in row)
    monkeypatch.setattr(fllw, "train", None)  # all is read back
    assert command_of(experiment, monkeypatch, tmp_path, *flags) == found


def test_alignment_is_a_loop_over_both_views():
    z, old = normal(2, 10, 8)
    config = replace(SMALL, temperature=0.3)
    expected = brute_nt_xent(z[:5], z[5:], 0.3) + 0.7 / 2 * (
        brute_nt_xent(z[:5], old[5:], 0.3) + brute_nt_xent(z[5:], old[:5], 0.3))
    assert alignment.criterion(config, 0.7, z, old).item() == pytest.approx(float(expected))


def test_alignment_doubles_the_first_loss_and_holds_a_client_near_what_it_received():
    """At the first step both models are the same, so the second term equals the first."""
    d, stage = images(), Stage(2, (0, 1), (1,), 1)
    message = fllw.broadcast(fllw.initial(SMALL, SHAPE), (0, 1))
    config = replace(SMALL, local_epochs=8, lr=1e-2)
    losses, moves = [], []
    for weight in (0.0, 1.0):
        upload, loss = alignment.aligned_train(weight, config, stage, message, d.train_images, 1, 0)
        losses.append(loss[0].item())
        learners = [fllw.receive(config, m, SHAPE, stage) for m in (message | upload, message)]
        views = data.normalise(d.train_images)
        own, old = [learner.head(learner.encoder(views)) for learner in learners]
        moves.append(nn.functional.cosine_similarity(own, old).mean().item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-3) and moves[1] > moves[0]


def test_the_server_calibrates_all_blocks_on_images_that_no_client_has(unmetered):
    config, d = replace(SMALL, rounds=3), images()
    clients, own = calibration.divide(config, d, 0.2)
    both = torch.cat([clients.train_images, own]).flatten(1).unique(dim=0)
    assert len(own) == 12 and torch.equal(both, d.train_images.flatten(1).unique(dim=0))
    plain, ended = [], []
    fllw.federate(config, clients, on_round=lambda row, state: plain.append(dict(state.server)))

    def on_round(row, state):
        before = dict(state.version)
        calibration.calibrate(config, own, 2, "end", row, state)
        ended.append((dict(state.server), before != state.version))

    fllw.federate(config, clients, on_round=on_round)
    assert [changed for _, changed in ended] == [False, False, True]
    assert same_tensors(ended[1][0], plain[1])
    whole = Stage(1, (0, 1, 2), (0, 1, 2), 1)
    expected, _ = fllw.local_train(replace(config, local_epochs=2), whole, plain[2], own, 3,
                                   calibration.SERVER)
    assert same_tensors(ended[2][0], expected)


def test_the_bare_loop_of_the_benchmark_is_the_local_step():
    """The same views through both, with the learning rate of a first step: the same tensors."""
    stage = Stage(2, (0, 1), (1,), 1)
    server = fllw.initial(SMALL, SHAPE)
    learner = fllw.receive(SMALL, fllw.broadcast(server, (0, 1)), SHAPE, stage)
    views = data.normalise(images(8).train_images.repeat(2, 1, 1, 1))
    frozen = learner.encoder.lower(views, 1).detach()
    z = learner.head(learner.encoder.upper(frozen, 1))
    ssl_loss.nt_xent(*z.chunk(2), SMALL.temperature).backward()
    expected = {n: p.grad.clone() for n, p in learner.named_parameters() if p.requires_grad}
    benchmark.bare_loop(SMALL, stage, learner, views, 1)
    assert same_tensors(expected, {n: p.grad for n, p in learner.named_parameters()
                                   if p.requires_grad})


def test_controls_spend_what_they_are_compared_with(unmetered):
    config = replace(SMALL, depth=4, rounds=40, depth_dropout=0.0, clients=2)
    rows = compare.variants(config)
    for key, (mine, other, measure) in compare.MATCHED.items():
        one = compare.matched(rows, key, SHAPE)
        assert replace(one, rounds=40) == rows[mine]
        spent = [sum(fllw.cost(c, SHAPE)[column] for column in measure) for c in (one, rows[other])]
        assert spent[0] == pytest.approx(spent[1], rel=0.5 / one.rounds + 1e-6), key
    assert rows["one-block"].depth == 1 and rows["two-blocks"].depth == 2
    own = compare.variants(config, 0.5)  # a rate of its own for the smallest model alone
    assert {key for key in rows if rows[key] != own[key]} == {"one-block"}
    assert own["one-block"] == replace(rows["one-block"], lr=0.5)
    assert "rate 0.5" in compare.name_of("one-block", own["one-block"], config)
    assert "pairs" not in compare.variants(replace(config, depth=3))


def test_a_comparison_goes_on_and_reads_back(npz, tmp_path, capsys, monkeypatch, unmetered):
    arguments = ["compare", "--data", str(npz), *TINY, "--rounds", "3", "--out", str(tmp_path),
                 "--rows", "raw", "one-block", "fll", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    first = capsys.readouterr().out.split("test images,")[1]
    assert "FLL" in first and "±" in first and "one block end to end" in first
    monkeypatch.setattr(fllw, "federate", None)  # would fail if anything were trained again
    compare.main()
    assert capsys.readouterr().out.split("test images,")[1] == first
    damaged = tmp_path / "fll-seed1" / "summary.json"
    damaged.write_text("{")
    for flags, sentence in (([], "damaged"), (["--lr", "0.1"], "lr"),
                            (["--finetune", "-2"], "0 or"), (["--one-block-lr", "-1"], "0 or")):
        monkeypatch.setattr(sys, "argv", [*arguments, *flags])
        with pytest.raises(InputError, match=sentence):
            compare.main()


def test_paper_scale_rehearses_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(paper_scale, "ROWS", ("scratch", "fll"))
    monkeypatch.setattr(sys, "argv", ["paper_scale", "--rehearse", "--device", "cpu", "--out",
                                      str(tmp_path / "toy"), "--minutes", "0.1"])
    paper_scale.main()
    printed = capsys.readouterr().out
    assert "images/s" in printed and "from scratch" in printed and "TFLOP/s" in printed
    rounds = json.loads((tmp_path / "toy" / "settings.json").read_text())["rounds"]
    assert rounds % 3 == 0 and rounds == len(json.loads(
        (tmp_path / "toy" / "fll-seed0" / "history.json").read_text()))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--batch-size", "64"])
    with pytest.raises(InputError, match="batch_size"):
        paper_scale.main()


def test_the_loop_in_the_readme_is_federate(unmetered):
    """With a smaller model and fewer images than the README's, by replacing two of its lines."""
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for old, new in (("fllw.Config(rounds=8)", "SMALL"), ('data.load("mnist5k")', "images()")):
        assert old in code
        code = code.replace(old, new)
    scope = {"SMALL": SMALL, "images": images}
    exec(code, scope)
    encoder, _ = fllw.federate(SMALL, images())
    assert same_tensors(encoder.state_dict(), scope["encoder"].state_dict())
