"""Tests of paper_scale.py."""
import json
from dataclasses import replace

import pytest

import data
import fllw
from experiments import finetune, paper_scale
from ssl_loss import evaluate

def test_every_row_is_written_and_is_what_the_modules_give(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr("experiments.RESULTS", tmp_path)
    monkeypatch.setattr(fllw, "table", lambda *_: rows.append(
        json.loads((tmp_path / "toy.json").read_text())["rows"]))
    flags = "--rehearse --minutes 1 --epochs 1 --images 100 --device cpu --seeds 5 --save toy"
    paper_scale.main(flags.split())
    assert [len(written) for written in rows] == [1, 2, 3, 4, 5, 6]
    config = replace(paper_scale.TOY, rounds=4, depth_dropout=0.5, device="cpu", seed=5)
    dataset = data.load("mnist5k", images=100)
    state = fllw.federate(config, data.split(dataset, 2, seed=5))  # four rounds: two a stage
    encoder = fllw.encoder_of(config, state.server, dataset.shape)
    expected = evaluate(encoder, dataset, "natural")
    expected["finetuned"] = finetune.finetune(config, encoder, dataset, 1)
    assert all(rows[5]["FLL + FDD 0.5"][name] == [number] for name, number in expected.items())
    for flags in ("--data mnist5k --device cpu", "--rehearse --epochs 0"):
        with pytest.raises(SystemExit, match="2"):
            paper_scale.main(flags.split())

def test_the_rounds_fill_the_time(monkeypatch):
    def federate(config, clients, plan):  # a block that trains takes 2 s, a frozen one 1 s
        return fllw.State({}, [{"seconds": 99}, {"seconds": 2 * plan[0].stop - plan[0].first}])
    monkeypatch.setattr(fllw, "federate", federate)
    config, dataset = replace(paper_scale.TOY, depth=3, rounds=50), data.load("mnist5k", images=100)
    # 2 clients * 3 epochs * (3 + 3 + 4 + 6 + 2) = 108 s a round; 6 rows * 5 epochs * 2 * 6 = 360 s.
    for seconds, rounds in ((360 + 20 * 108, 20), (359 + 20 * 108, 19), (0, 6), (10**6, 50)):
        assert paper_scale.choose_rounds(config, dataset, 5, seconds) == rounds
