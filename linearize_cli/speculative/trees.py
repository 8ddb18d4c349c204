"""Token trees as choices: which candidate of which head every node is, and which tree is worth its cost."""

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from linearize_cli.errors import UserError
from linearize_cli.inputs import read_json, user_path

CHAIN, AUTO = "chain", "auto"
NODES = 64  # of an optimised tree at most, its root included
Rates = Sequence[Sequence[float]]  # acceptance[depth - 1][rank]

# Medusa's tree for Vicuna 7B, a node a choice (arXiv 2401.10774, FasterDecoding/Medusa): depths run together, a
# digit a rank.
MC_SIM_7B_63 = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 "
    "0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


@dataclass(frozen=True)
class Choices:
    """A tree below its root, in Medusa's form: a node is the ranks of the candidates on its way from the root, so
    `(0, 2)` is the third best candidate of the second head behind the best one of the first.

    Attributes:
        paths: of the nodes, shorter ones first.
    """

    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> "Choices":
        """
        Raises:
            ValueError: a node stands there twice, is the root, or has no parent.
        """
        ordered = sorted(map(tuple, paths), key=lambda path: (len(path), path))
        known = {(), *ordered}
        for path, before in zip(ordered, [None, *ordered], strict=False):
            if path == before or not path:
                raise ValueError(f"{list(path)} stands there twice" if path else "[] is the root itself")
            if path[:-1] not in known:
                raise ValueError(f"{list(path)} has no parent: {list(path[:-1])} is not there")
        return cls(tuple(ordered))

    @property
    def parents(self) -> list[int]:
        """Of the root, -1, and of the nodes."""
        place = {path: i for i, path in enumerate(self.paths, 1)} | {(): 0}
        return [-1, *(place[path[:-1]] for path in self.paths)]

    @property
    def depth(self) -> int:
        """How far the deepest node is below the root."""
        return max(map(len, self.paths), default=0)

    @property
    def width(self) -> int:
        """Candidates that a head must give."""
        return max((path[-1] for path in self.paths), default=-1) + 1

    def expected(self, acceptance: Rates) -> float:
        """Tokens that a step gives on average, the one after the accepted path included, if heads are right
        independently of one another.
        """
        return 1 + sum(probability(path, acceptance) for path in self.paths)


def probability(path: Sequence[int], acceptance: Rates) -> float:
    return prod(rates[rank] for rates, rank in zip(acceptance, path, strict=False))


def chain(depth: int) -> Choices:
    """The best candidate all the way."""
    return Choices(tuple((0,) * n for n in range(1, depth + 1)))


NAMED = {"mc_sim_7b_63": Choices.of([tuple(map(int, ranks)) for ranks in MC_SIM_7B_63.split()])}


def named_tree(name: str, depth: int, vocabulary: int, best: Choices) -> Choices:
    """The tree that a user names: `auto`, `chain`, `mc_sim_7b_63`, or a JSON file of choices.

    Args:
        depth: heads that there are; vocabulary: candidates that each has.
        best: what `auto` stands for.

    Raises:
        UserError: no such tree, or one that the heads cannot fill.
    """
    known = {AUTO: best, CHAIN: chain(depth), **NAMED}
    tree = known[name] if name in known else read_choices(name, known)
    if tree.depth > depth:
        raise UserError(
            f"--tree {name} is {tree.depth} deep, but there are {depth} heads",
            "Take its deeper nodes out, or train more heads.",
        )
    if tree.width > vocabulary:
        raise UserError(
            f"--tree {name} asks for rank {tree.width - 1}, but the vocabulary has {vocabulary} tokens",
            "Ranks begin at 0.",
        )
    return tree


def read_choices(file: str, known: Iterable[str]) -> Choices:
    """A JSON file such as `[[0], [1], [0, 0]]`.

    Raises:
        UserError: it is not there, or is no tree.
    """
    hint = "It is a list of choices, a list of ranks each, such as [[0], [1], [0, 0]]."
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"--tree {file}: no such file", f"Name {', '.join(known)}, or a file of choices.")
    paths = read_json(path, hint)
    if not is_choices(paths):
        raise UserError(f"--tree {file} is no list of lists of ranks, which are whole numbers from 0", hint)
    try:
        return Choices.of(paths)
    except ValueError as error:
        raise UserError(f"--tree {file} is no tree: {error}", hint) from None


def is_choices(data: object) -> bool:
    """Whether data has the form of choices: lists of numbers from 0, not empty as a whole."""
    return (
        isinstance(data, list)
        and bool(data)
        and all(isinstance(path, list) and all(type(r) is int and r >= 0 for r in path) for path in data)
    )


def likeliest(acceptance: Rates, nodes: int = NODES) -> list[tuple[int, ...]]:
    """The nodes with the highest probability to be accepted with all their ancestors, the highest first: any first
    ones of them are a tree, the best of their number.
    """
    waiting, found = [(-acceptance[0][0], (0,), 1.0)], []  # with the probability of what is above
    while waiting and len(found) < nodes - 1:
        negative, path, above = heapq.heappop(waiting)
        found.append(path)
        rank, depth = path[-1] + 1, len(path)
        if rank < len(acceptance[depth - 1]):
            heapq.heappush(waiting, (-above * acceptance[depth - 1][rank], (*path[:-1], rank), above))
        if depth < len(acceptance):
            heapq.heappush(waiting, (negative * acceptance[depth][0], (*path, 0), -negative))
    return found


def optimised(acceptance: Rates, seconds: Mapping[int, float]) -> Choices:
    """The tree with the most expected tokens per second.

    Args:
        acceptance: `acceptance[k][r]`, how often the candidate of rank r of head k + 1 is right; it falls with r.
        seconds: of a step with so many nodes, root included, for some numbers of nodes; between them it is
            interpolated.
    """
    nodes = likeliest(acceptance, max(seconds))
    expected, best = 1.0, (0.0, 0)
    for count in range(len(nodes) + 1):
        expected += probability(nodes[count - 1], acceptance) if count else 0.0
        best = max(best, (expected / interpolated(seconds, count + 1), count))
    return Choices.of(nodes[: best[1]])


def interpolated(points: Mapping[int, float], x: int) -> float:
    """Linear between the points, constant outside."""
    known = sorted(points)
    after = bisect_left(known, x)
    if after in (0, len(known)):
        return points[known[min(after, len(known) - 1)]]
    low, high = known[after - 1], known[after]
    return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
