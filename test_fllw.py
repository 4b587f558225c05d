"""Tests of ssl_loss.py, fllw.py and data.py, in this order of claims. Run: pytest test_fllw.py

 1. The loss equals a double loop, and what lightly printed; micro-batches are exact.
 2. The encoder equals timm's; first weights follow from the seed alone.
 3. Stages are those of the papers; depth dropout drops older blocks at its rate, new ones never.
 4. federate() equals the whole method once more, in plain loops; threads change no bit.
 5. Costs are those of a published table, of torch's counter, and of the bytes handed over; peak
    memory is that of real steps.
 6. k-NN equals a loop, the probe is at its optimum, test labels choose nothing.
 7. CIFAR and .npz files are read as they are; splits and views do what they say.
 8. Wrong input: one sentence, exit status 2, nothing touched, nothing unpickled.
 9. A run folder holds what was trained and paid; a killed run resumes to the same bits.
10. On a GPU (skipped without one) a local step waits for nothing."""
import collections
import contextlib
import copy
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import fllw
import ssl_loss
from fllw import Config, Stage

torch.set_num_threads(1)  # the tensors are tiny; and bits depend on the number of threads
HERE = Path(__file__).resolve().parent
SMALL = Config(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, clients=3,
               rounds=6, batch_size=8, depth_dropout=0.5, device="cpu", augment="digits", workers=1)
TINY = ("--dim 16 --depth 3 --heads 2 --head-hidden 24 --head-dim 8 --batch-size 8 --device cpu "
        "--rounds 6 --depth-dropout 0.5 --augment digits").split()  # the same, but two clients
PAPER = Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256, clients=10,
               rounds=180, local_epochs=3, batch_size=512, depth_dropout=0.0, device="cpu")
SHAPE = (1, 14, 14)
ONE = range(1, 2)  # the rounds of a stage that is looked at by itself

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
    return [str(row | {"seconds": 0}) for row in history]  # text shows the clients' order too

def federated(config, dataset=images(), **more):
    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    return fllw.federate(config, clients, **more)

@pytest.fixture
def unmetered(monkeypatch):
    """Leave out the measuring of memory, which takes longer than these rounds."""
    monkeypatch.setattr(fllw, "peak_memory", lambda *arguments: 1)

@pytest.fixture
def command(capsys):
    """A function: the command's arguments -> (exit status, what it printed)."""
    def run(*arguments):
        try:
            status = fllw.main(list(map(str, arguments))) or 0
        except SystemExit as stop:
            status = stop.code
        return status, "".join(capsys.readouterr())
    return run

# ----------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("n, d, t", [(1, 3, 0.5), (2, 4, 0.1), (7, 16, 0.1), (5, 2, 1.0)])
def test_nt_xent_equals_a_double_loop(n, d, t):
    z1, z2 = normal(2, n, d, seed=n)
    z, total = [v / v.norm() for v in torch.cat([z1, z2]).double()], 0.0
    for i in range(2 * n):
        others = sum(math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / t) / others)
    expected = pytest.approx(total / (2 * n), rel=1e-5, abs=1e-6)
    assert ssl_loss.nt_xent(z1, z2, t).item() == expected
    assert ssl_loss.nt_xent(3 * z2, z1, t).item() == expected

@pytest.mark.parametrize("t, expected", [(0.1, 0.45006483793258667), (0.5, 1.0748012065887451)])
def test_nt_xent_equals_what_lightly_printed(t, expected):
    """lightly 1.6.0: NTXentLoss(t)(wave((5, 4), 0), wave((5, 4), 0.3)).item()"""
    loss = ssl_loss.nt_xent(wave((5, 4), 0), wave((5, 4), 0.3), t).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    loss = ssl_loss.nt_xent(torch.eye(4), torch.eye(4), t).item()  # perfect pairs, by hand:
    assert loss == pytest.approx(math.log(math.exp(1 / t) + 6) - 1 / t, abs=1e-6)

STEPS = {  # name: (stage, blocks kept); Stage(number, first, newest, stop, rounds)
    "first stage": (Stage(1, 0, 0, 1, ONE), [0]),
    "end-to-end": (Stage(1, 0, 0, 3, ONE), [0, 1, 2]),
    "FLL, a block dropped": (Stage(3, 2, 2, 3, ONE), [0, 2]),
    "pairs": (Stage(2, 1, 1, 3, ONE), [0, 1, 2]),
    "progressive, a block dropped": (Stage(3, 0, 2, 3, ONE), [1, 2])}

def local_step(case, micro):
    """(loss, gradients, multiply-accumulates that torch counts) of a local step with 16 images."""
    (stage, kept), config = STEPS[case], replace(SMALL, micro_batch=micro)
    learner = fllw.learner_of(config, fllw.broadcast(fllw.initial(config, SHAPE), kept), SHAPE)
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    step = ssl_loss.micro_batched_step if micro else fllw.local_step
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = step(config, learner, stage, normal(32, *SHAPE)).item()
    gradients = [p.grad.flatten() for p in learner.parameters() if p.requires_grad]
    return loss, torch.cat(gradients), counter.get_total_flops() // 2

@pytest.mark.parametrize("case", STEPS)
def test_micro_batches_give_the_plain_loss_and_gradients(case):
    """The saving of memory is exact: it changes the order of the work, not its result."""
    loss, gradients, _ = local_step(case, 0)
    assert gradients.norm() > 0.1
    for micro in (1, 3, 100):
        again, others, _ = local_step(case, micro)
        assert again == pytest.approx(loss, rel=1e-5)
        assert (others - gradients).norm() <= 1e-5 * gradients.norm()

def test_bf16_stays_close_and_keeps_the_loss_in_float32():
    for micro in (0, 4):
        plain, amp = (federated(replace(SMALL, amp=on, micro_batch=micro)) for on in (False, True))
        losses, others = ([np.mean(list(row["losses"].values())) for row in state.history]
                          for state in (plain, amp))
        assert others == pytest.approx(losses, rel=0.05)
        assert others[0] != pytest.approx(losses[0], rel=1e-4)  # it is on
        assert all(t.dtype == torch.float32 for t in amp.server.values())
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
    vit = fllw.ViT(Config(dim=6, heads=3, patch_size=4), (3, 8, 12), range(2))
    for phase, (_, p) in enumerate(sorted(vit.named_parameters())):
        p.data = wave(p.shape, phase)
    assert vit(wave((1, 3, 8, 12), 0.5))[0].tolist() == pytest.approx(expected, abs=2e-5)

def test_first_weights_follow_from_the_seed_alone():
    weights = []
    for seed in (0, 0, 1):
        before = torch.random.get_rng_state()
        weights.append(fllw.initial(replace(SMALL, seed=seed), SHAPE))
        assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's draws change
        torch.rand(3)
    assert same_tensors(*weights[:2]) and not same_tensors(*weights[1:])

# ----------------------------------------------------------------------------------------- stages
def test_stages_are_those_of_the_papers():
    """(first block that trains, first new one, number of blocks): Guo et al. 2023, Tun et al."""
    table = {"e2e": [(0, 0, 12)], "progressive": [(0, s - 1, s) for s in range(1, 13)],
             "fll": [(s - 1, s - 1, s) for s in range(1, 13)]}
    for method, expected in table.items():
        plan = fllw.stages(replace(PAPER, method=method))
        assert [(stage.first, stage.newest, stage.stop) for stage in plan] == expected

@pytest.mark.parametrize("method, older", [("fll", 6), ("progressive", 6), ("e2e", 0)])
def test_depth_dropout_drops_older_blocks_at_its_rate_and_new_ones_never(method, older):
    config = replace(SMALL, method=method, depth=9, blocks_per_stage=3, depth_dropout=0.3)
    stage = fllw.stages(config)[-1]
    kept = [fllw.sample_kept_blocks(config, stage, r, c) for r in range(200) for c in range(10)]
    rates = np.bincount(np.concatenate(kept), minlength=9) / 2000
    assert len(rates) == 9 and all(rates[older:] == 1)
    assert np.all(np.abs(rates[:older] - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 2000))

# ---------------------------------------------------------------- the whole method, once more
def names_that_train(names, active):
    """The head and the final norm always train, the embedding does with block 0."""
    starts = ["head.", "encoder.norm."] + [f"encoder.blocks.{b}." for b in active]
    if 0 in active:
        starts += ["encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed"]
    return [name for name in names if name.startswith(tuple(starts))]

def bare_client(config, learner, trained, own, key, done):
    """Local epochs on a plain model; done: rounds of the stage before this one, and in all."""
    seed = np.random.default_rng([config.seed, fllw.TRAINING, *key]).integers(2**63)
    draws = torch.Generator().manual_seed(int(seed))
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay, fused=True)
    batch, recipe = min(config.batch_size, len(own)), data.RECIPES["digits"]
    steps = len(own) // batch
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(own), generator=draws)
        for i in range(steps):
            now = done[0] + (epoch * steps + i) / (steps * config.local_epochs)
            lr = config.lr / 2 * (1 + math.cos(math.pi * now / done[1]))
            optimizer.param_groups[0]["lr"] = lr
            chosen = own[order[i * batch:(i + 1) * batch]]
            z = learner.head(learner.encoder(data.two_views(chosen, recipe, draws)))
            optimizer.zero_grad()
            ssl_loss.nt_xent(z[:batch], z[batch:], config.temperature).backward()
            optimizer.step()

def bare_loop(config, clients, lost):
    """The method in plain loops over whole models, with none of the federated machinery."""
    server, L = fllw.Learner(config, SHAPE, range(config.depth)), config.depth
    server.load_state_dict(fllw.initial(config, SHAPE))
    starts = [0] if config.method == "e2e" else range(0, L, config.blocks_per_stage)
    shares = np.array_split(range(1, config.rounds + 1), len(starts))
    for start, stop, rounds in zip(starts, [*starts[1:], L], shares):
        active = range(start if config.method == "fll" else 0, stop)
        for b in range(start, stop) if start else ():
            below = server.encoder.blocks[str(b - 1)].state_dict()
            server.encoder.blocks[str(b)].load_state_dict(below)
        for done, number in enumerate(rounds):
            sent = collections.defaultdict(list)
            draws = np.random.default_rng([config.seed, fllw.SAMPLING, number])
            size = config.clients_per_round or config.clients
            for client in draws.choice(config.clients, size, replace=False):
                draws = np.random.default_rng([config.seed, fllw.DROPOUT, number, client])
                dropped = np.flatnonzero(draws.random(start) < config.depth_dropout)
                learner = copy.deepcopy(server)
                for b in [*dropped, *range(stop, L)]:
                    del learner.encoder.blocks[str(b)]
                trained = dict(learner.named_parameters())
                trained = {name: trained[name] for name in names_that_train(trained, active)}
                bare_client(config, learner, trained.values(), clients[client], (number, client),
                            (done, len(rounds)))
                for name, p in trained.items() if (number, client) not in lost else ():
                    sent[name].append((len(clients[client]), p.detach().double()))
            means = {name: sum(n * p for n, p in pairs) / sum(n for n, _ in pairs)
                     for name, pairs in sent.items()}
            server.load_state_dict(server.state_dict() | means)
    return server

BARE = {"FLL": dict(alpha=0.5), "pairs": dict(blocks_per_stage=2, depth=4),
        "progressive": dict(method="progressive", alpha=0.5, rounds=7),
        "end-to-end": dict(method="e2e", alpha=0.5, rounds=3),
        "sampled": dict(clients=6, clients_per_round=2, alpha=1.0, local_epochs=2)}

@pytest.mark.parametrize("case", BARE)
def test_federate_equals_a_bare_loop(case):
    """Some answers are lost, all those of round 3 among them."""
    received, lost = {}, {(1, 0), (4, 2), *((3, client) for client in range(6))}

    def train_client(config, stage, message, images, *key):
        received[key] = sorted({fllw.block_of(name) for name in message} - {None})
        answer = fllw.local_train(config, stage, message, images, *key)
        active = range(stage.newest if config.method == "fll" else 0, stage.stop)
        assert sorted(answer[0]) == sorted(names_that_train(message, active))
        return None if key in lost else answer

    config, x = replace(SMALL, **BARE[case]), normal(4, *SHAPE)
    clients = data.split(images(90), config.clients, config.alpha, config.seed)
    state = fllw.federate(config, clients, train_client=train_client)
    bare = bare_loop(config, clients, lost)
    assert state.server.keys() == bare.state_dict().keys()
    for name, tensor in bare.state_dict().items():
        assert torch.allclose(state.server[name], tensor, atol=1e-6), name
    encoder = fllw.encoder_of(config, state.server, SHAPE)
    assert torch.allclose(encoder(x), bare.encoder(x), atol=1e-4)
    assert received == {(row["round"], client): kept for row in state.history
                        for client, kept in row["kept"].items()}
    assert received.keys() - lost == {(r["round"], c) for r in state.history for c in r["losses"]}

# ----------------------------------------------------------------------------------------- loop
def test_a_round_that_diverges_never_reaches_the_server():
    state = fllw.State()
    with pytest.raises(FloatingPointError, match="round 1 diverged: take a smaller --lr"):
        federated(replace(SMALL, lr=1e39, batch_size=20), state=state)  # one step: a finite loss
    assert not state.history and all(t.isfinite().all() for t in state.server.values())

@pytest.mark.parametrize("more", [{}, {"method": "progressive", "micro_batch": 3}], ids=str)
def test_threads_and_the_global_generator_change_no_bit(more):
    """Client 0 is asked first and answers last. Uploads are added in the order asked: the sum
    1e30 - 1e30 + 3 is 3, but -1e30 + 3 + 1e30 is 0."""
    def train_client(*arguments):
        upload, losses, count = fllw.local_train(*arguments)
        upload["encoder.norm.bias"].fill_([1e30, -1e30, 3.0][arguments[-1]])
        time.sleep(0.1 if arguments[-1] == 0 else 0)
        return upload, losses, count

    config, d = replace(SMALL, rounds=3, augment="natural", **more), images(shape=(3, 14, 14))
    one = federated(config, d, train_client=train_client)
    before = torch.manual_seed(7).get_state()
    three = federated(replace(config, workers=3), d, train_client=train_client)
    assert torch.equal(torch.get_rng_state(), before)
    assert timeless(three.history) == timeless(one.history)
    assert same_tensors(three.server, one.server)
    assert torch.all(one.server["encoder.norm.bias"] == 1)

# ---------------------------------------------------------------------------------------- costs
@pytest.mark.parametrize("method, sent, computed, published", [
    ("e2e", 8.03, 1185, 1169), ("fll", 1.29, 281, 278), ("progressive", 4.68, 643, 635)])
def test_cost_reproduces_the_published_table(method, sent, computed, published, unmetered):
    """Tun et al. 2024, a client's 180 rounds: 1000 MiB sent, and 10^9 MACs for one image."""
    paid = fllw.cost(replace(PAPER, method=method), (3, 32, 32))
    both = paid["download_bytes"] + paid["upload_bytes"]
    assert both / (1000 * 2**20) == pytest.approx(sent, rel=0.01)
    assert paid["macs"] / 1e9 == pytest.approx(published, rel=0.025)
    assert paid["macs"] / 1e9 == pytest.approx(computed, rel=0.002)

@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("case", STEPS)
def test_macs_equal_what_torch_counts_over_a_local_step(case, micro):
    (stage, kept), n = STEPS[case], 16
    expected = n * fllw.count_macs(replace(SMALL, micro_batch=micro), stage, kept, SHAPE)
    expected += 3 * (2 * n) ** 2 * SMALL.head_dim  # similarities: forward, and backward twice
    if stage.first == 0:  # the paper counts a gradient of the images, which nobody needs
        expected -= 2 * n * 4 * 49 * SMALL.dim
    assert local_step(case, micro)[2] == expected

@pytest.mark.parametrize("sampled", [0, 2])
@pytest.mark.parametrize("method", ["fll", "progressive", "e2e"])
def test_replay_and_cost_count_the_content_handed_over(method, sampled, monkeypatch, unmetered):
    """A client keeps what it received, by its content: what it has not had before must be sent."""
    had, counted = collections.defaultdict(set), collections.defaultdict(collections.Counter)

    def train_client(config, stage, message, images, number, client):
        content = {hashlib.sha256(t.numpy()).digest(): t.nbytes for t in message.values()}
        kept = {fllw.block_of(name) for name in message} - {None}
        answer = fllw.local_train(config, stage, message, images, number, client)
        counted[number].update(
            download_bytes=sum(content[key] for key in content.keys() - had[client]),
            stateless_download_bytes=sum(content.values()),
            upload_bytes=sum(tensor.nbytes for tensor in answer[0].values()),
            macs=config.local_epochs * fllw.count_macs(config, stage, kept, SHAPE))
        had[client] |= content.keys()
        return answer

    first = fllw.initial(SMALL, SHAPE)  # with noise only copies have the same content
    first = {name: t + 0.01 * normal(*t.shape, seed=i) for i, (name, t) in enumerate(first.items())}
    monkeypatch.setattr(fllw, "initial", lambda config, shape: first)
    config = replace(SMALL, method=method, rounds=9, clients=4, clients_per_round=sampled)
    history, total = federated(config, train_client=train_client).history, collections.Counter()
    for row, paid in zip(history, fllw.replay(config, SHAPE, history), strict=True):
        sums = {column: value * len(row["kept"]) for column, value in paid.items()}
        assert sums == pytest.approx(counted[row["round"]]), row["round"]
        total.update(paid)
    if not sampled:
        assert fllw.cost(config, SHAPE) == pytest.approx({"peak_memory_bytes": 1} | total)

def test_a_client_that_looks_at_its_images_trains_and_has_no_peak(capsys):
    def train_client(config, stage, message, images, *key):
        bright = images.float().mean((1, 2, 3)) > images.float().mean().item()
        return fllw.local_train(config, stage, message, images[bright], *key)

    assert len(federated(SMALL, train_client=train_client).history) == 6
    paid, plain = fllw.cost(SMALL, SHAPE, train_client=train_client), fllw.cost(SMALL, SHAPE)
    assert plain.pop("peak_memory_bytes") > 0 and paid == plain
    assert capsys.readouterr().out.startswith("note: ")

# --------------------------------------------------------------------------------------- memory
def test_memory_meter_counts_by_hand():
    with fllw.MemoryMeter() as meter:
        a = torch.zeros(1000)       # 4000 bytes
        b = (a + 1) * 3             # a + 1 and its triple, then the triple alone
        a.add_(1), b.view(10, 100)  # in place and views take nothing
        del a, b
    assert meter.live == [0, 4000, 8000, 12000, 8000, 4000, 0]

def test_memory_of_fake_and_real_steps_is_the_same():
    config, own, peaks = replace(SMALL, batch_size=16), images(32).train_images, []
    for stage in fllw.stages(config):
        message = fllw.broadcast(fllw.initial(config, SHAPE), range(stage.stop))
        with fllw.MemoryMeter() as meter:
            fllw.local_train(config, stage, message, own, stage.rounds[0], 0)
        peaks.append(fllw.peak_memory(config, stage, SHAPE))
        assert max(meter.live) == peaks[-1]
    block = sum(t.nbytes for name, t in message.items() if ".blocks.1." in name)
    assert peaks[2] - peaks[1] == block  # frozen: no gradient, no moments, no activations

def test_the_readmes_memory_picture():
    """ViT-Tiny on CIFAR-10's images in batches of 128: the figures that the README shows."""
    config, stages = replace(PAPER, batch_size=128), [(1, 0, 0, 12, ONE), (12, 11, 11, 12, ONE)]
    whole, last = (fllw.peak_memory(config, Stage(*stage), (3, 32, 32)) for stage in stages)
    assert whole / 2**20 == pytest.approx(2479, rel=0.005)
    assert last / 2**20 == pytest.approx(291, rel=0.005)

# ----------------------------------------------------------------------------------- evaluation
def test_knn_equals_a_loop():
    train, test = normal(50, 6), normal(300, 6, seed=1)
    labels, truth, right = torch.arange(50) % 4, torch.arange(300) % 4, 0
    for x, y in zip(test, truth):
        cosines = torch.nn.functional.cosine_similarity(x[None], train)
        nearest = cosines.argsort(descending=True)[:7]
        votes = labels[nearest].bincount(torch.exp(cosines[nearest] / 0.07))
        right += (votes.argmax() == y).item()
    assert ssl_loss.knn(train, labels, test, truth, k=7) == pytest.approx(100 * right / 300)

def test_logistic_regression_is_at_its_optimum():
    x, y = normal(80, 5), torch.arange(80) % 3
    w, b = (p.double().requires_grad_() for p in ssl_loss.logistic(x, y, 0.01))
    loss = torch.nn.functional.cross_entropy(x.double() @ w + b, y) + 0.005 * w.square().sum()
    assert all(grad.abs().max() < 1e-3 for grad in torch.autograd.grad(loss, (w, b)))

def test_the_probe_reads_labels_from_features_of_any_scale():
    labels, scale = torch.arange(90) % 3, torch.tensor([500.0, 0.01, 0.01])
    x = (torch.eye(3)[labels] + 0.1 * normal(90, 3) + 7) * scale
    pairs = (x[60:], labels[60:]), (x[60::3], labels[60::3]), (x[60:], labels[60:] * 0)
    found = ssl_loss.linear_probe(x[:60], labels[:60], *pairs)
    assert found == pytest.approx([100, 100, 100 / 3])

def test_evaluation_chooses_nothing_by_test_labels(monkeypatch):
    """Whatever the test labels are, the same classifiers are fitted, with the same penalties."""
    d, fits, original = images(), [], ssl_loss.logistic
    encoder = fllw.encoder_of(SMALL, fllw.initial(SMALL, SHAPE), SHAPE)
    monkeypatch.setattr(ssl_loss, "logistic", lambda x, y, penalty: fits.append(
        (y.bincount().tolist(), penalty)) or original(x, y, penalty))
    for labels in (4 - d.test_labels, d.test_labels):
        found = ssl_loss.evaluate(encoder, d._replace(test_labels=labels), "digits")
    assert found["moved_knn"] < 60 < found["knn"]  # test images are training images
    half = len(fits) // 2
    assert fits[:half] == fits[half:] and len({penalty for _, penalty in fits}) > 1
    assert fits[-1][0] == [10] * 5  # ten labels a class

def test_raw_pixels_are_shrunk_by_area_averaging():
    large, small = images(2, (3, 128, 192)).train_images, images(2, (3, 40, 64)).train_images
    means = large.double().reshape(2, 3, 64, 2, 64, 3).mean((3, 5)) / 255
    assert torch.allclose(ssl_loss.pixels(large).double(), means.flatten(1), atol=1e-6)
    assert torch.equal(ssl_loss.pixels(small), small.flatten(1) / 255)

# ----------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("clients, alpha", [(1, 0.0), (7, 0.01), (50, 0.0), (7, 100.0)])
def test_partition_gives_every_image_to_one_client(clients, alpha):
    parts = data.partition(torch.arange(150) % 10, clients, alpha, seed=3)
    assert len(parts) == clients and min(map(len, parts)) >= 2
    assert torch.cat(parts).sort().values.tolist() == list(range(150))
    pairs = sum(len((part % 10).unique()) for part in parts)  # of a client and a label that it has
    assert (pairs < 50) == (alpha == 0.01 or clients == 1)

def test_rows_i_and_b_plus_i_are_views_of_image_i():
    """With recipes of no part and of one part, whose result is known."""
    batch, plain = images(8, (3, 10, 14)).train_images, data.Recipe(area=(1, 1), aspect=1)
    expected = data.normalise(batch).repeat(2, 1, 1, 1)
    luma = torch.einsum("bchw,c->bhw", expected, torch.tensor([0.299, 0.587, 0.114]))
    for recipe, result in ((plain, expected), (replace(plain, flip=1.0), expected.flip(3)),
                           (replace(plain, grey=1.0), luma[:, None].expand_as(expected))):
        views = data.two_views(batch, recipe, torch.Generator())
        assert torch.allclose(views, result, atol=1e-4)
    for part in ({"rotate": 15}, {"shear": 15}, {"shift": 0.1}, {"elastic": 0.05}, {"blur": 1.0},
                 {"jitter": 1.0, "colours": 0.4}, {"jitter": 1.0, "hue": 0.1}):
        views = data.two_views(batch, replace(plain, **part), torch.Generator())
        assert not torch.allclose(views, expected, atol=0.01)

@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 24, 40), (5, 16, 16), (3, 4, 128)])
def test_views_are_in_range_and_differ(shape):
    for recipe in data.RECIPES.values():
        views = data.two_views(images(12, shape).train_images, recipe, torch.Generator())
        assert views.abs().max() <= 1 + 1e-5 and not torch.allclose(views[:12], views[12:])

@pytest.fixture
def site(tmp_path, monkeypatch):
    """A small archive in the official format (20 records a member), behind a file:// URL."""
    (_, _, train, test, _), path = data.CIFAR["cifar100"], tmp_path / "site.tar.gz"
    with tarfile.open(path, mode="w:gz") as tar:
        for member in (*train, *test):
            info = tarfile.TarInfo(member)
            info.size = 20 * (2 + 3072)  # coarse label, label, pixels
            tar.addfile(info, io.BytesIO(np.random.default_rng(len(member)).bytes(info.size)))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data.CIFAR, "cifar100", (path.as_uri(), checksum, train, test, 2))
    return path

def test_cifar_is_downloaded_once_and_read_record_by_record(site, tmp_path, monkeypatch):
    d = data.load("CIFAR100", tmp_path / "cache")
    with tarfile.open(site) as tar:
        raw = tar.extractfile("cifar-100-binary/train.bin").read()
    start = 3 * (2 + 3072) + 2
    assert d.train_labels[3] == raw[start - 1]
    for c, y, x in ((0, 0, 0), (1, 5, 7), (2, 31, 31)):
        assert d.train_images[3, c, y, x] == raw[start + c * 1024 + y * 32 + x]
    site.unlink()
    for name in ("mkdir", "write_bytes", "replace"):  # the cache is read-only from now on
        monkeypatch.setattr(Path, name, lambda *arguments, **more: 1 / 0)
    assert data.load("cifar100", tmp_path / "cache").digest() == d.digest()

@pytest.mark.parametrize("there, said", [(b"", "No such file"), (b"cut", "SHA-256")])
def test_a_failed_download_names_its_reason_and_leaves_nothing(there, said, site, tmp_path):
    site.write_bytes(there) if there else site.unlink()
    with pytest.raises(data.InputError, match=said):
        data.load("cifar100", tmp_path / "cache")
    assert not (tmp_path / "cache" / site.name).exists()

def save_npz(path, **more):
    """images() in MedMNIST's layout: images [N, H, W], labels [N, 1]. more: other arrays, or None
    for one that is left out."""
    arrays = {name: tensor.numpy()[:, 0] if tensor.ndim > 1 else tensor.numpy()[:, None]
              for name, tensor in images()._asdict().items() if tensor is not None} | more
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path

@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    return save_npz(tmp_path_factory.mktemp("npz") / "tiny.npz", val_images=np.zeros(3))

def test_npz_reads_medmnist_layout_and_colour(npz, tmp_path, capsys):
    assert all(map(torch.equal, data.load(npz)[:4], images()[:4]))
    assert data.load(npz, images=7).digest() == data.load(npz, images=7).digest()
    colours = images(60, (8, 12, 3)).train_images.numpy()
    path = save_npz(tmp_path / "rgb.npz", train_images=colours, test_images=colours[:20])
    assert np.array_equal(data.load(path).train_images.permute(0, 2, 3, 1), colours)
    assert capsys.readouterr().out == ""  # nothing is odd, so nothing is said

def test_missing_labels_are_noted(tmp_path, capsys):
    """What has no label is left out of the evaluation alone."""
    labels = np.array([[-7], [30], [-1], [10]] * 15, dtype=np.int16)
    d = data.load(save_npz(tmp_path / "odd.npz", train_labels=labels,
                           test_labels=np.arange(20) % 4 * 10))
    assert d.train_labels.tolist() == [-1, 3, -1, 1] * 15
    assert "30 of 60 " in capsys.readouterr().out
    labelled = d._replace(train_images=d.train_images[1::2], train_labels=d.train_labels[1::2])
    assert ssl_loss.evaluate(None, d, "digits") == ssl_loss.evaluate(None, labelled, "digits")

# ---------------------------------------------------------------------------------- wrong input
@pytest.fixture
def refused(tmp_path, command):
    """A function: what the command says to wrong arguments, one sentence. It touches nothing."""
    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def said(*arguments):
        before = files()
        status, printed = command("--device", "cpu", "--out", tmp_path / "out", *arguments)
        assert status == 2 and "usage: " in printed and files() == before
        sentence = printed.split(": error: ")[1]
        assert len(sentence) > 20 and sentence.count("\n") == 1
        return sentence
    return said

WRONG = """
--data ~nobody-here/digits.npz: ~nobody-here
--clients 2001: 4002
--patch-size 5: 28 x 28
--clients-per-round 5: --clients 2
--alpha nan: --alpha
--micro-batch -1: --micro-batch
--device meta: meta
--out FILE: cannot be a run folder
--out HIDDEN: .gitkeep
--out ~nobody-here/run: ~nobody-here
"""

@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_a_wrong_setting_is_one_sentence(case, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("years of work")
    Path("HIDDEN/.gitkeep").mkdir(parents=True)
    arguments, words = case.rsplit(": ", 1)
    assert words in refused(*arguments.split())

BROKEN = {"float images": dict(train_images=np.zeros((60, 14, 14))),
          "test label below 0": dict(test_labels=np.arange(20) - 3),
          "no test labels": dict(test_labels=None),
          "wide test images": dict(test_images=np.zeros((20, 14, 15), dtype=np.uint8)),
          "short clients": dict(train_clients=np.zeros(59, dtype=int))}

@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_npz_is_one_sentence(case, tmp_path, refused):
    assert "broken.npz" in refused("--data", save_npz(tmp_path / "broken.npz", **BROKEN[case]))

def test_nothing_is_unpickled(tmp_path, refused):
    class Trap:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "sprung",)

    (tmp_path / "run").mkdir()
    torch.save({"settings": Trap()}, tmp_path / "run" / "checkpoint.pt")
    trap = save_npz(tmp_path / "trap.npz", train_labels=np.array([Trap()], dtype=object))
    assert "trap.npz" in refused("--data", trap)
    assert "cannot be a run folder" in refused("--out", tmp_path / "run")
    with pytest.raises(data.InputError, match="rerun its command"):
        fllw.load_encoder(tmp_path / "run")
    assert not (tmp_path / "sprung").exists()

# -------------------------------------------------------------------- run folder and the command
@pytest.fixture(scope="session")
def finished(npz, tmp_path_factory):
    """A run's folder, and what it printed to a stream that only writes, as some notebooks have."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        fllw.main(["--data", str(npz), *TINY, "--out", str(folder)])
    return folder, stream.getvalue()

def loaded(*path):
    return torch.load(Path(*path), weights_only=True)

def test_the_command_leaves_a_run_folder(npz, finished, tmp_path, command, refused):
    folder, printed = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    assert {path.stem for path in folder.iterdir()} == {"checkpoint", "encoder", "summary"}
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == ["raw pixels", "FLL + FDD 0.5", "end-to-end", "ratio"]
    encoder, mine = fllw.load_encoder(folder), summary["FLL + FDD 0.5"]
    assert same_tensors(encoder.state_dict(), loaded(folder, "encoder.pt"))
    config = replace(SMALL, clients=2)
    scores, paid = ssl_loss.evaluate(encoder, images(), "digits"), fllw.cost(config, SHAPE)
    assert mine == scores | paid | {"seconds": mine["seconds"]}
    assert summary["end-to-end"] == fllw.cost(replace(config, method="e2e"), SHAPE)

    expected = [tuple("".join("A" if b == row["stage"] - 1 else "+" if b in kept else "."
                              for b in range(row["stage"])) for kept in row["kept"].values())
                for row in loaded(folder, "checkpoint.pt")["history"]]
    assert re.findall("  ([A+.]+) ([A+.]+)$", printed, re.M) == expected
    device = "cpu" if torch.cuda.is_available() else "auto"  # here the same
    status, again = command("--data", npz, *TINY, "--device", device, "--out", folder)
    assert status == 0 and fllw.table(summary) in again and fllw.table(summary) in printed
    for flag, value in (("--seed", 3), ("--method", "e2e")):
        assert flag[2:] in refused("--data", npz, *TINY, flag, value, "--out", folder)
    other = save_npz(tmp_path / npz.name, train_images=images(seed=1).train_images[:, 0].numpy())
    assert "sha256" in refused("--data", other, *TINY, "--out", folder)

def test_a_file_may_say_whose_image_each_is(tmp_path, command, refused, unmetered):
    """And have no training labels: then there is no evaluation."""
    owners = np.arange(60) % 4 // 2 * 75 - 5  # 30 times -5, 30 times 70
    owners[[1, 3, 8]] = 900
    path = save_npz(tmp_path / "own.npz", train_clients=owners[:, None], train_labels=None,
                    test_labels=np.arange(20) // 17)
    for flag in ("--clients", "--alpha", "--images"):
        assert f"{flag} cannot be given" in refused("--data", path, flag, 2)
    status, printed = command("--data", path, *TINY, "--clients-per-round", 3, "--out",
                              tmp_path / "run")
    assert status == 0 and "0 of 60" in printed and "85 %" in printed and "k-NN" not in printed
    clients = [images().train_images[owners == number] for number in (-5, 70, 900)]
    expected = fllw.encoder_of(SMALL, fllw.federate(SMALL, clients).server, SHAPE).state_dict()
    assert same_tensors(loaded(tmp_path, "run", "encoder.pt"), expected)

    owners[[1, 3]] = 70
    assert "client 900 " in refused("--data", save_npz(tmp_path / "one.npz", train_clients=owners))
    path = save_npz(tmp_path / "none.npz", train_labels=np.full(60, -9))
    assert "--alpha" in refused("--data", path, "--alpha", 1)

def test_a_killed_run_resumes_to_the_same_bits(npz, tmp_path, command, unmetered, monkeypatch):
    """It is killed under a profiler, and goes on without docstrings, as under python -OO."""
    arguments = ["--data", npz, *TINY, "--rounds", "24", "--method", "progressive", "--out"]
    killed = [sys.executable, "-m", "cProfile", HERE / "fllw.py", *arguments, tmp_path / "killed"]
    process = subprocess.Popen(killed, stdout=subprocess.PIPE, text=True)
    while not re.match(" +1 +2 ", process.stdout.readline()):  # stage 1, round 2
        assert process.poll() is None
    process.kill()
    process.communicate()
    done = len(loaded(tmp_path, "killed", "checkpoint.pt")["history"])
    assert process.returncode != 0 and 2 <= done < 24
    monkeypatch.setattr(fllw, "__doc__", None)
    resumed, whole = ([line.split()[:6] for line in re.findall(r"^ +\d+ +\d+ .*", printed, re.M)]
                      for printed in (command(*arguments, tmp_path / name)[1]
                                      for name in ("killed", "whole")))
    assert len(whole) == 24 and resumed == whole[done:]  # losses and bytes
    one, other = (loaded(tmp_path, name, "checkpoint.pt") for name in ("killed", "whole"))
    assert timeless(one["history"]) == timeless(other["history"])
    assert same_tensors(one["server"], other["server"])

def test_short_memory_for_raw_pixels_loses_nothing(npz, tmp_path, command, unmetered, monkeypatch):
    def evaluate(encoder, *more):
        if encoder is None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes.\nError 12")
        return {"knn": 50.0}

    monkeypatch.setattr(fllw, "evaluate", evaluate)
    run = tmp_path / "run"
    status, printed = command("--data", npz, *TINY, "--out", run)
    assert status == 1 and re.search(r"\nmemory is short.*\n$", printed)
    assert same_tensors(fllw.load_encoder(run).state_dict(), loaded(run, "encoder.pt"))
    monkeypatch.setattr(fllw, "evaluate", lambda *arguments: {"knn": 50.0})
    assert "raw pixels" in command("--data", npz, *TINY, "--out", run)[1]

# ------------------------------------------------------------------------------------ on a GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [{}, {"micro_batch": 3}, {"amp": True, "augment": "natural"}])
def test_a_local_step_on_a_gpu_waits_for_nothing(more):
    """From the end of the first step, which starts libraries, to that of the fifth of six."""
    config, losses = replace(SMALL, device="cuda", **more), []

    def step(*arguments):
        one = ssl_loss.micro_batched_step if config.micro_batch else fllw.local_step
        losses.append(one(*arguments))
        torch.cuda.set_sync_debug_mode("error" if len(losses) < 5 else "default")
        return losses[-1]

    message, own = fllw.initial(config, (3, 14, 14)), images(48, (3, 14, 14)).train_images
    try:
        fllw.local_train(config, Stage(3, 2, 2, 3, ONE), message, own, 1, 0, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses) == 6 and torch.stack(losses).isfinite().all()
