"""The tests import the flat modules from the folder above, on one thread (two cores are shared with loader and gloo processes)."""
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
