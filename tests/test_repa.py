"""repa.py: filters, spectra, the loss, the projectors, torch.hub's real path."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torchvision.transforms.functional import normalize

import repa
from repa import DOG_SIGMAS, Encoder, Projector, alignment_loss, filter_target, load_encoder
from spectral import dog, rmsc

close = torch.testing.assert_close
GRID = (9, 14)
pytestmark = pytest.mark.filterwarnings("ignore:.*UNTRAINED")


def on_grid(tokens):                                       # (B, T, D) -> (B, h, w, D)
    return tokens.unflatten(1, GRID)


# ---- filters
def test_a_dog_is_divided_by_its_std():
    """Eq. 6 on the grid, then the std over the tokens; it does not see their mean."""
    tokens = torch.randn(2, 126, 5)
    for sigmas in (DOG_SIGMAS, (0.75, 2.0)):
        band = dog(on_grid(tokens).permute(0, 3, 1, 2), *sigmas).flatten(2).mT      # (B, T, D)
        expected = band / band.std(1, keepdim=True, correction=0)
        for same in (tokens, tokens + 7):
            close(filter_target(same, "dog", GRID, *sigmas), expected, rtol=1e-3, atol=1e-4)


def test_norm_std_is_the_factor_on_the_mean():
    """Table 6: (tokens - 0.6 mean) / std; a DoG has no mean, so there it changes nothing."""
    tokens = 3 * torch.randn(2, 126, 5) + 2
    mean, std = tokens.mean(1, keepdim=True), tokens.std(1, keepdim=True, correction=0)
    filtered = lambda kind, **options: filter_target(tokens, kind, GRID, **options)
    for factor in (0.0, 0.6, 1.0):
        expected = (tokens - factor * mean) / (std + 1e-6)
        close(filtered("spnorm", norm_std=factor), expected)
        assert torch.equal(filtered("dog", norm_std=factor), filtered("dog"))
    close(filtered("spnorm"), (tokens - 0.6 * mean) / (std + 1e-6))
    assert torch.equal(filtered("none"), tokens)
    for kind in ("spnorm", "dog"):                         # no division by zero
        assert filter_target(torch.zeros(1, 126, 2), kind, GRID).isfinite().all()


def test_default_sigmas_pass_the_layout_band():
    """The docstring's numbers: zero at DC, peak 0.59 at u = 4.3, half at 1.9 and 7.9."""
    u = np.arange(0, 16, 0.05)                             # 16-token side: u / 32 cycles per token
    waves = np.cos(2 * np.pi * u[:, None] / 32 * np.arange(-40, 41))       # (U, 81)
    waves = torch.from_numpy(waves).float()[:, None, None].expand(-1, 1, 3, -1)
    gain = dog(waves, *DOG_SIGMAS)[:, 0, 1, 40].numpy()    # at the crest, far from the border
    assert abs(gain[0]) < 1e-6 and gain.max() == pytest.approx(0.59, abs=0.005)
    assert u[gain.argmax()] == pytest.approx(4.3, abs=0.1)
    passed = u[gain >= gain.max() / 2]
    assert [passed.min(), passed.max()] == pytest.approx([1.95, 7.93], abs=0.06)


def test_filters_raise_the_contrast_of_smooth_features():
    """Sec. 3.5: a common offset makes directions alike; spnorm removes most of it, DoG all."""
    x = torch.randn(3, 16, 20, 24, dtype=torch.float64).numpy()
    x = ndimage.gaussian_filter(x, (0, 2, 2, 0), mode="mirror")
    tokens = (torch.from_numpy(x / x.std()) + 5 * torch.randn(24)).flatten(1, 2).float()
    raw, spnorm, band = (
        rmsc(filter_target(tokens, kind, (16, 20))) for kind in ("none", "spnorm", "dog"))
    assert (spnorm > 1.3 * raw).all() and (band > 2 * raw).all() and (band > spnorm).all()


# ---- loss and projector
def test_alignment_loss_is_minus_the_mean_cosine():
    """-1 with itself at any scale; by its formula; float32 from bf16."""
    a, b = torch.randn(2, 3, 126, 7)
    close(alignment_loss(a, 5 * a), torch.tensor(-1.0))
    close(alignment_loss(a, b), -((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(a.bfloat16(), b)
    assert loss.dtype == torch.float32
    close(loss, alignment_loss(a.bfloat16().float(), b))
    with pytest.raises(ValueError, match="shape"):
        alignment_loss(a, b[:, :1])                        # would broadcast


def test_gradient_goes_to_the_projection_only():
    """The encoder's tokens carry no graph, and a target that does gets no gradient."""
    encoder, images = load_encoder(source="random"), torch.rand(2, 3, 32, 48, requires_grad=True)
    raw = encoder(images, (4, 6))
    assert not raw.requires_grad and not raw.is_inference()    # which backward could not save
    projected, target = (torch.randn(2, 24, 64, requires_grad=True) for _ in range(2))
    (alignment_loss(projected, raw) + alignment_loss(projected, target)).backward()
    assert projected.grad.abs().sum() > 0 and target.grad is None
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("kind, reach", [("mlp", 0), ("conv", 1)])
def test_mlp_sees_one_token_and_conv_its_neighbours(kind, reach):
    """Output token (4, 7) depends on that input token (mlp) or on the 3x3 around it (conv)."""
    tokens = torch.randn(1, 126, 6, requires_grad=True)
    on_grid(Projector(kind, 6, 5, hidden=8)(tokens, GRID))[0, 4, 7].sum().backward()
    seen = torch.zeros(GRID, dtype=torch.bool)
    seen[4 - reach:5 + reach, 7 - reach:8 + reach] = True
    assert torch.equal(on_grid(tokens.grad)[0].abs().sum(-1) > 0, seen)


def test_the_mlp_projector_is_repas():
    """Three layers of width 2048. Xavier: uniform in +- sqrt(6 / (in + out)); biases 0."""
    layers = Projector("mlp", 384, 768).layers[::2]
    assert [layer.weight.shape for layer in layers] == [(2048, 384), (2048, 2048), (768, 2048)]
    for layer in layers:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert bound * 0.99 < layer.weight.abs().max() <= bound and not layer.bias.any()


# ---- encoder
class MeanColour(torch.nn.Module):
    """A stand-in for DINOv2: the token of a patch is its mean colour."""
    embed_dim, patch_size = 3, 14

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward_features(self, x):
        self.seen = x
        tokens = self.dropout(F.avg_pool2d(x, 14)).flatten(2).transpose(1, 2)
        return {"x_norm_patchtokens": tokens}


def test_encoder_normalises_then_resizes():
    """ImageNet statistics, then bicubic to 14 px per token. VA-VAE: bilinear, no statistics."""
    encoder, images = Encoder(MeanColour()).train(), torch.rand(2, 3, 32, 48) * 2 - 1
    tokens = encoder(images, (4, 6))
    x = normalize((images + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = F.interpolate(x, (56, 84), mode="bicubic")
    close(encoder.network.seen, x)
    close(tokens, F.avg_pool2d(x, 14).flatten(2).transpose(1, 2))          # no dropout
    vavae = Encoder(MeanColour(), resize="bilinear", imagenet=False)
    vavae(images, (4, 6))
    close(vavae.network.seen, F.interpolate(images, (56, 84), mode="bilinear"))
    small = load_encoder(source="random")
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images.bfloat16(), (4, 6)).dtype == torch.float32
        tokens = small(images, (4, 6))
    close(tokens, small(images, (4, 6)), rtol=0, atol=1e-4)  # bf16 on CUDA only
    with pytest.raises(ValueError, match="32x48 does not fit a token grid of 6x4"):
        encoder(images, (6, 4))


def test_random_encoder_is_always_the_same_and_says_that_it_teaches_nothing():
    """Independent of the global generator, which it leaves alone; depends on where things are."""
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="NOTHING"):
        first = load_encoder(source="random")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    tokens = first(images, (4, 6))
    assert torch.equal(tokens, load_encoder(source="random")(images, (4, 6)))
    assert tokens.shape == (2, 24, first.width) and tokens.std(1).mean() > 0.1
    assert not torch.allclose(tokens, first(images.flip(-1), (4, 6)), atol=1e-2)


# ---- torch.hub
HUBCONF = """
from repa import RandomEncoder

def dinov2_vitb14_reg(pretrained=True):
    assert not pretrained
    return RandomEncoder()

tiny = type("Tiny", (RandomEncoder,), dict(embed_dim=5))
"""
FILE = "dinov2_vitb14_reg4_pretrain.pth"


@pytest.fixture
def hub(tmp_path, offline):
    """The folder of weights of an empty TORCH_HOME, and a clone."""
    checkpoints, clone = tmp_path / "hub" / "checkpoints", tmp_path / "clone"
    checkpoints.mkdir(parents=True)
    clone.mkdir()
    (clone / "hubconf.py").write_text(HUBCONF)
    return checkpoints, clone


def test_torch_hub_with_a_clone_and_planted_weights(hub, offline):
    """Code from the clone or the hub's copy, weights from TORCH_HOME; or another hubconf.py."""
    checkpoints, clone = hub
    weights = repa.RandomEncoder().state_dict()
    torch.save(weights, checkpoints / FILE)
    encoder, images = load_encoder("dinov2_vitb14_reg", str(clone)), torch.rand(2, 3, 32, 48)
    assert torch.equal(encoder.network.patches.weight, weights["patches.weight"])
    tokens = encoder(images, (4, 6))
    assert tokens.shape == (2, 24, 64) and encoder.width == 64
    own = checkpoints.parent / repa.REPOSITORY.replace("/", "_").replace(":", "_")
    clone.rename(own)
    close(load_encoder("dinov2_vitb14_reg")(images, (4, 6)), tokens)
    assert load_encoder("tiny", source=str(own))(images, (4, 6)).shape == (2, 24, 5)
    assert not offline.called


def test_without_network_one_line_says_what_goes_where(hub, offline):
    """No code and no weights, or code without weights: URL, path and flag, in one line."""
    checkpoints, clone = hub
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/{FILE}"
    for source in (None, str(clone)):
        with pytest.raises(FileNotFoundError) as error:
            load_encoder("dinov2_vitb14_reg", source)
        for word in (url, str(checkpoints / FILE), "--encoder_source DIR"):
            assert word in str(error.value) and "\n" not in str(error.value)
    # the pinned commit at once: torch.hub would look for a branch of this name
    code, weights = (call.args[0].full_url for call in offline.call_args_list)
    commit = repa.REPOSITORY.split(":")[1]
    assert len(commit) == 40 and commit in code and weights == url


def test_unknown_names_and_wrong_weights_are_named(hub):
    """A name that is not there, the weights of another network: one line."""
    checkpoints, clone = hub
    torch.save(dict(weight=torch.zeros(5, 3)), checkpoints / FILE)
    for name, source, match in [
            ("dinov3_vitb16", None, "dinov2_vitg14_reg"),
            ("dinov2_vitl14", str(clone), "Cannot find callable dinov2_vitl14"),
            ("dinov2_vitb14_reg", str(clone), f"{FILE}.*bias")]:
        with pytest.raises(ValueError, match=f"^.*{match}.*$"):
            load_encoder(name, source)
