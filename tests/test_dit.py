"""
dit.py: the networks are the original repositories' networks, and the samplers sample what they say they sample.
Samplers are checked where the best prediction is known in closed form: Gaussian data, and data of a single point.
"""
import argparse
import math

import pytest
import torch
from torch import nn

from dit import DDPM, MODELS, Interpolant, NoiseStream, SiT, UViT, load_transformer, sincos_positions, sinusoid

TINY = dict(depth=3, dim=32, heads=2, patch_size=2)                            # of SiT and UViT; 6 x 10 latents give 3 x 5 tokens
KINDS = [SiT, UViT]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def tiny(kind, num_classes=7, seed=0, input_size=(6, 10), in_channels=3, **changes):
    """A small network with every parameter random: a fresh SiT is the zero function and would hide most mistakes."""
    model = kind(input_size, in_channels, num_classes, **{**TINY, **changes})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return model


def batch(B=4, num_classes=7, seed=1, shape=(3, 6, 10)):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(B, *shape, generator=g), torch.rand(B, generator=g)
    return x, t, torch.randint(num_classes, (B,), generator=g)


def gaussian_noise(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g, dtype=torch.float64)


class Analytic(nn.Module):
    """A stand-in network from a formula f(x, t); remembers the times and batch sizes it was called with."""
    def __init__(self, f):
        super().__init__()
        self.f, self.calls = f, []
        self.device_of = nn.Parameter(torch.zeros(1))                          # samplers run where the parameters are

    def forward(self, x, t, y=None, drop=None, return_hidden=None):
        self.calls.append((float(t[0]), len(x), drop))
        return self.f(x, t.view(-1, 1, 1, 1))


# ---------------------------------------------------------------------------- the networks
@pytest.mark.parametrize("name, num_classes, count", [
    ("SiT-B/2", 1000, 130_500_112), ("SiT-L/2", 1000, 458_086_416), ("SiT-XL/2", 1000, 675_111_184),
    ("UViT-S/2", 0, 44_259_492), ("UViT-M/2", 0, 130_122_404), ("UViT-L/2", 0, 285_737_124), ("UViT-H/2", 0, 499_677_860)])
def test_parameter_counts_are_those_of_the_originals(name, num_classes, count):
    """On 4x32x32; SiT with 1000 classes, a null label and its fixed positions counted, U-ViT unconditional."""
    with torch.device("meta"):
        model = MODELS[name](input_size=32, in_channels=4, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == count


def sit_shapes(depth, D, p, C, T, classes):
    """State dict of willisma/SiT's models.SiT(learn_sigma=False), written down from its modules."""
    shapes = {"pos_embed": (1, T, D), "x_embedder.proj.weight": (D, C, p, p), "x_embedder.proj.bias": (D,),
              "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,),
              "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
              "y_embedder.embedding_table.weight": (classes + 1, D),
              "final_layer.linear.weight": (p * p * C, D), "final_layer.linear.bias": (p * p * C,),
              "final_layer.adaLN_modulation.1.weight": (2 * D, D), "final_layer.adaLN_modulation.1.bias": (2 * D,)}
    for i in range(depth):
        for name, rows, columns in [("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D),
                                    ("adaLN_modulation.1", 6 * D, D)]:
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (rows, columns), (rows,)
    return shapes


def uvit_shapes(half, D, p, C, T, classes):
    """State dict of baofff/U-ViT's libs.uvit.UViT(num_classes=classes + 1, qkv_bias=False, mlp_time_embed=False)."""
    shapes = {"pos_embed": (1, T + 2, D), "label_emb.weight": (classes + 1, D),
              "patch_embed.proj.weight": (D, C, p, p), "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,),
              "decoder_pred.weight": (p * p * C, D), "decoder_pred.bias": (p * p * C,),
              "final_layer.weight": (C, C, 3, 3), "final_layer.bias": (C,)}
    blocks = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    for b in blocks:
        shapes[f"{b}.attn.qkv.weight"] = (3 * D, D)                            # the one linear without a bias
        for norm in ("norm1", "norm2"):
            shapes[f"{b}.{norm}.weight"] = shapes[f"{b}.{norm}.bias"] = (D,)
        linears = [("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D)]
        for name, rows, columns in linears + ([("skip_linear", D, 2 * D)] if b.startswith("out") else []):
            shapes[f"{b}.{name}.weight"], shapes[f"{b}.{name}.bias"] = (rows, columns), (rows,)
    return shapes


@pytest.mark.parametrize("name, shapes", [("SiT-S/4", sit_shapes(12, 384, 4, 16, 16, 1000)),
                                          ("UViT-S/4", uvit_shapes(6, 512, 4, 16, 16, 1000))])
def test_state_dict_names_and_shapes_are_those_of_the_originals(name, shapes):
    """Released weights load because every name and every shape is the released one, no more and no fewer."""
    with torch.device("meta"):
        model = MODELS[name](input_size=16, in_channels=16, num_classes=1000)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


def by_hand(kind, W, x, t, y, heads=2):
    """The forward pass of the originals in plain tensor operations on their state dict W: softmax, erf and tanh written out."""
    def linear(name, z):
        return z @ W[f"{name}.weight"].T + W.get(f"{name}.bias", 0)

    def norm(z, eps, name=None):
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return z if name is None else z * W[f"{name}.weight"] + W[f"{name}.bias"]

    def attention(name, z):
        B, T, D = z.shape
        q, k, v = (part.view(B, T, heads, -1).transpose(1, 2) for part in linear(f"{name}.qkv", z).chunk(3, dim=-1))
        out = torch.softmax(q @ k.transpose(2, 3) / (D // heads) ** 0.5, dim=-1) @ v
        return linear(f"{name}.proj", out.transpose(1, 2).reshape(B, T, D))

    def mlp(name, z):
        z = linear(f"{name}.fc1", z)
        squash = torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z ** 3)) if kind is SiT else torch.erf(z / 2 ** 0.5)
        return linear(f"{name}.fc2", 0.5 * z * (1 + squash))

    embed = "x_embedder.proj" if kind is SiT else "patch_embed.proj"
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)     # (B, T, C*2*2)
    z = patches @ W[f"{embed}.weight"].flatten(1).T + W[f"{embed}.bias"]
    silu = lambda c: c * torch.sigmoid(c)
    if kind is SiT:
        z = z + W["pos_embed"]
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", sinusoid(t, 256).double())))
        c = c + W["y_embedder.embedding_table.weight"][y]
        for i in range(3):
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"blocks.{i}.adaLN_modulation.1", silu(c))[:, None].chunk(6, -1)
            z = z + gate1 * attention(f"blocks.{i}.attn", norm(z, 1e-6) * (1 + scale1) + shift1)
            z = z + gate2 * mlp(f"blocks.{i}.mlp", norm(z, 1e-6) * (1 + scale2) + shift2)
        shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].chunk(2, -1)
        z = linear("final_layer.linear", norm(z, 1e-6) * (1 + scale) + shift)
    else:
        z = torch.cat([W["label_emb.weight"][y][:, None], sinusoid(t, 32).double()[:, None], z], dim=1) + W["pos_embed"]
        for name in ("in_blocks.0", "mid_block", "out_blocks.0"):
            if name == "out_blocks.0":
                z = linear("out_blocks.0.skip_linear", torch.cat([z, skip], dim=-1))
            z = z + attention(f"{name}.attn", norm(z, 1e-5, f"{name}.norm1"))
            z = z + mlp(f"{name}.mlp", norm(z, 1e-5, f"{name}.norm2"))
            skip = z if name == "in_blocks.0" else skip
        z = linear("decoder_pred", norm(z, 1e-5, "norm"))[:, 2:]
    out = torch.zeros_like(x)
    for i in range(3):
        for j in range(5):
            out[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2] = z[:, 5 * i + j].view(-1, 2, 2, 3).permute(0, 3, 1, 2)
    return out if kind is SiT else nn.functional.conv2d(out, W["final_layer.weight"], W["final_layer.bias"], padding=1)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_that_of_the_originals(kind):
    """Order of q, k, v and of shift, scale, gate, the kind of GELU, every epsilon, token order: as in the released code."""
    model, (x, t, y) = tiny(kind).double(), batch()                            # in float64, where 1e-5 is not 1e-6
    want = by_hand(kind, model.state_dict(), x.double(), t, y)
    assert want.std() > 0.1
    torch.testing.assert_close(model(x, t, y), want, rtol=1e-9, atol=1e-9)


def test_a_fresh_sit_is_the_zero_function_and_its_blocks_the_identity():
    """adaLN-Zero: gates and the last layer start at zero; positions are fixed."""
    x, t, y = batch()
    model = SiT((6, 10), 3, 7, **TINY)
    out, tokens = model(x, t, y, return_hidden=3)
    assert out.shape == x.shape and out.abs().max() == 0
    assert torch.equal(tokens, model.x_embedder["proj"](x).flatten(2).transpose(1, 2) + model.pos_embed)
    assert not model.pos_embed.requires_grad


def test_sincos_positions_column_first():
    """Entry by entry on a 2 x 3 grid: [sin(column w), cos(column w), sin(row w), cos(row w)], w = 10000^(-k / (dim/4))."""
    P = sincos_positions((2, 3), 8)[0]                                         # (6, 8)
    for row in range(2):
        for column in range(3):
            w = [1.0, 0.01]
            want = [f(position * k) for position in (column, row) for f in (math.sin, math.cos) for k in w]
            torch.testing.assert_close(P[row * 3 + column], torch.tensor(want))


def test_time_enters_unscaled_as_cosines_then_sines():
    """REPA feeds t in [0, 1] and U-ViT n = 1 .. 1000 to the same embedding; bfloat16 must not merge n = 999 and 1000."""
    s = sinusoid(torch.tensor([0.0, 0.25, 999.0, 1000.0]), 4)                  # frequencies 1 and 0.01
    want = [[math.cos(n), math.cos(n / 100), math.sin(n), math.sin(n / 100)] for n in (0, 0.25, 999, 1000)]
    torch.testing.assert_close(s, torch.tensor(want), atol=1e-4, rtol=0)
    x = batch()[0].bfloat16()
    model = tiny(UViT, num_classes=0).bfloat16()
    assert not torch.equal(model(x, torch.full((4,), 999.0)), model(x, torch.full((4,), 1000.0)))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_row_major_patches_of_row_column_channel(kind):
    """Cutting a 6 x 10 latent into 2 x 2 patches by hand and putting it together again gives it back."""
    x = batch()[0]
    tokens = torch.stack([x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].permute(0, 2, 3, 1).flatten(1)
                          for i in range(3) for j in range(5)], dim=1)         # (B, 15, 2*2*3)
    assert torch.equal(tiny(kind).unpatchify(tokens), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, p", [((6, 10), 2), ((6, 6), 2), ((5, 3), 1), ((12, 4), 4)])
def test_odd_numbers_of_patches(kind, size, p):
    """The output has the latent's shape, and every part of it depends on every patch."""
    model, x = tiny(kind, input_size=size, patch_size=p), batch(shape=(3, *size))[0].requires_grad_()
    out = model(x, torch.full((4,), 0.5), torch.arange(4))
    assert out.shape == x.shape
    out[0, 0, 0, 0].backward()
    assert (x.grad[0] != 0).all() and x.grad[1:].abs().max() == 0              # all patches of sample 0, nothing of the others


@pytest.mark.parametrize("kind, blocks", [(SiT, ["blocks.0", "blocks.1", "blocks.2"]),
                                          (UViT, ["in_blocks.0", "mid_block", "out_blocks.0"])])
def test_hidden_tokens_are_what_a_hook_sees(kind, blocks):
    """return_hidden=k gives the patch tokens after block k, counted from 1, and leaves the output as it is."""
    model, (x, t, y) = tiny(kind), batch()
    for k, name in enumerate(blocks, 1):
        seen = []
        hook = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
        out, hidden = model(x, t, y, return_hidden=k)
        hook.remove()
        assert torch.equal(hidden, seen[0][:, -15:]) and hidden.shape == (4, 15, 32)   # 15 patches; U-ViT's extras come first
        assert torch.equal(out, model(x, t, y))


def test_uvit_long_skips_join_first_with_last():
    """With two blocks down, the last block up takes the first skip: cutting out_blocks.1's skip half cuts in_blocks.0's road."""
    model, (x, t, y) = tiny(UViT, depth=4), batch()
    seen = {}
    for name in ("in_blocks.0", "in_blocks.1"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    for name in ("out_blocks.0", "out_blocks.1"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: args[1]}))
    model(x, t, y)
    assert seen["out_blocks.0"] is seen["in_blocks.1"] and seen["out_blocks.1"] is seen["in_blocks.0"]


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_labels_are_the_null_label(kind):
    """drop replaces a label by num_classes, in the rows it names only; the label and the time matter."""
    model, (x, t, _) = tiny(kind), batch()
    y, drop = torch.tensor([0, 3, 6, 2]), torch.tensor([True, False, True, False])
    assert torch.equal(model(x, t, y, drop=drop), model(x, t, torch.tensor([7, 3, 7, 2])))
    assert not torch.allclose(model(x, t, y), model(x, t, torch.full((4,), 7)))
    assert not torch.allclose(model(x, t, y), model(x, 1 - t, y))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_named_in_one_line(kind):
    """Patch size, latent size, labels and block number: a ValueError that says which."""
    model, (x, t, y) = tiny(kind), batch()
    wrong = [(lambda: kind((6, 9), 3, 0, **TINY), "patch size 2"),
             (lambda: model(x.transpose(2, 3), t, y), "built for"),
             (lambda: model(x, t), "missing"),
             (lambda: tiny(kind, num_classes=0)(x, t, y), "given"),
             (lambda: model(x, t, y + 6), r"not in 0 \.\. 7"),
             (lambda: model(x, t, y - 7), r"not in 0 \.\. 7"),
             (lambda: model(x, t, y, return_hidden=4), r"1 \.\. 3")]
    for call, words in wrong:
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["SiT-tiny/2", "UViT-tiny/2", "SiT-S/4"])
def test_models_are_built_by_name(name):
    """An int is a square; square input runs through training and sampling in bfloat16 weights and under autocast alike."""
    model = MODELS[name](input_size=8, in_channels=4, num_classes=0)
    process = DDPM() if name.startswith("UViT") else Interpolant()
    process.loss(model, torch.randn(2, 4, 8, 8)).backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(process.sample(model, (2, 4, 8, 8), steps=2)).all()
    out = process.sample(model.bfloat16(), (2, 4, 8, 8), steps=2)
    assert out.dtype == torch.float32 and out.shape == (2, 4, 8, 8) and torch.isfinite(out).all()


# ---------------------------------------------------------------------------- other people's weights
def test_repa_files_load(tmp_path):
    """EMA before model, DDP's prefix stripped, projectors dropped, the argparse.Namespace beside them no obstacle."""
    source, other, (x, t, y) = tiny(SiT), tiny(SiT, seed=5), batch()
    ema = {f"module.{k}": v for k, v in source.state_dict().items()} | {"module.projectors.0.0.weight": torch.zeros(9, 32)}
    torch.save({"model": other.state_dict(), "ema": ema, "opt": {"state": {}}, "steps": 3,
                "args": argparse.Namespace(model="SiT-B/2", seed=0)}, tmp_path / "repa.pt")
    loaded = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "repa.pt")
    assert torch.equal(loaded(x, t, y), source(x, t, y))


def save_learn_sigma(model, path):
    """The file the original SiT would write for `model`: each pixel of a patch has C velocity rows, then C variance rows."""
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (4, 3))                                 # (p*p, C, ...)
        state[key] = torch.cat([rows, torch.full_like(rows, 9.0)], dim=1).flatten(0, 1)
    torch.save(state, path)


def test_original_sit_runs_backwards_and_is_turned_round(tmp_path):
    """SiT: x_t = t x + (1 - t) eps and velocity x - eps. Loaded, it must be -SiT(x, 1 - t), and saving it keeps that."""
    original, (x, t, y) = tiny(SiT), batch()
    save_learn_sigma(original, tmp_path / "sit.pt")
    loaded = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "sit.pt")
    torch.testing.assert_close(loaded(x, t, y), -original(x, 1 - t, y), rtol=1e-4, atol=1e-4)
    torch.save({"ema": loaded.state_dict()}, tmp_path / "ours.pt")
    again = load_transformer(SiT((6, 10), 3, 7, **TINY), tmp_path / "ours.pt")
    assert torch.equal(again(x, t, y), loaded(x, t, y))


@pytest.mark.parametrize("sampler", ["ode", "em"])
def test_a_turned_sit_samples_towards_the_data(tmp_path, sampler):
    """A SiT that predicts x - eps = c whatever it sees moves every noise by c; pushed the wrong way it would end at -c."""
    original = SiT((6, 10), 3, 0, **TINY)
    c = torch.tensor([50.0, -30.0, 20.0])
    with torch.no_grad():
        original.final_layer.linear.bias.copy_(c.repeat(4))                    # rows are (row, column, channel)
    save_learn_sigma(original, tmp_path / "sit.pt")
    loaded = load_transformer(SiT((6, 10), 3, 0, **TINY), tmp_path / "sit.pt")
    start = torch.randn(2, 3, 6, 10) if sampler == "ode" else torch.zeros(2, 3, 6, 10)   # x_t = (1 - t) c solves the SDE's drift
    end = Interpolant().sample(loaded, start.shape, steps=7, sampler=sampler, noise=lambda shape: start)
    torch.testing.assert_close(end, start + c.view(3, 1, 1), rtol=1e-5, atol=1e-4)


def test_uvit_files_load_with_and_without_the_final_convolution(tmp_path):
    """Bare state dicts; U-ViT-H was trained with conv=False, which equals a 3x3 convolution by the identity."""
    source, (x, t, y) = tiny(UViT), batch()
    torch.save(source.state_dict(), tmp_path / "full.pth")
    full = load_transformer(UViT((6, 10), 3, 7, **TINY), tmp_path / "full.pth")
    assert torch.equal(full(x, 1000 * t, y), source(x, 1000 * t, y))
    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("final_layer")}, tmp_path / "h.pth")
    loaded = load_transformer(UViT((6, 10), 3, 7, **TINY), tmp_path / "h.pth")
    source.final_layer = nn.Identity()
    torch.testing.assert_close(loaded(x, 1000 * t, y), source(x, 1000 * t, y))


def test_files_that_do_not_fit_are_refused(tmp_path):
    """Missing file, not a checkpoint, something unsafe, another size, another family: one line each with the file's name."""
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": print}, tmp_path / "unsafe.pt")
    torch.save(tiny(SiT).state_dict(), tmp_path / "sit.pt")
    torch.save({k: v for k, v in tiny(UViT).state_dict().items() if not k.startswith("final_layer")}, tmp_path / "h.pt")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_transformer(tiny(SiT), tmp_path / "none.pt")
    for name, model, words in [("text", tiny(SiT), "not a checkpoint"), ("list", tiny(SiT), "neither"),
                               ("unsafe", tiny(SiT), "not a checkpoint"), ("h", tiny(SiT), "does not fit"),
                               ("sit", tiny(SiT, num_classes=9), "embedding_table"), ("sit", tiny(UViT), "does not fit"),
                               ("sit", tiny(SiT, input_size=8), "pos_embed")]:
        with pytest.raises(ValueError, match=words) as error:
            load_transformer(model, tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- the losses
@pytest.mark.parametrize("process", [Interpolant(), DDPM()])
def test_the_exact_prediction_has_no_loss(process):
    """Data of a single point x0: velocity and eps follow from x_t, t and x0 alone."""
    x0 = torch.randn(3, 6, 10)
    if isinstance(process, DDPM):
        a = lambda n: process.alpha_bar[n.long()].float()
        model = Analytic(lambda x, n: (x - a(n).sqrt() * x0) / (1 - a(n)).sqrt())
    else:
        model = Analytic(lambda x, t: (x - x0) / t)
    g = torch.Generator().manual_seed(0)
    assert process.loss(model, x0.expand(64, 3, 6, 10), generator=g) < 1e-6
    assert process.loss(model, x0.expand(64, 3, 6, 10) + 0.5, generator=g) > 1e-3


def test_a_training_batch_is_a_function_of_the_generator():
    """Same seed, same loss; times cover [0, 1) and 1 .. 1000; hidden tokens come along; label dropout leaves the noise alone."""
    model, (x, t, y) = tiny(SiT), batch()
    loss = lambda seed, **options: Interpolant().loss(model, x, y, torch.Generator().manual_seed(seed), **options)
    assert loss(3) == loss(3) != loss(4)
    paired, tokens = loss(3, return_hidden=2)
    assert paired == loss(3) and tokens.shape == (4, 15, 32)
    for process, low, high in [(Interpolant(), 0, 1), (DDPM(), 1, 1000)]:
        times = []
        spy = Analytic(lambda x, t: times.append(t.flatten()) or x)
        process.loss(spy, torch.zeros(4096, 1, 1, 1), generator=torch.Generator().manual_seed(0))
        assert low <= times[0].min() < low + 0.002 * high and 0.998 * high < times[0].max() <= high
        assert abs(times[0].mean() / high - 0.5) < 4 * (1 / 12 / 4096) ** 0.5


@pytest.mark.parametrize("process", [Interpolant(), DDPM()])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_label_dropout_rate(process, rate):
    """The loss drops each label with the given probability, 0.1 unless told otherwise."""
    N, spy = 10_000, Analytic(lambda x, t: x)
    options = {} if rate == 0.1 else {"label_dropout": rate}
    process.loss(spy, torch.zeros(N, 1, 1, 1), torch.zeros(N, dtype=torch.long), torch.Generator().manual_seed(0), **options)
    dropped = spy.calls[0][2]
    assert dropped.shape == (N,) and abs(dropped.double().mean() - rate) <= 4 * (rate * (1 - rate) / N) ** 0.5


# ---------------------------------------------------------------------------- the samplers
SHAPE = (2, 1, 3)                                                              # (C, h, w): six dimensions


def gaussian_data():
    """Mean (6,) and covariance (6, 6) of Gaussian data, eigenvalues 0.3 .. 2."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    return torch.linspace(-1, 1, 6, dtype=torch.float64), basis @ torch.diag(torch.linspace(0.3, 2, 6).double()) @ basis.T


def posterior(x, a, s, mean, cov):
    """E[x0 | x] and E[eps | x] for x = a x0 + s eps with x0 ~ N(mean, cov)."""
    r = torch.linalg.solve(a * a * cov + s * s * torch.eye(6), (x.flatten(1) - a * mean).T).T
    return (mean + a * r @ cov).view_as(x), (s * r).view_as(x)


def exact_velocity(mean, cov):
    def f(x, t):
        x0, eps = posterior(x, 1 - float(t[0]), float(t[0]), mean, cov)
        return eps - x0
    return Analytic(f)


def exact_eps(mean, cov):
    def f(x, n):
        a = float(DDPM().alpha_bar[int(n[0])])
        return posterior(x, a ** 0.5, (1 - a) ** 0.5, mean, cov)[1]
    return Analytic(f)


def root(cov):
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def ddpm_start(z, mean, cov):
    """z ~ N(0, I) turned into the distribution of level 1000, which Stable Diffusion's betas leave 0.0047 short of pure noise."""
    a = DDPM().alpha_bar[1000]
    return (a.sqrt() * mean + z.flatten(1) @ root(a * cov + (1 - a) * torch.eye(6))).view_as(z)


@pytest.mark.parametrize("sampler", ["em", "ode", "ddim", "ddpm"])
def test_exact_predictions_give_the_data_distribution(sampler):
    """4096 samples of every sampler have the mean and covariance of Gaussian data within 4.5 standard errors."""
    mean, cov = gaussian_data()
    N, noise = 4096, gaussian_noise(0)
    if sampler in ("em", "ode"):
        x = Interpolant().sample(exact_velocity(mean, cov), (N, *SHAPE), steps=400, sampler=sampler, noise=noise)
    else:
        first = iter([ddpm_start(noise((N, *SHAPE)), mean, cov)])              # the start, then plain noise where eta asks for it
        x = DDPM().sample(exact_eps(mean, cov), (N, *SHAPE), steps=500, eta=float(sampler == "ddpm"),
                          noise=lambda shape: next(first, noise(shape)))
    x = x.double().flatten(1)
    off = (x.mean(0) - mean) / (cov.diag() / N).sqrt()
    assert off.abs().max() < 4.5, off
    off = (x.T.cov() - cov) / ((cov.diag()[:, None] * cov.diag() + cov ** 2) / N).sqrt()
    assert off.abs().max() < 4.5, off


@pytest.mark.parametrize("sampler", ["ode", "ddim"])
def test_deterministic_samplers_are_of_first_order(sampler):
    """The exact flow keeps standardised coordinates: noise z ends at mean + cov^(1/2) z. Halving the step halves the error."""
    mean, cov = gaussian_data()
    z = gaussian_noise(0)((64, *SHAPE))
    exact = (mean + z.flatten(1) @ root(cov)).view_as(z)
    errors = []
    for steps in (50, 100, 200):
        if sampler == "ode":
            x = Interpolant().sample(exact_velocity(mean, cov), z.shape, steps=steps, sampler="ode", noise=lambda shape: z)
        else:
            start = ddpm_start(z, mean, cov)
            x = DDPM().sample(exact_eps(mean, cov), z.shape, steps=steps, noise=lambda shape: start)
        errors.append((x - exact).square().mean().sqrt())
    for coarse, fine in zip(errors, errors[1:]):
        assert 0.85 < math.log2(coarse / fine) < 1.15, errors


def test_one_euler_step_along_the_true_velocity_lands_on_the_data():
    """The path is straight: eps - (eps - x) = x, in one step as in seven."""
    x0, eps = torch.randn(2, 4, 3, 6, 10).unbind(0)
    for steps in (1, 7):
        model = Analytic(lambda x, t: (eps - x0).double())
        end = Interpolant().sample(model, x0.shape, steps=steps, sampler="ode", noise=lambda shape: eps)
        torch.testing.assert_close(end, x0)
        assert len(model.calls) == steps


def test_euler_maruyama_walks_as_repas():
    """Times 1 .. 0.04 in equal steps and a last step without noise; against the update written with REPA's score formula."""
    model = Analytic(lambda x, t: 0.3 * x - t)
    noise = gaussian_noise(0)
    draws = []
    end = Interpolant().sample(model, (2, 3, 6, 10), steps=25, noise=lambda shape: draws.append(noise(shape)) or draws[-1])
    times = [call[0] for call in model.calls]
    assert len(times) == len(draws) == 25 and times[-1] == 0.04
    torch.testing.assert_close(torch.tensor(times), torch.linspace(1, 0.04, 25))
    x = draws[0]
    for t, t_next, z in zip(times, times[1:] + [0.0], draws[1:] + [torch.zeros(1)]):
        v = 0.3 * x - t
        alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1, 1
        score = (alpha / d_alpha * v - x) / (sigma ** 2 - alpha / d_alpha * d_sigma * sigma)
        x = x + (v - 0.5 * (2 * t) * score) * (t_next - t) + (2 * t) ** 0.5 * abs(t_next - t) ** 0.5 * z
    torch.testing.assert_close(end, x.float())


def test_ddpm_levels():
    """alpha_bar by its definition; 100 steps visit 1000, 990, .., 10 and end on the data."""
    alpha_bar = DDPM().alpha_bar
    betas = [(0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * i / 999) ** 2 for i in range(1000)]
    assert alpha_bar.shape == (1001,) and alpha_bar[0] == 1
    torch.testing.assert_close(alpha_bar[1000].item(), math.prod(1 - b for b in betas))
    torch.testing.assert_close(alpha_bar[1].item(), 1 - 0.00085)
    x0 = torch.randn(2, 3, 6, 10).double()
    model = Analytic(lambda x, n: (x - alpha_bar[int(n[0])].sqrt() * x0) / (1 - alpha_bar[int(n[0])]).sqrt())
    end = DDPM().sample(model, x0.shape)
    assert [call[0] for call in model.calls] == list(range(1000, 0, -10))
    torch.testing.assert_close(end, x0.float())


def test_eta_one_is_the_ancestral_sampler():
    """Between neighbouring levels eta = 1 is DDPM's own step: Ho et al. 2020, Algorithm 2, with the posterior's variance."""
    ddpm, n = DDPM(), 400
    x, eps, z = torch.randn(3, 2, *SHAPE, dtype=torch.float64)
    a, b = ddpm.alpha_bar[n], ddpm.alpha_bar[n - 1]
    beta = 1 - a / b
    want = (x - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt() + (beta * (1 - b) / (1 - a)).sqrt() * z
    torch.testing.assert_close(ddpm.step(x, eps, n, n - 1, eta=1.0, noise=z), want)


def test_ddim_inverts():
    """eta = 0: up to noise and down again along the same eps is the identity; with eps depending on x, up to the step size."""
    ddpm, x = DDPM(), torch.randn(2, *SHAPE, dtype=torch.float64)
    eps = torch.randn_like(x)
    up = ddpm.step(x, eps, 0, 700)
    torch.testing.assert_close(up, ddpm.alpha_bar[700].sqrt() * x + (1 - ddpm.alpha_bar[700]).sqrt() * eps)
    torch.testing.assert_close(ddpm.step(up, eps, 700, 0), x)

    mean, cov = gaussian_data()
    model, z = exact_eps(mean, cov), x
    for n in range(1000):                                                      # encode: eps of the level it comes from
        z = ddpm.step(z, model(z, torch.full((2,), max(n, 1))), n, n + 1)
    back = ddpm.sample(model, x.shape, steps=1000, noise=lambda shape: z)
    torch.testing.assert_close(back, x.float(), rtol=0, atol=0.02)
    assert (z - x).abs().max() > 0.2                                           # it did go somewhere


@pytest.mark.parametrize("kind, process", [(SiT, Interpolant()), (UViT, DDPM())])
def test_guidance(kind, process):
    """cfg 1 is the conditional model bit for bit in single calls; otherwise null + cfg (class - null), inside the interval only."""
    model, (start, _, y) = tiny(kind, num_classes=7), batch()
    sample = lambda net, **options: process.sample(net, start.shape, steps=5, noise=gaussian_noise(0), **options)
    plain = Analytic(lambda x, t: model(x, t.flatten(), y))
    assert torch.equal(sample(model, y=y, cfg=1.0), sample(plain))
    assert not torch.allclose(sample(model, y=y, cfg=3.0), sample(plain))

    null = torch.full((4,), 7)
    guided = Analytic(lambda x, t: model(x, t.flatten(), null).double()
                      + 3 * (model(x, t.flatten(), y).double() - model(x, t.flatten(), null).double()))
    torch.testing.assert_close(sample(model, y=y, cfg=3.0), sample(guided), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(model, y=y, cfg=0.0), sample(model, y=null), rtol=1e-3, atol=1e-3)

    spy = Analytic(lambda x, t: x)
    sample(spy, y=y, cfg=3.0, cfg_interval=(0.3, 0.7))
    for t, rows, drop in spy.calls:
        t = t / 1000 if kind is UViT else t
        assert rows == (8 if 0.3 <= t <= 0.7 else 4)                           # twice the batch while guided
        assert drop is None or drop.tolist() == [False] * 4 + [True] * 4
    assert {rows for _, rows, _ in spy.calls} == {4, 8}


def test_a_sample_depends_on_seed_and_index_alone():
    """Samples 0 .. 5 in one batch, in two of 3 + 3, or shared out evens and odds to two processes: the same six."""
    rows = NoiseStream(7, range(6))
    first, second = rows((6, 3, 6, 10)), rows((6, 3, 6, 10))
    odd = NoiseStream(7, [1, 3, 5])
    assert torch.equal(odd((3, 3, 6, 10)), first[1::2]) and torch.equal(odd((3, 3, 6, 10)), second[1::2])
    flat = torch.cat([first, second, NoiseStream(8, range(6))(first.shape)]).flatten(1)        # 18 different streams
    assert (flat.corrcoef() - torch.eye(18)).abs().max() < 0.4
    many = NoiseStream(0, range(50))((50, 4, 16, 16))
    assert abs(many.mean()) < 4 / many.numel() ** 0.5 and abs(many.var() - 1) < 4 * (2 / many.numel()) ** 0.5

    y = torch.arange(6)
    for model, process in [(tiny(SiT), Interpolant()), (tiny(UViT), DDPM())]:
        run = lambda indices: process.sample(model, (len(indices), 3, 6, 10), steps=4, y=y[indices], cfg=1.5,
                                             noise=NoiseStream(7, indices))
        whole = run([0, 1, 2, 3, 4, 5])
        torch.testing.assert_close(torch.cat([run([0, 1, 2]), run([3, 4, 5])]), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run([1, 3, 5]), whole[1::2], rtol=1e-4, atol=1e-4)


def test_wrong_sampling_arguments_are_named():
    """Samplers, step counts, guidance without labels, and batches that do not match: one line each."""
    model, free = tiny(SiT), tiny(SiT, num_classes=0)
    shape = (2, 3, 6, 10)
    for call, words in [(lambda: Interpolant().sample(free, shape, sampler="heun"), "heun"),
                        (lambda: Interpolant().sample(free, shape, steps=1), "steps=1"),
                        (lambda: DDPM().sample(free, shape, steps=1001), "1001"),
                        (lambda: Interpolant().sample(free, shape, cfg=2.0), "cfg=2.0"),
                        (lambda: Interpolant().sample(model, shape, y=torch.zeros(3, dtype=torch.long)), "3 labels"),
                        (lambda: Interpolant().sample(free, shape, noise=NoiseStream(0, range(3))), "3 indices")]:
        with pytest.raises(ValueError, match=words):
            call()
