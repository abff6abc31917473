"""Quantize a plain torch module, save it, load it: no folder, no config, no transformers model.

Run: python examples/module.py
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import duotone


class Net(nn.Module):
    """Convolutions with batch norms, then linears: whatever has a forward will do."""

    def __init__(self) -> None:
        """With random weights; yours are trained."""
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Linear(32 * 4 * 4, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, 8, 8] -> scores [B, 10]."""
        x = self.pool(self.norm(self.conv(x)).relu()).flatten(1)
        return self.head(self.hidden(x).relu())


def main(method: str = "dpq") -> None:
    """Calibrate on batches as the module will meet them, compare on one that it has not seen."""
    torch.manual_seed(0)
    net = Net().eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(8)]
    quantized = duotone.quantize_module(net, batches, method=method, group_size=64, device="cpu")
    for layer in quantized.report.layers:
        print(f"{layer.layer}: weights off by {100 * layer.weight_error**0.5:.1f} %")
    for layer, reason in quantized.report.kept.items():
        print(f"left as it is: {layer}: {reason}")

    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        error = (quantized.module(x) - net(x)).norm() / net(x).norm()
    print(f"outputs off by {100 * error:.1f} %")

    with tempfile.TemporaryDirectory() as folder:
        quantized.save(Path(folder) / "net")
        again = duotone.load_module(net, Path(folder) / "net", batches[0], device="cpu")
    with torch.no_grad():
        print("the saved one gives the same:", torch.equal(again(x), quantized.module(x)))


if __name__ == "__main__":
    main()
