"""
Nothing is lost: runs are killed at random moments, stopped by signals, put on full disks and fed
with numbers that are not finite. `--long` kills every method, 36 times in all; without it one
method per stage, twice.
"""
import json
import os
import pathlib
import random
import resource
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

import losses
import train_ae
from common import run
from conftest import ROOT, run_main, same, start

TINY_AE = ("--preset quick --image_size 32 --batch_size 4 --val_images 4 --device cpu "
           "--log_every 2 --eval_every 3 --warmup_steps 2 --steps 12 --encoder_source random "
           "--gan_weight 0.5 --gan_start 4").split()
TINY_SIT = ("--preset quick --model SiT-tiny/4 --batch_size 4 --device cpu --log_every 2 "
            "--eval_every 3 --warmup_steps 2 --sample_steps 2 --encode_batch 8 --steps 12").split()
SIZES = dict(dsm=64, se=96, eq=96)
METHODS = {}
for reg in ("none", "kl", "esm", "dsm", "se", "eq", "vf", "uae"):
    size = ["--image_size", str(SIZES[reg])] if reg in SIZES else []
    METHODS[reg] = "train_ae", [*TINY_AE, "--reg", reg, *size]
METHODS["diffusion with dog"] = "train_diffusion", [
    *TINY_SIT, "--repa", "dog", "--repa_depth", "1", "--encoder_source", "random"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(method, material):
    """(module, flags but for --out) of a short run."""
    module, flags = METHODS[method]
    if module == "train_diffusion":
        flags = [*flags, "--ae", material / "ae" / "ckpt.pt", "--data", material / "images",
                 "--cache", material / "stress_cache"]
    return module, flags


def log_lines(out):
    """What log.jsonl holds by now."""
    log = out / "log.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def finish(module, *flags, cwd, output, timeout=90):
    process = start(module, *flags, cwd=cwd, output=output)
    process.join(timeout)
    assert process.exitcode == 0, pathlib.Path(output).read_text()


def equal_runs(a, b):
    """Checkpoints bit for bit but for the flags, logs byte for byte."""
    first, second = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    assert first.keys() == second.keys()
    for part in set(first) - {"args"}:
        assert same(first[part], second[part]), part
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def straight(material, tmp_path_factory):
    """straight(method) -> (folder of an uninterrupted run, seconds it took)."""
    done = {}

    def get(method):
        if method not in done:
            out, clock = tmp_path_factory.mktemp("straight"), time.monotonic()
            module, flags = command(method, material)
            finish(module, *flags, "--out", out / "run", cwd=out, output=out / "output.txt")
            done[method] = out / "run", time.monotonic() - clock
        return done[method]
    return get


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(method, material, straight, tmp_path, request):
    """
    SIGKILL, every second one while a checkpoint is being written, then a run to the end: the same
    as never having been killed.
    """
    long = request.config.getoption("--long")
    if not long and method not in ("kl", "diffusion with dog"):
        pytest.skip("--long runs every method")
    reference, seconds = straight(method)
    module, flags = command(method, material)
    out, rng = tmp_path / "run", random.Random(method)
    while_writing = 0
    for kill in range(4 if long else 2):
        process = start(module, *flags, "--out", out, "--resume", cwd=tmp_path,
                        output=tmp_path / "output.txt")
        begin = time.monotonic()
        moment = begin + rng.uniform(0.1, 0.9) * seconds
        end = moment if kill % 2 else begin + 2 * seconds
        while process.is_alive() and time.monotonic() < end:
            if kill % 2 == 0 and time.monotonic() > moment and list(out.glob(".ckpt.pt.*.tmp")):
                while_writing += 1
                break
            time.sleep(0.0005)
        process.kill()
        process.join()
        for line in log_lines(out):
            json.loads(line)                               # parseable at any time
        if (out / "ckpt.pt").exists():
            torch.load(out / "ckpt.pt", weights_only=True)
    finish(module, *flags, "--out", out, "--resume", cwd=tmp_path,
           output=tmp_path / "output.txt")
    equal_runs(reference, out)
    assert not list(out.glob(".*.tmp"))
    print(f"{method}: {kill + 1} kills survived, {while_writing} in the middle of writing a "
          "checkpoint")


@pytest.mark.parametrize("method, name", [("kl", "SIGTERM"), ("diffusion with dog", "SIGINT")])
def test_signals_finish_the_step_and_save(method, name, material, straight, tmp_path, request):
    """
    SIGTERM or Ctrl-C: exit code 0, a checkpoint of the very step, and the continued run equals one
    that never stopped.
    """
    if method != "kl" and not request.config.getoption("--long"):
        pytest.skip("--long runs both stages")
    reference, _ = straight(method)
    module, flags = command(method, material)
    out = tmp_path / "run"
    process = start(module, *flags, "--out", out, cwd=tmp_path, output=tmp_path / "output.txt")
    while process.is_alive() and len(log_lines(out)) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.Signals[name])
    asked = time.monotonic()
    process.join(60)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0 and time.monotonic() - asked < 20, output
    assert f"{name}: stopped before step" in output, output
    assert 0 < torch.load(out / "ckpt.pt", weights_only=True)["step"] < 12
    finish(module, *flags, "--out", out, "--resume", cwd=tmp_path,
           output=tmp_path / "output.txt")
    equal_runs(reference, out)


def descendants(pid):
    """Living children and grandchildren of a process; a fork server may stand between."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return [child for child, parent in parents.items() if pid in (parent, parents.get(parent))]


def test_a_signal_to_every_process_of_a_job(tmp_path):
    """
    A cluster signals the loader's workers as well, and a terminal's Ctrl-C does: they leave it to
    the training process, then end.
    """
    out = tmp_path / "run"
    process = start("train_ae", *TINY_AE, "--reg", "kl", "--workers", 2, "--gan_weight", 0,
                    "--steps", 100000, "--eval_every", 50000, "--out", out, cwd=tmp_path,
                    output=tmp_path / "output.txt")
    while process.is_alive() and len(log_lines(out)) < 3:
        time.sleep(0.01)
    children = descendants(process.pid)
    assert len(children) >= 2
    for pid in (*children, process.pid):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    process.join(30)
    output = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 0 and "stopped before step" in output, output
    end = time.monotonic() + 10
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in children):
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_torchrun_passes_the_signal_on(tmp_path):
    """
    SIGTERM to torchrun, as at a pre-emption: both processes save the same step, end by themselves,
    and the run goes on from there.
    """
    out = tmp_path / "run"
    torchrun = [*TORCHRUN, "train_ae.py", *TINY_AE, "--reg", "esm", "--steps", "100000",
                "--eval_every", "50000", "--gan_weight", "0", "--out", str(out)]
    process = subprocess.Popen(torchrun, cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and len(log_lines(out)) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "SIGTERM: stopped before step" in output and "--resume continues" in output, output
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert f"stopped before step {step} of" in output and step > 0


@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_a_dying_process_ends_the_run_with_its_error(how, tmp_path, request):
    """
    One of two processes fails in a step: torchrun ends the other one within a minute, and the
    reason is on the screen.
    """
    if not request.config.getoption("--long"):
        pytest.skip("--long runs it")
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
import train_ae
loss = train_ae.losses.esm_loss
def broken(images, latents, gamma, calls=[]):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) > 12:
        if {how == "raises"}:
            raise RuntimeError("the cable was pulled")
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(images, latents, gamma)
train_ae.losses.esm_loss = broken
sys.argv[0] = "train_ae.py"
with train_ae.run.one_line_errors():
    train_ae.main()
""")
    torchrun = [*TORCHRUN, str(script), *TINY_AE, "--reg", "esm", "--gan_weight", "0",
                "--out", str(tmp_path / "run")]
    begin = time.monotonic()
    result = subprocess.run(torchrun, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert result.returncode != 0 and time.monotonic() - begin < 60
    reason = "the cable was pulled" if how == "raises" else "SIGKILL"
    assert reason in result.stderr
    checkpoint = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] >= 0                         # the last good one is whole


# --------------------------------------------------------------------------------------------------
# Full disks: a file-size limit answers a write with an error as a full disk does

def only_error(output, module):
    """The one line in which a script ended, without a traceback."""
    text = output.read_text()
    errors = [line for line in text.splitlines() if line.startswith(f"{module}.py:")]
    assert len(errors) == 1 and "Traceback" not in text, text
    return errors[0]


def test_a_full_disk_keeps_the_checkpoint(straight, material, tmp_path):
    """
    A checkpoint that does not fit: one line that names it, exit code 2, the previous one whole, no
    half-written file.
    """
    module, flags = command("diffusion with dog", material)
    out, output = tmp_path / "run", tmp_path / "output.txt"
    finish(module, *flags, "--steps", 2, "--out", out, cwd=tmp_path, output=output)
    before = (out / "ckpt.pt").read_bytes()
    output.write_text("")
    process = start(module, *flags, "--out", out, "--resume", cwd=tmp_path, output=output,
                    largest_file=2 ** 20)
    process.join(60)
    error = only_error(output, "train_diffusion")
    assert process.exitcode == 2 and "ckpt.pt: cannot be written (File too large)" in error
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob(".*.tmp"))
    assert run.load_checkpoint(out / "ckpt.pt", "diffusion")["step"] == 2


@pytest.mark.parametrize("module, flags, culprit", [
    ("common.data", "pack --count 40 --size 64 --workers 0 --out packed.zip", "packed.zip"),
    ("train_diffusion", "{tiny} --ae {ae} --data {images} --cache cache --out run", "cache"),
    ("train_ae", "{tiny_ae} --reg kl --out run", "run/ckpt.pt"),
    ("evaluate", "gen --ckpt {run}/ckpt.pt --num_samples 40 --steps 2 --batch_size 8 --workers 0 "
     "--device cpu --out samples", "samples")])
def test_a_full_disk_is_one_line_whatever_is_written(module, flags, culprit, straight, material,
                                                     tmp_path):
    """
    Packed zip, latent cache, first checkpoint, samples: exit code 2, a line with the name, and
    nothing half-written under that name.
    """
    run_folder, _ = straight("diffusion with dog")
    flags = flags.format(tiny=" ".join(TINY_SIT), tiny_ae=" ".join(TINY_AE), run=run_folder,
                         ae=material / "ae" / "ckpt.pt", images=material / "images")
    output = tmp_path / "output.txt"
    process = start(module, *flags.split(), cwd=tmp_path, output=output, largest_file=8192)
    process.join(60)
    error = only_error(output, module)
    assert process.exitcode == 2 and culprit in error and "too large" in error
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"output.txt", "run/log.jsonl"}


# --------------------------------------------------------------------------------------------------
# Numbers go bad loudly

VALIDATION = 4                                             # calls of esm_loss before step 0's


def spoil(monkeypatch, steps, value=float("nan")):
    """esm_loss is multiplied by `value` at these steps."""
    calls, esm_loss = [], losses.esm_loss

    def wrapper(*args):
        calls.append(0)
        return esm_loss(*args) * (value if len(calls) - 1 - VALIDATION in steps else 1.0)
    monkeypatch.setattr(losses, "esm_loss", wrapper)


FLAGS = [*TINY_AE, "--reg", "esm", "--gan_weight", 0, "--eval_every", 100]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    """
    esm is nan in step 5: weights, moments and counts of that step stay; it is in the log.
    """
    run_main(train_ae, *FLAGS, "--steps", 5, "--out", tmp_path / "a", monkeypatch=monkeypatch)
    spoil(monkeypatch, {5})
    run_main(train_ae, *FLAGS, "--steps", 6, "--out", tmp_path / "b", monkeypatch=monkeypatch)
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    for checkpoint in (a, b):                              # measured anew by each validation
        del checkpoint["model"]["latent_mean"], checkpoint["model"]["latent_std"]
    assert b["step"] == 6 and same(a["model"], b["model"])
    assert same(a["optimizer"]["state"], b["optimizer"]["state"])
    run_main(train_ae, *FLAGS, "--steps", 9, "--out", tmp_path / "b", "--resume",
        monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in log_lines(tmp_path / "b")]
    # the others' mean
    means = [line for line in lines if "loss" in line]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in means)


def test_skipped_steps_are_logged_with_their_terms(tmp_path, monkeypatch):
    """Inf in steps 1 and 2: a line each with the step, the terms and the count, in order."""
    spoil(monkeypatch, {1, 2}, float("inf"))
    run_main(train_ae, *FLAGS, "--steps", 5, "--out", tmp_path, monkeypatch=monkeypatch)
    lines = [json.loads(line) for line in log_lines(tmp_path)]
    skipped = [line for line in lines if "not_finite" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(1, 1), (2, 2)]
    assert all(line["not_finite"] == ["esm", "grad_norm", "loss"] for line in skipped)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """
    Nine are survived, ten end the run with the step, the term and what to try; the checkpoint from
    before is kept.
    """
    spoil(monkeypatch, range(1, 10))
    run_main(train_ae, *FLAGS, "--steps", 12, "--out", tmp_path / "nine", monkeypatch=monkeypatch)
    monkeypatch.undo()
    spoil(monkeypatch, range(1, 20))
    message = r"step 10: esm, grad_norm, loss not finite, 10 steps in a row.*--dtype fp32"
    with pytest.raises(ValueError, match=message):
        run_main(train_ae, *FLAGS, "--steps", 20, "--out", tmp_path / "ten",
                 monkeypatch=monkeypatch)
    assert run.load_checkpoint(tmp_path / "ten" / "ckpt.pt", "ae")["step"] == 0


def test_a_loss_without_a_finite_value_but_with_a_finite_gradient_is_skipped_too(tmp_path):
    """|inf - x| has the gradient 1: only the loss shows it."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    log = run.Log(tmp_path / "log.jsonl")
    for step, loss in enumerate((float("inf"), 1.0)):
        weight.grad = torch.ones(3)
        log.add(step, dict(loss=torch.tensor(loss)))
        run.optimizer_step(optimizer, 0.1, 0.0, log.finite(step))
        assert torch.equal(weight.detach(), torch.ones(3)) == (step == 0)
        assert weight.grad is None
    assert optimizer.state[weight]["step"] == 1


def test_losses_that_stay_zero_are_reported(tmp_path, capsys):
    """
    Ten lines of exact zeros: one message that names the term; a term that is small but not zero is
    left alone.
    """
    log = run.Log(tmp_path / "log.jsonl")
    for step in range(25):
        log.add(step, dict(align=torch.tensor(0.0), loss=torch.tensor(1e-9)))
        log.write(step)
    errors = capsys.readouterr().err
    assert errors.count("align was exactly 0") == 1 and "step 9" in errors
    assert "loss was" not in errors


# --------------------------------------------------------------------------------------------------
# Long runs

def test_three_thousand_steps_leak_nothing(tmp_path, request):
    """
    Resident memory and file handles of a quick run every 300 steps: the second half's peak within
    5% of the first's, the median of handles equal.
    """
    if not request.config.getoption("--long"):
        pytest.skip("--long runs it (five minutes)")
    out = tmp_path / "run"
    curve = []                                             # (step, MiB, file handles)
    process = start("train_ae", "--preset", "quick", "--reg", "esm", "--steps", 3000,
                    "--eval_every", 300, "--out", out, cwd=tmp_path,
                    output=tmp_path / "output.txt")
    while process.is_alive():
        time.sleep(0.2)
        steps = [json.loads(line)["step"] for line in log_lines(out) if "psnr" in line]
        if steps and (not curve or steps[-1] > curve[-1][0]):
            pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            curve.append((steps[-1], pages * resource.getpagesize() // 2 ** 20, handles))
    print("step, MiB, file handles:", curve)
    assert process.exitcode == 0 and len(curve) >= 10
    first = [entry for entry in curve if 0 < entry[0] <= 1500]
    second = [entry for entry in curve if entry[0] > 1500]
    peaks = [max(entry[1] for entry in half) for half in (first, second)]
    handles = [statistics.median(entry[2] for entry in half) for half in (first, second)]
    assert peaks[1] < 1.05 * peaks[0]
    assert handles[0] == handles[1]                        # one may be open just now
    assert "\r" not in (tmp_path / "output.txt").read_text()   # no progress bar in a file
