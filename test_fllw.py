"""Tests against oracles: brute force, a plain loop, a published table, or another road to the same number."""
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
import fllw
import ssl_loss
from fllw import Config, InputError, Stage

HERE = Path(__file__).resolve().parent
SMALL = Config(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, clients=3, rounds=6, batch_size=8,
               depth_dropout=0.5, device="cpu", augment="digits")
PAPER = Config(**fllw.PRESETS["paper"], depth_dropout=0.0, device="cpu")


def images(n=60, shape=(1, 14, 14), classes=5, seed=0):
    """Random images, for what does not depend on their content."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g)
    return data.Dataset(pixels, torch.arange(n) % classes, pixels[:20], torch.arange(20) % classes)


def run_cli(*arguments, env=None, **options):
    return subprocess.run([sys.executable, str(HERE / "fllw.py"), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, **options)


def run_here(capsys, *arguments):
    """What the command prints, run in this process, which need not start first."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        fllw.main(list(map(str, arguments)))
    finally:
        signal.signal(signal.SIGINT, handler)
    return capsys.readouterr().out


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """A file in MedMNIST's layout: labels [N, 1] and a val split."""
    path, d = tmp_path_factory.mktemp("npz") / "tiny.npz", images()
    np.savez(path, train_images=d.train_images[:, 0].numpy(), train_labels=d.train_labels[:, None].numpy(),
             val_images=d.test_images[:, 0].numpy(), val_labels=d.test_labels[:, None].numpy(),
             test_images=d.test_images[:, 0].numpy(), test_labels=d.test_labels[:, None].numpy())
    return path


TINY = "--dim 16 --depth 3 --heads 2 --head-hidden 24 --head-dim 8 --clients 3 --rounds 6 --batch-size 8 --device cpu".split()


# ------------------------------------------------------------------------------------------------- loss

def brute_nt_xent(z1, z2, t):
    z = [v / v.norm() for v in torch.cat([z1, z2]).double()]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        total -= math.log(math.exp(z[i] @ z[j] / t) / sum(math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i))
    return total / (2 * n)


@pytest.mark.parametrize("n, d, t", [(1, 3, 0.5), (2, 4, 0.1), (7, 16, 0.1), (5, 2, 1.0)])
def test_nt_xent_equals_a_double_loop(n, d, t):
    z1, z2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(n))
    assert ssl_loss.nt_xent(z1, z2, t).item() == pytest.approx(brute_nt_xent(z1, z2, t), rel=1e-5, abs=1e-6)
    assert ssl_loss.nt_xent(3 * z1, z2, t).item() == pytest.approx(ssl_loss.nt_xent(z2, z1, t).item(), rel=1e-5, abs=1e-6)


def test_nt_xent_docstring_example():
    assert ssl_loss.nt_xent(torch.eye(4), torch.eye(4), 0.5).item() == pytest.approx(math.log(math.e**2 + 6) - 2, abs=1e-6)


@pytest.mark.parametrize("z1, z2, t", [((4, 3), (4, 2), 0.1), ((4, 3), (3, 3), 0.1), ((4,), (4,), 0.1), ((0, 3), (0, 3), 0.1),
                                       ((4, 3), (4, 3), 0.0), ((4, 3), (4, 3), math.nan)])
def test_nt_xent_refuses_what_it_cannot_compare(z1, z2, t):
    with pytest.raises(ValueError):
        ssl_loss.nt_xent(torch.ones(z1), torch.ones(z2), t)


def test_nt_xent_equals_lightly():
    loss = pytest.importorskip("lightly.loss").NTXentLoss
    z1, z2 = torch.randn(2, 9, 16)
    assert ssl_loss.nt_xent(z1, z2, 0.2).item() == pytest.approx(loss(0.2)(z1, z2).item(), rel=1e-5)


@pytest.mark.parametrize("first, present", [(0, 3), (0, 1), (2, 3)], ids=["end-to-end", "first stage", "frozen below"])
@pytest.mark.parametrize("micro", [1, 3, 8, 100])
def test_micro_batches_give_the_plain_loss_and_gradients(first, present, micro):
    config, stage = replace(SMALL, depth=present), Stage(1, first, present, 1)
    views = torch.randn(16, 1, 14, 14, generator=torch.Generator().manual_seed(1))
    results = []
    for m in (0, micro):
        kept = [b for b in range(present) if b != 1 or first == 0]  # depth dropout took a frozen block
        message = fllw.broadcast(fllw.initial(config, (1, 14, 14), present), stage, kept)
        learner = fllw.receive(config, message, (1, 14, 14), stage)
        parts = fllw.split(config, learner, stage)
        loss = ssl_loss.contrastive_step(*parts, views, lambda z: ssl_loss.nt_xent(*z.chunk(2), 0.1), m)
        results.append((loss, torch.cat([p.grad.flatten() for p in learner.parameters() if p.requires_grad])))
    (plain, expected), (cached, gradient) = results
    assert cached.item() == pytest.approx(plain.item(), rel=1e-5)
    assert expected.norm() > 0.1 and (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_bf16_autocast_stays_close_and_keeps_the_loss_in_float32():
    (_, plain), (encoder, amp) = (fllw.federate(replace(SMALL, amp=a, micro_batch=m), dataset=images()) for a, m in ((False, 0), (True, 4)))
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    assert [r["loss"] for r in amp] == pytest.approx([r["loss"] for r in plain], rel=0.05) and amp[0]["loss"] != plain[0]["loss"]
    z1, z2 = torch.randn(2, 8, 16)
    assert ssl_loss.nt_xent(z1.bfloat16(), z2.bfloat16(), 0.1).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- model

def test_vit_equals_torchs_own_encoder_layers():
    """timm's arithmetic by another road: torch's TransformerEncoderLayer, pre-norm, with our weights copied in."""
    vit = fllw.ViT((8, 12), 4, 3, dim=24, depth=2, heads=3)
    with torch.no_grad():
        for p in vit.parameters():
            p += 0.1 * torch.randn(p.shape)
    x = torch.randn(5, 3, 8, 12)
    patches = nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias
    tokens = torch.cat([vit.cls_token.repeat(5, 1, 1), tokens], 1) + vit.pos_embed
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu", norm_first=True, batch_first=True, layer_norm_eps=1e-6)
        layer.load_state_dict({
            "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight, "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight, "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias})
        tokens = layer(tokens)
    tokens = nn.functional.layer_norm(tokens, (24,), vit.norm.weight, vit.norm.bias, 1e-6)
    assert torch.allclose(vit(x), tokens[:, 0], atol=1e-5)
    vit.pool = "mean"
    assert torch.allclose(vit(x), tokens[:, 1:].mean(1), atol=1e-5)


def test_vit_tiny_speaks_timms_language():
    state = fllw.ViT(32, 4, 3, 192, 12, 3).state_dict()
    assert sum(t.numel() for t in state.values()) == 5_360_832
    assert sum(t.numel() for name, t in state.items() if name.startswith("blocks.5.")) == 444_864
    block = "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias " \
            "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias".split()
    assert set(state) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
                          *(f"blocks.{i}.{name}" for i in range(12) for name in block)}
    assert state["cls_token"].shape == (1, 1, 192) and state["pos_embed"].shape == (1, 65, 192)
    assert state["patch_embed.proj.weight"].shape == (192, 3, 4, 4) and state["blocks.0.attn.qkv.weight"].shape == (576, 192)


@pytest.mark.parametrize("pool, options", [("token", {}), ("mean", {"global_pool": "avg", "fc_norm": False})])
def test_vit_equals_timm(pool, options):
    timm = pytest.importorskip("timm.models.vision_transformer")
    mine = fllw.ViT(32, 4, 3, 192, 12, 3, pool)
    theirs = timm.VisionTransformer(img_size=32, patch_size=4, in_chans=3, embed_dim=192, depth=12, num_heads=3, num_classes=0, **options)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(mine(x), theirs.eval()(x), atol=1e-4)


# -------------------------------------------------------------------------- stages, depth dropout, one client

def test_stages_are_the_family():
    table = {"e2e": [(0, 12)], "progressive": [(0, s) for s in range(1, 13)], "fll": [(s - 1, s) for s in range(1, 13)]}
    for method, blocks in table.items():
        plan = fllw.stages(replace(PAPER, method=method))
        assert [(s.first, s.present) for s in plan] == blocks and sum(s.rounds for s in plan) == 180
    assert [(s.first, s.present) for s in fllw.stages(replace(PAPER, blocks_per_stage=4))] == [(0, 4), (4, 8), (8, 12)]
    assert [s.rounds for s in fllw.stages(replace(SMALL, rounds=8))] == [3, 3, 2]
    for rounds in range(5, 60):  # the most equal split
        assert [s.rounds for s in fllw.stages(replace(SMALL, depth=5, rounds=rounds))] == list(map(len, np.array_split(range(rounds), 5)))
    share = lambda **more: [s.rounds for s in fllw.stages(replace(SMALL, rounds=12, first_share=0.5, **more))]
    assert share() == [6, 3, 3] and share(method="progressive") == [4, 4, 4]
    assert [s.rounds for s in fllw.stages(replace(SMALL, rounds=4, first_share=0.9))] == [2, 1, 1]


def test_patience_ends_a_stage_and_leaves_its_rounds_to_later_ones():
    """Against a loop that watches the losses round by round."""
    config, dice = replace(SMALL, depth=4, rounds=40, patience=3), random.Random(1)
    history, stage, begun, given = [], 1, 0, 10
    for number in range(40):
        mine = [row["loss"] for row in history[begun:]]
        best = min(range(len(mine)), key=lambda i: mine[i]) if mine else 0
        if len(mine) == given or (stage < 4 and mine and len(mine) - 1 - best >= 3):
            begun, stage = number, stage + 1
            given = math.ceil((40 - begun) / (5 - stage))
        plan = fllw.stages(config, history)
        assert sum(s.rounds for s in plan[:stage - 1]) == begun and plan[stage - 1].rounds == given and sum(s.rounds for s in plan) == 40
        history.append({"stage": stage, "loss": dice.random() if stage != 2 else -number})
    assert begun > 10 and [sum(row["stage"] == s for row in history) for s in (1, 2)] == [sum(row["stage"] == 1 for row in history), math.ceil(
        (40 - sum(row["stage"] == 1 for row in history)) / 3)]  # stage 2 improved all the time and had its full share
    _, history = fllw.federate(replace(SMALL, rounds=12, lr=1e-6, patience=1), dataset=images())  # nothing is learned
    lengths = [sum(row["stage"] == s for row in history) for s in (1, 2, 3)]
    silent = [{"stage": 1, "loss": None}] * 3
    assert fllw.stages(replace(SMALL, rounds=12, patience=1), silent)[0].rounds == 4  # a round nobody answered tells nothing
    assert sum(lengths) == 12 and lengths[0] < 4 < lengths[2]
    assert fllw.cost(replace(SMALL, rounds=12, lr=1e-6, patience=1, depth_dropout=0.0), "fll", (1, 14, 14), history)["upload_bytes"] \
        == sum(row["upload_bytes"] for row in history)


@pytest.mark.parametrize("method", ["fll", "progressive", "e2e"])
def test_a_round_changes_exactly_what_trains(method):
    config, d = replace(SMALL, method=method), images()
    for stage in fllw.stages(config):
        server = fllw.initial(config, d.shape, stage.present)
        message = fllw.broadcast(server, stage, range(stage.present))
        learner = fllw.receive(config, message, d.shape, stage)
        assert len(learner.encoder.blocks) == stage.present  # blocks after the stage do not exist
        frozen, active, head = fllw.split(config, learner, stage)
        head(active(frozen(torch.randn(4, *d.shape)))).sum().backward()
        for name, p in learner.named_parameters():
            assert stage.trains(name) or p.grad is None and not p.requires_grad
        head(active(frozen(torch.randn(4, *d.shape)))).sum().backward()
        torch.optim.AdamW(learner.parameters(), 0.1).step()
        assert all(torch.equal(p, server[name]) for name, p in learner.named_parameters() if not stage.trains(name))
        before = {name: t.clone() for name, t in server.items()}
        state = fllw.State(d.shape, server)
        fllw.run_round(config, state, stage, lambda s, m, r, c, p: (*fllw.local_train(config, s, m, d.train_images, r, c, p), 60))
        trained = {"head.", "encoder.norm."} | {f"encoder.blocks.{b}." for b in range(stage.first, stage.present)}
        trained |= {"encoder.cls", "encoder.pos", "encoder.patch"} if stage.first == 0 else set()
        for name, tensor in state.server.items():
            same = torch.equal(tensor, before[name])
            assert same != name.startswith(tuple(trained)), name


def test_depth_dropout_drops_frozen_blocks_at_its_rate_and_only_those():
    config, stage = replace(SMALL, depth=12, depth_dropout=0.3), Stage(9, 8, 9, 1)
    kept = [fllw.draw_blocks(config, stage, r, c) for r in range(200) for c in range(10)]
    counts = np.bincount(list(itertools.chain(*kept)), minlength=9)
    assert counts[8] == 2000 and len(counts) == 9
    assert np.all(np.abs(counts[:8] / 2000 - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000))
    assert len({tuple(k) for k in kept}) > 100  # drawn anew for every client and round
    assert all(k == list(range(9)) for k in (fllw.draw_blocks(replace(config, depth_dropout=0.0), stage, r, 0) for r in range(9)))


def test_a_dropped_block_is_neither_sent_nor_run():
    config, stage = SMALL, Stage(3, 2, 3, 1)
    server = fllw.initial(config, (1, 14, 14), 3)
    message = fllw.broadcast(server, stage, [0, 2])
    assert not any(".blocks.1." in name for name in message)
    learner = fllw.receive(config, message, (1, 14, 14), stage)
    full = fllw.encoder_of(config, server, (1, 14, 14))
    x = torch.randn(3, 1, 14, 14)
    assert not torch.allclose(learner.encoder(x), full(x))
    full.blocks = nn.ModuleList([full.blocks[0], full.blocks[2]])
    assert torch.equal(learner.encoder(x), full(x))


def test_evaluation_uses_every_block():
    encoder, _ = fllw.federate(replace(SMALL, depth_dropout=0.9), dataset=images())
    assert len(encoder.blocks) == 3 and all(isinstance(b, fllw.Block) for b in encoder.blocks)
    x = torch.randn(2, 1, 14, 14)
    y = encoder.lower(x, 3)
    assert torch.equal(encoder(x), encoder.norm(y)[:, 1:].mean(1))


def test_a_new_block_starts_as_a_copy_or_fresh():
    stage, shape = Stage(2, 1, 2, 1), (1, 14, 14)
    server = fllw.initial(SMALL, shape, 1)
    for new_block, same in (("copy", True), ("fresh", False)):
        grown = fllw.grow(replace(SMALL, new_block=new_block), server, shape, stage)
        assert torch.equal(grown["encoder.blocks.0.mlp.fc1.weight"], server["encoder.blocks.0.mlp.fc1.weight"])
        assert torch.equal(grown["encoder.blocks.1.mlp.fc1.weight"], server["encoder.blocks.0.mlp.fc1.weight"]) == same
        assert set(grown) == set(fllw.initial(SMALL, shape, 2))
    assert server.keys() == fllw.initial(SMALL, shape, 1).keys()  # the old state is left alone


def test_a_zero_block_changes_no_feature_and_adds_no_bytes():
    d, stage = images(), Stage(2, 1, 2, 1)
    server = fllw.initial(SMALL, d.shape, 1)
    grown = fllw.grow(replace(SMALL, new_block="zero"), server, d.shape, stage)
    before, after = (fllw.features(fllw.encoder_of(SMALL, s, d.shape), d.train_images) for s in (server, grown))
    assert torch.equal(before, after) and fllw.nbytes(grown) == fllw.nbytes(server) + 4 * 4  # four zeros of four bytes
    upload, *_ = fllw.local_train(SMALL, stage, grown, d.train_images, 1, 0)
    assert upload["encoder.blocks.1.mlp.fc2.weight"].abs().min() > 0 and not grown["encoder.blocks.1.mlp.fc2.weight"].any()


# ------------------------------------------------------------------------------- what the family adds

def test_the_server_calibrates_every_block_on_images_that_no_client_has():
    config, d = replace(SMALL, rounds=3, calibrate=2, server_share=0.2, calibrate_at="round"), images()
    parts = fllw.holdings(config, d.train_labels)
    assert len(parts[fllw.SERVER]) == 12 and torch.cat(list(parts.values())).sort().values.tolist() == list(range(60))
    assert len(fllw.holdings(replace(config, calibrate=0), d.train_labels)[fllw.SERVER]) == 0
    states = []
    fllw.federate(config, lambda row, state: states.append(dict(state.server)), d)
    assert not torch.equal(states[1]["encoder.blocks.0.mlp.fc1.weight"], states[0]["encoder.blocks.0.mlp.fc1.weight"])  # a frozen one
    # the last round once more, by hand: the clients' mean, then the server's own epochs over everything
    stage, grown = Stage(3, 2, 3, 1), fllw.grow(config, states[1], d.shape, Stage(3, 2, 3, 1))
    average = fllw.WeightedMean()
    for client in range(3):
        message = fllw.broadcast(grown, stage, fllw.draw_blocks(config, stage, 3, client))
        average.add(fllw.local_train(config, stage, message, d.train_images[parts[client]], 3, client)[0], len(parts[client]))
    own = d.train_images[parts[fllw.SERVER]]
    expected, *_ = fllw.local_train(replace(config, local_epochs=2), replace(stage, first=0), grown | average.mean, own, 3, fllw.SERVER)
    assert set(expected) == set(states[2]) and all(torch.equal(t, states[2][name]) for name, t in expected.items())
    paid = fllw.cost(replace(config, depth_dropout=0.0), "fll", d.shape)
    assert paid["download_bytes"] == paid["stateless_download_bytes"]  # no block is ever final


def test_calibration_at_the_end_is_one_more_training_by_the_server():
    config, d = replace(SMALL, rounds=4, calibrate=3, server_share=0.2), images()
    plain, ended = [], []
    fllw.federate(config, lambda row, state: ended.append((row["calibrated"], dict(state.server))), d)
    assert [done for done, _ in ended] == [False, False, False, True]
    parts = fllw.holdings(config, d.train_labels)
    rest = torch.cat([parts[c] for c in range(3)]).sort().values
    clients_only = d._replace(train_images=d.train_images[rest], train_labels=d.train_labels[rest])
    fllw.federate(replace(config, calibrate=0), lambda row, state: plain.append(dict(state.server)), clients_only)
    for (_, a), b in zip(ended[:3], plain):
        assert all(torch.equal(t, b[name]) for name, t in a.items())
    expected, *_ = fllw.local_train(replace(config, local_epochs=3), Stage(1, 0, 3, 1), plain[3], d.train_images[parts[fllw.SERVER]], 4, fllw.SERVER)
    assert all(torch.equal(t, ended[3][1][name]) for name, t in expected.items())
    with_it, without = (fllw.cost(replace(config, calibrate=c, depth_dropout=0.0), "fll", d.shape) for c in (3, 0))
    assert with_it == without  # the clients pay nothing for it


def test_a_calibration_that_diverges_is_left_out():
    state = fllw.State((1, 14, 14), fllw.initial(SMALL, (1, 14, 14), 1))
    before = dict(state.server)
    nan = lambda stage, message, *_: ({n: t * float("nan") for n, t in message.items()}, torch.zeros(1), 0, 5)
    assert not fllw.calibrate(replace(SMALL, calibrate=1, rounds=1), state, Stage(1, 0, 1, 1), nan, 0.0, (0, 1))
    assert state.server.keys() == before.keys() and all(map(torch.equal, state.server.values(), before.values()))

def test_alignment_is_a_loop_over_both_views():
    z, g = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    config = replace(SMALL, align=0.7, temperature=0.3)
    expected = brute_nt_xent(z[:5], z[5:], 0.3) + 0.7 * (brute_nt_xent(z[:5], g[5:], 0.3) + brute_nt_xent(z[5:], g[:5], 0.3)) / 2
    assert fllw.criterion(config, z, g).item() == pytest.approx(float(expected), rel=1e-5)


def test_alignment_holds_a_client_near_what_it_received():
    d, stage = images(), Stage(2, 1, 2, 1)
    message = fllw.initial(SMALL, d.shape, 2)
    views = data.two_views(d.train_images, data.RECIPES["digits"], torch.Generator().manual_seed(9))

    def drift(align):
        config = replace(SMALL, align=align, local_epochs=8, lr=1e-2)
        upload, losses, _ = fllw.local_train(config, stage, message, d.train_images, 1, 0)
        with torch.no_grad():
            own, received = (learner.head(learner.encoder(views)) for learner in
                             (fllw.receive(config, m, d.shape, stage) for m in (message | upload, message)))
        return nn.functional.cosine_similarity(own, received).mean().item(), losses[0].item()

    (free, loss), (held, both) = drift(0.0), drift(1.0)
    assert held > free + 0.04
    assert both == pytest.approx(2 * loss, rel=1e-3)  # at the first step both models are the same
    plain, aligned = (fllw.macs(replace(SMALL, align=a), Stage(3, 2, 3, 1), range(3), (1, 14, 14)) for a in (0.0, 1.0))
    embed, block, head = 4 * 49 * 16, 5 * 12 * 16**2 + 2 * 5**2 * 16, 24 * (16 + 24 + 8)
    assert aligned - plain == 2 * (embed + 3 * block + head)  # the received model forward, two views


@pytest.mark.parametrize("first, kept", [(0, [0, 1]), (1, [0, 1]), (1, [1])], ids=["end-to-end", "layer-wise", "layer-wise, dropped"])
def test_alignment_with_micro_batches_is_alignment_without(first, kept):
    d, stage = images(), Stage(2, first, 2, 1)
    message = fllw.broadcast(fllw.initial(SMALL, d.shape, 2), stage, kept)
    plain, cached = (fllw.local_train(replace(SMALL, align=1.0, micro_batch=m), stage, message, d.train_images[:16], 1, 0) for m in (0, 3))
    assert torch.allclose(plain[1], cached[1], rtol=1e-5) and len(plain[1]) == 2  # biases before a norm have no gradient
    assert all(torch.allclose(t, cached[0][name], atol=1e-5) for name, t in plain[0].items() if name.endswith("weight"))


def centralized(config, d):
    """Plain end-to-end SimCLR, written without any of the federated machinery."""
    learner = fllw.Learner(config, d.shape, config.depth)
    learner.load_state_dict(fllw.initial(config, d.shape, config.depth))
    chosen = data.partition(d.train_labels, 1, 0.0, config.seed)[0]
    for r in range(1, config.rounds + 1):
        optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=config.weight_decay, fused=True)
        g = torch.Generator().manual_seed(int(np.random.default_rng([config.seed, fllw.TRAINING, r, 0]).integers(2**63)))
        order = torch.randperm(len(chosen), generator=g)
        n = len(chosen) // config.batch_size
        for i in range(n):
            optimizer.param_groups[0]["lr"] = config.lr / 2 * (1 + math.cos(math.pi * (r - 1 + i / n) / config.rounds))
            batch = d.train_images[chosen[order[i * config.batch_size:(i + 1) * config.batch_size]]]
            z = learner.head(learner.encoder(data.two_views(batch, data.RECIPES["digits"], g)))
            optimizer.zero_grad()
            ssl_loss.nt_xent(z[:config.batch_size], z[config.batch_size:], config.temperature).backward()
            optimizer.step()
    return learner.encoder


def test_one_client_with_everything_is_centralized_training():
    config, d = replace(SMALL, method="e2e", clients=1, rounds=3), images()
    encoder, _ = fllw.federate(config, dataset=d)
    for (name, p), q in zip(encoder.named_parameters(), centralized(config, d).parameters()):
        assert torch.allclose(p, q, atol=1e-6), name


def test_fll_with_one_stage_of_all_blocks_is_end_to_end():
    results = [fllw.federate(replace(SMALL, rounds=2, **kw), dataset=images()) for kw in (dict(method="e2e"), dict(blocks_per_stage=3))]
    for a, b in zip(results[0][0].parameters(), results[1][0].parameters()):
        assert torch.equal(a, b)
    assert [r["loss"] for r in results[0][1]] == [r["loss"] for r in results[1][1]]


def test_same_seed_same_numbers_and_another_seed_others():
    (a, ha), (b, hb), (c, _) = (fllw.federate(replace(SMALL, seed=s), dataset=images()) for s in (1, 1, 2))
    drop = lambda h: [{k: v for k, v in row.items() if k != "seconds"} for row in h]
    assert drop(ha) == drop(hb) and all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.pos_embed, c.pos_embed)


def test_a_clients_result_depends_on_seed_round_and_client_alone():
    d, stage = images(), Stage(2, 1, 2, 3)
    message = fllw.initial(SMALL, d.shape, 2)
    train = lambda client: fllw.local_train(SMALL, stage, message, d.train_images, 4, client)[0]
    forward = {c: train(c) for c in (0, 1, 2)}
    torch.rand(5), np.random.rand(5)  # global generators must not matter
    backward = {c: train(c) for c in (2, 1, 0)}
    for c in range(3):
        assert all(torch.equal(forward[c][n], backward[c][n]) for n in forward[c])
    assert not torch.equal(forward[0]["head.0.weight"], forward[1]["head.0.weight"])


# ------------------------------------------------------------------------------------------------- server

def test_fedavg_equals_the_plain_weighted_mean():
    states, weights = [{"a": torch.randn(3, 2), "b": torch.randn(4)} for _ in range(5)], [3, 1, 7, 2, 2]
    average = fllw.WeightedMean()
    for state, weight in zip(states, weights):
        average.add(state, weight)
    for name in "ab":
        plain = sum(w * s[name].double() for s, w in zip(states, weights)) / sum(weights)
        assert torch.allclose(average.mean[name].double(), plain, atol=1e-6)
    one = fllw.WeightedMean()
    one.add(states[0], 3)
    assert torch.equal(one.mean["a"], states[0]["a"]) and one.mean["a"] is not states[0]["a"]


def test_a_round_is_the_weighted_mean_of_its_clients():
    config, d, stage = replace(SMALL, alpha=0.5, depth_dropout=0.0), images(), Stage(1, 0, 1, 2)
    parts = data.partition(d.train_labels, 3, 0.5, 0)
    server = fllw.initial(config, d.shape, 1)
    state = fllw.State(d.shape, server)
    work = lambda s, m, r, c, p: (*fllw.local_train(config, s, m, d.train_images[parts[c]], r, c, p), len(parts[c]))
    fllw.run_round(config, state, stage, work)
    uploads = [work(stage, server, 1, c, 0.0)[0] for c in range(3)]
    sizes = torch.tensor([float(len(p)) for p in parts])
    assert len(set(sizes.tolist())) > 1
    for name in server:
        plain = sum(s * u[name] for s, u in zip(sizes / sizes.sum(), uploads))
        assert torch.allclose(state.server[name], plain, atol=1e-6), name


def test_sampling_covers_all_clients_and_ten_thousand_work():
    config = replace(SMALL, clients=10, clients_per_round=4)
    seen = [fllw.sample_clients(config, r) for r in range(300)]
    assert all(len(set(s)) == 4 for s in seen)
    assert np.bincount(np.concatenate(seen)).min() > 300 * 0.4 * 0.7
    _, history = fllw.federate(replace(SMALL, clients=10_000, clients_per_round=2, rounds=3), dataset=images(20_000, (1, 7, 7)))
    assert [len(row["clients"]) for row in history] == [2, 2, 2]


def test_lost_clients_are_left_out_and_the_weights_renormalised():
    config, d, stage = replace(SMALL, client_failure=0.5), images(), Stage(1, 0, 1, 9)
    state = fllw.State(d.shape, fllw.initial(config, d.shape, 1))
    constant = lambda s, m, r, c, p: ({name: torch.full_like(t, c) for name, t in m.items()}, torch.zeros(1), 0, 10 * (c + 1))
    patterns = set()
    for _ in range(30):
        before = state.server
        row = fllw.run_round(config, state, stage, constant)
        here = [c for c in range(3) if c not in row["lost"]]
        patterns.add(tuple(here))
        if here:
            expected = sum(c * (c + 1) for c in here) / sum(c + 1 for c in here)
            assert state.server["encoder.norm.bias"][0].item() == pytest.approx(expected, rel=1e-6)
            assert row["upload_bytes"] == pytest.approx(fllw.nbytes(before) * len(here) / 3)
        else:
            assert row["loss"] is None and all(state.server[n] is before[n] for n in before)
    assert {(), (0, 1, 2)} < patterns and len(patterns) > 4


@pytest.mark.parametrize("spoil", [
    lambda u: {**u, "head.0.weight": u["head.0.weight"] * math.nan}, lambda u: {**u, "head.0.weight": u["head.0.weight"] + math.inf},
    lambda u: {**u, "head.0.weight": u["head.0.weight"][..., :1]}, lambda u: {**u, "head.0.weight": u["head.0.weight"].double()},
    lambda u: {n: t for n, t in u.items() if n != "head.0.weight"}, lambda u: {**u, "encoder.blocks.7.norm1.weight": torch.ones(16)}],
    ids=["nan", "infinity", "shape", "dtype", "a tensor missing", "one too many"])
def test_a_bad_upload_is_rejected_counted_and_the_round_goes_on(spoil):
    d, stage = images(), Stage(1, 0, 1, 1)
    state = fllw.State(d.shape, fllw.initial(SMALL, d.shape, 1))

    def work(stage, message, round, client, progress):
        upload = {name: torch.full_like(t, client) for name, t in message.items()}
        if client == 1:
            upload = spoil(upload)
        return upload, torch.ones(1), 0, 10

    row = fllw.run_round(SMALL, state, stage, work)
    assert row["rejected"] == [1] and row["lost"] == [] and row["loss"] == 1.0
    assert all(torch.allclose(t, torch.ones(())) for t in state.server.values())  # mean of clients 0 and 2


def test_nan_on_every_client_stops_with_the_last_round_kept():
    d, stage = images(), Stage(1, 0, 1, 1)
    state = fllw.State(d.shape, fllw.initial(SMALL, d.shape, 1))
    before = dict(state.server)
    with pytest.raises(fllw.Diverged):
        fllw.run_round(SMALL, state, stage, lambda s, m, r, c, p: ({n: t * math.nan for n, t in m.items()}, torch.tensor([math.nan]), 0, 1))
    assert state.server == before and state.history == []


# --------------------------------------------------------------------------------------------------- cost

@pytest.mark.parametrize("method, communication, compute", [("e2e", 8.03, 1185), ("fll", 1.29, 281), ("progressive", 4.68, 643)])
def test_cost_reproduces_the_published_table(method, communication, compute):
    """Tun et al. 2024: per client, 180 rounds; bytes in units of 1000 MiB, compute in 10^9 MACs for one image."""
    paid = fllw.cost(PAPER, method, (3, 32, 32))
    assert (paid["download_bytes"] + paid["upload_bytes"]) / (1000 * 2**20) == pytest.approx(communication, rel=0.01)
    published = {"e2e": 1169, "fll": 278, "progressive": 635}[method]
    assert paid["macs"] / 1e9 == pytest.approx(published, rel=0.025) and paid["macs"] / 1e9 == pytest.approx(compute, rel=0.002)


def test_cost_counts_what_training_hands_over():
    """Two roads: cost() without training, and tensors intercepted in a real run by their names alone."""
    config, d, sent, uploaded, clients = replace(SMALL, rounds=7), images(), 0, 0, 3
    original = fllw.local_train

    def spy(config, stage, message, *rest):
        nonlocal sent, uploaded
        unique = {t.data_ptr(): t for t in message.values()}
        sent += sum(t.numel() * 4 for t in unique.values())
        upload, losses, peak = original(config, stage, message, *rest)
        uploaded += sum(t.numel() * 4 for t in upload.values())
        return upload, losses, peak

    fllw.local_train = spy
    try:
        _, history = fllw.federate(config, dataset=d)
    finally:
        fllw.local_train = original
    paid = fllw.cost(config, "fll", d.shape)
    assert paid["stateless_download_bytes"] == pytest.approx(sent / clients) and paid["upload_bytes"] == pytest.approx(uploaded / clients)
    for name in ("download_bytes", "stateless_download_bytes", "upload_bytes", "macs"):
        assert paid[name] == pytest.approx(sum(row[name] for row in history))
    assert paid["download_bytes"] < paid["stateless_download_bytes"]


def test_a_client_that_keeps_everything_receives_each_frozen_block_once():
    config = replace(SMALL, depth=4, rounds=8, depth_dropout=0.0, clients=1)
    block = sum(t.numel() * 4 for t in fllw.Block(16, 2).parameters())
    embed = 4 * (16 * 49 + 16 + 16 + 5 * 16)
    always = 4 * (2 * 16 + 16 * 24 + 24 * 24 + 24 * 8 + 4 * 24)  # norm and head
    paid = fllw.cost(config, "fll", (1, 14, 14))
    # the frozen block is the very thing the next one starts from: no extra bytes; the embedding's last version is one
    assert paid["download_bytes"] == 8 * (block + always) + 3 * embed
    assert paid["upload_bytes"] == 8 * (block + always) + 2 * embed
    # stateless: the blocks below in each round, less the copy in each stage's first round
    assert paid["stateless_download_bytes"] == 8 * (always + embed) + block * (2 * (1 + 2 + 3 + 4) - 3)


def test_memory_of_fake_and_real_steps_is_the_same():
    config = replace(SMALL, batch_size=16)
    for stage in fllw.stages(config):
        message = fllw.initial(config, (1, 14, 14), stage.present)
        _, _, real = fllw.local_train(config, stage, message, images(40).train_images, 1, 0)
        assert fllw.step_memory(config, stage, range(stage.present), (1, 14, 14)) == real


def test_memory_meter_counts_by_hand():
    meter = ssl_loss.MemoryMeter("cpu")
    with meter:
        a = torch.zeros(1000)      # 4000 bytes
        b = a + 1                  # 8000
        a.add_(1), b.view(10, 100)  # in place and views take nothing
        del a                      # 4000
        c = b * 2                  # 8000
        d = (c + 1) * 3            # c + 1 and its triple: 16000 at the peak
    assert meter.peak == 16000
    del b, c, d
    assert meter.live == 0


def test_layer_wise_needs_an_eighth_of_the_memory_at_every_stage():
    config = replace(PAPER, batch_size=128)
    whole = fllw.step_memory(config, Stage(1, 0, 12, 1), range(12), (3, 32, 32))
    assert whole == pytest.approx(2.48 * 2**30, rel=0.03)
    for stage in fllw.stages(config):
        assert whole / fllw.step_memory(config, stage, range(stage.present), (3, 32, 32)) >= 8


def test_micro_batches_pay_a_second_forward_of_what_trains():
    plain, micro = (fllw.macs(replace(SMALL, micro_batch=m), Stage(3, 2, 3, 1), range(3), (1, 14, 14)) for m in (0, 4))
    assert micro - plain == 2 * (5 * 12 * 16**2 + 2 * 5**2 * 16)  # two views through one block, 5 tokens of width 16


@pytest.mark.parametrize("batch, micro, s, ratio", [(256, 16, 1, 50), (256, 16, 12, 50), (512, 16, 12, 80)])
def test_micro_batches_need_little_memory_even_at_the_last_stage(batch, micro, s, ratio):
    config = replace(PAPER, batch_size=batch)
    whole = fllw.step_memory(config, Stage(1, 0, 12, 1), range(12), (3, 32, 32))
    assert whole / fllw.step_memory(replace(config, micro_batch=micro), Stage(s, s - 1, s, 1), range(s), (3, 32, 32)) >= ratio


def test_memory_with_micro_batches_grows_by_the_cached_tokens_and_features_alone():
    config, stage, peaks = replace(SMALL, dim=32), Stage(3, 2, 3, 1), []
    learner = fllw.receive(config, fllw.initial(config, (1, 28, 28), 3), (1, 28, 28), stage)
    for n in (64, 128):
        views, meter = torch.randn(2 * n, 1, 28, 28), ssl_loss.MemoryMeter("cpu")
        learner.zero_grad()
        with meter:
            ssl_loss.contrastive_step(*fllw.split(config, learner, stage), views, lambda z: z.square().mean(), 4)
        peaks.append(meter.peak)
    tokens, feature = 4 * 17 * 32, 4 * 32  # bytes a view
    assert 128 * tokens < peaks[1] - peaks[0] <= 128 * (tokens + 4 * feature)


# --------------------------------------------------------------------------------------------- evaluation

def test_knn_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 6, generator=g), torch.randn(30, 6, generator=g)
    labels, truth = torch.arange(50) % 4, torch.arange(30) % 4
    right = 0
    for x, y in zip(test, truth):
        similarity = [(nn.functional.cosine_similarity(x, t, dim=0).item(), c) for t, c in zip(train, labels.tolist())]
        votes = [0.0] * 4
        for s, c in sorted(similarity, reverse=True)[:7]:
            votes[c] += math.exp(s / 0.07)
        right += votes.index(max(votes)) == y
    assert ssl_loss.knn(train, labels, test, truth, k=7) == pytest.approx(100 * right / 30)


def test_logistic_regression_is_at_its_optimum():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 5, generator=g), torch.arange(80) % 3
    w, b = (p.double().requires_grad_() for p in ssl_loss.logistic(x, y, 3, 0.01))
    loss = nn.functional.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
    assert all(grad.abs().max() < 1e-3 for grad in torch.autograd.grad(loss, (w, b)))


def test_probes_do_not_touch_the_encoder_nor_choose_by_test_labels(monkeypatch):
    d = images()
    encoder, _ = fllw.federate(replace(SMALL, rounds=3), dataset=d)
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    encode = lambda x: fllw.features(encoder, x)
    fllw.evaluate(encode, d)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    fitted = []
    original = ssl_loss.logistic
    monkeypatch.setattr(ssl_loss, "logistic", lambda *a: fitted.append(a[3]) or original(*a))
    for labels in (d.test_labels, 4 - d.test_labels):
        fllw.evaluate(encode, d._replace(test_labels=labels))
    half = len(fitted) // 2
    assert fitted[:half] == fitted[half:]  # the same penalties tried and chosen, whatever the test labels


def test_fine_tuning_learns_follows_its_schedule_and_leaves_the_encoder_alone(monkeypatch):
    d = images(200)
    for pixels, labels in ((d.train_images, d.train_labels), (d.test_images, d.test_labels)):
        pixels //= 4
        for i, label in enumerate(labels):
            pixels[i, :, 2 * label:2 * label + 4] += 160  # a bright bar tells the class
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, d.shape, 3), d.shape)
    before, rates = {name: t.clone() for name, t in encoder.state_dict().items()}, []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    plain = data.Recipe(area=(1, 1), aspect=1)
    tune = lambda **more: ssl_loss.finetune(encoder, d, plain, torch.Generator().manual_seed(0), batch_size=50, lr=3e-3, **more)
    assert tune(epochs=16, warmup=2) > 90
    expected = [3e-3 * (e / 2 if e < 2 else (1 + math.cos(math.pi * (e - 2) / 14)) / 2) for e in np.arange(1, 65) / 4]
    assert rates == pytest.approx(expected)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters()) and not encoder.training
    seen = []
    monkeypatch.setattr(data, "view", lambda x, *_: seen.append(x) or data.normalise(x))
    tune(epochs=2, labels_per_class=3)
    assert [len(x) for x in seen] == [15, 15] and len({bytes(i.numpy()) for x in seen for i in x}) == 15
    bars = [sum(int((x[:, 0, 2 * c + 2].float().mean(1) > 100).sum()) for x in seen) for c in range(5)]
    assert min(bars) >= 6  # three of each class, twice


def test_linear_probe_finds_what_is_linearly_there():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 10, generator=g) + 4 * nn.functional.one_hot(labels, 10)
    assert ssl_loss.linear_probe(x[:200], labels[:200], x[200:], labels[200:]) > 95
    noise = torch.randn(300, 10, generator=g)
    assert ssl_loss.linear_probe(noise[:200], labels[:200], noise[200:], labels[200:]) < 55


# --------------------------------------------------------------------------------------------------- data

def test_embedded_digits():
    d = data.load("mnist5k")
    assert d.train_images.shape == (4000, 1, 28, 28) and d.test_images.shape == (1000, 1, 28, 28)
    assert d.train_images.dtype == torch.uint8 and d.classes == 10
    assert torch.bincount(d.train_labels).tolist() == [400] * 10 and torch.bincount(d.test_labels).tolist() == [100] * 10
    assert not {bytes(i.numpy()) for i in d.train_images} & {bytes(i.numpy()) for i in d.test_images}
    few, fewer = data.load("mnist5k", images=500), data.load("mnist5k", images=100)
    assert len(few.train_images) == 500 and few.classes == 10 and len(few.test_images) == 1000
    small, large, whole = ({bytes(i.numpy()) for i in part.train_images} for part in (fewer, few, d))
    assert small < large < whole
    assert data.MNIST5K.stat().st_size < 1.1e6


@pytest.mark.parametrize("clients", [1, 7, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 100.0])
def test_partition_gives_every_image_to_one_client(clients, alpha):
    labels = torch.arange(150) % 10
    parts = data.partition(labels, clients, alpha, seed=3)
    assert len(parts) == clients and min(map(len, parts)) >= 2
    assert torch.cat(parts).sort().values.tolist() == list(range(150))
    again = data.partition(labels, clients, alpha, seed=3)
    assert all(map(torch.equal, parts, again))
    if clients > 1:
        assert not all(torch.equal(a, b) for a, b in zip(parts, data.partition(labels, clients, alpha, seed=4)))


def test_small_alpha_means_few_classes_a_client():
    labels = torch.arange(4000) % 10
    seen = lambda alpha: np.mean([len(labels[p].unique()) for p in data.partition(labels, 10, alpha)])
    assert seen(0.0) == 10 and seen(0.05) < 5 < seen(1.0)


@pytest.mark.parametrize("recipe", data.RECIPES)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 24, 40), (5, 16, 16), (3, 4, 128)])
def test_two_views(recipe, shape):
    batch = images(12, shape).train_images
    views = lambda seed: data.two_views(batch, data.RECIPES[recipe], torch.Generator().manual_seed(seed))
    x = views(0)
    assert x.shape == (24, *shape) and x.dtype == torch.float32 and x.min() >= -1 - 1e-5 and x.max() <= 1 + 1e-5
    assert torch.equal(x, views(0)) and not torch.equal(x, views(1)) and not torch.allclose(x[:12], x[12:])
    assert batch.dtype == torch.uint8


def test_row_i_and_row_b_plus_i_come_from_image_i():
    batch = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    for i in range(6):
        batch[i, :, 8:20, 8:20] = 40 * (i + 1)
    brightest = data.two_views(batch, data.RECIPES["digits"], torch.Generator().manual_seed(0)).amax((1, 2, 3))
    assert torch.allclose(brightest, torch.tensor([40. * (i + 1) for i in range(6)] * 2) / 127.5 - 1, atol=1e-4)


def test_the_recipe_that_does_nothing_does_nothing():
    batch, plain = images(8, (3, 10, 14)).train_images, data.Recipe(area=(1, 1), aspect=1)
    expected = data.normalise(batch).repeat(2, 1, 1, 1)
    assert torch.allclose(data.two_views(batch, plain, torch.Generator()), expected, atol=1e-4)
    flipped = data.two_views(batch, replace(plain, flip=1.0), torch.Generator())
    assert torch.allclose(flipped, expected.flip(3), atol=1e-4)
    grey = data.two_views(batch, replace(plain, grey=1.0), torch.Generator())
    luma = (expected * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(grey, luma.expand_as(grey), atol=1e-4)


def test_blur_equals_a_gaussian_convolution():
    x = torch.rand(1, 1, 40, 40)
    y = data.blur(x, data.Recipe((1, 1), 1, blur=1.0), lambda low, high: torch.full((1,), (low + high) / 2))
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.05) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    expected = nn.functional.conv2d(nn.functional.pad(x, (2, 2, 2, 2), mode="reflect"), kernel)
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """CIFAR archives in the official format on loopback; `server.fault` breaks them."""
    archives, bodies, rng = dict(data.ARCHIVES), {}, np.random.default_rng(0)
    for name, archive in data.ARCHIVES.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for member in (*archive.train, *archive.test):
                records = rng.integers(0, 256, (20, archive.label_bytes + 3072), dtype=np.uint8)
                records[:, :archive.label_bytes] %= 10
                info = tarfile.TarInfo(member)
                info.size = records.size
                tar.addfile(info, io.BytesIO(records.tobytes()))
        bodies["/" + archive.url.rsplit("/", 1)[1]] = buffer.getvalue()
        archives[name] = archive._replace(size=len(buffer.getvalue()), sha256=hashlib.sha256(buffer.getvalue()).hexdigest())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body, start = bodies[self.path], int((self.headers.get("Range") or "bytes=0-")[6:-1])
            httpd.requests.append(start)
            start = 0 if httpd.fault == "no ranges" else start
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            half = start + (len(body) - start) // 2
            self.wfile.write(body[start:half] if httpd.fault == "cut" else
                             bytes(len(body) - start) if httpd.fault == "damaged" else body[start:])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.fault, httpd.requests, httpd.bodies, httpd.cache = "", [], bodies, tmp_path / "cache"
    for name, archive in archives.items():
        file = archive.url.rsplit("/", 1)[1]
        archives[name] = archive._replace(url=f"http://127.0.0.1:{httpd.server_port}/{file}")
    monkeypatch.setattr(data, "ARCHIVES", archives)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("name, train", [("cifar10", 100), ("cifar100", 20)])
def test_cifar_is_downloaded_once_and_read_record_by_record(server, name, train):
    d = data.load(name, server.cache)
    assert d.train_images.shape == (train, 3, 32, 32) and d.test_images.shape == (20, 3, 32, 32)
    archive = data.ARCHIVES[name]
    with tarfile.open(fileobj=io.BytesIO(server.bodies["/" + archive.url.rsplit("/", 1)[1]])) as tar:
        raw = tar.extractfile(archive.train[0]).read()
    i, (record, at) = 3, (archive.label_bytes + 3072, archive.label_bytes)
    assert d.train_labels[i] == raw[i * record + at - 1]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):
        assert d.train_images[i, c, y, x] == raw[i * record + at + c * 1024 + y * 32 + x]
    data.load(name, server.cache)
    assert server.requests == [0] and len(os.listdir(server.cache)) == 1


def test_an_interrupted_download_is_resumed(server):
    server.fault = "cut"
    with pytest.raises(InputError, match="resume"):
        data.load("cifar10", server.cache)
    server.fault = ""
    assert len(data.load("cifar10", server.cache).train_images) == 100
    assert server.requests[0] == 0 and server.requests[1] > 0


def test_an_interrupted_download_restarts_where_the_server_knows_no_ranges(server):
    server.fault = "cut"
    with pytest.raises(InputError):
        data.load("cifar10", server.cache)
    server.fault = "no ranges"
    assert len(data.load("cifar10", server.cache).train_images) == 100


def test_what_does_not_match_its_checksum_is_never_read(server):
    server.fault = "damaged"
    with pytest.raises(InputError, match="SHA-256"):
        data.load("cifar10", server.cache)
    assert not os.listdir(server.cache)
    server.fault = ""
    data.load("cifar10", server.cache)
    path = server.cache / data.ARCHIVES["cifar10"].url.rsplit("/", 1)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        data.load("cifar10", server.cache)
    assert path.exists()


def test_no_network_is_one_sentence(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match="could not download"):
        data.load("cifar10", server.cache)


def test_labels_may_be_any_whole_numbers(tmp_path):
    d = images()
    np.savez(tmp_path / "l.npz", train_images=d.train_images[:, 0].numpy(), train_labels=d.train_labels.numpy() * 10**9 - 7,
             test_images=d.test_images[:, 0].numpy(), test_labels=d.test_labels.numpy() * 10**9 - 7)
    again = data.load(str(tmp_path / "l.npz"))
    assert torch.equal(again.train_labels, d.train_labels) and torch.equal(again.test_labels, d.test_labels)


def test_a_damaged_npz_never_ends_in_a_traceback(npz, tmp_path):
    good, dice = npz.read_bytes(), random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(3):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        (tmp_path / "bad.npz").write_bytes(bad)
        try:
            data.load(str(tmp_path / "bad.npz"))
        except InputError:
            pass


def test_npz_reads_medmnist_layout_and_colour(npz, tmp_path):
    d = data.load(str(npz))
    assert d.shape == (1, 14, 14) and d.train_labels.shape == (60,) and torch.equal(d.train_images, images().train_images)
    rgb = images(30, (3, 8, 12))
    np.savez(tmp_path / "rgb.npz", train_images=rgb.train_images.permute(0, 2, 3, 1).numpy(), train_labels=rgb.train_labels.numpy(),
             test_images=rgb.test_images.permute(0, 2, 3, 1).numpy(), test_labels=rgb.test_labels.numpy())
    assert torch.equal(data.load(str(tmp_path / "rgb.npz")).train_images, rgb.train_images)


# ------------------------------------------------------------------------------------------- wrong input

def broken_npz(tmp_path, case):
    d = images()
    arrays = dict(train_images=d.train_images[:, 0].numpy(), train_labels=d.train_labels.numpy(),
                  test_images=d.test_images[:, 0].numpy(), test_labels=d.test_labels.numpy())
    if case == "no labels":
        del arrays["train_labels"]
    elif case == "pickled":
        arrays["train_labels"] = np.array([{}] * 60, dtype=object)
    elif case == "float images":
        arrays["train_images"] = arrays["train_images"] / 255
    elif case == "short labels":
        arrays["test_labels"] = arrays["test_labels"][:-1]
    elif case == "float labels":
        arrays["train_labels"] = arrays["train_labels"] / 1.0
    elif case == "other shape":
        arrays["test_images"] = arrays["test_images"][:, :7]
    elif case == "empty":
        arrays["train_images"], arrays["train_labels"] = arrays["train_images"][:0], arrays["train_labels"][:0]
    path = tmp_path / "broken.npz"
    np.savez(path, **arrays)
    if case == "no zip":
        path.write_text("hello")
    elif case == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    return path


def refused(capsys, tmp_path, *arguments, out="out"):
    """The command line says one sentence on stderr, exits with 2 and writes nothing."""
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        fllw.main(["--device", "cpu", *(["--out", str(tmp_path / out)] if out else []), *map(str, arguments)])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("fllw.py: ") and len(said.err.splitlines()) == 1 and len(said.err) > 30, said.err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    return said.err


@pytest.mark.parametrize("case", ["no labels", "pickled", "float images", "short labels", "float labels", "other shape", "empty", "no zip", "cut"])
def test_a_wrong_npz_is_refused(case, capsys, tmp_path):
    assert "broken.npz" in refused(capsys, tmp_path, "--data", broken_npz(tmp_path, case))


@pytest.mark.parametrize("arguments, word", [
    ("--data imagenet", "mnist5k"), ("--data nowhere.npz", "nowhere.npz"), ("--patch-size 5", "patch"), ("--dim 30", "--heads"),
    ("--depth 3 --blocks-per-stage 2", "--blocks-per-stage"), ("--depth-dropout 1", "[0, 1)"), ("--depth-dropout -0.1", "[0, 1)"),
    ("--depth-dropout nan", "[0, 1)"), ("--client-failure 1.5", "[0, 1)"), ("--clients 2001", "4002"), ("--clients 2001 --alpha 1", "4002"),
    ("--clients 4 --clients-per-round 5", "--clients"), ("--rounds 3", "stages"), ("--dim 0", "--dim"), ("--depth -1", "--depth"),
    ("--heads 0", "--heads"), ("--patch-size 0", "--patch-size"), ("--clients 0", "--clients"), ("--rounds 0", "--rounds"),
    ("--local-epochs 0", "--local-epochs"), ("--batch-size 1", "--batch-size"), ("--batch-size -4", "--batch-size"), ("--lr 0", "--lr"),
    ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--temperature 0", "--temperature"), ("--alpha -1", "--alpha"), ("--micro-batch -1", "--micro-batch"),
    ("--head-dim 0", "--head-dim"), ("--seed -1", "--seed"), ("--rounds many", "--rounds"), ("--method magic", "magic"), ("--speed 3", "--speed"),
    ("--images 5000", "4,000"), ("--images 3 --clients 2", "4"), ("--calibrate 1 --server-share 0", "--server-share"), ("--server-share 1", "[0, 1)"),
    ("--calibrate 1 --server-share 0.9999 --clients 1", "training images"), ("--align -1", "--align"), ("--patience -1", "--patience"),
    ("--finetune -1", "--finetune"), ("--labels-per-class 5", "--finetune"), ("--seeds 1 2", "--seeds"), ("--compare --seeds 1 1", "--seeds"), ("--compare --seeds 1 --seed 2", "--seeds"),
    ("--compare --seeds -1", "--seeds"), ("--compare magic", "magic"), ("--benchmark --compare", "--benchmark"),
    ("--device tpu9", "tpu9"), ("--device meta", "meta"), ("--compare --rounds 3", "stages"), ("--compare --align 1", "--align"), ("--compare scratch", "--finetune"),
    ("--compare 2-blocks --depth 3 --rounds 6", "2-blocks"), *([] if torch.cuda.is_available() else [("--device cuda", "cuda")])])
def test_a_wrong_setting_is_refused(arguments, word, capsys, tmp_path):
    assert word in refused(capsys, tmp_path, *arguments.split())


def test_a_wrong_output_folder_is_refused(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"vocab_size": 1}')
    assert "not a run" in refused(capsys, tmp_path, out="other")
    assert "not a run" in refused(capsys, tmp_path, out="mine")
    assert "not a run" in refused(capsys, tmp_path, out="file")
    assert "cannot write" in refused(capsys, tmp_path, out="file/below")


def test_wrong_checkpoints_are_refused(npz, capsys, tmp_path):
    run = tmp_path / "out"
    assert run_cli("--data", npz, *TINY, "--out", run).returncode == 0
    capsys.readouterr()
    assert "--lr" in refused(capsys, tmp_path, "--resume", run, "--lr", "0.5", out=None)
    assert "not a run" in refused(capsys, tmp_path, "--resume", tmp_path / "nothing", out=None)
    assert "not a run" in refused(capsys, tmp_path, "--resume", "", out=None)
    assert "--compare" in refused(capsys, tmp_path, "--resume", run, "--compare", out=None)
    (run / "summary.json").unlink()
    assert "unfinished" in refused(capsys, tmp_path, "--data", npz, *TINY)
    assert "not a run folder" in refused(capsys, tmp_path, "--compare", "--data", npz, *TINY)
    good = (run / "checkpoint.pt").read_bytes()
    foreign = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, foreign)
    for bad in (good[:len(good) // 2], b"", b"hello", foreign.getvalue()):
        (run / "checkpoint.pt").write_bytes(bad)
        with pytest.raises(InputError, match="damaged or not a checkpoint"):
            fllw.load_checkpoint(run, Config(), (1, 14, 14))
        assert "damaged" in refused(capsys, tmp_path, "--resume", run, out=None)


# --------------------------------------------------------------------------------------------- the commands

ROW = {"round", "stage", "method", "loss", "clients", "kept_blocks", "download_bytes", "upload_bytes", "peak_memory_bytes", "seconds"}


def test_the_command_leaves_a_run_folder(npz, tmp_path):
    done = run_cli("--data", npz, *TINY, "--out", tmp_path / "run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert set(os.listdir(tmp_path / "run")) == {"encoder.pt", "config.json", "history.json", "summary.json", "checkpoint.pt"}
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [row["round"] for row in history] == [1, 2, 3, 4, 5, 6] and all(ROW <= set(row) for row in history)
    assert len(re.findall(r"^ +\d/3 +\d/6 ", done.stdout, re.M)) == 6
    for words in ("raw pixels", "random encoder", "FLL + FDD 0.25", "end-to-end", "ratio"):
        assert words in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"raw pixels", "random encoder", "FLL + FDD 0.25", "end-to-end",
                            "FLL + FDD 0.25, micro-batch 16", "end-to-end, micro-batch 16"}
    encoder, d = fllw.load_encoder(tmp_path / "run"), data.load(str(npz))
    assert fllw.evaluate(lambda x: fllw.features(encoder, x), d) == \
        pytest.approx({name: summary["FLL + FDD 0.25"][name] for name in ("knn", "linear_probe")})
    again = run_cli("--data", npz, *TINY, "--out", tmp_path / "again")
    assert again.returncode == 0 and stripped(tmp_path / "run") == stripped(tmp_path / "again")
    rows = [json.loads((tmp_path / r / "summary.json").read_text()) for r in ("run", "again")]
    for row in rows:
        del row["FLL + FDD 0.25"]["seconds"]
    assert rows[0] == rows[1]


def test_a_comparison_over_seeds(npz, tmp_path, capsys):
    arguments = ["--compare", "raw", "random", "scratch", "centralized", "e2e", "fll", "fdd", "e2e-bytes", "--seeds", 0, 3,
                 "--data", npz, *TINY, "--finetune", 2, "--out", tmp_path / "run"]
    done = run_here(capsys, *arguments)
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = ["raw pixels", "random encoder", "scratch", "centralized", "end-to-end", "progressive", "FLL", "FLL + FDD 0.25"]
    assert list(rows)[:8] == names and rows["FLL + patience 3"] == {} == rows["progressive"]
    assert re.search(r"^FLL \+ patience 3 +not run$", done, re.M)
    mean = lambda name, column: np.mean(rows[name][column])
    for column in ("macs", "upload_bytes"):
        assert mean("FLL", column) < mean("end-to-end", column)
    equal, = [name for name in rows if "rounds: bytes of FLL" in name]
    per_round = mean("end-to-end", "download_bytes") / 6  # as near as a whole number of rounds comes
    assert abs(mean(equal, "download_bytes") - mean("FLL + FDD 0.25", "download_bytes")) < 0.75 * per_round
    assert "upload_bytes" not in rows["centralized"] and set(rows["scratch"]) == {"seeds", "finetuned"} and rows["FLL"]["seeds"] == 2
    for key, seed, name in ("fll", 3, "FLL"), ("e2e", 0, "end-to-end"):  # every cell has its own run folder
        one = json.loads((tmp_path / "run" / f"{key}-seed{seed}" / "summary.json").read_text())
        assert one == {column: values[(0, 3).index(seed)] for column, values in rows[name].items() if column != "seeds"}
    run_here(capsys, "--data", npz, *TINY, "--finetune", 2, "--depth-dropout", 0, "--seed", 3, "--out", tmp_path / "alone")
    for column, value in json.loads((tmp_path / "alone" / "summary.json").read_text())["FLL"].items():
        assert column == "seconds" or value == rows["FLL"][column][1], column
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*")}
    again = run_here(capsys, "--compare", "fll", *arguments[9:]).split("Accuracy")  # reads back what is there and trains nothing
    assert again[1] == done.split("Accuracy")[1] and "round" not in again[0]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("*/*")}
    assert "--lr" in refused(capsys, tmp_path, *arguments, "--lr", 0.5, out=None)
    assert "not a run" in refused(capsys, tmp_path, *arguments[12:], out=None)
    assert "row of the comparison" in refused(capsys, tmp_path, *arguments[12:-1], tmp_path / "run" / "fll-seed0", out=None)
    assert "a comparison" in refused(capsys, tmp_path, "--resume", tmp_path / "run" / "fll-seed0", out=None)
    assert "--lr" in refused(capsys, tmp_path, "--compare", "fdd-half", "--seed", 9, *arguments[12:], "--lr", 0.5, out=None)  # no row is there yet
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "fll-seed0").rename(tmp_path / "other" / "e2e-seed0")
    assert "not a row" in refused(capsys, tmp_path, *arguments[:-1], tmp_path / "other", out=None)


def test_means_and_spreads_of_a_table():
    text = fllw.table({"a": {"knn": [90.0, 92.0], "macs": [1e9, 3e9]}, "b": {"knn": 50.0}, "c": {}})
    assert [line.split() for line in text.splitlines()[1:]] == [["a", "91.0", "±1.4", "2.00"], ["b", "50.0", "-"], ["c", "not", "run"]]


def test_a_comparison_goes_on_where_it_stopped(npz, tmp_path, capsys):
    arguments = ["--compare", "e2e", "progressive", "fll", "--data", npz, *TINY, "--out", tmp_path / "run"]
    process = subprocess.Popen([sys.executable, str(HERE / "fllw.py"), *map(str, arguments)],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "progressive-seed0" / "checkpoint.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    done = run_here(capsys, *arguments)
    assert len(re.findall(r"^ +1/1 +\d/6 ", done, re.M)) == 0  # end-to-end was done
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(rows[name]["knn"] for name in ("end-to-end", "progressive", "FLL"))
    assert run_here(capsys, *arguments).split("Accuracy")[1] == done.split("Accuracy")[1]
    assert "not a run" in refused(capsys, tmp_path, "--resume", tmp_path / "run", out=None)


def test_the_benchmark_prints_its_tables(npz, capsys):
    fllw.benchmark(replace(SMALL, data=str(npz), depth=2, clients=1), turns=1, steps=1, batches=(8, 16))
    speed, memory = capsys.readouterr().out.split("Peak memory")
    rows = [(line[:18].strip(), *line[18:].split()) for line in speed.splitlines()[2:] if line.strip()]
    names = ["progressive", "FLL", f"FLL + FDD {SMALL.depth_dropout:g}"]
    assert [row[:2] for row in rows] == [("centralized", "1")] + [(name, stage) for name in names for stage in ("1", "2", "mean")]
    assert rows[0][6:8] == ("1.00", "1.00")
    for i in (1, 4, 7):  # the mean over the stages, of the predicted share
        assert float(rows[i + 2][7]) == pytest.approx((float(rows[i][7]) + float(rows[i + 1][7])) / 2, abs=0.011)
    assert [int(line[18:24]) for line in memory.splitlines()[2:]] == [8] * 4 + [16] * 4
    assert fllw.parse(["--benchmark", "--depth", "2"]) == (fllw.benchmark, (replace(Config(), depth=2),))


def test_help_explains_every_setting():
    done = run_cli("--help")
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in text and repr(f.default) in text and len(f.metadata["help"]) > 10


def test_flags_override_a_preset():
    function, (config, resume) = fllw.parse("--preset paper --depth 6 --seed 3".split())
    assert function is fllw.run and config == replace(Config(**fllw.PRESETS["paper"]), depth=6, seed=3) and not resume
    function, (config, rows, seeds) = fllw.parse("--compare --seeds 2 5 --lr 0.5".split())
    assert function is fllw.compare and rows == [] and seeds == [2, 5] and config.lr == 0.5


def test_rows_of_a_comparison_change_what_they_name():
    plan = fllw.variants(replace(SMALL, depth=4, rounds=8, local_epochs=2, finetune=1), (1, 14, 14))
    assert list(plan) == list(fllw.ROWS) and len({name for name, _ in plan.values()}) == len(plan)
    plain = plan["fll"][1]
    assert plain == replace(SMALL, depth=4, rounds=8, local_epochs=2, finetune=1, depth_dropout=0.0)
    assert plan["2-blocks-epochs"] == ("FLL, 2 blocks a stage + FDD 0.25, 4 local epochs",
                                       replace(plain, depth_dropout=0.25, blocks_per_stage=2, local_epochs=4))
    assert plan["fdd-epochs"][1] == replace(plain, depth_dropout=0.25, local_epochs=6) and plan["fdd"][1].local_epochs == 2
    price = {key: fllw.cost(plan[key][1], plan[key][1].method, (1, 14, 14)) for key in ("e2e", "fdd", "fdd-compute")}
    a_round = price["fdd-compute"]["macs"] / plan["fdd-compute"][1].rounds
    assert abs(price["fdd-compute"]["macs"] - price["e2e"]["macs"]) < a_round < abs(price["fdd"]["macs"] - price["e2e"]["macs"])


def stripped(run):
    history = json.loads((run / "history.json").read_text())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_a_killed_run_resumes_to_the_same_bits(npz, tmp_path):
    arguments = ["--data", npz, *TINY, "--rounds", "12", "--local-epochs", "3", "--client-failure", "0.3"]
    assert run_cli(*arguments, "--out", tmp_path / "whole").returncode == 0
    command = [sys.executable, str(HERE / "fllw.py"), *map(str, arguments), "--out", str(tmp_path / "killed")]
    dice, kills = random.Random(0), 0
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for line in process.stdout:
            if re.match(r" +\d/3 ", line):  # at least one more round is done: kill it somewhere in the next ones
                time.sleep(dice.random() * 0.1)
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["history"]) < 12
        kills += 1
        command = [sys.executable, str(HERE / "fllw.py"), "--resume", str(tmp_path / "killed")]
    done = run_cli("--resume", tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert stripped(tmp_path / "whole") == stripped(tmp_path / "killed")
    whole, killed = (torch.load(tmp_path / r / "encoder.pt", weights_only=True) for r in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[n], killed[n]) for n in whole)


def test_ctrl_c_says_how_to_resume(npz, tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "fllw.py"), "--data", str(npz), *TINY, "--rounds", "300", "--out", str(tmp_path / "run")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().splitlines() == [f"interrupted; go on with: python fllw.py --resume {tmp_path / 'run'}"]


@pytest.mark.parametrize("extra", [["--client-failure", 0.2, "--alpha", 1], ["--method", "e2e", "--rounds", 1], ["--clients", 1],
                                   ["--rounds", 3, "--calibrate", 1, "--calibrate-at", "round"]],
                         ids=["six rounds", "one round", "one rank idles", "the first rank calibrates"])
def test_two_processes_give_the_history_of_one(extra, npz, tmp_path):
    arguments = ["--data", npz, *TINY, *extra]
    assert run_cli(*arguments, "--out", tmp_path / "one").returncode == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "fllw.py"),
                           *map(str, arguments), "--out", str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = stripped(tmp_path / "one"), stripped(tmp_path / "two")
    assert len(re.findall(r"^ +\d/\d +\d/\d ", done.stdout, re.M)) == len(one)  # one process alone prints
    for a, b in zip(one, two, strict=True):
        assert (a.pop("loss") or 0) == pytest.approx(b.pop("loss") or 0, rel=1e-5)  # None: nobody answered
        assert a == b
    if len(one) == 1:  # later, Adam makes full steps of gradients that are rounding errors, where the loss is flat
        one, two = (torch.load(tmp_path / r / "encoder.pt", weights_only=True) for r in ("one", "two"))
        assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


# --------------------------------------------------------------------------------------------- the notebook

def test_the_notebook_is_committed_executed_and_clean():
    text = (HERE / "demo.ipynb").read_text()
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))  # run once, from top to bottom
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10 and len(text) < 2e6
    assert not any("javascript" in kind or "widget" in kind for o in outputs for kind in o.get("data", {}))
    source = "\n".join("".join(c["source"]) for c in cells)
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if re.match(r" *(import|from) ", line)}
    assert imported <= {"inspect", "time", "dataclasses", "matplotlib", "numpy", "torch", "IPython", "data", "fllw", "ssl_loss"}
    assert "/work/" not in text and "/tmp/" not in text and "/home/" not in text


@pytest.mark.parametrize("module", ["fllw", "ssl_loss", "data"])
def test_modules_import_numpy_torch_and_the_standard_library(module):
    source = (HERE / f"{module}.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if re.match(r" *(import|from) \w", line) and '"""' not in line}
    assert imported <= {"numpy", "torch", "data", "ssl_loss"} | set(sys.stdlib_module_names), imported
