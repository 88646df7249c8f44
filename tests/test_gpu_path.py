"""
What the GPU path rests on, shown on the CPU: one walk back through each network, compiled or not;
resume in another memory layout; several nodes; signals that cost nothing.
"""
import copy
import json
import os
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import train_ae
from common import run
from conftest import run_main, start
from losses import PatchDiscriminator, dsm_pair
from vae import AEConfig, AutoencoderKL

TINY = AEConfig((1, 2), 4, ch=8, num_res_blocks=1, norm_groups=4)
FLAGS = dict(gamma=1.0, esm_weight=0.01, kl_weight=1e-6, vf_weight=0.1, uae_weight=0.5,
             gan_weight=0.5, lpips_weight=0.5, grad_accum=1)


class Walks(TorchDispatchMode):
    """How often convolution_backward sends a gradient on through each weight of a network."""

    def __init__(self, network):
        super().__init__()
        self.count, self.names = Counter(), {p.data_ptr(): n for n, p in network.named_parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[-1][0]:
            self.count[self.names.get(args[2].data_ptr())] += 1
        return func(*args, **(kwargs or {}))


class MeanTokens(torch.nn.Module):
    """A target encoder of width 6: three means of the image a token, and their squares."""
    width = 6

    def forward(self, images, grid):
        x = torch.nn.functional.adaptive_avg_pool2d(images, grid)
        return torch.cat([x, x.square()], dim=1).flatten(2).transpose(1, 2)


def networks(aligned=False, gan=True):
    """What train_ae.place leaves, small."""
    torch.manual_seed(0)
    ae = AutoencoderKL(TINY)
    disc = PatchDiscriminator(channels=8) if gan else None
    projection = torch.nn.Linear(4, MeanTokens.width, bias=False) if aligned else None
    return SimpleNamespace(ae=ae, ae_step=ae, disc=disc, disc_step=disc, perceptual=None,
                           encoder=MeanTokens() if aligned else None, projection=projection,
                           projection_step=projection)


def part(nets, reg, pair=lambda x, z: (x, z), gan=True):
    """One forward_backward of the autoencoder, images of 32 x 48; returns (images, noise, log)."""
    args = SimpleNamespace(reg=reg, **FLAGS)
    compute = run.Compute(0, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 16, 24, generator=generator)
    turn = SimpleNamespace(ae=True, disc=False, gan=gan)
    return images, noise, train_ae.forward_backward(args, nets, compute, images, noise, pair, turn)


@pytest.mark.parametrize("reg, aligned", [(["kl"], False), (["vf"], True), (["uae"], True)])
def test_each_network_is_walked_back_once(reg, aligned):
    """
    GAN and alignment: every convolution passes its gradient on once, the image's never. Only the
    1x1 convolution between the latents and the encoder's last layer is asked for the ratio as well.
    """
    nets = networks(aligned)
    with Walks(nets.ae) as walks:
        part(nets, reg)
    convolutions = {name for name, p in nets.ae.named_parameters() if p.ndim == 4}
    walked = convolutions - {"encoder.conv_in.weight", "quant_conv.weight"}
    assert {walks.count[name] for name in walked} == {1}
    assert walks.count["quant_conv.weight"] == (3 if "vf" in reg else 1)
    assert walks.count["encoder.conv_in.weight"] == 0


def test_the_cut_changes_no_gradient():
    """ESM, DSM and GAN: the gradients of the plain sum, its ratio measured as it always was."""
    cut, plain = networks(), networks()
    pair = lambda x, z: dsm_pair(x, z, 10)
    images, noise, values = part(cut, ["esm", "dsm"], pair)
    recon, target, latents, _ = plain.ae(images, noise, pair)
    rec = (recon - target).abs().mean()
    gan = losses.hinge_g_loss(plain.disc(recon))
    ratio = losses.adaptive_weight(rec, gan, plain.ae.last_layer)
    loss = rec + 0.01 * losses.esm_loss(images, latents) + 0.5 * ratio * gan
    loss.backward()
    torch.testing.assert_close(values["loss"], loss)
    torch.testing.assert_close(values["gan_weight"], ratio)
    for a, b in zip(cut.ae.parameters(), plain.ae.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in cut.disc.parameters())


def test_the_alignments_ratio_is_that_of_two_plain_losses():
    """Without a GAN: vf's weight compares reconstruction and alignment at the encoder's end."""
    nets, plain = networks(aligned=True, gan=False), networks(aligned=True, gan=False)
    images, noise, values = part(nets, ["vf"], gan=False)
    recon, target, latents, _ = plain.ae(images, noise, lambda x, z: (x, z))
    cells = plain.projection(latents.flatten(2).transpose(1, 2))
    align = losses.vf_loss(cells, plain.encoder(images, (16, 24)))
    rec = (recon - target).abs().mean()
    ratio = losses.adaptive_weight(rec, align, plain.ae.encoder_last_layer)
    torch.testing.assert_close(values["align_weight"], ratio)
    assert nets.projection.weight.grad.abs().sum() > 0


def test_the_discriminator_learns_from_real_before_fake():
    """D(real) is walked back on its own; the gradients are those of the sum."""
    nets, args = networks(), SimpleNamespace(reg=["none"], **FLAGS)
    whole = copy.deepcopy(nets.disc)
    compute = run.Compute(0, 1, torch.device("cpu"))
    images, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 16, 24)
    turn = SimpleNamespace(ae=False, disc=True, gan=True)
    values = train_ae.forward_backward(args, nets, compute, images, noise, lambda x, z: (x, z),
                                       turn)
    with torch.no_grad():
        recon, *_ = nets.ae(images, noise, lambda x, z: (x, z))
    loss = losses.hinge_d_loss(whole(images), whole(recon))
    loss.backward()
    torch.testing.assert_close(values["disc"], loss)
    for a, b in zip(nets.disc.parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert all(p.grad is None for p in nets.ae.parameters())


@pytest.mark.parametrize("before, after", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_moments_follow_their_parameters_layout(before, after, tmp_path):
    """A checkpoint of one memory layout goes on in the other: AdamW's steps, bit for bit."""
    def trained(layout, start=None):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(8, 16, 3).to(memory_format=layout)   # whole vectors
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        parts, steps = dict(model=network, optimizer=optimizer), range(3)
        if start:
            run.restore(tmp_path, torch.load(start, weights_only=True), parts)
            steps = range(3, 6)
        for step in steps:
            for p in network.parameters():
                generator = torch.Generator().manual_seed(step)
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
        return parts
    file = tmp_path / "ckpt.pt"
    run.save_checkpoint(file, {k: v.state_dict() for k, v in trained(before).items()})
    switched, straight = trained(after, file), trained(before, file)
    for a, b in zip(switched["model"].parameters(), straight["model"].parameters()):
        assert torch.equal(a, b)
    for p, state in switched["optimizer"].state.items():
        assert state["exp_avg"].stride() == p.stride()


# ---- several nodes

def two_nodes(module):
    """In a child process: as if each process were a node of its own."""
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
    run.time.sleep = lambda seconds: None          # a later rank waits before it complains


def run_two(tmp_path, module, *flags, **options):
    """Two processes, each in a folder of its own; returns their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir(exist_ok=True)
        processes.append(start(module, *flags, cwd=tmp_path / f"node{rank}", rank=rank, world=2,
                               output=tmp_path / f"{rank}.txt", port=port, **options))
    for process in processes:
        process.join(90)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    return [process.exitcode for process in processes], said


QUICK = ("--preset quick --image_size 16 --batch_size 4 --val_images 4 --device cpu --log_every 1 "
         "--eval_every 10 --reg esm --out run").split()


def test_a_node_without_the_checkpoint_ends_the_resume(tmp_path, monkeypatch):
    """--resume on two nodes, one of which has no checkpoint: one line with both steps, exit 2."""
    (tmp_path / "node0").mkdir()
    monkeypatch.chdir(tmp_path / "node0")
    run_main(train_ae, *QUICK, "--steps", 1, monkeypatch=monkeypatch)
    codes, said = run_two(tmp_path, "train_ae", *QUICK, "--steps", 2, "--resume", patch=two_nodes)
    assert codes == [2, 2] and "find run at steps [1, 0]" in said[0], said
    assert "Traceback" not in said[0] + said[1]


def test_several_nodes_do_not_write_one_cache(material, tmp_path):
    """Encoding on two nodes is refused with the way out: one node first."""
    flags = ["--preset", "quick", "--model", "SiT-tiny/4", "--batch_size", 4, "--device", "cpu",
             "--ae", material / "ae" / "ckpt.pt", "--data", material / "images", "--steps", 1,
             "--encode_batch", 8, "--cache", "cache", "--out", "run"]
    codes, said = run_two(tmp_path, "train_diffusion", *flags, patch=two_nodes)
    assert codes == [2, 2] and "--cache cache: " in said[0] and "--nnodes=1" in said[0], said
    assert not list(tmp_path.rglob("cache"))


def test_processes_ask_one_another_at_every_tenth_step(monkeypatch):
    """One process answers at once; several exchange it at calls 1, 11, 21, or after 2 seconds."""
    with run.StopSignal() as stop:
        stop.name = "SIGTERM"
        assert stop.asked()
    with run.StopSignal() as stop:
        stop.name, exchanged = "SIGTERM", []
        monkeypatch.setattr(run.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(run.dist, "all_reduce", exchanged.append)
        monkeypatch.setattr(run.dist, "get_world_size", lambda: 1)
        answers = [stop.asked() for _ in range(21)]
        assert answers == [i % 10 == 0 for i in range(21)] and len(exchanged) == 3
        stop.clock -= 9                                    # the last ten steps took 0.9 s each
        stop.last, stop.ask_at = stop.calls - 9, 0
        slow = [stop.asked() for _ in range(5)]
    assert slow == [True, False, True, False, False]


# ---- torch.compile on the CPU

@pytest.mark.parametrize("reg", ["kl", "vf", "uae"])
def test_compiled_training_is_eager_training(reg, tmp_path, monkeypatch, request):
    """GAN from step 2, LPIPS, alignment; from a cold and a warm Inductor cache: eager's losses."""
    if not request.config.getoption("--long"):
        pytest.skip("--long compiles (about two minutes a method)")
    from torchvision.models import VGG16_Weights, vgg16
    place = tmp_path / "hub" / "checkpoints" / os.path.basename(VGG16_Weights.IMAGENET1K_V1.url)
    place.parent.mkdir(parents=True)
    torch.save(vgg16().state_dict(), place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    flags = ("--preset quick --steps 6 --log_every 1 --eval_every 3 --val_images 5 --lr 1e-6 "
             "--gan_weight 0.5 --gan_start 2 --lpips_weight 0.5 --batch_size 4 --device cpu "
             f"--image_size 32 --encoder_source random --reg {reg}").split()
    logs = {}
    for name, compile in (("eager", "off"), ("cold", "on"), ("warm", "on")):
        torch.compiler.reset()
        run_main(train_ae, *flags, "--compile", compile, "--out", tmp_path / name,
            monkeypatch=monkeypatch)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert logs["cold"] == logs["warm"]
    for eager, cold in zip(logs["eager"], logs["cold"], strict=True):
        assert eager == pytest.approx(cold, rel=1e-4, abs=1e-5)


def test_what_differs_between_cpu_and_gpu_is_decided_in_one_place(monkeypatch, capsys):
    """runtime.Compute: both devices' defaults; flags win; channels_last goes with compiling."""
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    cpu = run.Compute(0, 1, torch.device("cpu"))
    assert (cpu.dtype, cpu.compiling, torch.backends.cudnn.benchmark) == ("fp32", False, False)
    gpu = run.Compute(0, 1, torch.device("cuda"), fixed_size=True)
    assert (gpu.dtype, gpu.compiling) == ("bf16", True)
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
    eager = run.Compute(1, 2, torch.device("cuda"), "fp32", "off")
    assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    for compute, last in ((cpu, False), (gpu, True), (eager, False)):
        network = torch.nn.Conv2d(4, 8, 3)
        compute.channels_last(network, None)
        assert network.weight.is_contiguous(memory_format=torch.channels_last) == last
    monkeypatch.setattr(torch, "compile", lambda function: "compiled")
    assert gpu.compiled(len) == "compiled" and eager.compiled(len) is len
    for compute in (gpu, eager):
        compute.say("from rank 0")
        compute.warn_of_compilation()
    said = capsys.readouterr().out
    assert said.count("from rank 0") == 1 and said.count("--compile off") == 1


@pytest.mark.parametrize("reg, flags, compiled", [
    ("esm", [], True), ("eq", [], False), ("se", [], False), ("eq", ["--compile", "on"], True)])
def test_methods_of_many_sizes_are_not_compiled_by_themselves(reg, flags, compiled, monkeypatch):
    """On CUDA: eq and se off, with a line that says why; --compile on wins."""
    class Asked(Exception):
        pass

    def stop(self, text=None):
        raise Asked
    seen = []
    monkeypatch.setattr(run, "init_distributed", lambda device: (0, 1, torch.device("cuda")))
    monkeypatch.setattr(train_ae, "open_model", lambda args: stop(None))
    monkeypatch.setattr(run.Compute, "say", lambda self, text: seen.append(text))
    built, init = [], run.Compute.__init__

    def spy(self, *args, **options):
        init(self, *args, **options)
        built.append(self)
    monkeypatch.setattr(run.Compute, "__init__", spy)
    for name in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    with pytest.raises(Asked):
        run_main(train_ae, "--reg", reg, *flags, monkeypatch=monkeypatch)
    assert built[0].compiling == compiled
    assert [f"--reg {reg}: not compiled" in text for text in seen] == [True] * (not compiled)
    assert torch.backends.cudnn.benchmark == (reg == "esm")
