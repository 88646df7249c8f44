"""experiments/lecture.ipynb runs from a clone, its exercises tell right from wrong, it is small."""
import re
import shutil
import sys

import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

import train_ae
import train_diffusion
from analysis.figures import TARGET, band_matrix, divergence, psd_exponent
from common.weights import load_autoencoder
from conftest import LONG, ROOT

FILE = ROOT / "experiments" / "lecture.ipynb"
WEIGHTS = [ROOT / "experiments" / "lecture" / f"{name}.pt" for name in ("kl", "esm", "dsm")]
NOTEBOOK = nbformat.read(FILE, as_version=4)
CODE = {cell.id: cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"}
DRAWING = [name for name, source in CODE.items()
           if re.search(r"^(show_figure|slider)\(", source, re.M)]

# The notebook's own solutions: number of the exercise, then the function's first line and its body
SOLUTIONS, = [cell.source for cell in NOTEBOOK.cells if cell.id == "solutions"]
FOUND = re.findall(r"<summary>Exercise (\d)</summary>\n\n```python\n(def .*:)\n    ([^`]*?)\n```",
                   SOLUTIONS)
HEADS = {int(number): head for number, head, _ in FOUND}
RIGHT = {int(number): body for number, _, body in FOUND}   # for `raise NotImplementedError`
WRONG = [                                                  # and what the check says to it
    (1, "return 0.5", "for S = 0.1 you return alpha_bar = 0.5; there 9% is learnable"),
    (2, RIGHT[2].replace("mean()", "sum()"), "this is the sum over the batch"),
    (2, RIGHT[2].replace("gamma=gamma", "gamma=0"), "with gamma = 1.0 you return"),
    (3, RIGHT[3].replace("(n)", "(n).logical_not()"), "a high-pass"),
    (3, "return spectral.block_dct2(x)", "your result has shape (2, 3, 4, 4, 8, 8)"),
    (3, "return x.nothing", "your function raises AttributeError"),
]


def execute(names, scope):
    """Code cells in this process, without their magic lines."""
    for name in names:
        lines = [line for line in CODE[name].splitlines() if not line.startswith("%")]
        exec("\n".join(lines), scope)


@pytest.fixture(scope="module")
def prepared():
    """The namespace after the cells that the exercises need."""
    scope = {}
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.chdir(ROOT)
        patch.setattr(sys, "path", list(sys.path))
        execute(("setup", "helpers", "checker", "images"), scope)
    return scope


def answer(number, body, scope):
    """Whether the notebook takes this body for the function of an exercise."""
    stub = CODE[f"exercise-{number}"]
    assert stub.count("raise NotImplementedError") == 1 and HEADS[number] in stub
    exec(stub.replace("raise NotImplementedError", body), scope)
    execute([f"check-{number}"], scope)
    return scope["SOLVED"][number]


def test_it_runs_from_top_to_bottom(monkeypatch):
    """
    Every figure is drawn, and the text is right about the three autoencoders: the smoothest is dsm,
    then esm; esm is closest to the target; where their high bands land.
    """
    scope, drawn, names = {}, set(), ("kl", "esm", "dsm")
    monkeypatch.chdir(ROOT / "experiments")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("IPython.display.display", lambda image: drawn.add(cell))
    with plt.rc_context():
        for cell in CODE:
            execute([cell], scope)
    assert drawn == set(DRAWING)
    kl, esm, dsm = (psd_exponent(scope["latents"][name]) for name in names)
    assert kl + 0.2 < esm < dsm - 0.2
    measured = scope["measured"]
    kl, esm, dsm = (divergence(measured[TARGET], measured[name]) for name in names)
    assert esm < dsm < kl
    matrices = (band_matrix(scope["decoded"][name]) for name in names)
    kl, esm, dsm = (matrix[9:, 0].mean() for matrix in matrices)   # in DC, of the highest bands
    assert min(kl, esm) > 0.4 and dsm < 0.05


@LONG
def test_it_runs_in_a_kernel(tmp_path):
    """In a copy of what it needs, started in experiments/: the same figures, nothing fails."""
    for folder in ("common", "analysis", "experiments/lecture"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    notebook = nbformat.read(FILE, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=170, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path / "experiments")}}).execute()
    drawn = {cell.id for cell in code
             if any("image/png" in output.get("data", {}) for output in cell.outputs)}
    assert drawn == set(DRAWING)
    assert code[-1].outputs[0].text == "0 of 3 exercises solved\n"


def test_the_first_cell_says_where_to_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="start Jupyter in the project's folder"):
        execute(["setup"], {})


def test_the_solutions_solve_the_exercises(prepared, capsys):
    """Exactly those folded at the end of the notebook; and an unsolved exercise says so."""
    assert RIGHT.keys() == {1, 2, 3} and SOLUTIONS.count("<details>") == 3
    for number, body in RIGHT.items():
        assert not answer(number, "raise NotImplementedError", prepared)
        assert answer(number, body, prepared)
        unsolved, solved = capsys.readouterr().out.splitlines()
        assert unsolved.startswith(f"Exercise {number}: not solved yet: ")
        assert solved == f"Exercise {number}: solved"


@pytest.mark.parametrize("number, body, said", WRONG)
def test_a_wrong_answer_does_not(number, body, said, prepared, capsys):
    assert not answer(number, body, prepared)
    line, = capsys.readouterr().out.splitlines()
    assert said in line


def test_the_kept_outputs_are_whole():
    """
    One run in order; an image of each figure, and a line that describes it; no error, warning or
    widget, no home paths.
    """
    assert FILE.stat().st_size < 2e6
    cells = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds, printed = set(), ""
        for output in cell.outputs:
            printed += output.get("text", "")
            assert output.output_type != "error" and output.get("name") != "stderr", cell.id
            kinds |= output.get("data", {}).keys()
        assert ("image/png" in kinds) == (cell.id in DRAWING), cell.id
        assert len(re.findall("^Figure: .{40}", printed, re.M)) == (cell.id in DRAWING), cell.id
        assert not any("widget" in kind for kind in kinds), cell.id
    assert not re.search(r"(^|[\s\"'(=])(/(home|root|tmp|usr|opt|work|Users)/|[A-Z]:\\\\)",
                         FILE.read_text(), re.M)


def test_the_commands_of_the_samples_are_understood(monkeypatch):
    """Each finds what the one before it leaves, and the file that it writes is the one shown."""
    text, = (cell.source for cell in NOTEBOOK.cells if cell.id == "samples-text")
    for name in ("kl", "dsm"):
        runs = []
        for module in (train_ae, train_diffusion):
            script = f"{module.__name__}.py"
            line, = re.findall(rf"^python {script} (.*-{name})$", text, re.M)
            monkeypatch.setattr("sys.argv", [script, *line.split()])
            runs.append(module.get_args())
        ae, sit = runs
        assert ae.data == "discs" and ae.reg == [name] and sit.ae == f"{ae.out}/ckpt.pt"
        shown = f"experiments/lecture/samples-{name}.png"
        assert f"\ncp {sit.out}/samples.png {shown}\n" in text and (ROOT / shown).exists()


def test_the_commands_made_these_weights():
    """Every flag of the commands in the text is the one in the file."""
    text, = (cell.source for cell in NOTEBOOK.cells if cell.id == "autoencoders-text")
    for path in WEIGHTS:
        flags, = re.findall(rf"^python train_ae.py (.*) --out out/lecture/{path.stem}$", text, re.M)
        args = load_autoencoder(path).trained
        for flag, value in re.findall(r"--(\w+) (\S+)", flags):
            kept = args[flag][0] if flag == "reg" else args[flag]
            assert type(kept)(value) == kept, flag
