"""The two figures that explain the paper are drawn, with the values that the code uses."""
from unittest import mock

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image

from analysis import figures, ideas
from conftest import run_main
from losses import DSM_MASKS
from repa import DOG_SIGMAS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Both figures as the README's command draws and writes them."""
    out, spy = tmp_path_factory.mktemp("ideas"), mock.Mock(wraps=ideas.save_figure)
    with mock.patch.object(ideas, "save_figure", spy):
        run_main(ideas, "--plot", out / "a.png", "--pipeline", out / "b.png", "--size", 64)
    assert all(Image.open(path).size[0] > 1000 for path in (out / "a.png", out / "b.png"))
    return [call.args[0] for call in spy.call_args_list]


def texts(figure):
    """All that is written in a figure, legends and titles included."""
    return "\n\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_ideas_show_what_the_code_uses(drawn):
    """A panel per figure of the paper that it explains; the masks of --reg dsm, the default DoG."""
    found = texts(drawn[0])
    sources = "Fig. 2", "power law", "ESM", "Prop. 3.1", "Fig. 10", "Fig. 9", "Eq. 6"
    for number, source in enumerate(sources, 2):           # as in the table of GUIDE.md
        title, = [text for text in found.split("\n\n") if text.startswith(f"{number}  ")]
        assert source in title
    assert all(f"n = {n}:" in found for n in DSM_MASKS)
    assert "= {}, {} (default)".format(*DOG_SIGMAS) in found


def test_a_method_has_one_colour():
    """In a run's name as in the authors' curves; runs of one method differ; images are black."""
    runs = ["quick-kl", "b/dsm-s0", "celeba-f16d16-esm", "se_2", "kl-1e-6-s0", "first", "1"]
    colors = figures.run_colors(runs)
    names = "SD-VAE", "DSM", "ESM", "Scale Equivariance"
    assert colors[:4] == [figures.COLORS[name] for name in names]
    assert len({to_rgb(color) for color in (*colors, "black", "gray")}) == len(runs) + 2
    assert all(curve in figures.COLORS for curves in figures.CURVES.values() for curve in curves)


@pytest.mark.parametrize("values, ticks", [((0.3, 7), ["0.5", "1", "2", "5"]),
                                           ((0.002, 300), ["0.01", "0.1", "1", "10", "100"])])
def test_logarithmic_axes_have_plain_numbers(values, ticks, tmp_path):
    """1, 2, 5 of each decade, or decades alone; nothing else is labelled."""
    figure, ((ax,),) = figures.subplots(1, 1, (4, 4))
    ax.plot(range(2), values)
    figures.log_axes(ax, "y")
    figures.save_figure(figure, tmp_path / "a.png")
    low, high = ax.get_ylim()
    labels = [label for label in ax.get_yticklabels(which="both") if label.get_text()]
    inside = [label.get_text() for label in labels if low <= label.get_position()[1] <= high]
    assert inside == ticks


def test_the_pipeline_has_every_stage(drawn):
    """Fig. 1: encode, sample, ESM between the spectra, one mask on both sides, decode, loss."""
    found = texts(drawn[1]).lower()
    for stage in ("encoder", "sample", "esm (alg. 1)", "spectra", "dsm (alg. 2)", "one mask",
                  "masked image", "masked latent", "decoder", "reconstruction", "loss"):
        assert stage in found, stage
    assert len(drawn[1].findobj(AxesImage)) == 6             # also both masked, and the mask
