"""The two figures that explain the paper are drawn, with the values that the code uses."""
import torch
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image

from analysis import ideas
from conftest import run_main
from losses import DSM_MASKS
from repa import DOG_SIGMAS


def texts(figure):
    """All that is written in a figure, legends and titles included."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_ideas_show_what_the_code_uses():
    """A panel per figure of the paper that it explains; the masks of --reg dsm, the default DoG."""
    found = texts(ideas.plot(torch.rand(1, 3, 64, 80) * 2 - 1))
    for figure in ("Fig. 2", "Fig. 9", "Fig. 10", "Prop. 3.1", "Eq. 6", "ESM"):
        assert figure in found
    assert all(f"n = {n}:" in found for n in DSM_MASKS)
    assert "= {}, {} (default)".format(*DOG_SIGMAS) in found


def test_the_pipeline_has_every_stage():
    """Fig. 1: encode, sample, ESM between the spectra, one mask on both sides, decode, loss."""
    figure = ideas.pipeline(torch.rand(1, 3, 64, 128) * 2 - 1)
    found = texts(figure).lower()
    for stage in ("encoder", "sample", "esm (alg. 1)", "spectra", "dsm (alg. 2)", "one mask",
                  "masked image", "masked latent", "decoder", "reconstruction", "loss"):
        assert stage in found, stage
    assert len(figure.findobj(AxesImage)) == 6             # also both masked, and the mask


def test_the_readmes_command_draws_both(tmp_path, monkeypatch):
    """Of a given image, and of the one that comes with matplotlib."""
    Image.linear_gradient("L").resize((90, 80)).save(tmp_path / "image.png")
    run_main(ideas, "--plot", tmp_path / "a.png", "--pipeline", tmp_path / "b.png", "--size", 64,
             "--image", tmp_path / "image.png", monkeypatch=monkeypatch)
    run_main(ideas, "--pipeline", tmp_path / "c.png", monkeypatch=monkeypatch)
    sizes = {Image.open(tmp_path / name).size for name in ("b.png", "c.png")}
    assert len(sizes) == 1 and Image.open(tmp_path / "a.png").size[0] > 1000
