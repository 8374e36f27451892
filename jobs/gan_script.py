"""Learn to draw digits: a generator and a discriminator, two models with an optimizer each (Goodfellow et al., 2014).

The first rank prints what the generator draws, at the end.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import muster

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--folder", help="folder to keep everything in, and to go on from")
options = parser.parse_args()
NOISE = 16


def build(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, outputs)
    )


def train() -> None:
    generator, discriminator = session.wrap(build(NOISE, 64)), session.wrap(build(64, 1))
    draws = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    judges = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    session.track(generator=generator, discriminator=discriminator, draws=draws, judges=judges)
    data = TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1)
    for (real,) in session.batches(data, options.batch_size, steps=options.steps):
        noise = torch.randn(len(real), NOISE, device=session.device)
        fake = torch.tanh(generator(noise))

        verdicts = discriminator(torch.cat([real, fake.detach()]))
        truth = torch.cat([torch.full((len(real), 1), 0.9), torch.zeros(len(real), 1)]).to(session.device)
        judged = functional.binary_cross_entropy_with_logits(verdicts, truth)
        judges.zero_grad()
        judged.backward()
        judges.step()

        believed = discriminator(fake)
        drawn = functional.binary_cross_entropy_with_logits(believed, torch.ones_like(believed))
        draws.zero_grad()
        drawn.backward()
        draws.step()
        session.log(judge_loss=judged, draw_loss=drawn)
    if session.is_primary:
        with torch.no_grad():
            images = torch.tanh(generator(torch.randn(8, NOISE, device=session.device))).reshape(8, 8, 8)
        for row in images.transpose(0, 1).flatten(1).cpu():
            print("  ".join("".join(" .:oO@"[int((pixel + 1) * 2.99)] for pixel in part) for part in row.split(8)))


with muster.Session(run=options.folder) as session:
    train()
