"""For torch.hub: `--encoder labelnet --encoder_source experiments`."""
from experiments.labelnet import load_labelnet


def labelnet():
    """The LabelNet of labelnet.pt."""
    return load_labelnet()
