"""Tests of finetune.py: what is put on top of an encoder, and who is trained."""
from dataclasses import replace

import torch

import data
import fllw
from experiments import compare, finetune
from experiments.test_experiments import FLAGS, npz, same_tensors, unmetered  # noqa: F401

ONE = fllw.Config(dim=16, heads=4, depth=1, head_hidden=8, head_dim=8, device="cpu")
SHAPE = (1, 28, 28)

def tensors(encoder):
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

def test_blocks_come_from_the_server_and_above_them_from_the_seed():
    server = fllw.initial(replace(ONE, seed=3), SHAPE)  # stands for what was trained
    trained = tensors(fllw.encoder_of(ONE, server, SHAPE))
    assert same_tensors(tensors(finetune.encoder_of(ONE, server, SHAPE)), trained)
    four = replace(ONE, depth=4)
    fresh = tensors(fllw.encoder_of(four, fllw.initial(four, SHAPE), SHAPE))
    assert same_tensors(tensors(finetune.encoder_of(four, server, SHAPE)), fresh | trained)
    assert same_tensors(tensors(finetune.encoder_of(four, {}, SHAPE)), fresh)

def test_fine_tuning_learns_from_labels_and_leaves_the_encoder_alone():
    dark_and_bright = torch.tensor([0, 1]).repeat(40)
    pixels = (200 * dark_and_bright).byte()[:, None, None, None].expand(-1, *SHAPE).contiguous()
    labels = dark_and_bright.where(torch.arange(80) < 60, -1)  # the last ones have no label
    easy = data.Dataset(pixels, labels, pixels[:10], dark_and_bright[:10])
    encoder = finetune.encoder_of(ONE, {}, SHAPE)
    before = tensors(encoder)
    for per_class, epochs in ((0, 20), (10, 8)):
        assert finetune.finetune(ONE, encoder, easy, epochs, per_class) == 100
    assert same_tensors(tensors(encoder), before)

def test_the_command_tunes_what_compare_trained(
        npz, tmp_path, monkeypatch, capsys, unmetered):  # noqa: F811
    flags = [*FLAGS, "--data", str(npz), "--rates", "1e-3", "--out", str(tmp_path), "--rows"]
    flags += ["untrained", "one-block", "fll"]
    compare.main(flags)
    monkeypatch.setattr(fllw, "train", None)  # would fail if an encoder were trained again
    monkeypatch.setattr(finetune, "finetune", lambda config, encoder, dataset, epochs, count, draw:
                        10 * len(encoder.blocks) + count + draw**2)
    finetune.main([*flags, "--labels", "0", "7"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    small, deep = ["10.0", "23.0"], ["20.0", "33.0"]  # on all labels: one draw
    assert [line[-2:] for line in lines] == [deep, small, deep, deep]
    assert [line[:-2][-1] for line in lines] == ["encoder", "rounds", "top", "rounds"]
