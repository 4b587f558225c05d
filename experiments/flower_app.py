"""What runs inside Flower: the server's loop, which is fllw.train(), and one client's round.

`experiments.flower` starts it. Every message gets a client process of its own, so a client keeps
nothing from one round to the next."""
import io
import time
from dataclasses import fields, replace

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import data
import fllw

client_app = ClientApp()  # Flower reads the source for these names: keep them plain assignments
server_app = ServerApp()

def read_config(context):
    """The run's settings, which Flower hands to the server and to every client."""
    settings = context.run_config
    return fllw.Config(**{f.name: type(f.default)(settings[f.name]) for f in fields(fllw.Config)})

def pack(tensors):
    """name -> tensor as one array of bytes: Flower makes several HTTP requests for every array."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return ArrayRecord([np.frombuffer(buffer.getvalue(), np.uint8)])

def unpack(record):
    buffer = io.BytesIO(record.to_numpy_ndarrays()[0].tobytes())
    with np.load(buffer, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

class Clients:
    """Reaches the clients of a run: one message to each, by Flower, and one answer back.

    grid: Flower's Grid; timeout: seconds to wait for answers; who answers later was lost."""
    def __init__(self, grid, timeout):
        self.grid, self.timeout = grid, timeout
        self.nodes = {}  # client -> the id of its node
        self.known = set()  # ids of the nodes that said who they are
        self.shapes = set()  # of images: (channels, height, width)

    def exchange(self, messages):
        """Send pairs (who, Message); yield (who, content of the reply) in the order sent.

        That order must not depend on who is fastest, since sums of floats depend on it."""
        sent = [(who, *self.grid.push_messages([message])) for who, message in messages]
        waiting, arrived = {key for _, key in sent}, {}
        deadline = time.monotonic() + self.timeout
        for who, key in sent:
            while key in waiting and time.monotonic() < deadline:
                for reply in self.grid.pull_messages(list(waiting)):
                    arrived[reply.metadata.reply_to_message_id] = reply
                waiting -= arrived.keys()
                time.sleep(0.2 if key in waiting else 0)
            reply = arrived.pop(key, None)
            if reply is None or reply.has_error():
                reason = reply.error.reason if reply else f"{self.timeout:g} seconds are over"
                print(f"no answer from {who}: {reason}")
            else:
                yield who, reply.content

    def meet(self):
        """Forget the nodes that Flower has given up; ask each new one which client it is."""
        present = set(self.grid.get_node_ids())
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}
        questions = [(node, Message(RecordDict(), node, MessageType.QUERY, ttl=self.timeout))
                     for node in sorted(present - self.known)]
        for node, content in self.exchange(questions):
            self.known.add(node)
            self.nodes[content["about"]["client"]] = node
            self.shapes.add(tuple(content["about"]["shape"]))

    def gather(self, count):
        """Wait until `count` clients are there, or for the timeout; the shape of their images."""
        deadline = time.monotonic() + self.timeout
        while len(self.nodes) < count and time.monotonic() < deadline:
            self.meet()
            time.sleep(0.2)
        if len(self.shapes) != 1:
            raise data.InputError(f"clients must have images of one shape, not {self.shapes}")
        return min(self.shapes)

    def ask(self, stage, round_number, progress, messages):
        """The `ask` of fllw.federate(). A client without a node yields nothing: it was lost."""
        self.meet()
        task = {"number": stage.number, "present": list(stage.present),
                "active": list(stage.active), "rounds": stage.rounds,
                "round_number": round_number, "progress": progress}

        def orders():
            for client, tensors in messages:
                if client in self.nodes:
                    content = RecordDict({"task": ConfigRecord(task), "tensors": pack(tensors)})
                    yield client, Message(content, self.nodes[client], MessageType.TRAIN,
                                          ttl=self.timeout, group_id=str(round_number))
        answered = 0
        for client, content in self.exchange(orders()):
            report = content["report"]
            yield client, fllw.Answer(unpack(content["tensors"]), report["loss"], report["images"])
            answered += 1
        if not answered:
            raise RuntimeError(f"no client answered in round {round_number}")

@server_app.main()
def serve(grid, context):
    """Train. The server has no images: a run folder belongs to its settings and --data's name."""
    config = read_config(context)
    fllw.validate(replace(config, device="cpu"))
    clients = Clients(grid, float(context.run_config["timeout"]))
    images = torch.zeros(0, *clients.gather(config.clients), dtype=torch.uint8)
    labels = torch.zeros(0, dtype=torch.int64)
    dataset = data.Dataset(images, labels, images, labels)
    with fllw.run_folder(config, dataset, f"flower on {config.data}") as (folder, state):
        fllw.train(config, dataset, folder, state, ask=clients.ask)

def own_images(context):
    """(client, its images), by its node's settings; the server has no say in it.

    With num-partitions, it takes its part of a file that all clients share."""
    node, config = context.node_config, read_config(context)
    client, count = node["partition-id"], node.get("num-partitions")
    dataset = data.load(node["data"], node.get("cache", "~/.cache/fllw"), config.images)
    if not count:
        return client, dataset.train_images
    parts = data.partition(dataset.train_labels, count, config.alpha, config.seed)
    return client, dataset.train_images[parts[client]]

@client_app.query()
def introduce(message, context):
    client, images = own_images(context)
    about = MetricRecord({"client": client, "shape": list(images.shape[1:])})
    return Message(RecordDict({"about": about}), reply_to=message)

@client_app.train()
def answer(message, context):
    client, images = own_images(context)
    config = replace(read_config(context), device=context.node_config.get("device", "auto"))
    task, order = message.content["task"], (client, unpack(message.content["tensors"]))
    present, active = tuple(task["present"]), tuple(task["active"])
    stage = fllw.Stage(task["number"], present, active, task["rounds"])
    ask = fllw.in_turn(config, images, {client: torch.arange(len(images))})
    for _, reply in ask(stage, task["round_number"], task["progress"], [order]):
        report = MetricRecord({"loss": reply.loss, "images": reply.images})
        content = RecordDict({"report": report, "tensors": pack(reply.upload)})
        return Message(content, reply_to=message)
