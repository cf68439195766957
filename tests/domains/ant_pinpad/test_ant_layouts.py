"""The plane of cells: geometry, random layouts, and shortest ways against networkx."""

from __future__ import annotations

import networkx
import pytest
import torch

from metacontroller.domains.ant_pinpad.layouts import COUNTERCLOCKWISE, STEPS, Arena, direction_fields
from metacontroller.domains.pinpad.layouts import UNREACHABLE, distance_fields, object_lookup, sample_layouts


def random_state(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_distances(arena: Arena, objects: torch.Tensor) -> torch.Tensor:
    """(b, c, n): to every color, `UNREACHABLE` at most."""
    colors = torch.arange(arena.num_colors).expand(len(objects), -1)
    return distance_fields(arena, objects, colors).clamp(max=UNREACHABLE)


def test_cells_and_places_are_each_others_inverse() -> None:
    arena = Arena(size=3, cell_size=2.0)
    cells = torch.arange(9)
    assert arena.center(cells)[[0, 2, 6]].tolist() == [[-2.0, 2.0], [2.0, 2.0], [-2.0, -2.0]]
    assert torch.equal(arena.cell(arena.center(cells)), cells)
    corner = arena.center(cells) + torch.tensor([0.99, -0.99])
    assert torch.equal(arena.cell(corner), cells)
    beyond = torch.tensor([[3.01, 0.0], [0.0, -3.01], [-3.01, 3.01]], dtype=torch.float64)
    assert arena.cell(beyond).tolist() == [-1, -1, -1]


def way_graph(arena: Arena, objects: list[int], color: int) -> networkx.DiGraph:
    """Moves between neighboring cells that enter nothing but empty cells and the color, and leave no wall."""
    taken = {cell: number for number, cell in enumerate(objects)}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(arena.num_cells))
    for cell in range(arena.num_cells):
        row, column = divmod(cell, arena.size)
        for down, right in STEPS:
            if 0 <= row + down < arena.size and 0 <= column + right < arena.size:
                ahead = (row + down) * arena.size + column + right
                if taken.get(cell, -1) < arena.num_colors and taken.get(ahead, color) == color:
                    graph.add_edge(cell, ahead)
    return graph


def test_distances_are_those_of_the_shortest_ways() -> None:
    arena = Arena(size=4, num_colors=4, num_walls=2)
    keys = torch.rand((30, 16), generator=random_state())
    objects = keys.topk(arena.num_objects).indices  # layouts without a way to some color are among them
    distance = all_distances(arena, objects)
    assert bool((distance == UNREACHABLE).any())
    for row in range(30):
        walls = set(objects[row, 4:].tolist())
        for color in range(4):
            target = int(objects[row, color])
            lengths = networkx.single_target_shortest_path_length(
                way_graph(arena, objects[row].tolist(), color), target
            )
            known = dict(lengths)
            expected = [known.get(cell, UNREACHABLE) if cell not in walls else UNREACHABLE for cell in range(16)]
            assert distance[row, color].tolist() == expected


def test_a_direction_leads_to_a_cell_from_which_it_is_nearer() -> None:
    arena = Arena()
    objects = sample_layouts(arena, 40, random_state(1)).objects
    distance, direction = all_distances(arena, objects), direction_fields(arena, objects)
    lookup = object_lookup(arena, objects)
    for row in range(40):
        for color in range(4):
            for cell in range(16):
                way = int(direction[row, color, cell])
                here = int(distance[row, color, cell])
                assert (way < 0) == (here == 0 or here == UNREACHABLE)
                if way < 0:
                    continue
                ahead = cell + STEPS[way][0] * 4 + STEPS[way][1]
                assert int(distance[row, color, ahead]) == here - 1
                assert int(lookup[row, ahead]) in (-1, color)


def test_ways_turn_with_the_world() -> None:
    """Each, but where two opposite directions are equally near."""
    arena = Arena()
    objects = sample_layouts(arena, 200, random_state(2)).objects
    cells = torch.arange(16)
    left = (3 - cells % 4) * 4 + cells // 4  # where each cell lies in a world that is turned counter-clockwise
    ways = direction_fields(arena, objects)
    again = direction_fields(arena, left[objects])[:, :, left]
    expected = torch.where(ways < 0, ways, torch.tensor(COUNTERCLOCKWISE)[ways])
    same = again == expected
    assert 0.98 < float(same.float().mean()) < 1
    assert bool(((again + expected)[~same] % 4 == 1).all())  # up and down, or left and right
    assert bool(same.all(-1).all(-1).float().mean() > 0.8)


def test_random_layouts_have_a_way_to_every_color_and_differ() -> None:
    arena = Arena()
    layouts = sample_layouts(arena, 200, random_state())
    cells = torch.cat([layouts.objects, layouts.agent[:, None]], 1)
    assert all(len(set(row)) == 6 for row in cells.tolist())
    distance = all_distances(arena, layouts.objects)
    origins = torch.cat([layouts.objects[:, :4], layouts.agent[:, None]], 1)
    assert int(distance.gather(2, origins[:, None].expand(-1, 4, -1)).max()) < UNREACHABLE
    assert len(torch.unique(layouts.objects, dim=0)) > 190
    assert len(torch.unique(cells[:, -1])) == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 1}, "size is 1; expected at least 2"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"cell_size": 0.0}, "cell_size is 0.0"),
        ({"start_yaw": 4.0}, "start_yaw is 4.0; expected a number between 0 and 3.14159"),
        ({"size": 2}, "4 cells, too few for 4 colors, 1 walls and the ant"),
    ],
)
def test_planes_that_cannot_be_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arena(**changes)  # pyright: ignore[reportArgumentType]


def test_a_plane_without_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metacontroller.domains.pinpad.layouts.MAX_RESAMPLES", 20)
    with pytest.raises(ValueError, match="no feasible layout was found in 20 tries for size 3"):
        sample_layouts(Arena(size=3, num_colors=8, num_walls=0), 4, random_state())
