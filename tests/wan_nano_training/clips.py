"""The miniature's world: clips of moving shapes, their prompts, and how a clip is recognised.

A prompt names colour, shape and motion, and sometimes the ground: "a blue square turns over a green
ground". Place, size, speed, the rest of the ground and a small second shape are random.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES, SIZE = 17, 64
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.70, 0.20, 0.80),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "grey": (0.42, 0.42, 0.42),
    "brown": (0.36, 0.22, 0.10),
    "green": (0.08, 0.32, 0.14),
    "blue": (0.08, 0.14, 0.36),
}
DIRECTIONS = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
MOTIONS = (*DIRECTIONS, "bounces", "grows", "shrinks", "turns")
SHAPES = ("ball", "square", "triangle")


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
        for ground in (None, *GROUNDS)
        if ground != colour and (shape, motion) != ("ball", "turns")
    ]


def vocabulary() -> list[str]:
    return sorted({word for scene in scenes() for word in scene.prompt.split()})


def pick(count: int, generator: torch.Generator, unseen: bool = False) -> list[Scene]:
    """Random scenes, half of them with a named ground; ``unseen``: those kept out of training."""
    # every eleventh is kept out of training, evenly over colours, shapes, motions and grounds
    found = [scene for i, scene in enumerate(scenes()) if (i % 11 == 5) == unseen]
    by_ground = [[u for u in found if bool(u.ground) == named] for named in (False, True)]
    coins = torch.rand(2, count, generator=generator).tolist()
    chosen = [(by_ground[a < 0.5], b) for a, b in zip(*coins, strict=True)]
    return [group[int(b * len(group))] for group, b in chosen]


def draw(scene: Scene, generator: torch.Generator) -> Tensor:
    """A clip [3, FRAMES, SIZE, SIZE] in [-1, 1] of a scene; what it leaves open is random."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    time = torch.linspace(0, 1, FRAMES)
    radius = torch.full((FRAMES,), between(8, 13))
    upright = torch.full((FRAMES,), math.pi / 2)
    margin, angle = radius + 2, upright + between(-0.2, 0.2)
    if scene.motion == "turns":  # clockwise, and its corners stay inside
        radius, margin = radius + 4, 1.3 * (radius + 4)
        angle = angle + time * math.radians(between(80, 140))
    if scene.motion in ("grows", "shrinks"):
        radius = between(4, 6.5) + time * between(8, 12)
        radius, margin = radius if scene.motion == "grows" else radius.flip(0), radius + 2
    x, y = (
        torch.full((FRAMES,), between(float(margin.max()), SIZE - float(margin.max())))
        for _ in "xy"
    )
    if scene.motion in DIRECTIONS:
        travel = between(20, SIZE - 2 * float(margin.max()))
        begin = between(float(margin[0]), SIZE - float(margin[0]) - travel)
        along = begin + travel * time
        dx, dy = DIRECTIONS[scene.motion]
        along = along if dx + dy > 0 else SIZE - along
        x, y = (along, y) if dx else (x, along)
    elif scene.motion == "bounces":
        height = between(16, 28)  # it falls and comes back
        floor = between(float(margin[0]) + height, SIZE - float(margin[0]))
        y = floor - height * torch.cos(math.pi * time).abs()

    video = _ground(scene, between)
    if between(0, 1) < 0.35:
        others = [name for name in COLOURS if name not in (scene.colour, scene.ground)]
        place = torch.tensor([[between(6, SIZE - 6)], [between(6, SIZE - 6)]]).expand(2, FRAMES)
        small = torch.full((FRAMES,), between(3, 4.5))
        shape = SHAPES[int(between(0, 3))]
        colour = COLOURS[others[int(between(0, len(others)))]]
        video = _paint(video, colour, shape, *place, small, upright)
    video = _paint(video, COLOURS[scene.colour], scene.shape, x, y, radius, angle, between(1, 2))
    return video * 2 - 1


def _ground(scene: Scene, between) -> Tensor:
    """Plain or graded along one direction; near the named colour, else any dark one."""
    ends = torch.tensor([[between(0.02, 0.45) for _ in range(3)] for _ in range(2)])
    if scene.ground:
        ends = torch.tensor(GROUNDS[scene.ground]) + (ends - 0.23) * 0.25
    if between(0, 1) < 0.4:
        ends = ends[:1].expand(2, 3)
    turn, places = between(0, 2 * math.pi), torch.linspace(-0.5, 0.5, SIZE)
    slope = places * math.cos(turn) + places[:, None] * math.sin(turn) + 0.5
    video = torch.lerp(ends[0, :, None, None], ends[1, :, None, None], slope.clamp(0, 1))
    return video[:, None].expand(3, FRAMES, SIZE, SIZE).clamp(0, 1)


def _paint(
    video: Tensor,
    colour: tuple[float, float, float],
    shape: str,
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    angle: Tensor,
    softness: float = 1.5,
) -> Tensor:
    """Paint a shape over a video at places [FRAMES] in pixels, its edge ``softness`` wide."""
    pixels = torch.arange(SIZE) + 0.5
    across, down = pixels - x[:, None, None], pixels[:, None] - y[:, None, None]
    radius, angle = radius[:, None, None], angle[:, None, None]
    corners = {"ball": 0, "square": 4, "triangle": 3}[shape]
    if corners:
        normals = [angle + 2 * math.pi * i / corners for i in range(corners)]
        sides = [across * u.cos() + down * u.sin() for u in normals]
        inner = radius * {4: 0.9, 3: 0.7}[corners]
        distance = torch.stack(sides).amax(0) - inner
    else:
        distance = (across.square() + down.square()).sqrt() - radius
    cover = torch.sigmoid(-distance * 2 / softness)
    return torch.lerp(video, torch.tensor(colour)[:, None, None, None], cover)


def seen(clip: Tensor) -> tuple[str, str]:
    """Colour and motion of the largest shape in a clip [3, F, H, W] in [-1, 1], from arithmetic.

    Pixels near a colour of the palette are its mask; area, centre and corners of the largest mask
    over the frames give the motion. No motion: "stays"; no mask: ("nothing", "stays").
    """
    rgb = (clip.permute(1, 2, 3, 0) + 1) / 2
    palette = torch.tensor(list(COLOURS.values()))
    distances = (rgb[..., None, :] - palette).norm(dim=-1)
    masks = (distances < 0.3) & (distances == distances.amin(-1, keepdim=True))
    areas = masks.float().sum((1, 2))  # [F, colours]
    best = int(areas.mean(0).argmax())
    mask, area = masks[..., best].float(), areas[:, best]
    if area.min() < 12:
        return "nothing", "stays"
    height, width = mask.shape[1:]
    x = (mask * torch.arange(width)).sum((1, 2)) / area
    y = (mask * torch.arange(height)[:, None]).sum((1, 2)) / area
    return list(COLOURS)[best], _motion(mask, area, x, y)


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
    across = torch.arange(mask.size(2)) - x[:, None, None]
    down = torch.arange(mask.size(1))[:, None] - y[:, None, None]
    place, reach = torch.complex(*torch.broadcast_tensors(across, down)), 0
    for corners in (3, 4):
        moments = (mask * place**corners).sum((1, 2))
        size = (mask * place.abs() ** corners).sum((1, 2))
        strength = float((moments.abs() / size).min())
        steps = (moments[1:] * moments[:-1].conj()).angle() / corners
        if strength > 0.1:
            reach = max(reach, abs(math.degrees(float(steps.sum()))))
    return reach
