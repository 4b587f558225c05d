"""Tests of finetune.py: what is put on top of an encoder, who is trained, and what is kept."""
from dataclasses import replace

import torch

import data
import fllw
from experiments import compare, finetune
from experiments.test_experiments import FLAGS, npz, same_tensors, unmetered  # noqa: F401
from ssl_loss import features

ONE = fllw.Config(dim=16, heads=4, depth=1, head_hidden=8, head_dim=8, device="cpu")
SHAPE = (1, 28, 28)

def tuned(key, depth, whole):
    """The encoder that is tuned, and the one that was trained, of `depth` blocks."""
    config = replace(ONE, depth=depth)
    server = fllw.initial(replace(config, seed=3), SHAPE)
    return (finetune.encoder_of(key, config, server, whole, SHAPE),
            fllw.encoder_of(config, server, SHAPE))

def test_where_the_blocks_of_an_encoder_come_from():
    pixels = data.load("mnist5k").test_images[::100]
    for depth in (1, 2):
        deep, own = tuned("one-block-identity", depth, 4)
        torch.testing.assert_close(features(deep, pixels), features(own, pixels))
        assert len(deep.blocks) == 4 and deep.blocks["3"].mlp.fc1.weight.any()
    for key, depth, whole in (("one-block-fresh", 1, 4), ("scratch-one", 1, 1), ("fll", 2, 2)):
        deep, own = (encoder.state_dict() for encoder in tuned(key, depth, whole))
        fresh = fllw.initial(replace(ONE, depth=whole), SHAPE)
        fresh = fllw.encoder_of(ONE, fresh, SHAPE).state_dict()
        assert same_tensors(deep, fresh if key == "scratch-one" else fresh | own)

def test_fine_tuning_learns_from_labels_and_leaves_the_encoder_alone():
    dark_and_bright = torch.tensor([0, 1]).repeat(40)
    pixels = (200 * dark_and_bright).byte()[:, None, None, None].expand(-1, *SHAPE).contiguous()
    labels = dark_and_bright.where(torch.arange(80) < 60, -1)  # the last ones have no label
    easy = data.Dataset(pixels, labels, pixels[:10], dark_and_bright[:10])
    encoder, _ = tuned("fll", 1, 1)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for per_class, epochs in ((0, 20), (10, 8)):
        assert finetune.finetune(ONE, encoder, easy, epochs, per_class) == 100
    assert same_tensors(encoder.state_dict(), before)

def test_the_command_tunes_what_compare_trained_and_computes_nothing_twice(
        npz, tmp_path, monkeypatch, capsys, unmetered):  # noqa: F811
    flags = [*FLAGS, "--data", str(npz), "--lr", "1e-3", "--out", str(tmp_path), "--rows"]
    compare.main([*flags, "untrained", "one-block", "fll"])
    monkeypatch.setattr(fllw, "train", None)  # would fail if an encoder were trained again
    flags += "fll --controls scratch scratch-one one-block-identity --labels 0 7 --draws 3".split()
    for finetuned in (lambda config, encoder, dataset, epochs, count, draw:
                      10 * len(encoder.blocks) + count + draw**2, None):
        monkeypatch.setattr(finetune, "finetune", finetuned)
        finetune.main(flags)
        table = capsys.readouterr().out.splitlines()[-4:]  # on all labels: one draw
        assert [line.split() for line in table] == [
            ["FLL,", "2", "rounds", "20.0", "28.7"], ["scratch", "20.0", "28.7"],
            ["scratch-one", "10.0", "18.7"], ["one-block-identity", "20.0", "28.7"]]
