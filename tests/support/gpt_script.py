"""A very small GPT that learns to add, on a session: dropout, two groups of weights, clipping, accumulation, warmup."""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

import muster

SYMBOLS = "0123456789+=."
WIDTH, HEADS, LAYERS, LENGTH = 32, 2, 2, 12


class Sums(Dataset[Tensor]):
    """Sums of two numbers below 100, such as `17+5=22....`, as symbols (LENGTH,)."""

    def __init__(self, count: int) -> None:
        pairs = torch.randint(100, (count, 2), generator=torch.Generator().manual_seed(1)).tolist()
        self.texts = [f"{a}+{b}={a + b}".ljust(LENGTH, ".") for a, b in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([SYMBOLS.index(symbol) for symbol in self.texts[index]])


class Block(nn.Module):
    """Causal self-attention and a network for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, states: Tensor) -> Tensor:
        length = states.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        inputs = self.before(states)
        states = states + self.attention(inputs, inputs, inputs, attn_mask=future, need_weights=False)[0]
        return states + self.network(self.between(states))


class Gpt(nn.Module):
    """Logits (batch, length, symbols) of the next symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(len(SYMBOLS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, len(SYMBOLS), bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        places = torch.arange(symbols.shape[1], device=symbols.device)
        logits: Tensor = self.head(self.blocks(self.symbols(symbols) + self.places(places)))
        return logits


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))


def train(session: muster.Session, options: argparse.Namespace) -> Iterator[float]:
    """The loss of each micro-batch."""
    model = session.wrap(Gpt())
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    session.track(model=model, optimizer=optimizer, schedule=schedule)
    data = Sums(options.samples)
    for text in session.batches(data, options.batch_size, steps=options.steps, accumulate=options.accumulate):
        logits = model(text[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        session.log(loss=loss)
        if session.updates:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        yield float(loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()
    with muster.Session() as session:
        losses = list(train(session, options))
        if session.is_primary and losses:
            print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last", flush=True)


if __name__ == "__main__":
    main()
