"""What the tests share: runs of the scripts, here or in other processes, and small material."""
import csv
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import urllib.error
import zipfile
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work: threads would wait for one another

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port
from torchvision.models import VGG16_Weights, vgg16

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true",
        help="the whole stress tests: every method, more kills, thousands of steps")


LONG = pytest.mark.skipif("not config.getoption('--long')", reason="--long runs it")


def long_but(names, *always):
    """Values of a parameter, all but some of them for --long alone."""
    return [name if name in always else pytest.param(name, marks=LONG) for name in names]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def run_main(module, *flags):
    """module.main() in this process, with these flags on its command line."""
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, flags)]):
        try:
            module.main()
        finally:
            importlib.import_module("common.run").locks.close()     # as at the end of a process


def args_of(script, *flags):
    """The flags as script.main() would read them."""
    with mock.patch.object(sys, "argv", [script.__name__, *flags]):
        return script.get_args()


# Processes that can be killed, forked in a second from a server that has imported everything
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "train_ae", "train_diffusion", "evaluate"])


def _child(module, argv, cwd, output, environment, largest_file, patch):
    os.environ.update(environment)
    os.chdir(cwd)
    sys.stdout = sys.stderr = open(output, "a", buffering=1)       # to the end, with tracebacks
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)            # the suite may run under nohup
    if largest_file:                                        # writing more fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from common import run
    script = importlib.import_module(module)
    if patch:
        patch(script)
    sys.argv = [f"{module}.py", *argv]
    with run.one_line_errors():
        script.main()


def start(module, *flags, cwd, output, rank=0, world=1, port=None, largest_file=None, patch=None):
    """The process of module.main(), one of `world` under gloo if a port is given, now started."""
    group = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                 MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if port else {}
    process = SERVER.Process(target=_child, args=(
        module, [*map(str, flags)], cwd, output, group, largest_file, patch))
    process.start()
    return process


def run_ranks(world, module, *flags, cwd, output, patch=None, timeout=120):
    """The same on `world` processes; AssertionError with their output unless all exit with 0."""
    port = get_free_port() if world > 1 else None
    ranks = [start(module, *flags, cwd=cwd, output=f"{output}.{rank}", rank=rank, world=world,
        port=port, patch=patch) for rank in range(world)]
    stop = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0, stop - time.monotonic()))
    exits = [process.exitcode for process in ranks]        # None: it still runs
    for process in ranks:
        process.kill()
    text = [pathlib.Path(f"{output}.{rank}").read_text() for rank in range(world)]
    assert exits == [0] * world, "".join(text)


def read_lines(path):
    """A file of JSON lines, such as log.jsonl, as a list, which is empty before there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(path):
    """A CSV file as a list of dicts."""
    return list(csv.DictReader(pathlib.Path(path).read_text().splitlines()))


def noise(i, height=9, width=11):
    """(height, width, 3) uint8, different for every i and not its own mirror image."""
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pngs(path, names, *sides):
    """A folder, or a zip if it is called so, of noise under these names; returns its path."""
    for i, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(noise(i, *sides)).save(file, "PNG")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, file.getvalue())
        else:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(file.getvalue())
    return path


def same(a, b):
    """Equality, bit for bit, of nested dicts and lists of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def equal_runs(a, b):
    """Checkpoints bit for bit but for the flags, logs byte for byte; returns the checkpoint."""
    first, second = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    assert first.keys() == second.keys()
    for part in set(first) - {"args"}:
        assert same(first[part], second[part]), part
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    return first


def copy_at(step, run, copy):
    """A copy of a run's folder as if it had been killed after its checkpoint of this step."""
    shutil.copytree(run, copy)
    (copy / f"ckpt_{step}.pt").rename(copy / "ckpt.pt")


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder of 12 images in two classes, and an autoencoder that saw it for two steps."""
    import train_ae
    folder = tmp_path_factory.mktemp("material")
    pngs(folder / "images", [f"{'ab'[i % 2]}/{i}.png" for i in range(12)], 20, 26)
    flags = "--preset quick --model f2d4-tiny --image_size 16 --batch_size 4 --steps 2 --reg kl"
    run_main(train_ae, *flags.split(), "--device", "cpu", "--data", folder / "images", "--out",
             folder / "ae")
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No weights in TORCH_HOME, and no network, which is asked through the mock that this is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = mock.Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(torch.hub, "urlopen", network)
    return network


@pytest.fixture
def main(tmp_path, monkeypatch, offline):
    """main(command, *flags) runs evaluate.py offline in tmp_path; returns its new results."""
    import evaluate
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results.jsonl"

    def main(command, *flags):
        device = [] if command == "curves" else ["--device", "cpu"]
        results.unlink(missing_ok=True)
        run_main(evaluate, command, *flags, *device)
        return read_lines(results)
    return main


@pytest.fixture
def handlers():
    """Of signals, put back after the test."""
    numbers = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def plant_vgg(home, monkeypatch):
    """LPIPS' VGG-16 in a TORCH_HOME: random convolutions, for the rest one number per tensor."""
    with torch.device("meta"):
        weights = vgg16().state_dict()
    for name, tensor in weights.items():
        weights[name] = torch.zeros(1).expand(tensor.shape)
        if tensor.ndim == 4:
            weights[name] = torch.nn.init.kaiming_normal_(torch.empty(tensor.shape), mode="fan_out")
    path = home / "hub" / "checkpoints" / os.path.basename(VGG16_Weights.IMAGENET1K_V1.url)
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    monkeypatch.setenv("TORCH_HOME", str(home))


@pytest.fixture(scope="session")
def inception_home(tmp_path_factory):
    """A TORCH_HOME with random Inception weights under the name that torch-fidelity looks for."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    home = tmp_path_factory.mktemp("torch_home")
    weights = home / "hub" / "checkpoints" / os.path.basename(fidelity.URL_INCEPTION_V3)
    weights.parent.mkdir(parents=True)
    kind = fidelity.FeatureExtractorInceptionV3            # an instance knows the names and shapes
    with mock.patch.object(fidelity, "load_state_dict_from_url"), mock.patch.object(
            kind, "load_state_dict"):
        torch.save(kind("x", ["2048"]).state_dict(), weights)
    return home
