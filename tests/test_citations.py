"""
What comments and pages cite of the paper exists there, and is what they say it is. The numbers are
those of arXiv:2603.14645 v1. The equation of somebody else is told by an author and a year in the
same brackets: (Song et al. 2021, Eq. 12).
"""
import re

import pytest

from conftest import ROOT

EXISTS = {
    "Sec": "1 2 2.1 2.2 3 3.1 3.2 3.3 3.4 3.5 4 4.1 4.2 5 6",
    "Eq": "1 2 3 4 5 6 7 8 9 10 11",
    "Fig": "1 2 3 4 5 6 7 8 9 10",
    "Table": "1 2 3 4 5 6 7 8",
    "Alg": "1 2",
    "Prop": "3.1 3.2",
    "Lemma": "A.2",
    "Remark": "A.1",
    "Appendix": "A.1 A.2 A.3 A.4 A.5 A.6 A.7 A.8",        # also without that word
}
LONG = dict(Section="Sec", Equation="Eq", Figure="Fig", Algorithm="Alg", Proposition="Prop")
KIND = r"(?:Sec|Eq|Fig|Alg|Prop)s?\.|(?:Table|Lemma|Remark|Appendix|" + "|".join(LONG) + ")s?"
GAP = r"[\s#]+"                                            # a list may go on in the next line
NUMBER = r"(?:A\.\d+|\d+(?:\.\d+)?)"
LIST = rf"{NUMBER}(?:(?:,{GAP}|{GAP}(?:and|to){GAP}|-){NUMBER})*"
CITATION = re.compile(rf"\b({KIND}){GAP}({LIST})|\b(A\.\d+)")
FOREIGN = re.compile(r"\([^()]*[A-Z][\w-]+( et al\.?| and [A-Z][\w-]+)?,? (19|20)\d\d[^()]*\)")


def expand(listed):
    """'3, 7 to 9' -> ['3', '7', '8', '9'], and 'A.1 to A.3' likewise."""
    found = []
    for until, number in re.findall(rf"(to{GAP}|-)?({NUMBER})", listed):
        if until:
            first, last = (int(end.split(".")[-1]) for end in (found[-1], number))
            found += [f"{'A.' * number.startswith('A')}{n}" for n in range(first + 1, last)]
        found.append(number)
    return found


def citations(text):
    """(line number, kind, number) of every citation of this paper in a text."""
    foreign = [match.span() for match in FOREIGN.finditer(text)]
    for match in CITATION.finditer(text):
        if any(start < match.start() < end for start, end in foreign):
            continue
        kind, listed, appendix = match.groups()
        kind = (kind or "Appendix").rstrip(".s")
        for number in expand(listed or appendix):
            in_appendix = number.startswith("A.") and kind not in ("Lemma", "Remark")
            yield (text.count("\n", 0, match.start()) + 1,
                   "Appendix" if in_appendix else LONG.get(kind, kind), number)


def texts():
    """{name: text} of every .py and .md file of the project, but this one."""
    rooms = ("", "common", "analysis", "experiments", "tests")
    paths = [path for room in rooms for path in sorted((ROOT / room).glob("*.*"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths
            if path.suffix in (".py", ".md") and path.name not in __file__}


FILES = texts()


def test_every_citation_exists():
    """In the paper's text, by kind and number; there are enough of them to believe the search."""
    found = [(name, *citation) for name, text in FILES.items() for citation in citations(text)]
    assert len(found) > 150 and len(FILES) > 40
    wrong = [f"{name}:{line} cites {kind} {number}" for name, line, kind, number in found
             if number not in EXISTS[kind].split()]
    assert not wrong, "\n".join(wrong)


# (what a line is about: all of these patterns; a kind; what the line must cite of this kind if it
# cites any of it; what it may cite besides)
PAIRS = [
    ((r"\bESM\b|\bDSM\b|Alg\. [12]", "^(?!.*ypothesis)"), "Sec", "", "3.3 4.1"),
    ((r"Fig\. 10\b",), "Appendix", "A.7", ""),
    ((r"\bA\.7\b",), "Fig", "10", ""),
    ((r"Fig\. 9\b",), "Appendix", "A.4", ""),
    ((r"\bA\.4\b",), "Fig", "9", ""),
    ((r"spectr(um|a)\b|PSD", "latents", r"^(?!.*(VA-VAE|DINOv2|Fig\. 3))"), "Fig", "4 5", "7 8"),
    ((r"spectr(um|a)\b|PSD", "DINOv2"), "Fig", "7", "4 5 8"),
    ((r"spectr(um|a)\b|PSD", "VA-VAE"), "Fig", "8", "4 5 7"),
    ((r"^ +bands|evaluate\.py.*bands",), "Fig", "", ""),   # our figure
    ((r"REPA-DoG",), "Table", "", "4 6"),
    ((r"learnable power",), "Prop", "3.1", ""),
    ((r"RMSC",), "Prop", "3.2", ""),
    ((r"\bDoG\b",), "Eq", "6", ""),
]
WRONG = {
    r"Table 2, (left|right)": "its halves are f8d4 and f16d16",
    r"\bkl\b.* methods? of Table 1|Table 1\b.*--reg kl": "KL is no method of Table 1",
    r"Table 7, gamma\b(?!,? (and )?weight)": "it is about gamma and the weight",
    r"Figs\. 5 and 5": "the paper's own misprint: Figs. 4 and 5",
}


def faults(line):
    """What is wrong with a line's citations, as sentences."""
    cited = {}
    for _, kind, number in citations(line):
        cited.setdefault(kind, set()).add(number)
    result = [f"{wrong}: {why}" for wrong, why in WRONG.items() if re.search(wrong, line)]
    for about, kind, needed, besides in PAIRS:
        found, needed = cited.get(kind, set()), set(needed.split())
        if not found or not all(re.search(pattern, line) for pattern in about):
            continue
        if not needed <= found <= needed | set(besides.split()):
            result.append(f"{kind} {', '.join(sorted(found))} in a line about {about[0]}")
    return result


def test_known_pairs_are_cited_together():
    """ESM and Alg. 1 with Sec. 3.3, masks with Fig. 10 and A.7, and so on."""
    wrong = [f"{name}:{number} {fault}" for name, text in FILES.items()
             for number, line in enumerate(text.splitlines(), 1) for fault in faults(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text, expected", [
    ("Eqs. 7 to 10 and 12", "Eq 7, Eq 8, Eq 9, Eq 10, Eq 12"),
    ("(Appendix A.9), Appendix A.2 to A.3", "Appendix A.9, Appendix A.2, Appendix A.3"),
    ("Lemma A.2 in A.1; Fig. 10, A.7", "Lemma A.2, Appendix A.1, Fig 10, Appendix A.7"),
    ("Figs. 4, 5, 7-9; Tables 7\nand 8", "Fig 4, Fig 5, Fig 7, Fig 8, Fig 9, Table 7, Table 8"),
    ("# (Fig.\n    # 11)", "Fig 11"),
    ("DDIM (Song et al. 2021, Eq. 12), Eq. 3; table 5, A.B, 3.1", "Eq 3"),
])
def test_citations_are_found(text, expected):
    """Lists, ranges, broken lines; those of other papers are left out."""
    assert ", ".join(f"{kind} {number}" for _, kind, number in citations(text)) == expected


@pytest.mark.parametrize("line", [
    "ESM: KL(P_image^gamma || P_latent), weight 0.01 (Sec. 3.2, Alg. 1)",
    "Fig. 10, A.4    triangular masks on 8x8 blocks; low-pass in the DCT = downsampling",
    "spectrum    radial PSD of images and of the latents of any autoencoders   Figs. 5, 7, 8",
    "DINOv2's spectrum (Fig. 4)",
    "| Alg. 2, DSM; the masks of Fig. 10 | `evaluate.py bands` |",
    "recon       PSNR, SSIM, LPIPS, rFID on held-out images          Table 2, left",
    "| Table 1, earlier methods | `losses.py` | `train_ae.py --reg kl`, `se`, `eq` |",
])
def test_what_was_wrong_once_is_found(line):
    """These stood in these files."""
    assert faults(line)
