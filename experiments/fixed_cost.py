"""What does a client cost beside its arithmetic? CPU time here and in pfl-research, same work.

    pip install "pfl[pytorch]==0.6.0"           # without it only this program is measured
    OMP_NUM_THREADS=1 python -m experiments.fixed_cost

pfl-research (Granqvist et al. 2024, arXiv 2404.06430) is a simulator of federated learning that is
known for its speed. Both sides train the same model end to end, with the same loss, views and
optimizer, for one local epoch on one thread, and average by numbers of images. They take turns, so
that other work on the machine slows both. A turn is two rounds, of which the second is timed.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch

import data
import experiments
import fllw
from data import InputError
from experiments import save
from fllw import Config
from ssl_loss import nt_xent

END_TO_END = Config(method="e2e", depth_dropout=0.0, rounds=100)
TINY = replace(END_TO_END, dim=16, heads=4, head_hidden=24, head_dim=8)
SETTINGS = {  # name: (what it is, settings, images of a client)
    "few": ("2 clients, 31 steps each", replace(END_TO_END, clients=2), 31 * 64),
    "many": ("100 clients of 40 images", replace(END_TO_END, clients=100), 40),
    "tiny": ("1,000 clients of 4 images, tiny model", replace(TINY, clients=1000), 4)}

class Clock:
    """Called after every round; reads the CPU time, in seconds, and ends the run after two."""
    def __init__(self):
        self.readings = []

    def __call__(self, *_):
        self.readings.append(time.process_time())
        if len(self.readings) == 2:
            raise StopIteration  # the second round is over

def run_ours(config, dataset, clock):
    """Rounds of this program, until the clock stops them."""
    fllw.federate(config, dataset, on_round=clock)

class PflModel(fllw.Learner):
    """A learner with the two methods that pfl asks for."""
    def __init__(self, config, image_shape):
        super().__init__(config, image_shape)
        self.config, self.draws = config, torch.Generator().manual_seed(config.seed)

    def loss(self, images):
        recipe = data.RECIPES[fllw.recipe_name(self.config)]
        views = data.two_views(images, recipe, self.draws)
        return nt_xent(*self.head(self.encoder(views)).chunk(2), self.config.temperature)

    def metrics(self, images):  # pfl evaluates in the first round, which is not timed
        from pfl.metrics import Weighted
        return {"images": Weighted(len(images), 1)}

def run_pfl(config, dataset, clock):
    """The same rounds on pfl's simulated backend: all clients take part in each."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    class AfterRound(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            clock()
            return super().after_central_iteration(aggregate_metrics, model,
                                                   central_iteration=central_iteration)

    def optimizer(parameters, lr):
        return torch.optim.AdamW(parameters, lr, weight_decay=config.weight_decay, fused=True)

    parts = data.partition(dataset.train_labels, config.clients, config.alpha, config.seed)
    users = FederatedDataset(
        lambda client: PyTorchTensorDataset([dataset.train_images[parts[client]]], str(client)),
        get_user_sampler("minimize_reuse", range(config.clients)))
    module = PflModel(config, dataset.shape)
    module.load_state_dict(fllw.initial(config, dataset.shape))
    model = PyTorchModel(module, optimizer, torch.optim.SGD(module.parameters(), 1.0))
    training = NNTrainHyperParams(local_num_epochs=config.local_epochs, local_num_steps=None,
                                  local_learning_rate=config.lr, local_batch_size=config.batch_size)
    rounds = NNAlgorithmParams(central_num_iterations=config.rounds, evaluation_frequency=10**6,
                               train_cohort_size=config.clients, val_cohort_size=None)
    backend = SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(rounds, backend, model, training, NNEvalHyperParams(None),
                             [AfterRound()], send_metrics_to_platform=False)

def milliseconds(run, config, dataset):
    """CPU milliseconds of one client's round."""
    clock = Clock()
    try:
        with fllw.one_thread():
            run(config, dataset, clock)
    except StopIteration:
        first, second = clock.readings
        return 1000 * (second - first) / config.clients

def measure(name, turns, sides):
    """A row of the table; sides: column -> function like run_ours()."""
    _, config, images = SETTINGS[name]
    dataset = data.load(config.data, images=config.clients * images)
    times = {column: [] for column in sides}
    for _ in range(turns):
        for column, run in sides.items():
            times[column].append(milliseconds(run, config, dataset))
    row = {column: statistics.median(values) for column, values in times.items()}
    if "pfl" in row:
        row["ratio"] = row["pfl"] / row["ours"]
    return row | {f"{column}_turns": values for column, values in times.items()}

class Flags(argparse.ArgumentParser):
    error = fllw.Parser.error  # one sentence

def main(arguments=None):
    parser = Flags("python -m experiments.fixed_cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=3, help="of which medians are shown")
    given = experiments.parse(parser, arguments, seeds="")
    if given["turns"] < 1:
        raise InputError(f"--turns must be 1 or more, it is {given['turns']}")
    sides, note = {"ours": run_ours, "pfl": run_pfl}, ""
    try:
        import pfl  # noqa: F401
    except ImportError:
        del sides["pfl"]
        note = '\nFor pfl-research\'s column: pip install "pfl[pytorch]==0.6.0"'
    rows = {SETTINGS[name][0]: measure(name, given["turns"], sides) for name in given["settings"]}
    if given["save"]:
        save(given["save"], "python -m experiments.fixed_cost " + " ".join(sys.argv[1:]),
                     rows)
    columns = {"ours": ("ours, ms", 1, 1), "pfl": ("pfl, ms", 1, 1), "ratio": ("pfl/ours", 1, 2)}
    print(f"CPU time of one client's round, median of {given['turns']} turns\n"
          f"{fllw.table(rows, columns)}{note}")

if __name__ == "__main__":
    fllw.command(main)
