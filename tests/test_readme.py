"""What the pages promise and code can keep: the snippet runs as it stands, links lead somewhere."""
import re

import pytest
import torch
from torch import nn

from conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("use_esm, use_dsm", [(True, False), (False, True), (True, True)])
def test_the_idea_in_ten_lines(use_esm, use_dsm):
    """The python block of the README, word for word, in a foreign loop: it has gradients."""
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line]) <= 12
    encoder = nn.Conv2d(3, 4, 2, stride=2)
    decoder = nn.ConvTranspose2d(4, 3, 2, stride=2)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    scope = dict(encoder=encoder, decoder=decoder, images=images, use_esm=use_esm, use_dsm=use_dsm)
    exec(code, scope)
    scope["loss"].backward()
    assert encoder.weight.grad.abs().sum() > 0 and decoder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("page", ["README.md", "GUIDE.md", "experiments/README.md"])
def test_links_lead_somewhere(page):
    """Every relative link and picture of a page exists."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target
