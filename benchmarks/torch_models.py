"""The models of `models.py` as torch has them, for a look beside them: needs torch."""

import time
from collections.abc import Callable
from typing import Any

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
    """A transformer layer, its norms before or behind."""

    def __init__(self, width: int, heads: int, causal: bool = False, post_norm: bool = False):
        super().__init__()
        self.heads, self.causal, self.post_norm = heads, causal, post_norm
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(h.transpose(1, 2).flatten(-2))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="none" if self.post_norm else "tanh"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.feed(x))
        x = x + self.attend(self.norm1(x))
        return x + self.feed(self.norm2(x))


def decoder(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    stack = [Layer(width, heads, causal=True) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(vocabulary, width), *stack, nn.LayerNorm(width), nn.Linear(width, vocabulary))


class VisionTransformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, patch: int, side: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


class Bert(nn.Module):
    """Without padding, so without a mask."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int):
        super().__init__()
        self.words, self.places, self.sides = (nn.Embedding(n, width) for n in (vocabulary, length, 2))
        for embedding in (self.words, self.places, self.sides):
            nn.init.normal_(embedding.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(Layer(width, heads, post_norm=True) for _ in range(layers)))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.places(places) + self.sides(torch.zeros_like(tokens))
        x = self.layers(self.norm(x))
        x = torch.take_along_dim(x, masked[..., None], 1)
        return F.linear(self.head(x), self.words.weight) + self.bias


def network(model: str, tiny: bool, batch: int | None, device: str) -> tuple[nn.Module, tuple[Any, ...], Any]:
    """A model with its inputs and labels, in the sizes of `models.case`."""

    def integers(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, device=device)

    base = (2, 32, 2) if tiny else (12, 768, 12)
    if model in ("resnet50", "vit-b16"):
        batch, side = batch or (2 if tiny else 64), 32 if tiny else 224
        images = torch.randn(batch, 3, side, side, device=device)
        if model == "vit-b16":
            return VisionTransformer(*base, 8 if tiny else 16, side), (images,), integers(1000, batch)
        net = resnet((1, 1), 8) if tiny else resnet((3, 4, 6, 3), 64)
        images = images.to(memory_format=torch.channels_last)
        return net.to(memory_format=torch.channels_last), (images,), integers(1000, batch)
    if model == "bert-base":
        batch, length, vocabulary = batch or (2 if tiny else 64), 16 if tiny else 128, 64 if tiny else 30522
        masked = (batch, length * 20 // 128)
        inputs = (integers(vocabulary, batch, length), integers(length, *masked))
        return Bert(*base, vocabulary, 16 if tiny else 512), inputs, integers(vocabulary, *masked)
    sizes: tuple[int, int, int, int] = (6, 512, 8, 256) if model == "lm" else (*base, 50257)
    sizes = (*base, 64) if tiny else sizes
    batch = batch or (2 if tiny else 32 if model == "lm" else 8)
    tokens = integers(sizes[3], batch, 16 if tiny else 512)
    return decoder(*sizes), (tokens,), tokens.roll(-1, 1)


class TorchRunner:
    """A compiled step, as torch's own recipe for mixed precision has it; `precision` is a dtype of `torch.autocast`."""

    def __init__(self, model: str, precision: str, tiny: bool, batch: int | None):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = None if precision == "float32" else getattr(torch, precision)
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "float16")
        torch.manual_seed(0)
        net, self.inputs, self.labels = network(model, tiny, batch, self.device)
        net = net.to(self.device)
        self.parameters = list(net.parameters())
        self.clips = model != "resnet50"
        make: Callable[..., Any] = torch.optim.AdamW if self.clips else torch.optim.SGD
        options = {"lr": 1e-4, "weight_decay": 1e-4} if self.clips else {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        self.optimizer = make(self.parameters, fused=True, **options)
        self.net = torch.compile(net)
        start = time.perf_counter()
        self._step()
        self._wait()
        self.compile_seconds = time.perf_counter() - start
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._step()
            self._wait()
        self.peak_bytes = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def _step(self) -> None:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            logits = self.net(*self.inputs)
            loss = F.cross_entropy(logits.flatten(0, -2).float(), self.labels.flatten())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def sample(self, steps: int) -> float:
        """Seconds of one step, the mean of several."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return (time.perf_counter() - start) / steps
