"""Tests of ssl_loss.py, fllw.py and data.py. Run: pytest test_fllw.py

Wherever there is an oracle, a test compares with it: brute force, a plain loop, a published table,
what another library printed, or another route to the same number. The order is that of the modules.
Read "the whole method, once more" to see all of FLL on one page."""
import copy
import hashlib
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
import time
from collections import defaultdict
from dataclasses import fields, replace
from functools import partial
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
ROUND_LINE = r"^ +\d +\d +\d\.\d{3} "  # stage, round, loss
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
    encoder, history = fllw.federate(config, dataset, **joints, on_round=lambda row, state:
                                     servers.append(dict(state.server)))
    return encoder, history, servers

def client_of(config, stage, kept, shape=SHAPE):
    """A client's learner with the blocks `kept`, from the seed."""
    message = fllw.broadcast(fllw.initial(config, shape), kept)
    return fllw.assemble(config, message, shape, stage.trains)

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
    assert ssl_loss.nt_xent(*normal(2, 8, 16).bfloat16(), 0.1).dtype == torch.float32

# ---------------------------------------------------------------------------------------- model

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

# ----------------------------------------------------------------------------------------- stages

def test_stages_are_those_of_the_papers():
    table = {"e2e": [(0, 12)], "progressive": [(0, s) for s in range(1, 13)],
             "fll": [(s - 1, s) for s in range(1, 13)]}
    for method, blocks in table.items():
        plan = fllw.stages(replace(PAPER, method=method))
        assert [(s.active, s.present) for s in plan] == [
            (tuple(range(first, stop)), tuple(range(stop))) for first, stop in blocks]
    by_four = [s.active for s in fllw.stages(replace(PAPER, blocks_per_stage=4))]
    assert by_four == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    lasting = fllw.stages(replace(PAPER, depth=4, method="lasting"))
    assert [(s.present, s.active) for s in lasting] == [
        ((0, 3), (0, 3)), ((0, 1, 3), (1, 3)), ((0, 1, 2, 3), (2, 3))]

def test_rounds_are_shared_equally_or_as_asked():
    def rounds_of(**more):
        return [s.rounds for s in fllw.stages(replace(SMALL, **more))]

    assert rounds_of(rounds=11) == [4, 4, 3]
    assert rounds_of(rounds=12, first_share=0.5) == [6, 3, 3]
    assert rounds_of(rounds=4, first_share=0.9) == [2, 1, 1]

def test_depth_dropout_drops_frozen_blocks_at_its_rate_and_only_those():
    config = replace(SMALL, depth=12, depth_dropout=0.3)
    stage = Stage(9, tuple(range(9)), (2, 8), 1)
    kept = [fllw.sample_kept_blocks(config, stage, r, c) for r in range(200) for c in range(10)]
    counts = np.bincount(np.concatenate(kept), minlength=9)
    assert counts[2] == counts[8] == 2000 and len(counts) == 9
    frozen = np.delete(counts, [2, 8]) / 2000
    assert np.all(np.abs(frozen - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000))
    assert len(set(kept)) > 100  # drawn anew for every client and round

EMBEDDING = ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed")

def names_that_train(names, active):
    """The head and the final norm always train, the embedding does with block 0."""
    starts = ["head.", "encoder.norm."] + [f"encoder.blocks.{b}." for b in active]
    starts += EMBEDDING if 0 in active else []
    return [name for name in names if name.startswith(tuple(starts))]

def test_clients_are_sent_no_block_that_they_dropped_and_send_what_trains():
    received = []

    def train_client(config, stage, message, images, round_number, client, progress):
        blocks = {fllw.block_of(name) for name in message} - {None}
        received.append((round_number, client, blocks))
        upload, losses = fllw.local_train(config, stage, message, images, round_number, client)
        assert set(upload) == set(names_that_train(message, stage.active))
        return upload, losses

    _, history = fllw.federate(replace(SMALL, rounds=9), images(), train_client=train_client)
    expected = [(row["round"], client, set(kept)) for row in history
                for client, kept in zip(row["clients"], row["kept_blocks"])]
    assert received == expected and any(len(kept) < 3 for *_, kept in received[-9:])

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
    """Block 1 is new; block 0 is the nearest below it, also where block 2 exists already."""
    config, server = replace(SMALL, method=method, new_block=kind), {}
    fllw.grow(config, server, fllw.stages(config)[0], SHAPE)
    first, x = dict(server), normal(3, *SHAPE)
    fllw.grow(config, server, Stage(2, present, present[1:], 1), SHAPE)
    assert same_tensors(first, {name: server[name] for name in first})
    if kind == "zero":  # the identity: no feature changes
        before, after = (fllw.encoder_of(config, s, SHAPE)(x) for s in (first, server))
        assert torch.equal(before, after)
    else:
        source = {"copy": (first, 0), "fresh": (fllw.initial(config, SHAPE), 1)}[kind]
        assert same_tensors(block_tensors(server, 1), block_tensors(*source))

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
    blocks, number, there, steps = server.encoder.blocks, 0, [], {}
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
            now, beta = server.state_dict(), config.server_momentum
            if beta:
                steps = {n: mean[n] - now[n] + beta * steps.get(n, 0) for n in mean}
                mean = {n: now[n] + steps[n] for n in mean}
            server.load_state_dict(now | mean)
    return server.encoder

def losing(ask, lost):
    """An `ask` whose clients in `lost`, pairs (round, client), train but never answer."""
    def ask_and_lose(stage, round_number, progress, messages):
        for client, answer in ask(stage, round_number, progress, messages):
            if (round_number, client) not in lost:
                yield client, answer
    return ask_and_lose

BARE = {"fll": dict(alpha=0.5), "e2e": dict(alpha=0.5, rounds=3), "progressive": dict(rounds=5),
        "lasting": dict(alpha=0.5, depth=4), "momentum": dict(server_momentum=0.6, rounds=7),
        "sampled": dict(clients=6, clients_per_round=2, alpha=1.0, local_epochs=2, rounds=5),
        "one client": dict(method="e2e", clients=1, rounds=3, local_epochs=2)}

@pytest.mark.parametrize("lost", [set(), {(1, 0), (4, 2), *((3, c) for c in range(6))}], ids=len)
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

@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_resumes_from_any_round_to_the_same_bits(momentum):
    config, d, states = replace(SMALL, rounds=7, server_momentum=momentum), images(), []

    encoder, history = fllw.federate(
        config, d, on_round=lambda row, state: states.append(copy.deepcopy(state)))
    assert len(states) == 7
    for state in states:
        again, longer = fllw.federate(config, d, state)
        assert timeless(longer) == timeless(history)
        assert same_tensors(encoder.state_dict(), again.state_dict())

# -------------------------------------------------------------------------------------- clients

def constant(sends=lambda client, name: True):
    """A client that fills each tensor that it sends with its own number."""
    def train_client(config, stage, message, images, round_number, client, progress):
        upload = {name: torch.full_like(t, client) for name, t in message.items()
                  if stage.trains(name) and sends(client, name)}
        return upload, torch.tensor([float(client)])
    return train_client

def test_each_tensor_is_averaged_over_the_clients_that_sent_it():
    """Uploads may be partial; a tensor that nobody sent stays as it was."""
    config, d = replace(SMALL, method="e2e", alpha=0.5), images(120)
    sizes = np.array(list(map(len, parts_of(config, d))))  # 3 clients, unequal
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

SPOILED = {
    "nan": lambda u: {**u, "head.0.weight": u["head.0.weight"] * math.nan},
    "infinity": lambda u: {**u, "head.0.weight": u["head.0.weight"] + math.inf},
    "shape": lambda u: {**u, "head.0.weight": u["head.0.weight"][..., :1]},
    "dtype": lambda u: {**u, "head.0.weight": u["head.0.weight"].double()},
    "unknown": lambda u: {**u, "head.7.weight": torch.ones(16)},
    "frozen": lambda u: {**u, "encoder.blocks.0.norm1.weight": torch.ones(16)}}

@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_upload_is_rejected_as_a_whole_and_the_round_goes_on(case):
    def train_client(config, stage, message, images, round_number, client, progress):
        upload, loss = constant()(config, stage, message, images, round_number, client, progress)
        return SPOILED[case](upload) if client == 1 else upload, loss

    _, history, servers = federated(SMALL, images(), train_client=train_client, plan=top_down)
    assert [answer["valid"] for answer in history[0]["answers"]] == [True, False, True]
    assert fllw.mean_loss(history[0]) == 1.0  # of 0 and 2
    assert all(torch.allclose(servers[0][name], torch.ones(()))
               for name in names_that_train(servers[0], (2,)))

@pytest.mark.parametrize("count", [0, -3, math.nan, math.inf])
def test_an_answer_without_a_count_of_images_is_rejected(count):
    reach = fllw.in_turn(SMALL, images().train_images, parts_of(SMALL, images()), constant())

    def ask(*call):
        for client, answer in reach(*call):
            yield client, answer._replace(images=count) if client == 1 else answer

    history = fllw.federate(SMALL, images(), ask=ask)[1]
    assert [answer["valid"] for answer in history[0]["answers"]] == [True, False, True]

def test_nan_on_every_client_stops_with_the_last_round_kept():
    def train_client(config, stage, message, images, round_number, client, progress):
        factor = math.nan if round_number == 3 else 1.0
        upload = {n: t * factor for n, t in message.items() if stage.trains(n)}
        return upload, torch.tensor([factor])

    state = fllw.State()
    with pytest.raises(FloatingPointError, match="round 3.*--lr"):
        fllw.federate(SMALL, images(), state, train_client)
    assert len(state.history) == 2 and all(t.isfinite().all() for t in state.server.values())

# -------------------------------------------------------------------------------------- workers
# A function that a worker runs must be one of a module.

def first_is_last(config, stage, message, images, round_number, client, progress):
    """Client 0 is the slowest, so the answers of a round arrive in another order than asked."""
    time.sleep(0.4 if client == 0 else 0)
    return fllw.local_train(config, stage, message, images, round_number, client, progress)

def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def interrupts(config, stage, message, images, round_number, client, progress):
    """Client 0 presses Ctrl-C, and nobody answers."""
    if client == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)

def test_worker_processes_give_the_bits_of_one_process():
    config, d = replace(SMALL, rounds=3, alpha=0.5), images()
    expected, history = fllw.federate(config, d)
    for workers in (1, 2, 3):
        with fllw.reach_clients(replace(config, workers=workers), d, first_is_last) as ask:
            encoder, again = fllw.federate(config, d, ask=ask)
        assert timeless(again) == timeless(history)  # so the answers came in the order asked
        assert same_tensors(encoder.state_dict(), expected.state_dict())
    assert multiprocessing.active_children() == []

def ended(body, capsys):
    """(exit status, what was said) of a command that does not reach its end."""
    with pytest.raises(SystemExit) as stop:
        fllw.command(body)
    code, said = stop.value.code, capsys.readouterr().err
    return (1, code) if isinstance(code, str) else (code, said.rstrip())  # a text exits with 1

@pytest.mark.parametrize("client, expected", [
    (dies, (1, "a worker process was killed: rerun the command to resume, with fewer --workers if "
               "memory was short")),
    (interrupts, (130, "interrupted; rerun the command to resume"))])
def test_a_killed_worker_or_ctrl_c_ends_the_command_and_leaves_no_process(client, expected, capsys):
    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if started with "&"
        with fllw.reach_clients(replace(SMALL, workers=2), images(), client) as ask:
            fllw.federate(SMALL, images(), ask=ask)

    assert ended(body, capsys) == expected
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
    def with_noise(config, shape, device="cpu"):
        tensors = initial(config, shape, device)
        if str(device) == "meta":  # no content
            return tensors
        return {n: t + 0.01 * normal(*t.shape, seed=i) for i, (n, t) in enumerate(tensors.items())}
    return with_noise

class CountingClient:
    """A client that keeps whatever it received, by its content, and knows nothing of stages: what
    it has not had before must be sent. Instead of training it adds noise.

    sends(client, name): whether it uploads a tensor; spoils(round, client): whether with NaN."""
    def __init__(self, sends=lambda client, name: True, spoils=lambda round_number, client: False):
        self.sends, self.spoils = sends, spoils
        self.had, self.rows = defaultdict(set), defaultdict(list)

    def __call__(self, config, stage, message, images, round_number, client, progress):
        content = {hashlib.sha256(t.numpy()).digest(): t.nbytes for t in message.values()
                   if t.any()}  # that a tensor is 0 is known to all
        new = sum(size for key, size in content.items() if key not in self.had[client])
        self.had[client] |= content.keys()

        noise = torch.Generator().manual_seed(1000 * round_number + client)
        factor = math.nan if self.spoils(round_number, client) else 1.0
        upload = {name: factor * t + 0.01 * torch.randn(t.shape, generator=noise)
                  for name, t in message.items() if stage.trains(name) and self.sends(client, name)}
        report = np.float64(0).nbytes + np.int64(0).nbytes  # mean loss, number of images
        kept = sorted({fllw.block_of(name) for name in message} - {None})
        self.rows[round_number].append({
            "client": client, "download_bytes": new,
            "stateless_download_bytes": sum(content.values()),
            "upload_bytes": sum(t.nbytes for t in upload.values()) + report,
            "macs": config.local_epochs * fllw.count_macs(config, stage, kept, SHAPE)})
        return upload, torch.ones(1)

def nudge(row, state):
    """An `on_round` that changes a tensor in every other round, frozen or not."""
    name = "encoder.blocks.0.norm1.weight"
    if row["round"] % 2:
        state.server[name] = state.server[name] + 1
        row["changed"] = [name]

LOST = {(r, client) for r in range(1, 10) for client in range(6) if (r + client) % 4 == 0}
SOME = {"clients": 6, "clients_per_round": 2}
SENDING = {  # (settings, client, who is lost, on_round)
    "all": ({}, CountingClient, set(), None), "sampled": (SOME, CountingClient, set(), nudge),
    "partial": (SOME, partial(CountingClient, sends=lambda client, name: client % 2
                              or "head." not in name), LOST, None),
    "rejected": (SOME, partial(CountingClient, spoils=lambda r, client: (r + client) % 3), LOST,
                 None)}

@pytest.mark.parametrize("sending", SENDING)
@pytest.mark.parametrize("new_block", ["copy", "zero", "fresh"])
@pytest.mark.parametrize("case", PLANS)
def test_the_ledger_counts_the_content_handed_over(case, new_block, sending, monkeypatch):
    monkeypatch.setattr(fllw, "initial", noisy(fllw.initial))
    (method, plan), (more, new_client, lost, on_round) = PLANS[case], SENDING[sending]
    config, d = replace(SMALL, method=method, new_block=new_block, rounds=9, **more), images()
    client = new_client()
    ask = losing(fllw.in_turn(config, d.train_images, parts_of(config, d), client), lost)
    _, history = fllw.federate(config, d, ask=ask, plan=plan, on_round=on_round)

    ledger, again = [fllw.Ledger(config, SHAPE, plan(config, ())) for _ in range(2)]
    for row in json.loads(json.dumps(history)):  # a resumed run has read its rows
        paid, clients = ledger.add(row), client.rows[row["round"]]
        assert paid == again.add(row)  # a query does not change what it looks at
        answered = {answer["client"] for answer in row["answers"]}
        for key, value in paid.items():
            total = sum(one[key] for one in clients
                        if key != "upload_bytes" or one["client"] in answered)
            assert value == pytest.approx(total / len(clients)), (key, row["round"])

@pytest.mark.parametrize("method", METHODS)
def test_cost_is_what_a_real_run_paid(method, unmetered):
    config = replace(SMALL, method=method, local_epochs=2)
    _, history = fllw.federate(config, images())
    ledger, paid = fllw.Ledger(config, SHAPE), fllw.cost(config, SHAPE)
    rows = [ledger.add(row) for row in history]
    for key in rows[0]:
        assert paid[key] == pytest.approx(sum(row[key] for row in rows)), key

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
    ((0, 1, 2), (2,), (2,)), ((0, 1, 2), (1, 2), (0, 1, 2)), ((0, 2), (0, 2), (0, 2)),
    ((0, 1, 2), (1,), (0, 1, 2))],
    ids=["end-to-end", "first", "last", "all dropped", "overlapping", "lasting", "frozen above"])
def test_macs_equal_what_torch_counts_over_a_local_step(present, active, kept, micro):
    config, stage, n = replace(SMALL, micro_batch=micro), Stage(1, present, active, 1), 16
    expected = n * fllw.count_macs(config, stage, kept, SHAPE)
    if 0 in active:  # the paper counts a gradient of the images, which nobody needs
        expected -= 2 * n * 4 * 49 * config.dim
    assert counted_macs(config, stage, kept, n) == expected

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

def test_memory_of_fake_and_real_steps_is_the_same():
    config = replace(SMALL, batch_size=16, local_epochs=2)
    for stage in fllw.stages(config)[::2]:
        message, own = fllw.broadcast(fllw.initial(config, SHAPE), stage.present), images(32)
        with fllw.MemoryMeter() as meter:
            fllw.local_train(config, stage, message, own.train_images, 1, 0)
        predicted = fllw.peak_memory(config, stage, SHAPE)
        # more images than in two steps: a longer order in which they come, and more losses
        assert abs(meter.peak - predicted) <= 8 * 32 + 8 * 4

def test_the_readmes_memory_picture():
    """ViT-Tiny on CIFAR-10's images in batches of 128: the figures that the README shows."""
    config, blocks = replace(PAPER, batch_size=128), tuple(range(12))
    whole, last = (fllw.peak_memory(config, Stage(1, blocks, active, 1), (3, 32, 32)) / 2**20
                   for active in (blocks, blocks[-1:]))
    assert (whole, last) == (pytest.approx(2479, rel=0.005), pytest.approx(291, rel=0.005))

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

def test_evaluation_chooses_nothing_by_test_labels(monkeypatch):
    """Whatever the test labels are, the same classifiers are fitted, with the same penalties."""
    d, fits, original = images(), [], ssl_loss.logistic
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    monkeypatch.setattr(ssl_loss, "logistic", lambda x, y, penalty: fits.append(
        (y.bincount().tolist(), penalty)) or original(x, y, penalty))
    for labels in (d.test_labels, 4 - d.test_labels):
        found = ssl_loss.evaluate(encoder, d._replace(test_labels=labels), "digits")
    assert set(found) == {"knn", "linear_probe", "moved_knn", "moved_probe", "ten_labels"}
    half = len(fits) // 2
    assert fits[:half] == fits[half:] and len({penalty for _, penalty in fits}) > 1
    assert fits[-1][0] == [10] * 5  # ten labels a class

# ----------------------------------------------------------------------------------------- data

def test_embedded_digits():
    d, few = data.load("mnist5k"), data.load("MNIST5K", images=500)
    assert d.train_images.shape == (4000, 1, 28, 28) and d.test_images.shape == (1000, 1, 28, 28)
    assert torch.bincount(d.train_labels).tolist() == [400] * 10
    assert torch.bincount(d.test_labels).tolist() == [100] * 10
    kept, whole, test = ({bytes(i.numpy()) for i in part}
                         for part in (few.train_images, d.train_images, d.test_images))
    assert len(kept) == 500 and kept < whole and not test & whole

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

@pytest.mark.parametrize("recipe", data.RECIPES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 24, 40), (5, 16, 16), (3, 4, 128)])
def test_two_views_are_in_range_and_follow_their_generator(recipe, shape):
    a, b, other = (data.two_views(images(12, shape).train_images, data.RECIPES[recipe],
                                  torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert a.shape == (24, *shape) and a.dtype == torch.float32 and a.abs().max() <= 1 + 1e-5
    assert torch.equal(a, b) and not torch.equal(a, other) and not torch.allclose(a[:12], a[12:])

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

def test_blur_equals_a_gaussian_convolution():
    def middle(low, high):
        return torch.full((1,), (low + high) / 2)

    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    y = data.blur(x, data.Recipe((1, 1), 1, blur=1.0), middle)
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.05) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    assert torch.allclose(y, nn.functional.conv2d(padded, kernel), atol=1e-5)

@pytest.fixture
def site(tmp_path, monkeypatch):
    """A small archive in the official format (20 records a member), behind a file:// URL."""
    archive, path, dice = data.ARCHIVES["cifar100"], tmp_path / "site.tar.gz", random.Random(0)
    with tarfile.open(path, mode="w:gz") as tar:
        for member in (*archive.train, *archive.test):
            info = tarfile.TarInfo(member)
            info.size = 20 * (2 + 3072)  # coarse label, label, pixels
            tar.addfile(info, io.BytesIO(dice.randbytes(info.size)))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data.ARCHIVES, "cifar100",
                        archive._replace(url=path.as_uri(), sha256=checksum))
    return path

def test_cifar_is_downloaded_once_and_read_record_by_record(site, tmp_path):
    d = data.load("CIFAR100", tmp_path / "cache")
    assert d.train_images.shape == (20, 3, 32, 32) and d.test_images.shape == (20, 3, 32, 32)
    with tarfile.open(site) as tar:
        raw = tar.extractfile("cifar-100-binary/train.bin").read()
    start = 3 * (2 + 3072) + 2
    assert d.train_labels[3] == raw[start - 1]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):
        assert d.train_images[3, c, y, x] == raw[start + c * 1024 + y * 32 + x]
    site.unlink()  # from now on there is only the cache
    assert data.load("cifar100", tmp_path / "cache").digest() == d.digest()
    assert os.listdir(tmp_path / "cache") == [site.name]

@pytest.mark.parametrize("there, said", [(b"", "could not download"), (b"cut", "SHA-256")])
def test_what_cannot_be_downloaded_is_one_sentence_and_leaves_nothing(there, said, site, tmp_path):
    site.write_bytes(there) if there else site.unlink()
    with pytest.raises(InputError, match=said):
        data.load("cifar100", tmp_path / "cache")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".tmp"}

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

def refused(tmp_path, *arguments, out="out"):
    """What the command says: one sentence. It touches nothing."""
    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before, given = files(), ["--device", "cpu", "--out", tmp_path / out, *arguments]
    with pytest.raises(InputError) as said:
        fllw.main(list(map(str, given)))
    text = str(said.value)
    assert len(text) > 20 and "\n" not in text and files() == before
    return text

WRONG = """
--data imagenet: mnist5k
--data nowhere.npz: nowhere.npz
--images 5000: 4,000
--images 3 --clients 2: at least 4
--clients 2001: 4002
--clients 2001 --alpha 1: 4002
--dim 30: --heads
--depth 3 --blocks-per-stage 2: --blocks-per-stage
--method lasting --depth 1: lasting
--method magic: magic
--depth-dropout 1: --depth-dropout
--clients 3 --clients-per-round 5: it is 5
--rounds 3: stages
--alpha 1e308: --alpha
--speed 3: --speed
--device tpu9: tpu9
--device meta: meta
--device cuda:99: cuda:99
--out FILE: cannot be a run folder
--out FOREIGN: other files
"""

@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_setting_is_one_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("hello")
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN" / "thesis.tex").write_text("years of work")
    arguments, words = case.rsplit(": ", 1)
    assert words in refused(tmp_path, *arguments.split())

@pytest.mark.parametrize("name", [f.name for f in fields(Config) if "low" in f.metadata])
def test_every_number_has_a_lower_limit(name):
    low = Config.__dataclass_fields__[name].metadata["low"]
    for wrong in (low - 1, math.nan):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be from {low:g} to"):
            fllw.validate(replace(SMALL, **{name: wrong}))

BROKEN = {"float images": dict(train_images=np.zeros((60, 14, 14))),
          "short labels": dict(test_labels=np.zeros(19, dtype=int)),
          "float labels": dict(train_labels=np.zeros(60)),
          "other shape": dict(test_images=np.zeros((20, 7, 14), dtype=np.uint8)),
          "beyond int64": dict(test_labels=np.full(20, 2**63, dtype=np.uint64)),
          "no pixels": dict(train_images=np.zeros((60, 0, 14), dtype=np.uint8))}

@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_npz_is_one_sentence(case, tmp_path):
    path = save_npz(tmp_path / "broken.npz", images(), **BROKEN[case])
    assert "broken.npz" in refused(tmp_path, "--data", path)

def test_images_with_channels_first_are_named_as_what_they_look_like(tmp_path):
    """[N, 3, 14, 14] reads as 3 x 14 pixels with 14 channels; the sentence says so."""
    first = {f"{split}_images": images(n, (3, 14, 14)).train_images.numpy()
             for split, n in (("train", 60), ("test", 20))}
    path = save_npz(tmp_path / "first.npz", images(), **first)
    said = refused(tmp_path, "--data", path)
    assert "[N, H, W, C]" in said and "3 x 14" in said and "14 channels" in said

@pytest.mark.parametrize("arguments, name", [
    ("--method progressive --depth-dropout 0.5", "depth-dropout"),
    ("--method e2e --blocks-per-stage 2", "blocks-per-stage"),
    ("--blocks-per-stage 4 --first-share 0.5", "first-share"), ("--depth-dropout 0.5", None)])
def test_a_flag_without_effect_is_answered_with_a_note(arguments, name, monkeypatch, capsys):
    monkeypatch.setattr(fllw, "run", lambda config: None)
    expected = f"note: --{name} changes nothing here\n" if name else ""
    assert run_here(capsys, *arguments.split()) == expected

def test_a_table_shows_means_and_spreads_also_where_only_ascii_is_known(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as PYTHONIOENCODING=ascii makes
    monkeypatch.setattr(sys, "stdout", terminal)
    rows = {"a": {"knn": [90.0, 92.0], "macs": [1e9, 3e9]}, "b": {"knn": 50.0}}
    fllw.command(lambda: print(fllw.table(rows), flush=True))
    lines = terminal.buffer.getvalue().decode().splitlines()
    assert [line.split() for line in lines[1:]] == [["a", "91.0", "?1.4", "2.00", "?1.41"],
                                                    ["b", "50.0", "-"]]

def mutated(content, dice):
    """The bytes with a few of them changed, lost or repeated."""
    bad = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        at, size = dice.randrange(len(bad)), dice.randint(1, 8)
        bad[at:at + size] = dice.choice([dice.randbytes(size), b"", 2 * bad[at:at + size]])
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
    for name in ("config.json", "checkpoint.pt"):
        (folder / name).write_bytes((finished[0] / name).read_bytes())
    return folder

@pytest.fixture
def fast(monkeypatch, unmetered):
    """Leave out the evaluation as well."""
    monkeypatch.setattr(fllw, "evaluate", lambda *_: {"knn": 50.0})

def rows_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["history"]

def tensors_of(folder):
    return torch.load(folder / "encoder.pt", weights_only=True)

def opened(npz, folder):
    """The State that `fllw.py --data npz TINY --out folder` would resume from."""
    config = replace(SMALL, augment="auto", depth_dropout=0.25, data=str(npz), out=str(folder))
    with fllw.run_folder(config, data.load(npz)) as (_, state):
        return state

def test_the_command_leaves_a_run_folder(npz, finished, capsys):
    folder, printed = finished
    assert set(os.listdir(folder)) == {"config.json", "checkpoint.pt", "encoder.pt",
                                       "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["round"] for row in rows_of(folder)] == [1, 2, 3, 4, 5, 6]
    assert len(re.findall(ROUND_LINE, printed, re.M)) == 6
    assert list(summary) == ["raw pixels", "FLL + FDD 0.25", "end-to-end", "ratio"]
    encoder = fllw.load_encoder(folder)
    assert same_tensors(encoder.state_dict(), tensors_of(folder))
    scores = ssl_loss.evaluate(encoder, data.load(npz), "natural")
    assert scores == {key: summary["FLL + FDD 0.25"][key] for key in scores}
    again = run_here(capsys, "--data", npz, *TINY, "--out", folder)
    assert "finished" in again and fllw.table(summary) in again and fllw.table(summary) in printed

def test_a_round_line_says_who_kept_which_block_and_who_failed():
    answers = [{"client": 0, "loss": 2.0, "images": 9, "valid": True},
               {"client": 2, "loss": 7.0, "images": 9, "valid": False}]
    row = {"round": 5, "stage": 3, "clients": [0, 1, 2], "answers": answers, "seconds": 1.5,
           "kept_blocks": [[0, 1, 2], [2], [1, 2]]}
    line = fllw.round_line(row, Stage(3, (0, 1, 2), (2,), 1),
                           {"download_bytes": 3e6, "upload_bytes": 4e3}, 5 * 2**20)
    assert line.split() == ("3 5 2.000 3.000 0.004 5.0 1.50 ++A ..A .+A "
                            "lost: client 1 rejected: client 2").split()

def test_a_run_killed_while_it_trains_resumes_to_the_same_bits(npz, tmp_path, capsys, fast):
    arguments = ["--data", npz, *TINY, "--rounds", 24, "--server-momentum", 0.5]
    folder = tmp_path / "killed"
    command = [sys.executable, HERE / "fllw.py", *map(str, arguments), "--out", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(rows_of(folder)) < 24
    (tmp_path / "moved.npz").write_bytes(npz.read_bytes())  # the same images under another path
    run_here(capsys, *arguments, "--data", tmp_path / "moved.npz", "--out", folder)
    run_here(capsys, *arguments, "--out", tmp_path / "whole")
    assert timeless(rows_of(folder)) == timeless(rows_of(tmp_path / "whole"))
    assert same_tensors(tensors_of(folder), tensors_of(tmp_path / "whole"))
    assert not list(folder.glob("*.tmp"))

def test_a_folder_belongs_to_its_settings_and_the_content_of_its_images(npz, finished, tmp_path,
                                                                        capsys):
    folder, _ = finished
    for other in (["--rounds", 3], ["--seed", 1], ["--lr", 0.5], ["--method", "e2e"]):
        said = refused(folder.parent, "--data", npz, *TINY, *other, out="run")
        assert "belongs to a run" in said and other[0][2:] in said
    same = tmp_path / "elsewhere.npz"
    same.write_bytes(npz.read_bytes())
    assert "finished" in run_here(capsys, "--data", same, *TINY, "--out", folder)
    other = save_npz(tmp_path / npz.name, images(seed=1))
    assert "images" in refused(folder.parent, "--data", other, *TINY, out="run")
    with pytest.MonkeyPatch.context() as patch:  # draws on a GPU are not those on a CPU
        patch.setattr(fllw, "pick_device", lambda config: torch.device("cuda"))
        with pytest.raises(InputError, match="belongs to a run with device cpu, not cuda"):
            opened(npz, folder)

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

def test_a_diverged_run_ends_with_the_advice_to_take_a_smaller_lr(npz, tmp_path, capsys):
    """The loss was finite, the features are not: no traceback of the probe's optimizer."""
    arguments = ["--data", npz, *TINY, "--method", "e2e", "--rounds", 1, "--images", 20, "--lr",
                 1e7, "--out", tmp_path / "run"]
    status, said = ended(partial(fllw.main, list(map(str, arguments))), capsys)
    assert (status, said) == (1, "the encoder's features are not finite: take a smaller --lr and "
                                 "another --out")

def test_a_finished_run_gets_its_encoder_back(npz, finished, unfinished, capsys):
    """Its summary alone is no finished run: the same command writes the encoder anew."""
    (unfinished / "summary.json").write_bytes((finished[0] / "summary.json").read_bytes())
    with pytest.raises(InputError, match="rerun its command"):
        fllw.load_encoder(unfinished)
    fllw.main(["--data", str(npz), *TINY, "--out", str(unfinished)])
    assert "is finished" not in capsys.readouterr().out
    ours, theirs = fllw.load_encoder(unfinished), fllw.load_encoder(finished[0])
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    incomplete = {name: t for name, t in ours.state_dict().items() if "blocks.1" not in name}
    torch.save(incomplete, unfinished / "encoder.pt")
    with pytest.raises(InputError, match="is damaged"):
        fllw.load_encoder(unfinished)

def test_damaged_files_are_one_sentence_or_do_no_harm(npz, finished, unfinished, tmp_path):
    """Every kind of file that is read, forty times with random damage."""
    for name in ("encoder.pt", "summary.json"):
        (unfinished / name).write_bytes((finished[0] / name).read_bytes())
    (unfinished / "bad.npz").write_bytes(npz.read_bytes())
    show = ["--data", str(npz), *TINY, "--out", str(unfinished)]
    readers = {"bad.npz": lambda: data.load(unfinished / "bad.npz"),
               "encoder.pt": lambda: fllw.load_encoder(unfinished),
               "summary.json": lambda: fllw.main(show),
               **{name: lambda: opened(npz, unfinished)
                  for name in ("checkpoint.pt", "config.json")}}
    dice = random.Random(0)
    for name, read in readers.items():
        path, refusals = unfinished / name, 0
        good = path.read_bytes()
        for _ in range(40):
            path.write_bytes(mutated(good, dice))
            try:
                read()
            except InputError as error:
                assert str(unfinished) in str(error) and "\n" not in str(error)
                refusals += 1
        path.write_bytes(good)
        read()
        assert refusals > 5, name

def test_nothing_is_unpickled(npz, unfinished, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"server": Trap()}, unfinished / "checkpoint.pt")
    torch.save({"norm.bias": Trap()}, unfinished / "encoder.pt")
    np.savez(tmp_path / "trap.npz", train_labels=np.array([Trap()], dtype=object))
    for read in (partial(opened, npz, unfinished), partial(fllw.load_encoder, unfinished),
                 partial(data.load, tmp_path / "trap.npz")):
        with pytest.raises(InputError):
            read()
    assert not (tmp_path / "sprung").exists()

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

