"""Tests of flower.py; skipped unless Flower is installed.

    pytest experiments/test_flower.py    # the two with a SuperLink take a minute or two each
"""
import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Error, Message

import data
import fllw
from experiments import flower

TINY = fllw.Config(augment="digits", dim=16, depth=2, heads=2, head_hidden=32, head_dim=16,
                   images=120, batch_size=20, rounds=3, depth_dropout=0.5, seed=3, workers=1)

def told(history):
    """A history as it is kept, without the seconds, which differ from run to run."""
    rows = json.loads(json.dumps(history))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

def same(one, other):
    """Whether two models hold the same bits under the same names."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

def server_folder(config, dataset):
    """The run folder as the server opens it, which has no images."""
    empty = data.Dataset(*(tensor[:0] for tensor in dataset))
    return fllw.run_folder(config, empty, f"flower on {config.data}")

def outcome(config, dataset):
    """(encoder, history) that the server left behind."""
    with server_folder(config, dataset) as (folder, state):
        return fllw.load_encoder(folder), state.history

# ------------------------------------------------------------------------------ without processes
class BackwardsGrid:
    """Stands for Flower's Grid: every message is answered, the last one first, one at a time.

    lost: numbers of messages that are answered with an error, counted from 0."""
    def __init__(self, contexts, lost=()):
        self.contexts, self.lost, self.replies = contexts, lost, []  # contexts: node -> Context

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        for message in messages:
            number = len(self.replies)
            message.metadata.__dict__["_message_id"] = f"message {number}"
            if number in self.lost:
                reply = Message(Error(code=3, reason="the node is gone"), reply_to=message)
            else:
                reply = flower.answer(message, self.contexts[message.metadata.dst_node_id])
            self.replies.append(reply)
            yield f"message {number}"

    def pull_messages(self, keys):
        return [r for r in self.replies if r.metadata.reply_to_message_id in keys][-1:]

@pytest.fixture
def serve():
    """Runs the ServerApp on a BackwardsGrid. Node 70 has client 0, node 69 client 1, and so on."""
    from flwr.supercore.task_identity import TaskIdentity  # Flower sets it in its own processes
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def call(config, lost=()):
        contexts = {70 - client: SimpleNamespace(run_config=asdict(config),
                                                 node_config={"partition-id": client})
                    for client in range(config.clients)}
        flower.serve(BackwardsGrid(contexts, lost), contexts[70])
    return call

def test_answers_are_averaged_in_the_order_asked(serve, tmp_path):
    config = replace(TINY, clients=4, clients_per_round=3, out=str(tmp_path / "run"))
    dataset = data.load(config.data, images=config.images)
    serve(config)
    encoder, history = outcome(config, dataset)
    expected, rows = fllw.federate(config, dataset)
    assert [[a["client"] for a in row["answers"]] for row in history] == [
        row["clients"] for row in rows]
    assert told(history) == told(rows) and same(encoder, expected)

def test_a_client_that_does_not_answer_is_lost(serve, tmp_path):
    config = replace(TINY, clients=3, rounds=2, out=str(tmp_path / "run"))
    serve(config, lost=[4])  # 0 to 2 ask who is who, 3 to 5 are round 1
    _, history = outcome(config, data.load(config.data))
    assert [[a["client"] for a in row["answers"]] for row in history] == [[0, 2], [0, 1, 2]]

    with pytest.raises(RuntimeError, match="no client answered: the node is gone"):
        serve(replace(config, out=str(tmp_path / "other")), lost=[3, 4, 5])
    with pytest.raises(data.InputError, match="must be 3 clients"):
        serve(replace(config, out=str(tmp_path / "third")), lost=[0])

def test_input_is_checked(tmp_path):
    for wrong in (["--files", "a.npz"], ["--data", "a.npz"], ["--rounds", "0"]):
        with pytest.raises(data.InputError):
            flower.main([*wrong, "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())

# --------------------------------------------------------------------------------- with processes
def processes_of(config, words=""):
    """The folders in /proc of Flower's processes for a run, with these words in their commands."""
    mark, found = f"FLWR_HOME={config.out}.flower".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                if words in (path / "cmdline").read_text():
                    found.append(path)
    return found

def open_ports(processes):
    """Addresses, as /proc/net writes them, on which these processes listen."""
    sockets, ports = set(), set()
    for path in processes:
        with contextlib.suppress(OSError):  # it has ended
            sockets |= {link.readlink().name for link in (path / "fd").iterdir()}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                ports.add(columns[1])
    return ports

@contextlib.contextmanager
def meanwhile(config, task):
    """Call task() once a second while the block runs; afterwards no process of it is left."""
    over = threading.Event()

    def repeat():
        while not over.wait(1):
            task()
    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    patience = time.monotonic() + 30
    while processes_of(config) and time.monotonic() < patience:
        time.sleep(0.2)
    assert not processes_of(config)

def test_a_run_on_flower_equals_federate_bit_for_bit(tmp_path):
    config = replace(TINY, data=str(data.MNIST5K), out=str(tmp_path / "run"))
    dataset = data.load(config.data, images=config.images)
    expected, rows = fllw.federate(config, dataset)

    # The first round was done before, and the server resumes from its checkpoint.
    def stop(row, state):
        if row["round"] == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), server_folder(config, dataset) as (folder, state):
        fllw.train(config, dataset, folder, state, on_round=stop)
    assert (folder / "checkpoint.pt").exists() and not (folder / "encoder.pt").exists()

    ports = set()
    with meanwhile(config, lambda: ports.update(open_ports(processes_of(config)))):
        listing = flower.run(config)
    encoder, history = outcome(config, dataset)
    assert told(history) == told(rows) and same(encoder, expected)
    assert len(ports) == 3 and all(port.startswith("0100007F:") for port in ports)

    # What crossed the network in two rounds of two clients, by Flower's own count of HTTP bodies.
    ledger, traffic = fllw.Ledger(config, dataset.shape), json.loads(listing)["runs"][0]
    costs = [ledger.add(row) for row in rows][1:]
    for column, flow in (("stateless_download_bytes", "outbound"), ("upload_bytes", "inbound")):
        tensors = 2 * sum(cost[column] for cost in costs)
        measured = traffic["network-traffic"][f"{flow}-bytes"]
        print(f"{column}: ledger {tensors:,.0f}, Flower {measured:,}")
        assert tensors < measured < tensors + 4 * 200_000

def test_a_killed_node_is_lost_and_the_run_goes_on(tmp_path):
    images = data.load("mnist5k", images=100).train_images
    parts, files = [torch.arange(60), torch.arange(60, 100)], []
    for client, part in enumerate(parts):  # each client has a file of its own
        labels, own = np.arange(len(part)), images[part, 0].numpy()
        files.append(str(tmp_path / f"{client}.npz"))
        np.savez(files[-1], train_images=own, train_labels=labels, test_images=own,
                 test_labels=labels)
    config = replace(TINY, images=0, data=" ".join(files), out=str(tmp_path / "run"))
    dataset = data.load(files[0])
    rows = fllw.federate(config, dataset, ask=fllw.in_turn(config, images, parts))[1]

    def kill():  # as soon as round 1 is done
        if (tmp_path / "run" / "checkpoint.pt").exists():
            for path in processes_of(config, "partition-id=1"):
                os.kill(int(path.name), signal.SIGKILL)
    flags = [f"--{f.name.replace('_', '-')}={getattr(config, f.name)}" for f in fields(config)
             if getattr(config, f.name) != f.default and f.name != "data"]
    with meanwhile(config, kill):
        flower.main(["--files", *files, *flags])
    _, history = outcome(config, dataset)
    assert told(history[:1]) == told(rows[:1])
    assert [[a["client"] for a in row["answers"]] for row in history] == [[0, 1], [0], [0]]
    assert [row["clients"] for row in history] == [[0, 1]] * 3
