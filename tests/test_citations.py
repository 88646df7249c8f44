"""What comments and pages cite of the paper (arXiv:2603.14645 v1) exists there."""
import re

import pytest

from conftest import ROOT

EXISTS = {
    "Sec": "1 2 2.1 2.2 3 3.1 3.2 3.3 3.4 3.5 4 4.1 4.2 5 6",
    "Eq": "1 2 3 4 5 6 7 8 9 10 11", "Fig": "1 2 3 4 5 6 7 8 9 10", "Table": "1 2 3 4 5 6 7 8",
    "Alg": "1 2", "Prop": "3.1 3.2", "Lemma": "A.2", "Remark": "A.1",
    "Appendix": "A.1 A.2 A.3 A.4 A.5 A.6 A.7 A.8",        # also without that word
}
LONG = dict(Section="Sec", Equation="Eq", Figure="Fig", Algorithm="Alg", Proposition="Prop")
KIND = r"(?:Sec|Eq|Fig|Alg|Prop)s?\.|(?:Table|Lemma|Remark|Appendix|" + "|".join(LONG) + ")s?"
GAP = r"[\s#]+"                                            # a list may go on in the next line
NUMBER = r"(?:A\.\d+|\d+(?:\.\d+)?)(?![\dk])"            # not the steps of "Sec. 4.2, 400k"
LIST = rf"{NUMBER}(?:(?:,{GAP}|{GAP}(?:and|to){GAP}|-){NUMBER})*"
CITATION = re.compile(rf"\b({KIND}){GAP}({LIST})|\b(A\.\d+)")
# of somebody else: by author and year in the same brackets, (Song et al. 2021, Eq. 12)
FOREIGN = re.compile(r"\([^()]*[A-Z][\w-]+( et al\.?| and [A-Z][\w-]+)?,? (19|20)\d\d[^()]*\)")


def expand(listed):
    """'3, 7 to 9' -> ['3', '7', '8', '9'], and 'A.1 to A.3' likewise."""
    found = []
    for until, appendix, number in re.findall(rf"(to{GAP}|-)?(A\.)?(\d+(?:\.\d+)?)", listed):
        if until:
            last = int(found[-1].removeprefix("A."))
            found += [f"{appendix}{n}" for n in range(last + 1, int(number))]
        found.append(appendix + number)
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
            place = "Appendix" if in_appendix else LONG.get(kind, kind)
            yield text.count("\n", 0, match.start()) + 1, place, number


ROOMS = "", "common", "analysis", "experiments", "tests"
PATHS = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.*"))
         if path.suffix in (".py", ".md") and path.name not in __file__]
FILES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}


def test_every_citation_exists():
    """In the paper's text, by kind and number; there are enough of them to believe the search."""
    found = [(name, *citation) for name, text in FILES.items() for citation in citations(text)]
    assert len(found) > 150 and len(FILES) > 40
    wrong = [f"{name}:{line} cites {kind} {number}" for name, line, kind, number in found
             if number not in EXISTS[kind].split()]
    assert not wrong, "\n".join(wrong)


# Patterns of a line that cites the wrong place, and a line that did
WRONG = {
    r"(ESM|DSM)(?!.*ypothesis).*Sec\. (?!3\.3|4\.1)": "ESM: weight 0.01 (Sec. 3.2, Alg. 1)",
    r"Fig\. 10\b.* A\.(?!7)\d|Fig\. 9\b.* A\.(?!4)\d": "Fig. 10, A.4    triangular masks",
    r"DINOv2's spectrum \(Fig\. (?!7)|VA-VAE's spectrum \(Fig\. (?!8)":
        "DINOv2's spectrum (Fig. 4)",
    r"learnable power.*Prop\. 3\.2|RMSC.*Prop\. 3\.1": "RMSC: energy outside DC (Prop. 3.1)",
    r"\bDoG\b.*Eq\. (?!6)\d": "DoG, a band-pass of the tokens (Eq. 5)",
}


@pytest.mark.parametrize("pattern", WRONG)
def test_no_line_cites_what_was_wrong_once(pattern):
    assert re.search(pattern, WRONG[pattern])
    found = [f"{name}: {line}" for name, text in FILES.items() for line in text.splitlines()
             if re.search(pattern, line)]
    assert not found, "\n".join(found)
