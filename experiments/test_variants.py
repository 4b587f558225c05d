"""Tests of objectives.py, multimodal.py and alignment, against loops and published bytes."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import fllw
from experiments import lw_fedssl, multimodal, objectives
from experiments.test_experiments import SHAPE, TINY, images, unmetered  # noqa: F401
from ssl_loss import nt_xent

def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

def server_of(config, stage, shape=SHAPE):
    return fllw.broadcast(fllw.initial(config, shape), range(stage.stop))

def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())

def cross_entropy(anchor, targets, own, t):
    """-log of the softmax, at `own`, of an anchor's similarities with the targets."""
    scores = [math.exp(cosine(anchor, target) / t) for target in targets]
    return -math.log(scores[own] / sum(scores))

def test_losses_of_the_other_objectives_against_loops_over_images():
    (q, k), B, t = normal(2, 6, 5), 3, 0.3
    expected = np.mean([2 - 2 * cosine(q[i], k[(i + B) % 6]) for i in range(2 * B)])
    assert float(objectives.byol(q, k, t)) == pytest.approx(expected, rel=1e-5)
    total = sum(cross_entropy(q[i], k[B:] if i < B else k[:B], i % B, t) for i in range(2 * B))
    assert float(objectives.moco_v3(q, k, t)) == pytest.approx(2 * t * total / B, rel=1e-5)
    pull = nt_xent(k[:B], q[B:], t) + nt_xent(q[:B], k[B:], t)
    torch.testing.assert_close(lw_fedssl.aligned(q, k, t), nt_xent(q[:B], q[B:], t) + pull / 2)

def targets_of(models, momentum, views):
    """By the definition. models: whole copies of the learner, as it was before every step."""
    target, n, m = copy.deepcopy(models[0]), len(models) - 1, momentum  # n: steps that were taken
    target.head.predictor = torch.nn.Identity()
    for key, average in target.named_parameters():
        w = [model.get_parameter(key) for model in models]
        average.data = m**n * w[0] + sum((1 - m) * m**(n - i) * w[i] for i in range(1, n + 1))
    return target.head(target.encoder(views))

@pytest.mark.parametrize("config, client, loss_of, momentum, number", [
    (objectives.Settings(**TINY), objectives.train_client, objectives.byol, 0.99, 1),
    (objectives.Settings(**TINY, objective="moco_v3"), objectives.train_client, objectives.moco_v3,
     0.99, 2), (lw_fedssl.Aligned(**TINY), lw_fedssl.aligned_train, lw_fedssl.aligned, 1, 2)])
def test_a_client_and_its_compute_against_steps_with_whole_copies_of_the_model(
        config, client, loss_of, momentum, number):
    stage, pixels, models = fllw.stages(config)[number - 1], images(24).train_images, []
    server = server_of(config, stage)

    def step(config, learner, stage, views):
        models.append(copy.deepcopy(learner).requires_grad_(False))
        z, targets = learner.head(learner.encoder(views)), targets_of(models, momentum, views)
        loss = loss_of(z, targets, 0.2)
        loss.backward()
        return loss.detach()

    expected, losses, _ = fllw.local_train(config, stage, server, pixels, number, 0, step)
    client(config, stage, server, pixels, number, 1)  # another client leaves nothing behind
    upload, steps, _ = client(config, stage, server, pixels, number, 0)
    assert upload.keys() == expected.keys() and steps.tolist() == pytest.approx(losses.tolist())
    for key, tensor in upload.items():
        if not key.endswith(("qkv.bias", "encoder.norm.bias")):  # no gradient but rounding: keys'
            # bias moves no softmax, and batch norm takes a shift of all features away
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-5)
    # Of a view, by hand: 5 tokens of width 16 in a block, head, 4 patches; BYOL's predictor, 3x.
    forward = 5 * 12 * 16**2 + 2 * 5**2 * 16 + 24 * (16 + 24 + 8) + 4 * 49 * 16 * (number == 1)
    predictor = 2 * 24 * 8 * (momentum < 1)
    plain = fllw.count_macs(config, stage, range(number), SHAPE)
    assert config.macs(stage, range(number), SHAPE) == plain + 2 * (forward + 3 * predictor)

def test_published_communication_of_byol_and_moco(unmetered):  # noqa: F811
    """Tun et al. 2024: 8.40 end to end and 1.66 layer by layer (1000 MiB)."""
    config = objectives.Settings(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512,
                                 head_dim=256, rounds=180, depth_dropout=0.0, objective="byol")
    for method, published in (("e2e", 8.40), ("fll", 1.66)):
        price = fllw.cost(replace(config, method=method), (3, 32, 32))
        sent = (price["download_bytes"] + price["upload_bytes"]) / 2**20 / 1000
        assert sent == pytest.approx(published, abs=0.015)

PAIRED, BOTH = (2, 7, 14), multimodal.Settings(**TINY | {"batch_size": 4}, clients=4)

def test_sensors_are_halves_of_images_and_each_sees_one_view():
    pixels = images(4, (3, 15, 14)).train_images
    first, second = multimodal.split(pixels).chunk(2, 1)
    assert torch.equal(first, pixels[:, :, :7]) and torch.equal(second, pixels[:, :, 8:])
    stage, views, losses = fllw.stages(BOTH)[0], normal(8, *PAIRED), []
    for view, sensor in ((0, 0), (0, 1), (1, 0), (1, 1)):
        learner = fllw.learner_of(BOTH, server_of(BOTH, stage, PAIRED), PAIRED)
        blinded = views.clone()
        blinded[4 * view:][:4, sensor] = 0
        losses.append(multimodal.paired_step(BOTH, learner, stage, blinded).item())
    assert losses[1] == losses[2] and len(set(losses)) == 3  # these two see nothing less

def test_clip_loss_and_retrieval_against_loops():
    z, t, B, dataset = normal(8, 5), 0.3, 4, images(30, PAIRED)
    total = sum(cross_entropy(one[i], other, i, t) for i in range(B)
                for one, other in ((z[:B], z[B:]), (z[B:], z[:B])))
    assert float(multimodal.clip(z, t)) == pytest.approx(total / (2 * B), rel=1e-5)
    learner = fllw.learner_of(BOTH, fllw.initial(BOTH, PAIRED), PAIRED)
    a, b = learner.head(learner.encoder(data.normalise(dataset.test_images))).detach().chunk(2)
    places = [sorted(range(20), key=lambda c: -cosine(b[i], a[c])).index(i) for i in range(20)]
    expected = 100 * np.mean([place < 5 for place in places])
    assert multimodal.retrieval(BOTH, learner.state_dict(), dataset) == pytest.approx(expected)

def test_a_sensor_is_trained_by_those_who_have_it_and_averaged_over_them_alone():
    clients, stage, uploads = data.split(images(48, PAIRED), 4), fllw.stages(BOTH)[0], []
    start = server_of(BOTH, stage, PAIRED)
    for client, unseen in enumerate((None, None, 1, 0)):
        own = clients[client].clone()
        if unseen is not None:  # what the other sensor saw plays no part
            own[:, unseen] = 7
        uploads.append(multimodal.train_client(BOTH, stage, start, own, 1, client)[0])
    state = fllw.federate(BOTH, clients, None, [stage], multimodal.train_client)
    for name, tensor in state.server.items():  # every client has 12 images: a plain mean
        sent = [upload[name] for upload in uploads if name in upload]
        assert len(sent) == 3
        torch.testing.assert_close(tensor, torch.stack(sent).mean(0), rtol=1e-5, atol=1e-7)
