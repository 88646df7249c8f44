"""
LabelNet: a small residual network that miniature.py trains on class labels. Its pooled features
measure FD-cifar, and its tokens are a target encoder for images of 32 px, where DINOv2 is too big.
"""
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from repa import IMAGENET

PATH = pathlib.Path(__file__).with_name("labelnet.pt")


class LabelNet(nn.Module):
    """
    forward: (B, 3, H, W) in [-1, 1] -> logits; pooled: -> (B, 192); forward_features: DINOv2's
    interface, ImageNet-normalised images -> one token of width 96 per 4x4 pixels.
    """
    width, patch_size, embed_dim = 192, 4, 96

    def __init__(self, num_classes):
        super().__init__()
        layer = lambda i, o, stride=1: nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        self.stages = nn.ModuleList()
        for i, o in ((3, 48), (48, self.embed_dim), (self.embed_dim, self.width)):
            down = layer(i, o, 2)
            residual = nn.Sequential(layer(o, o), layer(o, o))
            self.stages.append(nn.ModuleList([down, residual]))
        self.head = nn.Linear(self.width, num_classes)

    def features(self, x, stages):
        for down, residual in stages:                                       # each halves the sides
            x = down(x)
            x = x + residual(x)
        return x

    def pooled(self, images):
        return self.features(images, self.stages).mean((2, 3))

    def forward(self, images):
        return self.head(self.pooled(images))

    def forward_features(self, x):
        mean, std = (torch.tensor(s, device=x.device).view(1, 3, 1, 1) for s in IMAGENET)
        x = 2 * (x * std + mean) - 1                       # repa.Encoder normalised it for DINOv2
        x = self.features(x, self.stages[:2])
        tokens = x.flatten(2).transpose(1, 2)              # (B, H/4 * W/4, 96)
        return {"x_norm_patchtokens": F.layer_norm(tokens, tokens.shape[-1:])}


def load_labelnet(path=PATH):
    """The LabelNet in a file of miniature.py."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    network = LabelNet(checkpoint["num_classes"])
    network.load_state_dict(checkpoint["model"])
    return network
