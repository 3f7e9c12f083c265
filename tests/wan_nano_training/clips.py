"""The miniature's world: clips of moving shapes, their prompts, and how a clip is recognised.

A prompt names colour, shape and motion, and sometimes the ground: "a blue square turns over a green
ground". Only the place is random. Places and speeds fit the latents' cells of 8 pixels, so that a
small model learns sharp edges.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES, SIZE, CELL = 17, 64, 8
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.70, 0.20, 0.80),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS = {  # two tones and, of 8x8 pixels in 2x2 cells, those of the second tone
    None: ((0.20, 0.20, 0.22), (0.38, 0.38, 0.40), "checks"),
    "black": ((0.02, 0.02, 0.04), (0.34, 0.34, 0.44), "dots"),
    "brown": ((0.36, 0.20, 0.10), (0.18, 0.10, 0.05), "bricks"),
    "green": ((0.06, 0.24, 0.10), (0.10, 0.38, 0.16), "bands"),
    "blue": ((0.06, 0.10, 0.28), (0.10, 0.20, 0.44), "stripes"),
}
DIRECTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
MOTIONS = (*DIRECTIONS, "bounces", "grows", "shrinks", "turns")
SHAPES = {  # corners that look alike, and area at radius 1
    "ball": (0, math.pi),
    "square": (4, 3.24),
    "triangle": (3, 2.0),
    "cross": (4, 2.88),
}
RADIUS = 12
Place = tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """The content of a prompt."""

    colour: str
    shape: str
    motion: str
    ground: str | None = None

    @property
    def prompt(self) -> str:
        over = f" over a {self.ground} ground" if self.ground else ""
        return f"a {self.colour} {self.shape} {self.motion}{over}"


def scenes() -> list[Scene]:
    """All scenes. A turning ball is left out: it would look still."""
    return [
        Scene(colour, shape, motion, ground)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for ground in GROUNDS
        if ground != colour and (shape, motion) != ("ball", "turns")
    ]


def vocabulary() -> list[str]:
    return sorted({word for scene in scenes() for word in scene.prompt.split()})


def _groups(unseen: bool) -> list[list[Scene]]:
    """Scenes without and with a named ground; ``unseen``: those kept out of training."""
    # every eleventh is kept out of training, evenly over colours, shapes, motions and grounds
    found = [scene for i, scene in enumerate(scenes()) if (i % 11 == 5) == unseen]
    return [[u for u in found if bool(u.ground) == named] for named in (False, True)]


def pick(count: int, generator: torch.Generator, unseen: bool = False) -> list[Scene]:
    """Random scenes, half of them with a named ground; ``unseen``: those kept out of training."""
    groups, coins = _groups(unseen), torch.rand(2, count, generator=generator).tolist()
    chosen = [(groups[a < 0.5], b) for a, b in zip(*coins, strict=True)]
    return [group[int(b * len(group))] for group, b in chosen]


def places(scene: Scene) -> list[Place]:
    """Where a scene's shape can be, in cells from the centre; from a path, to its side only."""
    steps, (dx, dy) = (-1, 0, 1), DIRECTIONS.get(scene.motion, (0, scene.motion == "bounces"))
    return [(x, y) for x in (steps, (0,))[abs(dx)] for y in (steps, (0,))[abs(dy)]]


def every_clip() -> list[tuple[float, Scene, Place]]:
    """All clips of the training; before each, how often ``pick`` and ``draw`` give it."""
    return [
        (1 / len(group) / len(places(scene)), scene, place)
        for group in _groups(unseen=False)
        for scene in group
        for place in places(scene)
    ]


def draw(scene: Scene, generator: torch.Generator) -> Tensor:
    """A clip [3, FRAMES, SIZE, SIZE] in [-1, 1] of a scene at a random place."""
    found = places(scene)
    return draw_at(scene, found[int(torch.randint(len(found), (), generator=generator))])


def draw_at(scene: Scene, place: Place) -> Tensor:
    time = torch.linspace(0, 1, FRAMES)
    x, y = (SIZE / 2 + CELL * cells + 0 * time for cells in place)
    radius, angle = torch.full((FRAMES,), float(RADIUS)), 0 * time
    if scene.motion == "turns":
        angle = time * math.pi / 2
    elif scene.motion == "grows":
        radius = 6 + 12 * time
    elif scene.motion == "shrinks":
        radius = 18 - 12 * time
    elif scene.motion == "bounces":  # falls and comes back
        y = 44 - 24 * torch.cos(math.pi * time).abs()
    else:  # 2 pixels a frame, a cell a latent
        dx, dy = DIRECTIONS[scene.motion]
        x, y = x + 32 * (time - 0.5) * dx, y + 32 * (time - 0.5) * dy
    first, second, pattern = GROUNDS[scene.ground]
    clip = torch.lerp(_column(first), _column(second), _pattern(pattern))
    cover = (0.5 - distance(scene.shape, x, y, radius, angle)).clamp(0, 1)
    return torch.lerp(clip, _column(COLOURS[scene.colour]), cover) * 2 - 1


def _column(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour)[:, None, None, None]


def _pattern(name: str) -> Tensor:
    """Share of a ground's second tone, [SIZE, SIZE]."""
    down, across = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    row, column = down // CELL, across // CELL
    joint = (across + CELL * (row % 2)) % (2 * CELL) == 0
    found = {
        "checks": (row + column) % 2 == 0,
        "dots": (down % CELL // 2 == 1) & (across % CELL // 2 == 1),
        "bricks": (down % CELL == 0) | joint,
        "bands": row % 2 == 0,
        "stripes": column % 2 == 0,
    }
    return found[name].float()


def distance(shape: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Pixels from a shape's edge, negative inside, [F, SIZE, SIZE] of places [F]; clockwise."""
    x, y, radius, angle = (u[:, None, None] for u in (x, y, radius, angle))
    pixels = torch.arange(SIZE) + 0.5
    across, down = pixels - x, pixels[:, None] - y
    across, down = (
        across * angle.cos() + down * angle.sin(),
        down * angle.cos() - across * angle.sin(),
    )
    if shape == "ball":
        return (across.square() + down.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(across.abs(), down.abs()) - 0.9 * radius
    if shape == "triangle":
        sides = torch.maximum(across.abs() * math.sqrt(0.75) - down / 2, down)
        return sides - 0.62 * radius
    long, short = torch.maximum(across.abs(), down.abs()), torch.minimum(across.abs(), down.abs())
    return torch.maximum(long - 1.1 * radius, short - 0.4 * radius)


def seen(clip: Tensor) -> tuple[str, str]:
    """Colour and motion of the largest shape in a clip [3, F, H, W] in [-1, 1], from arithmetic.

    Area, centre and corners of its mask over the frames give the motion. No motion: "stays"; no
    mask: ("nothing", "stays").
    """
    colour, mask = _largest(clip)
    area = mask.sum((1, 2))
    if area.min() < 12:
        return "nothing", "stays"
    return colour, _motion(mask, area, *_centre(mask))


def kind(clip: Tensor) -> tuple[str, float]:
    """Which shape fits a clip's largest one best, drawn with the same centre and area, and its
    intersection over union with it: mean of three frames."""
    mask = _largest(clip)[1][::8]
    area = mask.sum((1, 2))
    if area.min() < 12:
        return "nothing", 0.0
    (x, y), fits = _centre(mask), {}
    for shape, (corners, unit) in SHAPES.items():
        overlaps = []
        for degrees in range(0, 360 // corners if corners else 1, 15):
            angle = torch.full_like(x, math.radians(degrees))
            drawn = (distance(shape, x, y, (area / unit).sqrt(), angle) < 0).float()
            overlaps.append((drawn * mask).sum((1, 2)) / torch.maximum(drawn, mask).sum((1, 2)))
        fits[shape] = float(torch.stack(overlaps).amax(0).mean())
    best = max(fits, key=fits.__getitem__)
    return best, fits[best]


def _largest(clip: Tensor) -> tuple[str, Tensor]:
    """Colour and mask [F, H, W] of the largest shape: pixels near a colour of the palette."""
    rgb = (clip.permute(1, 2, 3, 0) + 1) / 2
    palette = torch.tensor(list(COLOURS.values()))
    distances = torch.cdist(rgb, palette)
    masks = (distances < 0.3) & (distances == distances.amin(-1, keepdim=True))
    best = int(masks.sum((0, 1, 2)).argmax())
    return list(COLOURS)[best], masks[..., best].float()


def _centre(mask: Tensor) -> tuple[Tensor, Tensor]:
    """x and y [F], in pixels."""
    area, (height, width) = mask.sum((1, 2)), mask.shape[1:]
    x = (mask * (torch.arange(width) + 0.5)).sum((1, 2)) / area
    return x, (mask * (torch.arange(height)[:, None] + 0.5)).sum((1, 2)) / area


def _motion(mask: Tensor, area: Tensor, x: Tensor, y: Tensor) -> str:
    growth = float(area[-2:].mean() / area[:2].mean())
    if max(growth, 1 / growth) > 2:
        return "grows" if growth > 1 else "shrinks"
    dx, dy = float(x[-1] - x[0]), float(y[-1] - y[0])
    if math.hypot(dx, dy) > 10:
        return max(DIRECTIONS, key=lambda name: dx * DIRECTIONS[name][0] + dy * DIRECTIONS[name][1])
    if float(y.max() - y.min()) > 8:
        return "bounces"
    return "turns" if _turned(mask, x, y) > 45 else "stays"


def _turned(mask: Tensor, x: Tensor, y: Tensor) -> float:
    """Degrees that a mask [F, H, W] turns about its centre, from its three or four corners."""
    across = torch.arange(mask.size(2)) + 0.5 - x[:, None, None]
    down = torch.arange(mask.size(1))[:, None] + 0.5 - y[:, None, None]
    place, reach = torch.complex(*torch.broadcast_tensors(across, down)), 0
    for corners in (3, 4):
        moments = (mask * place**corners).sum((1, 2))
        size = (mask * place.abs() ** corners).sum((1, 2))
        strength = float((moments.abs() / size).min())
        steps = (moments[1:] * moments[:-1].conj()).angle() / corners
        if strength > 0.1:
            reach = max(reach, abs(math.degrees(float(steps.sum()))))
    return reach
