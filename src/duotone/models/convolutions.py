# Shapes: B pictures, C channels, H height, W width, N out_channels, K = C * kernel height * kernel width, L places.
"""Convolutions as the matrix products they are: each patch of the picture is a row of K numbers (im2col)."""

from torch import Tensor, nn
from torch.nn import functional

from duotone.models.experts import linear_of, put

#: A convolution that reads fewer channels is the first layer: it sees the picture itself.
FEWEST_CHANNELS = 16
#: Set on the linear of a convolution: what it writes to has its channels in the second dimension, as pictures do.
CHANNELS_FIRST = "channels_first"


class UnfoldedConv2d(nn.Module):
    """A convolution whose weight is its child `linear`'s, [N, K]: x [B, C, H, W] -> [B, N, H', W'], up to rounding the same."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Of a convolution for which `is_linear`."""
        super().__init__()
        assert isinstance(conv.padding, tuple)
        self.kernel_size, self.stride, self.padding, self.dilation = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.linear = linear_of(conv.weight.data.flatten(1), conv.bias)
        setattr(self.linear, CHANNELS_FIRST, True)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in sizes
        )
        patches_BKL = functional.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        return self.linear(patches_BKL.mT).mT.unflatten(-1, (height, width))


def is_linear(module: nn.Module) -> bool:
    """Is this a convolution that one matrix multiplies, wide enough to be worth it?"""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
        and module.in_channels >= FEWEST_CHANNELS
    )


def why_not(module: nn.Module) -> str:
    """Why a convolution is left as it is."""
    groups, channels = int(getattr(module, "groups", 1)), int(getattr(module, "in_channels", 0))
    if type(module) is nn.Conv2d and groups > 1:
        return f"a convolution in {groups} groups, of {channels // groups} channels each"
    if type(module) is nn.Conv2d and channels < FEWEST_CHANNELS:
        return f"a convolution of {channels} channels: the first layer, which sees the picture itself"
    return f"a convolution of a kind that is no matrix product here, {type(module).__name__}"


def unfold(model: nn.Module) -> None:
    """Put an `UnfoldedConv2d` in the place of every convolution that is one matrix product."""
    for path, conv in [(name, module) for name, module in model.named_modules() if is_linear(module)]:
        assert isinstance(conv, nn.Conv2d)
        put(model, path, UnfoldedConv2d(conv))
