"""The decoder and the ResNet-50 of `models.py` as torch has them, for a look beside it: needs torch."""

import time

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, stride: int):
        super().__init__()
        self.main = nn.Sequential(
            *(nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.side = nn.Identity()
        if stride > 1 or into != 4 * width:
            self.side = nn.Sequential(nn.Conv2d(into, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.main(x) + self.side(x))


def resnet(stages: tuple[int, ...], width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2, 1)]
    into = width
    for i, blocks in enumerate(stages):
        for j in range(blocks):
            layers.append(Bottleneck(into, width * 2**i, 2 if i > 0 and j == 0 else 1))
            into = 4 * width * 2**i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(h.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def decoder(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    stack = [Layer(width, heads) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(vocabulary, width), *stack, nn.LayerNorm(width), nn.Linear(width, vocabulary))


class TorchRunner:
    """A compiled step: the sizes are those of `models.case`."""

    def __init__(self, model: str, low: bool, tiny: bool, batch: int | None, steps: int):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.steps, self.low = steps, low
        torch.manual_seed(0)
        if model == "resnet50":
            batch, side = batch or (2 if tiny else 64), 32 if tiny else 224
            net = resnet((1, 1), 8) if tiny else resnet((3, 4, 6, 3), 64)
            net = net.to(self.device, memory_format=torch.channels_last)
            images = torch.randn(batch, 3, side, side, device=self.device)
            self.inputs = images.to(memory_format=torch.channels_last)
            self.labels = torch.randint(1000, (batch,), device=self.device)
        else:
            sizes, batch, length = ((2, 32, 2, 64), batch or 2, 16) if tiny else ((6, 512, 8, 256), batch or 32, 512)
            net = decoder(*sizes).to(self.device)
            self.inputs = torch.randint(sizes[3], (batch, length), device=self.device)
            self.labels = self.inputs.roll(-1, 1)
        self.net = torch.compile(net)
        self.optimizer = torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=1e-4, fused=True)
        start = time.perf_counter()
        self._step()
        self._wait()
        self.compile_seconds = time.perf_counter() - start
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._step()
            self._wait()

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.low):
            logits = self.net(self.inputs)
            loss = F.cross_entropy(logits.flatten(0, -2).float(), self.labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def sample(self) -> float:
        """Seconds of one step, the mean of several."""
        self._wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        self._wait()
        return (time.perf_counter() - start) / self.steps
