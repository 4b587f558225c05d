"""Tests of the experiments, against loops, bare twins, published tables and a flop counter."""
import copy
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import experiments
import fllw
from experiments import (alignment, calibration, compare, early_stopping, finetune, multimodal,
                         objectives, paper_scale)
from fllw import Config, Stage
from ssl_loss import features

torch.set_num_threads(1)  # the tensors are tiny
HERE = Path(__file__).resolve().parent
SHAPE = (1, 14, 14)
SMALL = Config(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, clients=2,
               rounds=3, batch_size=8, depth_dropout=0.0, device="cpu", augment="digits", workers=1)
PAPER = replace(SMALL, dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256,
                rounds=180, local_epochs=3)
TINY = ("--dim 8 --depth 2 --heads 2 --head-hidden 8 --head-dim 4 --rounds 2 --batch-size 8 "
        "--device cpu --workers 1 --augment digits").split()

def images(n=60, shape=SHAPE):
    """A data set of noise, for what does not depend on what the images show."""
    pixels = torch.randint(0, 256, (n, *shape), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    return data.Dataset(pixels, torch.arange(n) % 5, pixels[:20], torch.arange(20) % 5)

def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

def small(experiment, **changes):
    """Settings of an experiment that train within a second."""
    return experiment.Settings(**{**asdict(SMALL), **changes})

def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())

def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())

def cross_entropy(anchor, targets, own, t):
    """-log of the softmax, at `own`, of an anchor's similarities with the targets."""
    scores = [math.exp(cosine(anchor, target) / t) for target in targets]
    return -math.log(scores[own] / sum(scores))

def server_of(config, stage, shape=SHAPE):
    """Fresh tensors of a server, of what is present in the stage."""
    return fllw.broadcast(fllw.initial(config, shape), stage.present)

def losing(ask, lost):
    """An `ask` that loses the clients in lost(round number): they are asked and never answer."""
    def unreliable(stage, round_number, progress, messages):
        there = (pair for pair in messages if pair[0] not in lost(round_number))
        yield from ask(stage, round_number, progress, there)
    return unreliable

@pytest.fixture
def unmetered(monkeypatch):
    """Leave out what takes longer than these rounds: measuring memory, and most of evaluation."""
    def evaluate(encoder, dataset, *more):
        return {"knn": float(features(encoder, dataset.test_images).std()) if encoder else 1}

    monkeypatch.setattr(fllw, "peak_memory", lambda *arguments, **more: 1)
    for module in (fllw, compare, calibration):
        monkeypatch.setattr(module, "evaluate", evaluate)

@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    def save(name, shape):
        parts = [t.permute(0, 2, 3, 1) if t.ndim == 4 else t for t in images(60, shape)]
        np.savez(folder / name, **{key: part.numpy() for key, part in zip(data.KEYS, parts)})
        return folder / name

    folder = tmp_path_factory.mktemp("npz")
    save("grey.npz", SHAPE)
    save("rgba.npz", (4, 14, 14))
    return folder

def call(experiment, monkeypatch, *flags):
    """Run an experiment's command in this process."""
    name = experiment.__name__.split(".")[1]
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    fllw.command(experiment.main)

# ------------------------------------------------------------------------------ other objectives
def test_losses_of_the_other_objectives_against_loops_over_images():
    q, k = normal(2, 6, 5)
    B, t, pairs = 3, 0.3, [(i, (i + 3) % 6) for i in range(6)]
    expected = np.mean([2 - 2 * cosine(q[i], k[j]) for i, j in pairs])
    assert float(objectives.byol(q, k, t)) == pytest.approx(expected, rel=1e-5)
    # among the targets of the other view
    total = sum(cross_entropy(q[i], k[B:] if i < B else k[:B], i % B, t) for i, _ in pairs)
    assert float(objectives.moco_v3(q, k, t)) == pytest.approx(2 * t * total / B, rel=1e-5)
    expected = 25 * np.mean([float(q[i, d] - q[i + B, d])**2 for i in range(B) for d in range(5)])
    for view in (q[:B].numpy(), q[B:].numpy()):
        c = np.cov(view.T)
        expected += 25 * np.mean([max(0, 1 - math.sqrt(c[d, d] + 1e-4)) for d in range(5)])
        expected += sum(c[d, e]**2 for d in range(5) for e in range(5) if d != e) / 5
    assert float(objectives.vicreg(None, q, [])) == pytest.approx(expected, rel=1e-4)

@pytest.mark.parametrize("objective, number", [("byol", 1), ("moco_v3", 2)])
def test_a_momentum_encoder_follows_every_step_and_gets_no_gradient(objective, number):
    """Against a twin with a whole copy of the model, frozen blocks and all."""
    config, pixels = small(objectives, objective=objective), images(24).train_images
    stage = fllw.stages(config)[number - 1]
    server = server_of(config, stage)
    upload, losses = objectives.momentum_train(config, stage, server, pixels, 1, 0)
    online = fllw.assemble(config, server, SHAPE, stage.trains)
    target = copy.deepcopy(online).requires_grad_(False)
    del target.head.predictor
    trained = {name: p for name, p in online.named_parameters() if stage.trains(name)}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=config.weight_decay)
    draws = fllw.generator(config, "cpu", fllw.TRAINING, 1, 0)
    for step, chosen in enumerate(torch.randperm(24, generator=draws).view(3, 8)):
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / 3)) / 2
        views = data.two_views(pixels[chosen], data.DIGITS, draws)
        loss = objectives.LOSSES[objective](online.head(online.encoder(views)),
                                            target.head(target.encoder(views)), 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step].item() == pytest.approx(loss.item(), rel=1e-4)
        for name, follower in target.named_parameters():
            if name in trained:
                follower.data = 0.99 * follower.data + 0.01 * trained[name].data
    assert upload.keys() == trained.keys() and "head.predictor.0.weight" in upload
    for name, parameter in trained.items():
        if not name.endswith(("qkv.bias", "encoder.norm.bias")):  # no gradient but rounding: keys'
            # bias moves no softmax, and batch norm takes a shift of all features away
            torch.testing.assert_close(upload[name], parameter.detach(), rtol=1e-3, atol=2e-5)

def test_published_communication_and_compute_of_byol_and_moco(unmetered):
    """Tun et al. 2024: 8.40 end to end and 1.66 layer by layer (1000 MiB)."""
    config = objectives.Settings(**{**asdict(PAPER), "clients": 1, "objective": "byol"})
    for method, published in (("e2e", 8.40), ("fll", 1.66)):
        price = fllw.cost(replace(config, method=method), (3, 32, 32))
        sent = price["download_bytes"] + price["upload_bytes"]
        assert sent / 2**20 / 1000 == pytest.approx(published, abs=0.015)
    whole = Stage(1, tuple(range(12)), tuple(range(12)), 1)  # two views; the target runs forward
    plain = fllw.count_macs(config, whole, whole.present, (3, 32, 32))
    assert config.macs(whole, whole.present, (3, 32, 32)) == pytest.approx(
        plain * 4 / 3 + 3 * 2 * (2 * 256 * 512))

# ---------------------------------------------------------------------------- joints, together
JOINTS = {  # what an experiment hands to federate()
    "byol": (small(objectives, objective="byol"), dict(train_client=objectives.momentum_train)),
    "vicreg": (small(objectives), dict(train_client=objectives.CLIENTS["vicreg"])),
    "sensors": (small(multimodal, clients=4, batch_size=4),
                dict(train_client=multimodal.two_sensor_train)),
    "early": (small(early_stopping, rounds=12, tolerance=100.0),
              dict(train_client=early_stopping.early_train, plan=early_stopping.plan)),
    "early cnn": (small(early_stopping, rounds=12, tolerance=100.0, encoder="cnn",
                        new_block="fresh"),
                  dict(train_client=early_stopping.early_train, plan=early_stopping.plan))}

@pytest.mark.parametrize("name", JOINTS)
def test_a_run_resumes_exactly_and_leaves_frozen_blocks(name):
    (config, joints), saved = JOINTS[name], []
    dataset = images(48, (2, 7, 14) if name == "sensors" else SHAPE)
    whole, history = fllw.federate(config, dataset, on_round=lambda row, state: saved.append(
        copy.deepcopy(state)), **joints)
    again, _ = fllw.federate(config, dataset, copy.deepcopy(saved[1]), **joints)
    assert same_tensors(whole.state_dict(), again.state_dict())
    stages = [row["stage"] for row in history]
    assert stages == ([1, 1, 1, 2, 2, 2, 3, 3, 3] if name.startswith("early") else [1, 2, 3])
    lowest = [{n: t for n, t in state.server.items() if fllw.block_of(n) == 0} for state in saved]
    assert all(same_tensors(lowest[stages.index(2) - 1], later)
               for later in lowest[stages.index(2):])

# ------------------------------------------------------------------------------------- sensors
def test_sensors_are_the_halves_of_images_of_any_number_of_channels():
    pixels = images(4, (3, 15, 14)).train_images
    first, second = multimodal.split(pixels).chunk(2, 1)
    assert torch.equal(first, pixels[:, :, :7]) and torch.equal(second, pixels[:, :, 8:])

def test_clip_loss_and_retrieval_against_loops():
    z, t, B, shape = normal(8, 5), 0.3, 4, (2, 7, 14)
    total = sum(cross_entropy(one[i], other, i, t) for i in range(B)
                for one, other in ((z[:B], z[B:]), (z[B:], z[:B])))
    config, dataset = small(multimodal, temperature=t), images(30, shape)
    assert float(multimodal.clip(config, z, [])) == pytest.approx(total / (2 * B), rel=1e-5)
    server = fllw.initial(config, shape)
    learner = fllw.assemble(config, server, shape)
    with torch.no_grad():
        a, b = learner.head(learner.encoder(data.normalise(dataset.test_images))).chunk(2)
    places = [sorted(range(20), key=lambda c: -cosine(b[i], a[c])).index(i) for i in range(20)]
    expected = {f"top{k}": 100 * np.mean([place < k for place in places]) for k in (1, 5)}
    assert multimodal.retrieval(config, server, dataset) == pytest.approx(expected)

def test_a_sensor_is_trained_by_those_who_have_it_and_averaged_over_them_alone():
    shape, config = (2, 7, 14), small(multimodal, clients=4, rounds=3, batch_size=4)
    dataset, stage, servers = images(48, shape), fllw.stages(config)[0], []
    fllw.federate(config, dataset, train_client=multimodal.two_sensor_train,
                  on_round=lambda row, state: servers.append((row, dict(state.server))))
    row, server = servers[0]
    start, uploads = server_of(config, stage, shape), []
    for client, part in enumerate(data.partition(dataset.train_labels, 4)):
        pixels, lacks = dataset.train_images[part], {2: "second", 3: "first"}.get(client, "none")
        upload, _ = multimodal.two_sensor_train(config, stage, start, pixels, 1, client)
        uploads.append(upload)
        assert upload.keys() == {name for name in start if f".{lacks}." not in name}
        assert row["answers"][client]["missing"] == sorted(start.keys() - upload)
        if lacks != "none":  # what the other sensor saw plays no part
            pixels[:, 1 if lacks == "second" else 0] = 7
            again, _ = multimodal.two_sensor_train(config, stage, start, pixels, 1, client)
            assert same_tensors(upload, again)
    for name, tensor in server.items():  # every client has 12 images: a plain mean
        own = [upload[name] for upload in uploads if name in upload]
        assert len(own) == 3
        torch.testing.assert_close(tensor, torch.stack(own).mean(0), rtol=1e-5, atol=1e-7)

# ------------------------------------------------------------------------------ early stopping
def test_early_stopping_against_a_history_made_by_hand():
    follow, nan = early_stopping.follow, math.nan
    assert follow([3, 2, 1], 2, 0.1) == (0, None)
    assert follow([3, 2, 1.95, 1.89, 1.85, 1.84], 2, 0.1) == (3, 6)  # 1.89 falls by 0.11 of 2
    assert follow([3, 3, 2, 2, 2, 0], 2, 0.1) == (3, 5)
    assert follow([nan, 3, nan, 3, nan, 3, nan], 2, 0.1) == (2, 6)  # no answer says nothing
    config = small(early_stopping, rounds=12, lr=1.0, tolerance=0.1)
    history = [{"stage": stage, "answers": [{"loss": loss, "valid": True}]}
               for stage, losses in {1: [3, 3, 3], 2: [5, 4, 4]}.items() for loss in losses]
    plan = early_stopping.plan(config, history)
    assert [stage.rounds for stage in plan] == [3, 4, 4]
    assert [stage.rate for stage in plan] == [0.5, 1.0, 2.0]

def test_a_round_that_lost_everybody_neither_ends_a_stage_nor_shortens_the_next():
    config, joints = JOINTS["early"]
    parts = data.partition(images(48).train_labels, 2)
    ask = fllw.in_turn(config, images(48).train_images, parts, early_stopping.early_train)
    ask = losing(ask, lambda round_number: {0, 1} if round_number == 2 else ())
    _, history = fllw.federate(config, images(48), ask=ask, plan=early_stopping.plan)
    assert [row["stage"] for row in history] == [1] * 4 + [2] * 3 + [3] * 3
    assert history[1]["answers"] == []

def test_held_out_images_train_nothing_and_are_all_of_the_loss():
    config, _ = JOINTS["early"]
    stage, pixels = early_stopping.plan(config, ())[0], images(24).train_images
    server, other = server_of(config, stage), pixels.clone()
    other[:2] = 255 - other[:2]  # of 24, a tenth
    upload, loss = early_stopping.early_train(config, stage, server, pixels, 1, 0)
    again, another = early_stopping.early_train(config, stage, server, other, 1, 0)
    assert same_tensors(upload, again) and loss.item() != another.item()

def test_compute_of_the_cnn_against_a_flop_counter():
    config, _ = JOINTS["early cnn"]
    learner, stage, forward = config.learner(SHAPE), early_stopping.plan(config, ())[2], []
    for blocks in range(1, config.depth + 1):
        with FlopCounterMode(display=False) as flops:
            learner.encoder.lower(torch.zeros(1, *SHAPE), blocks)
        forward.append(flops.get_total_flops() / 2 - sum(forward))
    head = sum(p.numel() for p in learner.head.parameters() if p.ndim == 2)
    assert config.macs(stage, stage.present, SHAPE) == 2 * (
        forward[0] + forward[1] + 3 * forward[2] + 3 * head)

# --------------------------------------------------------------------- alignment, calibration
@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_alignment_doubles_the_first_loss_and_holds_a_client(blocks, micro_batch):
    """At the first step both models are the same, so the second term equals the first."""
    stage, pixels = fllw.stages(SMALL)[blocks - 1], images().train_images
    message, losses, moves = server_of(SMALL, stage), [], []
    config = replace(SMALL, local_epochs=8, lr=1e-2, micro_batch=micro_batch)
    for weight in (0.0, 1.0):
        upload, loss = alignment.aligned_train(weight, config, stage, message, pixels, 1, 0)
        losses.append(loss[0].item())
        learners = [fllw.assemble(config, m, SHAPE) for m in (message | upload, message)]
        own, old = [learner.head(learner.encoder(data.normalise(pixels))) for learner in learners]
        moves.append(F.cosine_similarity(own, old).mean().item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-3)
    assert moves[1] > moves[0] or blocks == 1  # a new model has little to hold on to

def test_the_server_calibrates_all_blocks_on_images_that_no_client_has():
    config, dataset = replace(SMALL, depth_dropout=0.5), images()
    clients, own = calibration.divide(config, dataset, 0.2)
    both = torch.cat([clients.train_images, own.train_images]).flatten(1).unique(dim=0)
    assert len(own.train_images) == 12
    assert torch.equal(both, dataset.train_images.flatten(1).unique(dim=0))
    plain, ended = [], []
    fllw.federate(config, clients, on_round=lambda row, state: plain.append(dict(state.server)))

    def on_round(row, state):
        calibration.calibrate(config, own.train_images, 2, "end", row, state)
        ended.append((dict(state.server), row["changed"]))

    _, history = fllw.federate(config, clients, on_round=on_round)
    whole = Stage(1, (0, 1, 2), (0, 1, 2), 1)
    expected, _ = fllw.local_train(replace(config, local_epochs=2), whole, plain[2],
                                   own.train_images, 3, calibration.SERVER)
    assert [changed for _, changed in ended] == [[], [], sorted(expected)]
    assert same_tensors(ended[1][0], plain[1]) and same_tensors(ended[2][0], expected)

def test_what_calibration_changes_every_round_is_downloaded_again():
    """In the last round a client is sent all that the server trained, the frozen block as well."""
    config, own = replace(SMALL, depth=2, rounds=4), images(16).train_images
    _, history = fllw.federate(config, images(), on_round=lambda row, state: calibration.calibrate(
        config, own, 1, "round", row, state))
    first, both = [sum(t.nbytes for t in server_of(config, stage).values())
                   for stage in fllw.stages(config)]
    # in round 3 block 1 starts as a copy of block 0, which the client makes itself
    costs = calibration.client_costs(config, SHAPE, history)
    assert costs["download_bytes"] == 3 * first + both

# -------------------------------------------------------------------------------- comparisons
def test_controls_spend_what_they_are_compared_with(unmetered):
    rows = compare.variants(replace(SMALL, depth=4, rounds=40))
    for key, (mine, other, measure) in compare.MATCHED.items():
        one = compare.matched(rows, key, SHAPE)
        assert replace(one, rounds=40) == rows[mine]
        fewer, spent, more, allowed = [
            sum(fllw.cost(c, SHAPE)[column] for column in measure)
            for c in (replace(one, rounds=one.rounds - 1), one, replace(one, rounds=one.rounds + 1),
                      rows[other])]
        assert fewer < allowed < more, key
        if one.method == "e2e":  # all rounds cost the same
            assert spent == pytest.approx(allowed, rel=0.5 / one.rounds + 1e-6), key

def test_the_rate_is_chosen_on_training_images_alone(monkeypatch):
    """The best of four by a score made up here; no image of the test set is looked at."""
    dataset, seen = images(), []
    dataset = dataset._replace(test_images=255 - dataset.test_images)  # none is a training image

    def measure(key, row, held, out):
        seen.append(torch.cat([held.train_images, held.test_images]).flatten(1).unique(dim=0))
        return {"knn": -abs(row.lr - 4e-3), "linear_probe": 0.0}

    monkeypatch.setattr(compare, "measure", measure)
    flags = {"rows": ["fll"], "rates": compare.RATES, "one_block_lr": None, "tried": {}}
    assert compare.settings_of(flags, SMALL, dataset, None)["fll"].lr == 4e-3 and len(seen) == 4
    assert flags["tried"]["fll"] == {rate: -abs(rate - 4e-3) for rate in compare.RATES}
    assert all(torch.equal(s, dataset.train_images.flatten(1).unique(dim=0)) for s in seen)

COMMANDS = {  # experiment: (flags, rows of its table)
    compare: ("--rows raw fll --lr 1e-3 --seeds 0 1", 2), objectives: ("--seeds 1 --images 0", 3),
    multimodal: ("--seeds 0 --images 0", 3), alignment: ("--weight 0.5", 1),
    early_stopping: ("--seeds 1 --images 0 --rounds 4", 10),
    calibration: ("--epochs 2 --server-share 0.3", 1)}

@pytest.mark.parametrize("experiment", COMMANDS)
def test_a_command_saves_when_asked_and_before_it_prints_and_shows_a_finished_run(
        experiment, npz, tmp_path, monkeypatch, unmetered):
    flags, rows = COMMANDS[experiment]
    file = npz / ("rgba.npz" if experiment is multimodal else "grey.npz")
    flags = [*TINY, *flags.split(), "--out", tmp_path / "runs", "--data", file]
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(objectives, "CLIENTS", {"byol": objectives.momentum_train})
    shown, table = [], fllw.table
    monkeypatch.setattr(fllw, "table", lambda *given: shown.append(table(*given)))
    call(experiment, monkeypatch, *flags)
    assert not (tmp_path / "results").exists()
    if experiment is multimodal:
        with pytest.raises(data.InputError, match="made by experiments.multimodal"):
            fllw.load_encoder(tmp_path / "runs" / "FLL-seed0")
    for name in ("train", "evaluate"):  # would fail if anything were trained or evaluated again
        monkeypatch.setattr(fllw, name, None)
    (tmp_path / "moved.npz").write_bytes(file.read_bytes())  # the same images
    call(experiment, monkeypatch, *flags, "--data", tmp_path / "moved.npz")
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 1 + rows
    monkeypatch.setattr(fllw, "table", None)  # printing fails
    with pytest.raises(TypeError):
        call(experiment, monkeypatch, *flags, "--save", "tiny")
    saved = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert len(saved["rows"]) == rows and experiment.__name__ in saved["command"]

def test_paper_scale_rehearses_at_toy_size(npz, tmp_path, monkeypatch, capsys, unmetered):
    """Its rows are commands; here they run in this process."""
    def in_this_process(commands):
        for line in commands.values():
            experiment = {one.__name__: one for one in (compare, finetune)}[line[2]]
            call(experiment, monkeypatch, *line[3:])
        return []

    monkeypatch.setattr(paper_scale, "ROWS", ("raw", "scratch", "fll"))
    monkeypatch.setattr(paper_scale, "side_by_side", in_this_process)
    call(paper_scale, monkeypatch, "--rehearse", *"--images 0 --minutes 0.01 --device cpu".split(),
         "--workers", "1", "--data", npz / "grey.npz", "--out", tmp_path / "toy")
    printed = capsys.readouterr().out
    assert "from scratch" in printed and "fine-tuned" in printed
    rounds = json.loads((tmp_path / "toy" / "rounds.json").read_text())
    trained = fllw.read(tmp_path / "toy" / "fll-seed0" / "checkpoint.pt")
    assert rounds % 3 == 0 and rounds == len(trained["history"])

# -------------------------------------------------------------------------- what can go wrong
WRONG = """
alignment --weight nan                     : --weight must be from 0 to 1000000, it is nan
alignment --save ../up                     : must be letters, digits
calibration --server-share inf             : --server-share must be between 0 and 1
calibration --server-share 0.01            : the server needs at least 2 images
calibration --epochs 9999999999            : --epochs must be from 1 to 100000
calibration --server-share 0.97            : 2 clients need at least 4 training images
objectives --seeds 1 1                     : --seeds names a seed twice
objectives --seeds -1                      : --seed must be from 0
objectives --method e2e                    : leave it out
multimodal --augment natural               : --augment must be digits
multimodal --patch-size 2 --seeds 0 --images 0 : --patch-size 2 must divide the images
paper_scale --rehearse --minutes nan       : --minutes must be above 0
compare --rows fll --seeds 1 1             : one of them twice
compare --rows fll --rates nan             : --rates must be from
compare --rows fll fll                     : one of them twice
compare --rates 0.001 --lr 0.1             : give one of the two
compare --save=                            : must be letters
finetune --labels 5 -1                     : --labels 0 or more
stragglers --deadlines 4 nan               : --deadlines must be above 0 seconds
personal --alpha 0.1                       : leave it out
dropping_rates --depth 4 --rounds 4 --depth-dropout 0.9 : --depth-dropout 0.9 is too high: rising
dropping_rates --depth 1                   : --depth must be 2 or more
server_momentum --seed 1                   : differs from row to row
"""

@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_odd_input_is_one_sentence_and_status_2(case, npz, tmp_path, monkeypatch, capsys):
    (name, *flags), sentence = case.split(" :")[0].split(), case.split(" : ")[1]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        experiment = importlib.import_module(f"experiments.{name}")
        call(experiment, monkeypatch, *TINY, "--data", npz / "grey.npz", *flags)
    error = capsys.readouterr().err
    assert status.value.code == 2 and sentence in error and error.count("\n") == 1

def test_training_that_diverged_is_one_sentence(npz, tmp_path, monkeypatch, capsys, unmetered):
    with pytest.raises(SystemExit, match="smaller --lr"):
        call(early_stopping, monkeypatch, *TINY, "--data", npz / "grey.npz", "--images", "0",
             "--seeds", "0", "--lr", "1e8", "--out", tmp_path / "runs")

@pytest.mark.parametrize("name", ["alignment", "calibration", "early_stopping", "multimodal",
                                  "objectives", "paper_scale"])
def test_help_only_prints_and_a_script_says_how_to_run_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        call(sys.modules[f"experiments.{name}"], monkeypatch, "--help")
    assert status.value.code == 0 and "--save" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"python -m experiments.{name}$"):
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir())
