"""Tests of flower.py, where Flower is installed. The one with real processes takes two minutes."""
import contextlib
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import data
import fllw
from experiments import flower

TINY = fllw.Config(dim=16, depth=2, heads=2, head_hidden=32, head_dim=16, images=120, batch_size=20,
                   clients=4, clients_per_round=3, rounds=3, depth_dropout=0.5, seed=3)

class Grid:
    """Flower's Grid, without processes: it answers, unless it fails, when three threads ask."""
    def __init__(self, nodes, fails=lambda *_: False):
        self.barrier, self.nodes, self.fails = threading.Barrier(3, timeout=60), nodes, fails

    def get_node_ids(self):
        return list(self.nodes)[::-1]

    def send_and_receive(self, messages):
        [message] = messages
        message.metadata.__dict__["_message_id"] = "1"
        task, node = message.content["task"], message.metadata.dst_node_id
        self.barrier.wait()
        if self.fails(task["round"], task["client"]):
            return [Message(Error(code=3, reason="the node is gone"), reply_to=message)]
        return [flower.answer(message, self.nodes[node])]

def assert_equals_federate(folder, config, clients, lost):
    """The checkpoint in a folder is that of federate(), where clients are lost if lost(round,
    client): the same bits, and the same history but for the seconds."""
    def train_client(*arguments):
        return None if lost(*arguments[4:]) else fllw.local_train(*arguments)
    state = fllw.federate(config, clients, train_client=train_client)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["server"].keys() == state.server.keys()
    assert all(torch.equal(checkpoint["server"][name], state.server[name]) for name in state.server)
    for mine, expected in zip(checkpoint["history"], state.history, strict=True):
        assert mine | {"seconds": 0} == expected | {"seconds": 0}

def test_the_server_gets_the_bits_of_federate(tmp_path, capsys):
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # else Flower sets them
    config, own = replace(TINY, out=str(tmp_path / "run")), str(tmp_path / "own.npz")
    shutil.copy(data.MNIST5K, own)
    nodes = {n: SimpleNamespace(run_config=vars(config), node_config={}) for n in range(70, 74)}
    nodes[71].node_config["data"] = own  # in ascending order the second node, so client 1
    dataset = data.load("mnist5k", images=config.images)
    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    clients[1] = dataset.train_images
    folder, _ = fllw.open_run(config, dataset)
    gone = fllw.sample_clients(config, 2)[0]

    with pytest.raises(ConnectionError, match="no client answered in round 3"):
        flower.serve(Grid(nodes, lambda r, c: r == 3 or (r, c) == (2, gone)), nodes[70])
    assert f"round 2: client {gone} is lost: ConnectionError('the node" in capsys.readouterr().out
    flower.serve(Grid(nodes), nodes[70])
    assert_equals_federate(folder, config, clients, lambda r, c: (r, c) == (2, gone))

def test_an_answer_must_be_what_was_asked_for():
    images = data.load("mnist5k", images=40).train_images
    stage = fllw.stages(TINY)[1]  # in which block 0 is frozen
    message = fllw.broadcast(fllw.initial(TINY, images.shape[1:]), range(stage.stop))
    upload, _, _ = fllw.local_train(TINY, stage, message, images, 3, 0)

    def read(upload=upload, loss=1.5, images=40):
        report = ConfigRecord({"loss": loss, "images": images})
        content = RecordDict({"upload": ArrayRecord(upload), "report": report})
        reply = SimpleNamespace(content=content, has_error=lambda: False)
        return flower.read_answer(stage, message, reply)

    assert all(torch.equal(read()[0][name], upload[name]) for name in upload)
    assert read()[1:] == (torch.tensor([1.5]), 40)
    name, frozen = "encoder.norm.weight", "encoder.blocks.0.norm1.weight"
    nan = torch.where(torch.arange(16) == 3, torch.nan, upload[name])
    uploads = [{n: t for n, t in upload.items() if n != name}, upload | {"new": upload[name]},
               upload | {frozen: message[frozen]}, upload | {name: nan},
               upload | {name: upload[name][1:]}, upload | {name: upload[name].double()}]
    for wrong in (*({"upload": tensors} for tensors in uploads),
                  {"loss": torch.inf}, {"loss": 1e300}, {"loss": "low"},
                  {"images": 0}, {"images": -3}, {"images": 1.5}, {"images": True}):
        with pytest.raises((TypeError, ValueError)):
            read(**wrong)

def processes_of(home, word=""):
    """Ids of the processes for Flower's folder `home` that have a word in their command."""
    mark, found = f"FLWR_HOME={home}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if mark in (path / "environ").read_bytes() and word in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found

def test_real_processes_give_the_same_bits_and_a_killed_node_is_lost(tmp_path):
    file, folder = tmp_path / "\U0001f600.npz", tmp_path / "\U0001f600 \" run"
    path, home = folder / "checkpoint.pt", Path(f"{folder}.flower")
    shutil.copy(data.MNIST5K, file)
    config = replace(TINY, data=str(file), out=str(folder), clients=2, clients_per_round=0)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items()
             if value != getattr(fllw.Config(), name)]

    def kill():  # a SuperNode, as soon as round 2 is done
        while not path.exists() or len(torch.load(path)["history"]) < 2:
            time.sleep(0.5)
        os.kill(processes_of(home, "supernode")[0], 9)  # SIGKILL

    threading.Thread(target=kill, daemon=True).start()
    with mock.patch.dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        flower.main(flags)
    [lost] = {0, 1} - torch.load(path)["history"][2]["losses"].keys()
    clients = data.split(data.load(file, images=config.images), 2, config.alpha, config.seed)
    assert_equals_federate(folder, config, clients, lambda r, c: (r, c) == (3, lost))
    patience = time.monotonic() + 60
    while processes_of(home):
        assert time.monotonic() < patience
        time.sleep(0.2)
