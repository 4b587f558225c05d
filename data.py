"""Images for federated self-supervised learning: loading, splitting among clients, two views.

Images stay uint8 [N, C, H, W] until a batch is on its device; `two_views` turns it into floats.
The recipe for photographs follows SimCLR (Chen et al. 2020, appendix A); digits get small warps."""
import contextlib
import hashlib
import math
import tarfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

class InputError(Exception):
    """The user asked for what cannot be done; the message is one sentence that says what can."""

@contextlib.contextmanager
def friendly_errors(what, advice):
    """Turn any error of a missing, damaged or foreign file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch.load and numpy.load raise many kinds
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{what} ({reason}): {advice}") from None

@contextlib.contextmanager
def sentences(parser):
    """Errors of a command become one sentence; the exit status is 2 if the input was wrong."""
    try:
        yield
    except InputError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"{error}: take a smaller --lr or --weight-decay, and another --out\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: the same command resumes\n")

class Dataset(NamedTuple):
    train_images: torch.Tensor  # uint8 [N, C, H, W]
    train_labels: torch.Tensor  # int64 [N], -1: none; clients never see them
    test_images: torch.Tensor   # uint8 [M, C, H, W]
    test_labels: torch.Tensor   # int64 [M]
    train_clients: torch.Tensor = None  # int64 [N], whose image it is, if the data say so

    @property
    def shape(self):
        """(channels, height, width) of an image."""
        return tuple(self.train_images.shape[1:])

    @property
    def classes(self):
        return 1 + int(torch.cat([self.train_labels, self.test_labels]).max())

    def digest(self):
        """SHA-256 over the shapes and contents of all four arrays, as hexadecimal text."""
        result = hashlib.sha256()
        for tensor in filter(torch.is_tensor, self):
            result.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            result.update(tensor.contiguous().numpy())
        return result.hexdigest()

    def split(self, clients, alpha=0.0, seed=0):
        """Each client's own images: a list of uint8 tensors [n, C, H, W]."""
        if self.train_clients is None:
            parts = partition(self.train_labels, clients, alpha, seed)
        else:
            parts = [self.train_clients == client for client in range(clients)]
        return [self.train_images[part] for part in parts]

def expand(path):
    """The path with ~ replaced by the home folder."""
    with friendly_errors(f"{path} cannot be found", "give a path without ~"):
        return Path(path).expanduser()

# ------------------------------------------------------------------------------------------ loading
MNIST5K = Path(__file__).resolve().parent / "assets" / "mnist5k.npz"
KEYS = ("train_images", "train_labels", "test_images", "test_labels")

class Archive(NamedTuple):
    """An official CIFAR archive: records of `label_bytes` labels, then 3 x 32 x 32 pixels."""
    url: str
    sha256: str
    train: list  # members of the archive
    test: list
    label_bytes: int  # the last of them is the class

ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
        ["cifar-10-batches-bin/test_batch.bin"], 1),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ["cifar-100-binary/train.bin"], ["cifar-100-binary/test.bin"], 2)}

def load(name, cache="~/.cache/fllw", images=0):
    """Load `mnist5k` (embedded), `cifar10` or `cifar100` (downloaded once), or a FILE.npz.

    images: keep so many training images, the same ones every time; 0: all. Raises InputError."""
    known = str(name).lower()
    if known in ARCHIVES:
        dataset = load_cifar(ARCHIVES[known], download(ARCHIVES[known], Path(cache).expanduser()))
    elif known == "mnist5k" or known.endswith(".npz"):
        dataset = load_npz(MNIST5K if known == "mnist5k" else Path(name).expanduser())
    else:
        raise InputError(f"unknown data set {name!r}: use mnist5k, cifar10, cifar100 or a FILE.npz")
    there = len(dataset.train_images)
    if images > there:
        raise InputError(f"{name} has {there:,} training images: --images must be at most that")
    if images:
        kept = np.sort(np.random.default_rng(0).permutation(there)[:images])
        dataset = dataset._replace(train_images=dataset.train_images[kept],
                                   train_labels=dataset.train_labels[kept])
    return dataset

def load_npz(path):
    """Read KEYS (MedMNIST's layout) from an .npz; classes are numbered in the order of labels.

    Images are uint8 [N, H, W] or [N, H, W, C], labels whole numbers [N] or [N, 1]."""
    with friendly_errors(f"{path} cannot be read", "it must be an .npz of plain arrays"):
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in KEYS if key in file}
    for key in [key for key in KEYS if key not in arrays]:
        raise InputError(f"{path} has no {key!r}: it needs {', '.join(KEYS)}")
    train, labels = read_split(path, "train", arrays)
    test, more = read_split(path, "test", arrays)
    if train.shape[1:] != test.shape[1:]:
        raise InputError(f"{path}: train and test images differ in shape, they must not")
    numbers = np.unique(np.concatenate([labels, more]), return_inverse=True)[1]
    labels, more = torch.from_numpy(numbers).split([len(labels), len(more)])
    return Dataset(train, labels, test, more)

def read_split(path, split, arrays):
    """One split of a file -> (uint8 tensor [N, C, H, W], int64 array [N]), or InputError."""
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise InputError(f"{path}: {split}_images must be uint8 [N, H, W] or [N, H, W, C] and not "
                         f"empty, they are {images.dtype} {list(images.shape)}")
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.max() >= 2**63:
        raise InputError(f"{path}: {split}_labels must be {len(images)} whole numbers below 2^63, "
                         f"one an image, they are {labels.dtype} {list(labels.shape)}")
    images = torch.from_numpy(images.reshape(*images.shape[:3], -1))  # [N, H, W, C]
    return images.permute(0, 3, 1, 2).contiguous(), labels.astype(np.int64)

def load_cifar(archive, path):
    """Read the records straight out of the archive; nothing is unpacked or unpickled."""
    def read(members):
        with tarfile.open(path) as tar:
            raw = b"".join(tar.extractfile(member).read() for member in members)
        records = np.frombuffer(raw, np.uint8).reshape(-1, archive.label_bytes + 3 * 32 * 32)
        labels = records[:, archive.label_bytes - 1].astype(np.int64)
        pixels = records[:, archive.label_bytes:].reshape(-1, 3, 32, 32).copy()
        return torch.from_numpy(pixels), torch.from_numpy(labels)
    return Dataset(*read(archive.train), *read(archive.test))

def download(archive, cache):
    """The path of an archive with the right checksum; fetched once, under a temporary name."""
    path = source = cache / archive.url.rsplit("/", 1)[1]
    with friendly_errors(f"could not download {archive.url}",
                         f"rerun the command, or put the file at {path} yourself"):
        cache.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            source = path.with_name(path.name + ".tmp")
            print(f"downloading {archive.url}, about 170 MB", flush=True)
            with urllib.request.urlopen(archive.url, timeout=60) as reply:
                source.write_bytes(reply.read())
        if hashlib.sha256(source.read_bytes()).hexdigest() != archive.sha256:
            raise InputError(f"{source} does not match its SHA-256: delete it, rerun the command")
        source.replace(path)
    return path

# ------------------------------------------------------------ splitting among clients
def partition(labels, clients, alpha=0.0, seed=0):
    """Give each image to one client, at least 2 to each: labels int64 [N] -> `clients` indices.

    alpha = 0 deals them out at random in equal shares (IID). alpha > 0 draws, for every class, the
    clients' shares from Dirichlet(alpha), as Yurochkin et al. 2019 do (arXiv 1905.12022)."""
    if len(labels) < 2 * clients:
        raise InputError(f"{clients} clients need at least {2 * clients} training images (2 each), "
                         f"there are {len(labels)}")
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(labels))
    if alpha == 0:
        return [torch.from_numpy(part) for part in np.array_split(order, clients)]
    owner = np.empty(len(labels), dtype=np.int64)  # image -> client
    labels = np.asarray(labels)
    for label in np.unique(labels):
        images = order[labels[order] == label]
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(images)
        for client, part in enumerate(np.split(images, cuts.round().astype(int))):
            owner[part] = client
    while (sizes := np.bincount(owner, minlength=clients)).min() < 2:
        poor = np.argmax(sizes < 2)  # the first client without two: one image makes no contrast
        owner[np.argmax(owner == sizes.argmax())] = poor  # the largest client's first image
    return [torch.from_numpy(np.flatnonzero(owner == client)) for client in range(clients)]

# ---------------------------------------------------------------------- two views
@dataclass(frozen=True)
class Recipe:
    """What a random view does to an image. Ranges are uniform; 0 switches a part off."""
    area: tuple          # share of the image's area that the view shows; above 1 it zooms out
    aspect: float        # the crop's aspect ratio is log-uniform in [1 / aspect, aspect]
    shift: float = 0.0   # +- share of the image's size, on top of the crop's random place
    rotate: float = 0.0  # +- degrees
    shear: float = 0.0   # +- degrees
    elastic: float = 0.0   # +- share of the image's size by which a 4 x 4 net moves (Simard 2003)
    flip: float = 0.0      # probability of a horizontal flip
    jitter: float = 0.0    # probability of changing the colours, which are then
    colours: float = 0.0   # brightness, contrast and saturation, by factors in 1 +- this, and
    hue: float = 0.0       # hue, by +- turns of the colour circle
    grey: float = 0.0      # probability of dropping all colour
    blur: float = 0.0      # probability of a Gaussian blur, sigma in [0.1, 2] pixels
    solarise: float = 0.0  # probability of inverting the pixels above one half

DIGITS = Recipe((0.8, 1.2), aspect=1.3, shift=0.05, rotate=15, shear=15, elastic=0.05)
NATURAL = Recipe((0.2, 1.0), aspect=4 / 3, flip=0.5, jitter=0.8, colours=0.4, hue=0.1, grey=0.2,
                 blur=0.5)
RECIPES = {"digits": DIGITS, "natural": NATURAL, "solarised": replace(NATURAL, solarise=0.2)}
MOVED = {name: replace(one, grey=0.0, blur=0.0, solarise=0.0) for name, one in RECIPES.items()}

def recipe_name(config):
    """Which of RECIPES makes the views; digits are not flipped, photographs are."""
    auto = "digits" if config.data.lower() == "mnist5k" else "natural"
    return auto if config.augment == "auto" else config.augment

def normalise(images):
    """uint8 [B, C, H, W] in 0..255 -> float32 in -1..1, what the encoder reads."""
    return images.float() / 127.5 - 1

def two_views(images, recipe, generator):
    """Two views of image i, rows i and B + i: uint8 [B, C, H, W] -> float32 [2B, C, H, W]."""
    return view(images.repeat(2, 1, 1, 1), recipe, generator)

def moved(images, recipe, seed=0):
    """One view of every image, the same everywhere: uint8 [N, C, H, W] -> uint8 [N, C, H, W].

    recipe: a name in MOVED; all runs on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.cat([view(part, MOVED[recipe], generator) for part in images.cpu().split(500)])
    return ((views + 1) * 127.5).round().byte()

def view(images, recipe, generator):
    """One random view of every image: uint8 [B, C, H, W] -> float32 [B, C, H, W] in -1..1."""
    x = images.float() / 255  # all randomness comes in one draw; no recipe here needs 48 numbers
    numbers, used = torch.rand(48, len(x), device=x.device, generator=generator), 0

    def uniform(low, high, count=1):
        nonlocal used
        used += count
        return low + (high - low) * numbers[used - count:used].view(count, len(x)).squeeze(0)

    x = warp(x, recipe, uniform)
    if recipe.jitter or recipe.grey:
        x = colour(x, recipe, uniform)
    if recipe.blur:
        x = blur(x, recipe, uniform)
    if recipe.solarise:
        chosen = (uniform(0, 1) < recipe.solarise)[:, None, None, None]
        x = torch.where(chosen & (x > 0.5), 1 - x, x)
    return x.mul(2).sub(1)

def warp(x, recipe, uniform):
    """Crop, shift, turn, shear, flip: one affine map of -1..1; elastic bend. x: [B, C, H, W]."""
    H, W = x.shape[2:]
    area, ratio = uniform(*recipe.area), torch.exp(uniform(-1, 1) * math.log(recipe.aspect))
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()  # size of the crop; 1 is the image's own
    if recipe.area[1] <= 1:
        w, h = w.clamp(max=1), h.clamp(max=1)
    dx = uniform(-1, 1) * (1 - w).clamp(min=0) + uniform(-2, 2) * recipe.shift
    dy = uniform(-1, 1) * (1 - h).clamp(min=0) + uniform(-2, 2) * recipe.shift
    turn = torch.deg2rad(uniform(-1, 1) * recipe.rotate)
    shear = torch.deg2rad(uniform(-1, 1) * recipe.shear).tan()
    mirror = 1 - 2 * (uniform(0, 1) < recipe.flip).float()
    cos, sin = turn.cos(), turn.sin()
    across, down = H / W, W / H  # a turn is a turn in pixels, whatever the image's shape
    theta = torch.stack([
        torch.stack([mirror * w * cos, across * h * (shear * cos - sin), dx], 1),
        torch.stack([down * mirror * w * sin, h * (shear * sin + cos), dy], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # [B, H, W, 2]
    if recipe.elastic:
        net = uniform(-2, 2, 2 * 4 * 4).T.reshape(-1, 2, 4, 4)
        bend = F.interpolate(net * recipe.elastic, (H, W), mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)
    outside = "zeros" if recipe.area[1] > 1 else "reflection"
    return F.grid_sample(x, grid, padding_mode=outside, align_corners=False)

def colour(x, recipe, uniform):
    """Brightness and contrast, for C = 3 saturation, hue and grey: x [B, C, H, W] in 0..1.

    All are affine in the colour: one matrix and one offset an image."""
    B, C = x.shape[:2]
    apply = (uniform(0, 1) < recipe.jitter).float()
    bright, contrast, saturate = 1 + apply * uniform(-1, 1, 3) * recipe.colours
    turn = 2 * math.pi * apply * uniform(-1, 1) * recipe.hue
    saturate = (saturate * (uniform(0, 1) >= recipe.grey))[:, None, None]
    weights = (0.299, 0.587, 0.114) if C == 3 else [1 / C] * C
    luma = torch.cat([torch.full((1,), weight, device=x.device) for weight in weights])
    eye = torch.eye(C, device=x.device)
    matrix = eye.expand(B, C, C)
    if C == 3:
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        k = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)
        hue = cos * eye + sin * k + (1 - cos) / 3  # rotation about the grey axis (Rodrigues)
        matrix = (saturate * eye + (1 - saturate) * luma.expand(3, 3)) @ hue
    mean = torch.einsum("bchw,c->b", x, luma) / x[0, 0].numel()  # the fixed point of contrast
    y = ((bright * contrast)[:, None, None] * matrix) @ x.flatten(2)
    y = y + (bright * (1 - contrast) * mean)[:, None, None]
    return y.clamp(0, 1).view_as(x)

def blur(x, recipe, uniform):
    """Separable Gaussian blur, kernel a tenth of the image's width across. x: [B, C, H, W]."""
    radius = min(max(1, x.shape[-1] // 20), min(x.shape[-2:]) - 1)
    sigma = torch.where(uniform(0, 1) < recipe.blur, uniform(0.1, 2.0), 1e-3)  # 1e-3: no blur
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, 1)  # [B, 2 * radius + 1]
    for _ in range(2):  # along the width, transpose, along the height, transpose back
        padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
        x = sum(kernel[:, i, None, None, None] * padded[..., i:i + x.shape[-1]]
                for i in range(2 * radius + 1))
        x = x.transpose(2, 3)
    return x
