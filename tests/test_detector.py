import numpy as np
import pytest
import torch
from torch import Generator

from minisd3.detector import SIDE, STRIDE, Detector, Maps, detector, detector_loss
from minisd3.evaluate import caption_accuracy
from minisd3.scenes import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, pictures, scene


@pytest.mark.parametrize(("sides", "n"), [((128, 128), 200), ((96, 192), 60), ((192, 144), 60), ((96, 96), 60)])
def test_detector_reads_scenes_it_never_saw(sides: tuple[int, int], n: int) -> None:
    seeds = range(HELD_OUT, HELD_OUT + n)
    found = caption_accuracy(pictures(seeds, *sides), [scene(seed) for seed in seeds])
    shares = found.kind, found.colour, found.thing, found.background, found.count, found.relation, found.right
    assert min(rate.share for rate in shares) >= 0.98, found


def test_saturated_neighbours_are_one_object() -> None:
    """Two cells whose chance is 1 to the last bit; one of them is the peak all the same."""
    net, cells = Detector(width=8), SIDE // STRIDE
    presence = torch.full((1, cells, cells), -30.0)
    presence[0, 5, 5:7] = torch.tensor([40.0, 41.0])
    maps = Maps(presence, torch.zeros(1, 10, cells, cells), torch.zeros(1, 8, cells, cells), torch.zeros(1, 7))
    net.forward = lambda picture: maps  # type: ignore[method-assign]
    [reading] = net.read(torch.zeros(1, 3, SIDE, SIDE))
    assert [(thing.x, thing.y) for thing in reading.things] == [(6.5 / 16, 5.5 / 16)]


def test_detector_finds_objects_in_their_place() -> None:
    seeds = range(HELD_OUT, HELD_OUT + 64)
    near = []
    for reading, one in zip(detector().read(pictures(seeds)), map(scene, seeds), strict=True):
        for thing in one.things:
            near += [
                max(abs(f.x - thing.x), abs(f.y - thing.y))
                for f in reading.things
                if (f.kind, f.colour) == (thing.kind, thing.colour)
            ]
    assert np.mean([distance <= 1.5 * STRIDE / SIDE for distance in near]) >= 0.95


def test_detector_learns() -> None:
    torch.manual_seed(0)
    net = Detector(width=16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(12):  # the same step, so the same scenes and the same spoiling
        loss = detector_loss(net, 0, Generator().manual_seed(0), batch=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    maps = net(torch.zeros(2, 3, 96, 128))
    assert maps.presence.shape == (2, 12, 16) and maps.background.shape == (2, len(BACKGROUNDS))
    assert maps.kind.shape == (2, len(KINDS), 12, 16) and maps.colour.shape == (2, len(COLOURS), 12, 16)
