"""The tests import the flat modules from the folder above. Fixtures: a fixed seed, small material, planted Inception weights."""
import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def run(module, *flags, monkeypatch):
    """module.main() in this process, with these flags on its command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    module.main()


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder of 12 pictures in two classes, and an autoencoder that saw it for two steps."""
    import train_ae
    folder, patch = tmp_path_factory.mktemp("material"), pytest.MonkeyPatch()
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(folder / "images" / "ab"[i % 2] / f"{i}.png")
    run(train_ae, "--preset", "quick", "--data", folder / "images", "--image_size", 16, "--batch_size", 4, "--steps", 2, "--reg", "kl",
        "--device", "cpu", "--out", folder / "ae", monkeypatch=patch)
    patch.undo()
    return folder


@pytest.fixture(scope="session")
def inception_home(tmp_path_factory):
    """A TORCH_HOME with random Inception weights under the name that torch-fidelity looks for."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    home = tmp_path_factory.mktemp("torch_home")
    weights = home / "hub" / "checkpoints" / os.path.basename(URL_INCEPTION_V3)
    weights.parent.mkdir(parents=True)
    torch.save({}, weights)
    with pytest.MonkeyPatch.context() as patch:                                            # an instance, to learn the names and shapes
        patch.setenv("TORCH_HOME", str(home))
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        state = FeatureExtractorInceptionV3("x", ["2048"]).state_dict()
    torch.save(state, weights)
    return home
