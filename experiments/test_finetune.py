"""Tests of finetune.py: what is put on top of one block; the encoder given stays as it is."""
import sys
from dataclasses import replace

import pytest
import torch

import data
import fllw
from experiments import finetune
from ssl_loss import features

ONE = fllw.Config(dim=16, heads=4, depth=1, head_hidden=8, head_dim=8)
SHAPE = (1, 28, 28)

def one_block():
    return fllw.encoder_of(ONE, fllw.initial(replace(ONE, seed=3), SHAPE), SHAPE)

@pytest.mark.parametrize("depth", [1, 2])
def test_identities_on_top_change_no_feature(depth):
    images, small = data.load("mnist5k").test_images[::100], replace(ONE, depth=depth)
    encoder = fllw.encoder_of(small, fllw.initial(small, SHAPE), SHAPE)
    deep = finetune.deepen(small, encoder, 3, "zero", SHAPE)
    assert len(deep.blocks) == 3
    torch.testing.assert_close(features(deep, images), features(encoder, images))

@pytest.mark.parametrize("new_block", ["copy", "fresh"])
def test_copies_and_fresh_blocks_come_from_where_they_should(new_block):
    deep = finetune.deepen(ONE, one_block(), 3, new_block, SHAPE)
    fresh = fllw.initial(replace(ONE, depth=3), SHAPE)
    for name, tensor in deep.state_dict().items():
        source = one_block().state_dict().get(name)
        if fllw.block_of(name) in (1, 2):
            lowest = name.replace(f"blocks.{fllw.block_of(name)}.", "blocks.0.")
            source = (one_block().state_dict()[lowest] if new_block == "copy"
                      else fresh[f"encoder.{name}"])
        assert torch.equal(tensor, source), name

def test_fine_tuning_learns_and_leaves_the_encoder_alone():
    dark_and_bright = torch.tensor([0, 1]).repeat(40)
    images = (200 * dark_and_bright).byte()[:, None, None, None].expand(-1, *SHAPE).contiguous()
    easy = data.Dataset(images, dark_and_bright, images[:10], dark_and_bright[:10])
    encoder = one_block()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    accuracy = finetune.finetune(encoder, easy, finetune.MILD["digits"],
                                 torch.Generator().manual_seed(0), epochs=8, batch_size=16)
    assert accuracy == 100
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())

@pytest.mark.parametrize("row, depth", [("one-block-fresh", 1), ("two-blocks-micro-identity", 2)])
def test_a_row_without_room_for_blocks_on_top_is_refused(row, depth, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune", "--rows", row, "--depth", str(depth)])
    monkeypatch.setattr(data, "load", None)  # it is refused before anything is read
    with pytest.raises(data.InputError, match=f"--depth {depth} leaves nothing to put on top"):
        finetune.main()
