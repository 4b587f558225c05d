"""The notebook's exercises: a checker for each, which names the mistake, and the answers.

A checker compares a function with another route to the same number."""
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import fllw
from experiments import memory

CONFIG, SHAPE = fllw.Config(rounds=16), (1, 28, 28)  # of exercises 3 and 4, whatever the notebook's

class Mistake(Exception):
    """What is wrong with an answer."""

def demand(true, text):
    if not true:
        raise Mistake(text)

def call(function, *arguments):
    """The value of a function that may not be written yet."""
    value = function(*arguments)
    demand(value is not None, "your function returns nothing yet")
    return value

def exercise(number):
    """Makes a checker, which prints "right" or the mistake, of a function that raises Mistake."""
    def decorate(check):
        def checker(mine):
            try:
                check(mine)
                print(f"exercise {number}: right")
            except Mistake as mistake:
                print(f"exercise {number}: {mistake}")
        return checker
    return decorate

def demand_equal(value, right, mistakes, otherwise, rtol=1e-5):
    """mistakes: {what is wrong: the value that it leads to}; otherwise: for any other value."""
    words = next((words for words, wrong in mistakes.items()
                  if np.allclose(value, wrong, rtol, 1e-7)), otherwise)
    demand(np.allclose(value, right, rtol, 1e-7), words)

@exercise(1)
def check_nt_xent(mine, temperature=0.3):
    z1, z2 = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    value = torch.as_tensor(call(mine, z1.clone(), z2.clone(), temperature)).detach()
    demand(value.shape == (), f"the loss is one number, yours has shape {list(value.shape)}")
    both, twins = torch.cat([z1, z2]), torch.arange(10).roll(5)
    cosine = F.cosine_similarity(both[:, None], both[None], dim=2)  # [10, 10]
    off = torch.zeros(10, 10).fill_diagonal_(-torch.inf)
    rivals = torch.logsumexp(cosine / temperature + off, 1)
    rows = rivals - cosine[torch.arange(10), twins] / temperature   # the formula
    demand_equal(value, rows.mean(), {
        "the sum over k holds k = i as well: a view is not its own rival":
            F.cross_entropy(cosine / temperature, twins),
        "sim is the cosine: divide each vector by its length":
            F.cross_entropy(both @ both.T / temperature + off, twins),
        "where is the temperature?": F.cross_entropy(cosine + off, twins),
        "divide by the temperature, do not multiply":
            F.cross_entropy(cosine * temperature + off, twins),
        "take the mean over the 2B views, not the sum": rows.sum(),
        "take the mean over all 2B views, not over view 1 only": rows[:5].mean(),
        "the rivals are all other views, also those in the same half":
            F.cross_entropy(cosine[:5, 5:] / temperature, torch.arange(5)),
        "the sign is wrong": -rows.mean()}, f"{value:.4f}, but {rows.mean():.4f} is right")

@exercise(2)
def check_average(mine):
    uploads = [{"a": torch.tensor([1.0, 2.0])},
               {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([6.0])},
               {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([1.0])}]
    images = [10, 30, 20]
    value = call(mine, uploads, images)
    demand(value.keys() == {"a", "b"}, f"the mean has the tensors a and b, yours {sorted(value)}")
    a = torch.stack([upload["a"] for upload in uploads])  # [3, 2]
    weighted = torch.tensor(images)[:, None] * a
    demand_equal(value["a"], weighted.sum(0) / 60, {
        "weight each client by its number of images": a.mean(0),
        "divide by the sum of the images": weighted.sum(0)}, f"a is {value['a'].tolist()}: wrong")
    demand_equal(value["b"], [(30 * 6 + 20 * 1) / 50], {
        "client 0 did not send b, so its images do not count for b": [(30 * 6 + 20 * 1) / 60]},
        "clients 1 and 2 sent b: average over them, weighted by images")

@exercise(3)
def check_upload(mine):
    config = replace(CONFIG, blocks_per_stage=2, head_dim=48)  # other sizes than the notebook's
    second, d, value = fllw.stages(config)[1], config.dim, call(mine, config)
    server = fllw.broadcast(fllw.initial(config, SHAPE), range(second.stop))
    right = sum(tensor.nbytes for name, tensor in server.items() if second.trains(name))
    block, norm = 12 * d**2 + 13 * d, 2 * d
    demand_equal(value, right, {
        "a number is four bytes": right / 4,
        "the head travels too": 4 * (2 * block + norm),
        "the final norm travels too": right - 4 * norm,
        "a stage adds blocks_per_stage blocks": right - 4 * block,
        "the head's two batch norms are missing": right - 4 * 4 * config.head_hidden,
        "frozen blocks do not travel up": right + 4 * 2 * block,
        "biases and norms of the blocks are missing": right - 4 * 2 * 13 * d},
        f"{value:,} bytes, but {right:,} is right", rtol=0)

@exercise(4)
def check_plan(mine):
    plan, blocks, done, trained = list(call(mine, CONFIG)), 0, 0, set()
    for number, stage in enumerate(plan, 1):
        demand(stage.number == number, f"stage {number} is numbered {stage.number}")
        demand(len(stage.rounds) > 0, f"stage {number} has no rounds")
        demand(stage.rounds[0] == done + 1, f"stage {number} must begin in round {done + 1}")
        demand(stage.newest == blocks, f"newest must be {blocks} in stage {number}: so many blocks "
                                       "were there before")
        demand(blocks <= stage.stop <= CONFIG.depth,
               f"stop must be from {blocks} to {CONFIG.depth} in stage {number}")
        demand(0 <= stage.first < stage.stop, f"stage {number} trains no block")
        blocks, done = stage.stop, stage.rounds[-1]
        trained |= set(range(stage.first, stage.stop))
    demand(done == CONFIG.rounds, f"the last round is {done}, not {CONFIG.rounds}")
    idle = sorted(set(range(CONFIG.depth)) - trained)
    demand(not idle, f"these blocks never train: {idle}")
    plans = {"FLL": fllw.stages(CONFIG), "yours": plan}
    print(fllw.table({name: fllw.cost(CONFIG, SHAPE, p) for name, p in plans.items()}))

def peak(config, depth):
    """Peak bytes of a local step of the last stage, with so many blocks."""
    model = replace(config, depth=depth, rounds=depth)
    return fllw.peak_memory(model, fllw.stages(model)[-1], memory.SHAPE)

@exercise(5)
def check_deepest(mine, cap=300 * 2**20):
    for name in ("end-to-end", "FLL"):
        config = memory.ROWS[name]
        depth = call(mine, config, cap)
        demand(isinstance(depth, int) and depth > 0, f"{name}: {depth!r} is no number of blocks")
        here, above = peak(config, depth), peak(config, depth + 1)
        text = f"{name}, depth {depth}: {here / 2**20:.0f} MiB, one more {above / 2**20:.0f}"
        demand(here <= cap < above, f"{text}; the cap is {cap / 2**20:.0f}")
        print(text)

@exercise(6)
def check_momentum(mine, beta=0.5):
    on_round, state = call(mine, beta), fllw.State({name: torch.zeros(2) for name in "ab"})
    on_round(state)  # the first call has nothing to compare with
    right, step = torch.zeros(2), torch.zeros(2)
    for number, moved in enumerate(torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.5, 0.0]]), 2):
        averaged = right + moved  # what federate() has put there
        state.server["a"] = given = averaged.clone()
        step = moved + beta * step
        right = right + step
        on_round(state)
        demand(given.equal(averaged), "put a new tensor into state.server: change none in place")
        mine_now = state.server["a"]
        demand_equal(mine_now, right, {"the last step is not repeated": averaged},
                     f"round {number}: a is {mine_now.tolist()}, not {right.tolist()}")
        demand(state.server["b"].eq(0).all(), "b never moved, and must not")
    on_round(state)  # a round in which nothing moves
    demand_equal(state.server["a"], right, {}, "a did not move in this round, and must stay")

# --------------------------------------------------------------------------------------- answers
def nt_xent(z1, z2, temperature):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n, total = len(z), 0.0
    for i in range(n):
        twin = z[i] @ z[(i + n // 2) % n] / temperature
        rivals = sum(torch.exp(z[i] @ z[k] / temperature) for k in range(n) if k != i)
        total = total + torch.log(rivals) - twin
    return total / n

def average(uploads, images):
    mean = {}
    for name in {name for upload in uploads for name in upload}:
        sent = [(upload[name], n) for upload, n in zip(uploads, images) if name in upload]
        mean[name] = sum(n * tensor for tensor, n in sent) / sum(n for _, n in sent)
    return mean

def upload_bytes(config):
    d, h, o = config.dim, config.head_hidden, config.head_dim
    block, norm, head = 12 * d**2 + 13 * d, 2 * d, d * h + h**2 + h * o + 4 * h
    return 4 * (config.blocks_per_stage * block + norm + head)

def overlapping(config):  # the two newest blocks train
    return [replace(stage, first=max(0, stage.stop - 2)) for stage in fllw.stages(config)]

def deepest(config, cap):
    slope = peak(config, 4) - peak(config, 3)  # every further block costs the same
    return max(1, 3 + (cap - peak(config, 3)) // slope)

def momentum(beta):
    before, steps = {}, {}

    def on_round(state):
        for name, tensor in state.server.items():
            if name in before and not torch.equal(tensor, before[name]):
                steps[name] = tensor - before[name] + beta * steps.get(name, 0)
                state.server[name] = before[name] + steps[name]
        before.update(state.server)
    return on_round

ANSWERS = {check_nt_xent: nt_xent, check_average: average, check_upload: upload_bytes,
           check_plan: overlapping, check_deepest: deepest, check_momentum: momentum}
