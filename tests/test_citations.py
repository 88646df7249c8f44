"""
What comments and pages cite of the paper exists there, and is what they say it is. The numbers are
those of arXiv:2603.14645 v1. Somebody else's equation is told by an author and a year in the same
brackets: (Song et al. 2021, Eq. 12).
"""
import re
import subprocess

import pytest

from conftest import ROOT


def numbers(*names, upto=0):
    return {str(n) for n in range(1, upto + 1)} | set(names)


APPENDICES = {f"A.{n}" for n in range(1, 9)}
EXISTS = {
    "Sec": numbers("2.1", "2.2", "3.1", "3.2", "3.3", "3.4", "3.5", "4.1", "4.2", upto=6),
    "Eq": numbers(upto=11),
    "Fig": numbers(upto=10),
    "Table": numbers(upto=8),
    "Alg": numbers("1", "2"),
    "Prop": numbers("3.1", "3.2"),
    "Lemma": {"A.2"},
    "Remark": {"A.1"},
    "A.": APPENDICES,
}
WORDS = dict(section="Sec", equation="Eq", figure="Fig", algorithm="Alg", proposition="Prop",
             appendix="A.")
NUMBER = r"(?:A\.\d+|\d+(?:\.\d+)?)"
GAP = r"[\s#]+"                            # a citation may be broken at a line's end
LIST = rf"{NUMBER}(?:(?:,{GAP}|{GAP}(?:and|to|or){GAP}|-){NUMBER})*"
KIND = (r"(?:Sec|Eq|Fig|Alg|Prop)s?\.|(?:Section|Equation|Figure|Table|Algorithm|Proposition)s?|"
        r"Lemma|Remark|Appendix")
CITATION = re.compile(rf"\b({KIND}){GAP}({LIST})|\b(A\.\d+)")
FOREIGN = re.compile(r"[A-Z][\w-]+(?: et al\.?| (?:and|&) [A-Z][\w-]+)?,? (?:19|20)\d\d")


def expand(text):
    """'7, 9 and A.1 to A.3' -> ['7', '9', 'A.1', 'A.2', 'A.3']."""
    found = []
    for number in re.finditer(rf"(?:to{GAP}|-)?({NUMBER})", text):
        if number[0] != number[1] and found:
            head, _, last = number[1].rpartition(".")
            first = int(found[-1].rpartition(".")[2]) + 1
            found += [f"{head}.{n}" if head else str(n) for n in range(first, int(last))]
        found.append(number[1])
    return found


def brackets(text, place):
    """What stands in the innermost brackets around a place of a text, '' outside of any."""
    start, depth = place, 1
    while start and depth and text[start - 1:start + 1] != "\n\n":
        start -= 1
        depth += {")": 1, "(": -1}.get(text[start], 0)
    return text[start:(text + ")").index(")", place)] if depth == 0 else ""


def citations(text):
    """(line number, kind, number) of every citation of this paper in a text."""
    for match in CITATION.finditer(text):
        if FOREIGN.search(brackets(text, match.start())):
            continue
        word, listed, appendix = match.groups()
        kind = (word or "A.").rstrip(".s").lower()
        kind = WORDS.get(kind, kind.capitalize()) if word else "A."
        for number in expand(listed or appendix):
            if kind == "Sec" and number in APPENDICES:
                kind = "A."
            yield text.count("\n", 0, match.start()) + 1, kind, number


def texts():
    """{name: text} of every tracked or new .py and .md file, but this one."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.md"],
                            cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\n")]
    if listed.returncode:                                  # an archive without .git
        paths = [path for folder in (ROOT, ROOT / "experiments", ROOT / "tests")
                 for kind in ("*.py", "*.md") for path in folder.glob(kind)]
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)
            if path.is_file() and path.name != "test_citations.py"}


FILES = texts()


def test_every_citation_exists():
    """In the paper's text, by kind and number; there are enough of them to believe the search."""
    found = [(name, *citation) for name, text in FILES.items() for citation in citations(text)]
    assert len(found) > 150 and len(FILES) > 40
    wrong = [f"{name}:{line} cites {kind} {number}" for name, line, kind, number in found
             if number not in EXISTS[kind]]
    assert not wrong, "\n".join(wrong)


# What a line is about (a pattern), the kind it cites, and what it may then cite of that kind.
PAIRS = [
    (r"\bESM\b|\bDSM\b|Alg\. [12]", "Sec", {"3.3", "4.1"}),
    (r"Fig\. 10\b|DSM's masks|masks of DSM", "A.", {"A.7"}),
    (r"\bA\.7\b", "Fig", {"10"}),
    (r"\bA\.4\b", "Fig", {"9"}),
    (r"\bFig\. 9\b", "A.", {"A.4"}),
    (r"DINOv2.*(spectr|PSD)|(spectr|PSD).*DINOv2", "Fig", {"4", "5", "7", "8"}),
    (r"VA-VAE.*(spectr|PSD)|(spectr|PSD).*VA-VAE", "Fig", {"4", "5", "7", "8"}),
    (r"(spectr|PSD).*latents|latents.*(spectr|PSD)", "Fig", {"4", "5", "7", "8"}),
    (r"`?bands`?\b.*\?|evaluate\.py bands", "Fig", set()),
    (r"REPA-DoG|--preset imagenet-repa", "Table", {"4", "6"}),
    (r"\blearnable power", "Prop", {"3.1"}),
    (r"RMSC", "Prop", {"3.2"}),
    (r"\bDoG\b", "Eq", {"6"}),
]
# Of the same lines: what must be among what is cited, if a figure is.
MUST = [
    (r"(spectr|PSD)\w* .*\blatents|latents.*(spectr|PSD)", {"4", "5"}),
    (r"(spectr|PSD)\w* .*DINOv2|DINOv2.*(spectr|PSD)", {"7"}),
    (r"(spectr|PSD)\w* .*VA-VAE|VA-VAE.*(spectr|PSD)", {"8"}),
]
WRONG = [
    (r"Table 2, (left|right)", "the halves of Table 2 are f8d4 and f16d16"),
    (r"Tables? 3 and 4, .*REPA-DoG", "REPA-DoG is in Table 4 alone"),
    (r"(?i)\bkl\b.*methods? of Table 1", "KL is no method of Table 1"),
    (r"EQ-VAE[^.|]*(is|stands) in Table 2", "EQ-VAE is not in Table 2"),
    (r"Table 7, gamma(?! and weight|, weight)", "Table 7 is gamma and weight"),
]


def faults(line):
    """What is wrong with a line's citations, as sentences."""
    found = {}
    for _, kind, number in citations(line):
        found.setdefault(kind, set()).add(number)
    result = []
    for about, kind, allowed in PAIRS:
        if kind == "Sec" and "ypothesis" in line:
            allowed = allowed | {"3.2"}
        if re.search(about, line) and not found.get(kind, set()) <= allowed:
            result.append(f"{kind} {', '.join(sorted(found[kind]))} beside {about}")
    for about, needed in MUST:
        if re.search(about, line) and "Fig" in found and not needed <= found["Fig"]:
            result.append(f"Figs. {', '.join(sorted(found['Fig']))} beside {about}")
    return result + [why for pattern, why in WRONG if re.search(pattern, line)]


def test_known_pairs_are_cited_together():
    """ESM and Alg. 1 with Sec. 3.3, masks with Fig. 10 and A.7, and so on."""
    wrong = [f"{name}:{number} {fault}" for name, text in FILES.items()
             for number, line in enumerate(text.splitlines(), 1) for fault in faults(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text, expected", [
    ("Eqs. 7 to 10 and 12", "Eq 7, Eq 8, Eq 9, Eq 10, Eq 12"), ("see Sec. 3.3, Alg. 2",
    "Sec 3.3, Alg 2"), ("(Appendix A.9)", "A. A.9"), ("Figs. 4, 5, 7-9", "Fig 4, Fig 5, Fig 7, "
    "Fig 8, Fig 9"), ("Lemma A.2 in A.1", "Lemma A.2, A. A.1"), ("# Fig.\n    # 11", "Fig 11"),
    ("Tables 7\nand 8", "Table 7, Table 8"), ("DDIM (Song et al. 2021, Eq. 12)", ""),
    ("(Heusel and Unterthiner 2017, Table 9) but Eq. 3", "Eq 3"), ("Section A.4", "A. A.4"),
    ("f(x) in 2021, Eq. 12", "Eq 12"), ("no citation: table 5, A.B, 3.1", "")])
def test_citations_are_found(text, expected):
    """Lists, ranges, broken lines; those of other papers are left out."""
    assert ", ".join(f"{kind} {number}" for _, kind, number in citations(text)) == expected


@pytest.mark.parametrize("line", [
    "ESM (Sec. 3.2)", "Sec. 3.2, Alg. 1", "the masks of Fig. 10 (A.4)", "A.4, Fig. 10",
    "spectra of latents Figs. 5, 7, 8", "DINOv2's spectrum (Fig. 4)", "VA-VAE's PSD, Fig. 7",
    "| `evaluate.py bands` | Fig. 10 |", "Table 2, left", "| Tables 3 and 4, REPA, REPA-DoG |",
    "kl is one of the methods of Table 1", "Tables 7 and 8", "Table 7, gamma"][:11] + [
    "Table 7, gamma 0.6"])
def test_what_was_wrong_once_is_found(line):
    """Each of these stood in these files, in other words."""
    assert faults(line)
