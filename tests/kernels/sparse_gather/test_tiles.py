"""tile_order against a stable sort by tile, on drawn grids that hardly any tile divides."""

import random

import torch
from bank_helpers import refuses
from torch._dynamo.testing import CompileCounterWithBackend

from vidmem_kernels import tile_order


def by_sort(grid, tile):
    """(order, block_sizes) by the number of each token's tile."""
    numbers, step = torch.zeros(1, dtype=torch.int64), 1
    for size, side in zip(grid, tile, strict=True):
        count = -(-size // side)
        numbers = (numbers.unsqueeze(-1) * count + torch.arange(size) // side).flatten()
        step *= count
    return numbers.argsort(stable=True), numbers.bincount(minlength=step)


def test_by_hand(device):
    found = tile_order((1, 3, 4), (1, 2, 3), device=device)
    assert found.order.tolist() == [0, 1, 2, 4, 5, 6, 3, 7, 8, 9, 10, 11]
    assert found.inverse.tolist() == [0, 1, 2, 6, 3, 4, 5, 7, 8, 9, 10, 11]
    assert found.block_sizes.tolist() == [6, 2, 3, 1]
    assert all(x.dtype == torch.int32 and x.device.type == device for x in found)


def test_by_sort(device):
    draw = random.Random(0)
    for _ in range(60):
        grid = [draw.randint(0, 9) if draw.random() < 0.9 else 0 for _ in range(3)]
        tile = tuple(draw.choice([1, 2, 3, 4, 11]) for _ in range(3))
        order, inverse, sizes = tile_order(grid, tile, device=device)
        wanted, counts = by_sort(grid, tile)
        assert order.tolist() == wanted.tolist() and sizes.tolist() == counts.tolist(), (grid, tile)
        x = torch.randn(2, len(wanted), 3, device=device)
        assert torch.equal(x[:, order][:, inverse], x)


def test_one_graph_for_all_sizes():
    def call(x):
        order, inverse, sizes = tile_order(x.shape[1:4], (2, 3, 2), device=x.device)
        return x.flatten(1, 3)[:, order], inverse, sizes

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 5, 7, 3, 4), (3, 4, 9, 6, 7), (4, 11, 2, 8, 5)):
        x = torch.randn(shape)
        for a, b in zip(compiled(x), call(x), strict=True):
            assert torch.equal(a, b)
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_refuses():
    message = "tile_order: grid must be three numbers (time, height, width), got "
    refuses(TypeError, message + "(2, 3)", tile_order, (2, 3), (1, 1, 1))
    refuses(TypeError, message + "6", tile_order, 6, (1, 1, 1))
    message = "tile_order: tile must be three numbers (time, height, width), got 2"
    refuses(TypeError, message, tile_order, (2, 3, 4), 2)
    refuses(ValueError, "tile_order: grid[1] must be at least 0, got -3", tile_order, (2, -3, 4), (1, 1, 1))
    refuses(ValueError, "tile_order: tile[2] must be at least 1, got 0", tile_order, (2, 3, 4), (1, 1, 0))
    refuses(TypeError, "tile_order: tile[0] must be an int, got float", tile_order, (2, 3, 4), (1.0, 1, 1))
