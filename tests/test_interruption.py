"""Nothing is lost of runs that are killed, stopped, on full disks, not finite; --long: all runs."""
import functools
import itertools
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import losses
import train_ae
from common import run
from conftest import LONG, ROOT, equal_runs, long_but, read_lines, run_main, run_ranks, same, start

TINY_AE = ("--preset quick --image_size 32 --batch_size 4 --val_images 4 --device cpu "
           "--model f2d4-tiny --log_every 2 --eval_every 3 --warmup_steps 2 --steps 12 "
           "--encoder_source random --gan_weight 0.5 --gan_start 4").split()
TINY_SIT = ("--preset quick --model SiT-tiny/4 --batch_size 4 --device cpu --log_every 2 "
            "--eval_every 3 --warmup_steps 2 --sample_steps 2 --encode_batch 8 --steps 12").split()
METHODS = {}
for reg in ("none", "kl", "esm", "dsm", "se", "eq", "vf", "uae"):
    size = "96" if reg in ("se", "eq") else "32"           # the discriminator needs 24 of a quarter
    gan = "0" if reg == "kl" else "0.5"                    # fast: without --long it is the one
    METHODS[reg] = "train_ae", [*TINY_AE, "--reg", reg, "--image_size", size, "--gan_weight", gan]
METHODS["diffusion with dog"] = "train_diffusion", [
    *TINY_SIT, "--repa", "dog", "--repa_depth", "1", "--encoder_source", "random"]


def command(method, material):
    """(module, flags but for --out) of a short run."""
    module, flags = METHODS[method]
    if module == "train_diffusion":
        flags = [*flags, "--ae", material / "ae" / "ckpt.pt", "--data", material / "images",
                 "--cache", material / "stress_cache"]
    return module, flags


@pytest.fixture(scope="module")
def straight(material, tmp_path_factory):
    """straight(method) -> (folder of an uninterrupted run, seconds it took)."""
    @functools.cache
    def get(method):
        out, begin = tmp_path_factory.mktemp("straight"), time.monotonic()
        module, flags = command(method, material)
        run_ranks(1, module, *flags, "--out", out / "run", cwd=out, output=out / "output")
        return out / "run", time.monotonic() - begin
    return get


def killed_while_writing(n, _):
    """A patch for start(): SIGKILL in write n = 0, 1, ... of a file, before it is renamed."""
    fsync, calls = os.fsync, itertools.count()

    def sync(file):
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)
    os.fsync = sync


@pytest.mark.parametrize("method", long_but(METHODS, "kl", "diffusion with dog"))
def test_killed_at_random_moments(method, material, straight, tmp_path, request):
    """SIGKILL, every second one in the middle of a checkpoint: the same as never being killed."""
    reference, seconds = straight(method)
    module, flags = command(method, material)
    out, output, rng = tmp_path / "run", tmp_path / "output", random.Random(method)
    flags = [*flags, "--out", out, "--resume"]
    for kill in range(4 if request.config.getoption("--long") else 2):
        writing = kill % 2 == 0
        patch = functools.partial(killed_while_writing, 3 + kill) if writing else None
        process = start(module, *flags, cwd=tmp_path, output=output, patch=patch)
        process.join(60 if writing else rng.uniform(0.1, 0.9) * seconds)
        process.kill()
        process.join()
        assert not writing or list(out.glob(".*.tmp"))     # one was killed while writing
        read_lines(out / "log.jsonl")                      # parseable at any time
        if (out / "ckpt.pt").exists():
            torch.load(out / "ckpt.pt", weights_only=True)
    run_ranks(1, module, *flags, cwd=tmp_path, output=output)
    equal_runs(reference, out)
    assert not list(out.glob(".*.tmp"))


def forkserver_by_default(_):
    """As from Python 3.14 on; a patch for start(). Slow steps: the test has to keep up."""
    multiprocessing.set_start_method("forkserver", force=True)
    step = run.optimizer_step
    run.optimizer_step = lambda *args: (time.sleep(0.05), step(*args))[1]


@pytest.mark.parametrize("method", long_but(["kl", "diffusion with dog"], "kl"))
def test_signals_finish_the_step_and_save(method, material, straight, tmp_path):
    """Also the loader workers get them, and ignore them. Exit code 0; resuming changes nothing."""
    reference, _ = straight(method)
    module, flags = command(method, material)
    out, output = tmp_path / "run", tmp_path / "output"
    flags = [*flags, "--out", out, "--workers", 2]
    process = start(module, *flags, cwd=tmp_path, output=output, patch=forkserver_by_default)
    while process.is_alive() and len(read_lines(out / "log.jsonl")) < 3:   # both workers are up
        time.sleep(0.001)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers, asked = [*map(int, children.read_text().split())], time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)                   # else it may reach its end meanwhile
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        assert ") Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text()  # no zombie
    os.kill(process.pid, signal.SIGINT)                    # SIGTERM: see torchrun's test below
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0 and time.monotonic() - asked < 20, output.read_text()
    assert "SIGINT: stopped before step" in output.read_text()
    assert 0 < torch.load(out / "ckpt.pt", weights_only=True)["step"] < 12
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):      # they end, too
        assert time.monotonic() - asked < 30
        time.sleep(0.1)
    run_ranks(1, module, *flags, "--resume", cwd=tmp_path, output=output)
    equal_runs(reference, out)


def test_torchrun_passes_the_signal_on(tmp_path):
    """SIGTERM to torchrun, as at a pre-emption: both processes save one step and end themselves."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "train_ae.py", *TINY_AE, "--reg", "esm", "--steps", "100000",
                "--eval_every", "50000", "--gan_weight", "0", "--out", str(out)]
    process = subprocess.Popen(torchrun, cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and len(read_lines(out / "log.jsonl")) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert f"SIGTERM: stopped before step {step};" in output and step > 0, output


# ---- full disks: a file-size limit answers a write with an error as a full disk does
@pytest.mark.parametrize("module, flags, culprit, limit", [
    ("train_diffusion", "{sit} --out run --resume", "run/ckpt.pt", 2 ** 20),
    ("common.data", "pack --count 40 --size 64 --workers 0 --out packed.zip", "packed.zip", 8192),
    ("train_diffusion", "{sit} --cache cache --out run2", "cache", 8192),
    ("train_ae", "{ae} --out run2", "run2/ckpt.pt", 8192),
    ("evaluate", "gen --ckpt run --num_samples 40 --steps 2 --batch_size 8 --workers 0 --device "
     "cpu --out samples", "samples", 8192)])
def test_a_full_disk_is_one_line_whatever_is_written(module, flags, culprit, limit, straight,
                                                     material, tmp_path):
    """Exit code 2, a line with the name, nothing half-written; the run that was there is whole."""
    reference, _ = straight("diffusion with dog")
    shutil.copytree(reference, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sit, ae = (" ".join(map(str, command(method, material)[1]))
               for method in ("diffusion with dog", "kl"))
    output = tmp_path / "output"
    process = start(module, *flags.format(sit=sit, ae=ae).split(), cwd=tmp_path, output=output,
                    largest_file=limit)
    process.join(60)
    text = output.read_text()
    error, = [line for line in text.splitlines() if line.startswith(f"{module}.py:")]
    assert process.exitcode == 2 and culprit in error and "too large" in error
    assert "Traceback" not in text
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= left.items()
    assert left.keys() - before.keys() <= {output, tmp_path / "run2" / "log.jsonl"}


# ---- numbers go bad loudly
VALIDATION = 4                                             # calls of esm_loss before step 0's


def spoil(monkeypatch, steps, value=float("nan")):
    """esm_loss is multiplied by `value` at these steps."""
    calls, esm_loss = [], losses.esm_loss

    def wrapper(*args):
        calls.append(0)
        return esm_loss(*args) * (value if len(calls) - 1 - VALIDATION in steps else 1.0)
    monkeypatch.setattr(losses, "esm_loss", wrapper)


FLAGS = [*TINY_AE, "--reg", "esm", "--gan_weight", 0, "--eval_every", 100]


def test_steps_that_are_not_finite_change_nothing(tmp_path, monkeypatch):
    """esm is Inf in steps 3 and 4: the log has a line for each, and means of the others."""
    run_main(train_ae, *FLAGS, "--steps", 3, "--out", tmp_path / "a")
    spoil(monkeypatch, {3, 4}, float("inf"))
    run_main(train_ae, *FLAGS, "--steps", 5, "--out", tmp_path / "b")
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in "ab")
    for checkpoint in (a, b):                              # measured anew by each validation
        del checkpoint["model"]["latent_mean"], checkpoint["model"]["latent_std"]
    assert b["step"] == 5 and same(a["model"], b["model"])
    assert same(a["optimizer"]["state"], b["optimizer"]["state"])
    lines = read_lines(tmp_path / "b" / "log.jsonl")
    skipped = [line for line in lines if "not_finite" in line]
    assert [(line["step"], line["skipped"]) for line in skipped] == [(3, 1), (4, 2)]
    assert all(line["not_finite"] == ["esm", "grad_norm", "loss"] for line in skipped)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    means = [line for line in lines if "loss" in line]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in means)


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """Nine are survived, ten end the run with a line; the checkpoint from before is kept."""
    spoil(monkeypatch, range(1, 10))
    run_main(train_ae, *FLAGS, "--steps", 12, "--out", tmp_path / "nine")
    monkeypatch.undo()
    spoil(monkeypatch, range(1, 20))
    message = r"step 10: esm, grad_norm, loss not finite, 10 steps in a row.*--dtype fp32"
    with pytest.raises(ValueError, match=message):
        run_main(train_ae, *FLAGS, "--steps", 20, "--out", tmp_path / "ten")
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


# ---- long runs: five minutes
@LONG
def test_three_thousand_steps_leak_nothing(tmp_path):
    """Resident memory and file handles of a quick run: the second half's peak near the first's."""
    curve = {}                                             # step: (MiB, file handles)
    process = start("train_ae", "--preset", "quick", "--reg", "esm", "--steps", 3000,
                    "--out", tmp_path / "run", cwd=tmp_path, output=tmp_path / "output")
    while process.is_alive():
        time.sleep(0.2)
        lines = read_lines(tmp_path / "run" / "log.jsonl")
        if process.is_alive() and lines:
            pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            curve[lines[-1]["step"]] = (pages * resource.getpagesize(), handles)
    assert process.exitcode == 0 and len(curve) >= 10
    first = [entry for step, entry in curve.items() if step <= 1500]
    second = [entry for step, entry in curve.items() if step > 1500]
    assert max(second)[0] < 1.05 * max(first)[0]
    assert max(handles for _, handles in second) <= max(handles for _, handles in first) + 1
