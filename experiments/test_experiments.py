"""Tests of what the experiments share, of compare.py and of calibration; helpers of other tests."""
import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import experiments
import fllw
from experiments import (
    compare, early_stopping, lw_fedssl, multimodal, objectives, personal, stragglers)

torch.set_num_threads(1)  # the tensors are tiny
SHAPE = (1, 14, 14)
TINY = dict(dim=16, depth=3, heads=2, patch_size=7, head_hidden=24, head_dim=8, rounds=3,
            batch_size=8, depth_dropout=0.0, device="cpu", augment="digits", workers=1)
SMALL = fllw.Config(**TINY)
FLAGS = ("--dim 8 --depth 2 --heads 2 --head-hidden 8 --head-dim 4 --rounds 2 --batch-size 8 "
         "--device cpu --workers 1 --images 0 --seeds 0").split()

def images(n=60, shape=SHAPE):
    """A data set of noise, for what does not depend on what the images show."""
    pixels = torch.randint(0, 256, (n + 20, *shape), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    return data.Dataset(pixels[:n], torch.arange(n) % 5, pixels[n:], torch.arange(20) % 5)

def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())

def as_set(pixels):
    return {image.numpy().tobytes() for image in pixels}

@pytest.fixture
def unmetered(monkeypatch):
    """Leave out the measuring of memory, which takes longer than these rounds."""
    monkeypatch.setattr(fllw, "peak_memory", lambda *arguments: 1)

@pytest.fixture
def npz(tmp_path_factory):
    """A file of images whose halves are square."""
    path = tmp_path_factory.mktemp("npz") / "noise.npz"
    parts = images(60, (1, 28, 14))._asdict()
    np.savez(path, **{key: part.squeeze() for key, part in parts.items() if part is not None})
    return path

def test_controls_spend_what_they_are_compared_with(unmetered):
    config = replace(SMALL, depth=4, rounds=80)
    for key, (changes, other) in compare.ROWS.items():
        row = compare.row_of(key, config, SHAPE)
        assert replace(row, rounds=80) == replace(config, **changes)
        theirs = replace(config, **compare.ROWS[other or key][0])
        spent, allowed = (fllw.cost(one, SHAPE)["macs"] for one in (row, theirs))
        assert spent == pytest.approx(allowed, rel=1.2 / row.rounds), key  # rounds cost unlike

def test_the_rate_is_chosen_on_training_images_alone(monkeypatch):
    dataset, seen, config = images(), [], replace(SMALL, rounds=16)

    def measure(key, row, held, out):
        train, test = as_set(held.train_images), as_set(held.test_images)
        assert len(test) == 15 and not train & test and row == replace(config, lr=row.lr)
        seen.append(train | test)
        return {"knn": -abs(row.lr - 2e-3), "linear_probe": 0.0}
    monkeypatch.setattr(compare, "measure", measure)
    plan, tried = compare.plan_rows(["fll"], config, dataset, None, [1e-3, 2e-3, 4e-3])
    assert plan["fll"].lr == 2e-3 and tried["fll"] == {1e-3: -1e-3, 2e-3: 0.0, 4e-3: -2e-3}
    assert seen == [as_set(dataset.train_images)] * 3

def test_the_server_trains_all_its_blocks_on_images_that_no_client_has(unmetered):
    (theirs, own), server = lw_fedssl.divide(SMALL, images()), replace(SMALL, local_epochs=2)
    assert len(own) == 6 and not as_set(theirs.train_images) & as_set(own)
    assert as_set(theirs.train_images) | as_set(own) == as_set(images().train_images)
    work, sizes = lw_fedssl.calibration(server, own), []

    def on_round(state):
        average, number = dict(state.server), len(state.history)
        work(state)
        stage = fllw.Stage(1, 0, 0, number, range(1, 4))
        expected = fllw.local_train(server, stage, average, own, number, 2**32 - 1)[0]
        assert same_tensors(state.server, expected)
        sizes.append(sum(tensor.nbytes for tensor in expected.values()))
    fllw.federate(SMALL, data.split(theirs, 2), on_round=on_round)
    # A client downloads all anew in every round, but for a new block: that is a copy at first.
    rows, block = dict(lw_fedssl.rows_of(SMALL, images())), sizes[2] - sizes[1]
    assert rows["FLL + calibration"]["download_bytes"] == sum(sizes) - 2 * block

COMMANDS = {  # experiment: (flags, rows of its table)
    compare: ("--rows untrained fll --rates 1e-3 --out runs", 2), objectives: ("--seeds 0 1", 6),
    multimodal: ("", 3), lw_fedssl: ("", 4), early_stopping: ("--rounds 6", 14),
    personal: ("--clients 4", 24), stragglers: ("--deadlines 0.001", 8)}

@pytest.mark.parametrize("experiment", COMMANDS)
def test_a_command_saves_its_table_when_asked_and_before_it_prints(
        experiment, npz, tmp_path, monkeypatch, unmetered):
    flags = [*FLAGS, "--data", str(npz), *COMMANDS[experiment][0].split(), "--save", "tiny"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    experiments.show("any", {"a row": {"knn": 50.0}})  # was not asked to
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(fllw, "table", None)  # printing fails
    monkeypatch.setattr(sys, "argv", ["", "--save", "tiny"])
    with pytest.raises(TypeError):
        experiment.main(flags)
    saved = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert len(saved["rows"]) == COMMANDS[experiment][1]
    assert experiment is not objectives or len(set(saved["rows"]["byol, FLL"]["knn"])) == 2  # seeds
    assert saved["command"] == f"python -m {experiment.__name__} --save tiny"

WRONG = """
compare --rows fll --save ../up  : must be letters, digits
compare --rows fll --seeds 1 1   : --seeds names a seed twice
multimodal --augment natural     : leave it out
personal --clients 1             : two clients or more
stragglers --deadlines 4 nan     : --deadlines must be above 0
finetune --rows fll --labels 5 -1 : --labels 0 or more
compare --rows fll --clients-per-round 3 : at most --clients 2
compare --rows e2e e2e-rounds --rates 1  : two of these are the same run
"""

@pytest.mark.parametrize("case", WRONG.strip().splitlines())
def test_wrong_input_is_one_sentence_and_status_2(case, npz, tmp_path, monkeypatch, capsys):
    (name, *flags), sentence = case.split(" : ")[0].split(), case.split(" : ")[1]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        importlib.import_module(f"experiments.{name}").main([*FLAGS, "--data", str(npz), *flags])
    assert status.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
