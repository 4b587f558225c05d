"""Tests of flower.py and flower_app.py; skipped unless Flower is installed.

    pytest experiments/test_flower.py        # the two with a SuperLink take a minute or two each
"""
import contextlib
import json
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

import data
import fllw
from experiments import flower, flower_app, flower_network

TINY = fllw.Config(augment="digits", dim=16, depth=2, heads=2, head_hidden=32, head_dim=16,
                   images=120, batch_size=20, rounds=3, depth_dropout=0.5, seed=3)

def same(one, other):
    """Whether two state dicts hold the same bits under the same names."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

def told(history):
    """A history without the seconds, which differ from run to run."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]

# ------------------------------------------------------------------------------ without processes
@pytest.fixture
def identity():
    """Messages carry the ids of the task that makes them; outside Flower there is none."""
    from flwr.supercore.task_identity import TaskIdentity
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

class BackwardsGrid:
    """Stands for Flower's Grid: every message is answered, the last one first, one at a time."""
    def __init__(self, contexts):
        self.contexts, self.replies = contexts, []  # node -> context of its ClientApp

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        handlers = {"train": flower_app.answer, "query": flower_app.introduce}
        for message in messages:
            key = f"message {len(self.replies)}"
            message.metadata.__dict__["_message_id"] = key
            handle = handlers[message.metadata.message_type]
            self.replies.append(handle(message, self.contexts[message.metadata.dst_node_id]))
            yield key

    def pull_messages(self, keys):
        late = [r for r in self.replies if r.metadata.reply_to_message_id in keys]
        return late[-1:]

def contexts_of(config, nodes):
    settings = asdict(config) | {"timeout": 5.0}
    return {70 - client: SimpleNamespace(run_config=settings, node_config=node, node_id=70 - client)
            for client, node in enumerate(nodes)}

def test_answers_are_averaged_in_the_order_asked(identity):
    config = replace(TINY, clients=4, clients_per_round=3)
    nodes, dataset = flower.make_nodes(config, [])
    clients = flower_app.Clients(BackwardsGrid(contexts_of(config, nodes)), timeout=5)
    assert clients.gather(4) == dataset.shape
    encoder, history = fllw.federate(config, dataset, ask=clients.ask)
    expected, rows = fllw.federate(config, dataset)
    assert [[a["client"] for a in row["answers"]] for row in history] == [
        row["clients"] for row in rows]
    assert told(history) == told(rows) and same(encoder.state_dict(), expected.state_dict())

def test_a_client_that_does_not_answer_is_lost(identity):
    config = replace(TINY, clients=3, rounds=2)
    nodes, dataset = flower.make_nodes(config, [])
    grid = BackwardsGrid(contexts_of(config, nodes))
    clients = flower_app.Clients(grid, timeout=5)
    clients.gather(3)
    clients.timeout = 0.5
    pull = grid.pull_messages
    grid.pull_messages = lambda keys: [r for r in pull([k for k in keys if not k.endswith("4")])]
    _, history = fllw.federate(config, dataset, ask=clients.ask)  # messages 0 to 2 are questions
    assert [[a["client"] for a in row["answers"]] for row in history] == [[0, 2], [0, 1, 2]]

    grid.contexts.clear()  # as when Flower has given up all nodes
    with pytest.raises(RuntimeError, match="no client answered in round 1"):
        fllw.federate(config, dataset, ask=clients.ask)

def test_input_is_checked(tmp_path):
    for wrong in (["--files", "a.npz"], ["--timeout", "0"], ["--patch-size", "5"],
                  ["--clients", "9999"]):
        with pytest.raises(data.InputError):
            flower.main([*wrong, "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())

# --------------------------------------------------------------------------------- with processes
def processes_of(folder):
    """Ids of the running processes whose FLWR_HOME is this folder."""
    mark, found = f"FLWR_HOME={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(path)
    return found

def open_ports(processes):
    """Addresses, as /proc/net writes them, on which these processes listen."""
    sockets = {link.readlink().name for path in processes for link in (path / "fd").iterdir()}
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                ports.add(fields[1])
    return ports

class Wire:
    """Passes everything on to a port of 127.0.0.1, and counts the bytes both ways."""
    def __init__(self, target):
        self.target, self.bytes = target, {"up": 0, "down": 0}
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with contextlib.suppress(OSError):  # the SuperLink has ended
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                for ends in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source, sink, direction):
        with contextlib.suppress(OSError), source, sink:
            while chunk := source.recv(2**16):
                self.bytes[direction] += len(chunk)
                sink.sendall(chunk)

@contextlib.contextmanager
def flower_run(tmp_path, config, nodes, timeout):
    """A network on which the run has started; afterwards no process of it is left."""
    home, wires = tmp_path / "home", []
    home.mkdir()

    def via(port):
        wires.append(Wire(port))
        return wires[-1].listener.getsockname()[1]

    flower.write_app(home / "app", config, timeout)
    with flower_network.network(home, nodes, tmp_path / "log", via) as (flwr, supernodes):
        yield SimpleNamespace(command=flwr("run", f"{home}/app", "here", "--stream"), home=home,
                              supernodes=supernodes, wires=wires)
    assert not processes_of(home)

def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.2)

def test_a_run_on_flower_equals_federate_bit_for_bit(tmp_path):
    config = replace(TINY, out=str(tmp_path / "run"))
    nodes, dataset = flower.make_nodes(config, [])
    expected, rows = fllw.federate(config, dataset)

    # The first round was done before, and the server resumes from its checkpoint.
    empty = data.Dataset(*(tensor[:0] for tensor in dataset))
    with fllw.run_folder(config, empty, f"flower on {config.data}") as (folder, _):
        fllw.federate(config, dataset, on_round=lambda row, state: row["round"] == 1
                      and fllw.save_round(folder, row, state))
    with flower_run(tmp_path, config, nodes, 300.0) as run:
        wait_until(lambda: sum(len(row["answers"]) for row in flower.read_rows(config)) > 2,
                   run.command)
        ports = open_ports(processes_of(run.home))
        assert len(ports) == 3 and all(port.startswith("0100007F:") for port in ports)
        run.command.wait()
    assert told(flower.read_rows(config)) == json.loads(json.dumps(told(rows)))
    assert same(fllw.load_encoder(folder).state_dict(), expected.state_dict())

    ledger = fllw.Ledger(config, dataset.shape)
    costs = [ledger.add(row) for row in rows][1:]  # of two rounds
    for wire in run.wires:
        down = sum(cost["stateless_download_bytes"] for cost in costs)
        up = sum(cost["upload_bytes"] for cost in costs)
        print(f"ledger {down} down, {up} up; wire {wire.bytes}")
        assert down < wire.bytes["down"] < down + 400_000
        assert up < wire.bytes["up"] < up + 400_000

def test_a_killed_node_is_lost_and_the_run_goes_on(tmp_path):
    config = replace(TINY, out=str(tmp_path / "run"), images=0)
    images = data.load("mnist5k", images=100).train_images
    parts, files = [torch.arange(60), torch.arange(60, 100)], []
    for client, part in enumerate(parts):  # each client has a file of its own
        labels, own = np.arange(len(part)), images[part, 0].numpy()
        files.append(str(tmp_path / f"{client}.npz"))
        np.savez(files[-1], train_images=own, train_labels=labels, test_images=own,
                 test_labels=labels)
    nodes, dataset = flower.make_nodes(config, files)

    rows = fllw.federate(config, dataset, ask=fllw.in_turn(config, images, parts))[1]
    with flower_run(tmp_path, config, nodes, 300.0) as run:
        wait_until(lambda: flower.read_rows(config), run.command)
        received = run.wires[1].bytes["down"]
        wait_until(lambda: run.wires[1].bytes["down"] > received + 20_000, run.command)
        run.supernodes[1].kill()  # it has received its message of round 2
        run.supernodes[1].wait()
        run.command.wait()
    history = flower.read_rows(config)
    assert told(history[:1]) == json.loads(json.dumps(told(rows[:1])))
    assert [[a["client"] for a in row["answers"]] for row in history] == [[0, 1], [0], [0]]
    assert [row["clients"] for row in history] == [[0, 1]] * 3
    assert (tmp_path / "run" / "encoder.pt").exists()
