"""What the pages promise and code can keep: snippet, links, the map, costs, the paper's numbers."""
import inspect
import json
import pkgutil
import re
import sys

import benchmark
import pytest
import torch
from torch import nn

from analysis.figures import CURVES, TARGET, divergence
from conftest import ROOT

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "GUIDE.md").read_text()
TABLE = GUIDE[GUIDE.index("## From paper to code"):GUIDE.index("## Recipes at scale")]
MAP = [line.split("|")[:4] for line in TABLE.splitlines() if line.startswith("| ")]


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


def test_links_lead_somewhere():
    """Every relative link and image of a page or of the lecture exists."""
    pages = "README.md", "GUIDE.md", "experiments/README.md", "experiments/lecture.ipynb"
    for page in (ROOT / page for page in pages):
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        gone = [target for target in targets if not target.startswith("http")
                and not (page.parent / target).exists()]
        assert targets and not gone, page


def test_every_module_is_named():
    """The eight files with their lines, in a README of one sitting; the others in the GUIDE."""
    assert len(README.splitlines()) <= 130
    for path in ROOT.glob("*.py"):
        assert f"| `{path.name}` | {len(path.read_text().splitlines())} |" in README, path.name
    paths = [path for room in ("common", "analysis") for path in (ROOT / room).glob("[!_]*.py")]
    assert [path for path in paths if not re.search(rf"`(\w+/)?{path.name}`", GUIDE)] == []


def test_the_map_leads_somewhere():
    """Every name of a module, function and test in the table "From paper to code" exists."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    module, checked = "", 0
    for _, _, code, see in MAP:
        for name in re.findall(r"`([\w./]+)`", code):
            if name.endswith(".py"):
                assert (ROOT / name).exists(), name
                continue
            name = name if "." in name else f"{module}.{name}"     # in the module before it
            target = pkgutil.resolve_name(name)            # raises if it is not there
            module = name if inspect.ismodule(target) else name.rpartition(".")[0]
            checked += 1
        for name in re.findall(r"`(test_\w+\*?)`", see):
            assert re.search(name.replace("*", r"\w+") + r"\(", tests), name
            checked += 1
    assert checked > 40


def test_the_map_is_complete():
    """Every equation, figure, table, algorithm, statement and appendix is in its first column."""
    cited = [*(f"Eq. {n}" for n in (1, 5, 6, 11)), "Eqs. 2, 3, 4", "Eqs. 7 to 10",
             *(f"Fig. {n}" for n in (1, 2, 3, 6, 7, 8, 9, 10)), "Figs. 4 and 5",
             *(f"Table {n}" for n in (1, 2, 3, 4, 7, 8)), "Tables 5 and 6", "Alg. 1", "Alg. 2",
             "Prop. 3.1", "Prop. 3.2", "Lemma A.2", "Remark A.1", *(f"A.{n}" for n in range(1, 9))]
    papers = "\n".join(paper for _, paper, *_ in MAP)
    assert [name for name in cited if not re.search(re.escape(name) + r"(?!\d)", papers)] == []


def test_the_guides_costs_are_the_benchmarks(capsys, monkeypatch):
    """Rows of `benchmark.py --section costs` begin the GUIDE's; the others are in its text."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--section", "costs"])
    benchmark.main()
    *rows, last = capsys.readouterr().out.splitlines()
    rows = [row for row in rows if row.startswith("| train") and "one" not in row]
    assert len(rows) == 7 + 1 and all(row in GUIDE for row in rows[:-1])
    total = {row["name"]: row["gflop_per_image"] * row["images"]
             for row in json.loads(last)["rows"]}
    one_gpu = sum(gflop for name, gflop in total.items() if "one-gpu" in name)
    assert f"{one_gpu / 1e6:.0f} PFLOP" in GUIDE
    assert f"{total['train_ae, fine-tuning (GUIDE)'] / 1e9:.2f} EFLOP" in GUIDE


def rows_of(caption):
    """{first cell: the paper's cells} of the GUIDE's table under this caption."""
    after = GUIDE[GUIDE.index(caption):]
    lines = re.search(r"(\|.*\n)+", after)[0].splitlines()
    head, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines)
    paper = [i for i, cell in enumerate(head) if cell.startswith("paper")]
    return {row[0]: " / ".join(row[i] for i in paper).split(" / ") for row in rows[1:]}


def test_the_papers_numbers():
    """Tables 2, 3, 4, 7 and 8 as the paper prints them; of some only the gFID."""
    two = rows_of("**Table 2.**")
    assert list(two) == ["SD-VAE", "Scale Equivariance", "ESM-AE", "DSM-AE"]
    assert [row[4::5] for row in two.values()] == [
        ["6.88", "6.63"], ["5.46", "5.87"], ["5.84", "5.91"], ["4.49", "4.44"]]
    three = rows_of("**Table 3.**")
    assert three["SD-VAE"] == ("1.20 25.44 .659 37.78 22.95 17.40 14.58 "
                               "25.86 12.46 9.01 7.60").split()
    assert three["DSM-AE"] == ("1.57 23.83 .606 31.99 18.95 14.37 12.20 "
                               "21.92 10.64 7.83 6.48").split()
    four = rows_of("**Table 4**")
    assert four == {"REPA": "23.92 10.67 7.13 5.68 22.75".split(),
                    "iREPA": "17.73 8.51 6.23 5.07 21.40".split(),
                    "REPA-DoG": "18.52 8.60 6.15 4.98 20.37".split()}
    assert [row[4] for row in rows_of("**Table 7**").values()] == \
        "5.90 5.84 6.57 6.82 6.00".split()
    eight = rows_of("**Table 8**")
    assert [row[4] for row in eight.values()] == "5.02 4.49 4.61 5.33".split()
    assert two["DSM-AE"][:5] == eight["none: `--dsm_masks 0 8 10 12"]


def test_no_mask_set_but_the_papers():
    """Sets of masks on both pages are those of Table 8; what is our own is in experiments/."""
    papers = {"0 8 12", "0 8 10 12", "0 6 8 10 12", "0 8 10 12 13"}
    found = re.findall(r"\{(0(?:, \d+)+)\}|--dsm_masks (0[\d ]*\d)", README + GUIDE)
    assert len(found) > 4
    assert {(a or b).replace(",", "") for a, b in found} <= papers


def test_the_papers_claim_about_spectra_stands_beside_ours():
    """The divergences of the published curves, and that our figure's order is another one."""
    section = GUIDE[GUIDE.index("## The five methods side by side"):GUIDE.index("## Teaching")]
    curves = dict(CURVES["celeba"])
    target, _ = curves.pop(TARGET), curves.pop("image")
    found = {name: f"{divergence(target, curve):.2g}"[1:] for name, curve in curves.items()}
    assert f"| {' | '.join(found)} |" in section
    assert f"| {' | '.join(found.values())} |".replace(".02 |", ".020 |") in section
    assert "| .038 | .020 | .0054 | .0044 |" in section and "over-white" in section
    assert "The spectrum of this figure differs." in section
