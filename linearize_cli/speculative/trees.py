"""Token trees in Medusa's form (choices of candidates), and the choice of the tree with the best speed."""

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from linearize_cli.errors import UserError
from linearize_cli.inputs import read_json, user_path

CHAIN, AUTO = "chain", "auto"
NODES = 64  # the most nodes of an optimised tree, including the root
Rates = Sequence[Sequence[float]]  # acceptance[depth - 1][rank]

# Medusa's tree for Vicuna 7B (arXiv 2401.10774, FasterDecoding/Medusa). Each word is a node, each digit the rank of
# the candidate at one depth.
MC_SIM_7B_63 = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 "
    "0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


@dataclass(frozen=True)
class Choices:
    """The shape of a token tree in Medusa's form. A node is the tuple of candidate ranks on the path from the
    root.

    Rank 0 is a head's most probable candidate. For example, `(0, 2)` is the third best candidate of the
    second head, after the best one of the first head.

    Attributes:
        paths: the nodes without the root, shorter ones first.
    """

    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> "Choices":
        """Return the tree with these nodes, in any order. The root, which is the empty tuple, is not listed.

        Raises:
            ValueError: a node is listed twice, is the root, or has no parent.
        """
        ordered = sorted(map(tuple, paths), key=lambda path: (len(path), path))
        known = {(), *ordered}
        for path, before in zip(ordered, [None, *ordered], strict=False):
            if path == before or not path:
                raise ValueError(f"{list(path)} is listed twice" if path else "[] is the root itself")
            if path[:-1] not in known:
                raise ValueError(f"{list(path)} has no parent: {list(path[:-1])} is missing")
        return cls(tuple(ordered))

    @property
    def parents(self) -> list[int]:
        """Return the index of each node's parent. The root is node 0, with parent -1, then come the nodes of
        `paths`.
        """
        place = {path: i for i, path in enumerate(self.paths, 1)} | {(): 0}
        return [-1, *(place[path[:-1]] for path in self.paths)]

    @property
    def depth(self) -> int:
        """Return the depth of the deepest node. The root has depth 0."""
        return max(map(len, self.paths), default=0)

    @property
    def width(self) -> int:
        """Return the number of candidates that each head must give: the highest rank plus 1, or 0 for the
        root alone.
        """
        return max((path[-1] for path in self.paths), default=-1) + 1

    def expected(self, acceptance: Rates) -> float:
        """Return the expected number of new tokens per step: the accepted nodes, and the token after them.

        The heads are assumed to be right independently of one another.

        Args:
            acceptance: `acceptance[k - 1][r]`, how often the candidate of rank r of head k is right.
        """
        return 1 + sum(probability(path, acceptance) for path in self.paths)


def probability(path: Sequence[int], acceptance: Rates) -> float:
    """Return the probability that a node and all its ancestors are accepted.

    Args:
        path: the node, as the ranks on the path from the root.
        acceptance: `acceptance[k - 1][r]`, how often the candidate of rank r of head k is right.
    """
    return prod(rates[rank] for rates, rank in zip(acceptance, path, strict=False))


def chain(depth: int) -> Choices:
    """Return the chain of the best candidates of `depth` heads."""
    return Choices(tuple((0,) * n for n in range(1, depth + 1)))


NAMED = {"mc_sim_7b_63": Choices.of([tuple(map(int, ranks)) for ranks in MC_SIM_7B_63.split()])}


def named_tree(name: str, depth: int, vocabulary: int, best: Choices) -> Choices:
    """Return the tree for the option `--tree`.

    Args:
        name: `auto`, `chain` (the best candidate of each head), `mc_sim_7b_63` (a tree of the Medusa paper),
            or the path of a JSON file with a list of nodes.
        depth: the number of heads.
        vocabulary: the number of candidates of each head.
        best: the tree for `auto`.

    Raises:
        UserError: the tree does not exist, or needs more heads or candidates than there are.
    """
    known = {AUTO: best, CHAIN: chain(depth), **NAMED}
    tree = known[name] if name in known else read_choices(name, known)
    if tree.depth > depth:
        raise UserError(
            f"--tree {name} is {tree.depth} deep, but there are {depth} heads",
            "Remove its deeper nodes, or train more heads.",
        )
    if tree.width > vocabulary:
        raise UserError(
            f"--tree {name} uses rank {tree.width - 1}, but the vocabulary has {vocabulary} tokens",
            f"Use ranks from 0 to {vocabulary - 1}.",
        )
    return tree


def read_choices(file: str, known: Iterable[str]) -> Choices:
    """Read a tree from a JSON file such as `[[0], [1], [0, 0]]`.

    Args:
        known: the names of trees that the error lists if there is no such file.

    Raises:
        UserError: the file does not exist, or is not a tree.
    """
    hint = "Write a list of nodes, each a list of ranks, such as [[0], [1], [0, 0]]."
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"--tree {file}: no such file", f"Use {', '.join(known)}, or a JSON file of nodes.")
    paths = read_json(path, hint)
    if not is_choices(paths):
        raise UserError(f"--tree {file} is not a list of lists of ranks (whole numbers from 0)", hint)
    try:
        return Choices.of(paths)
    except ValueError as error:
        raise UserError(f"--tree {file} is not a tree: {error}", hint) from None


def is_choices(data: object) -> bool:
    """Return True if data is a non-empty list of lists of integers from 0."""
    return (
        isinstance(data, list)
        and bool(data)
        and all(isinstance(path, list) and all(type(r) is int and r >= 0 for r in path) for path in data)
    )


def likeliest(acceptance: Rates, nodes: int = NODES) -> list[tuple[int, ...]]:
    """Return the nodes that are most likely to be accepted with all their ancestors, the most likely first.

    The first n of them form a tree, the best one of n nodes below the root, for every n.

    Args:
        acceptance: `acceptance[k - 1][r]`, how often the candidate of rank r of head k is right.
        nodes: the most nodes, including the root.
    """
    waiting, found = [(-acceptance[0][0], (0,), 1.0)], []  # (-probability, path, probability of the parent)
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
    """Return the tree with the most expected tokens per second.

    Args:
        acceptance: `acceptance[k - 1][r]`, how often the candidate of rank r of head k is right. It falls
            with r.
        seconds: the duration of a step by the number of nodes, including the root. Other numbers are
            interpolated.
    """
    nodes = likeliest(acceptance, max(seconds))
    expected, best = 1.0, (0.0, 0)
    for count in range(len(nodes) + 1):
        expected += probability(nodes[count - 1], acceptance) if count else 0.0
        best = max(best, (expected / interpolated(seconds, count + 1), count))
    return Choices.of(nodes[: best[1]])


def interpolated(points: Mapping[int, float], x: int) -> float:
    """Return the value at `x` by linear interpolation between points. Outside of them it is the nearest
    point's value.
    """
    known = sorted(points)
    after = bisect_left(known, x)
    if after in (0, len(known)):
        return points[known[min(after, len(known) - 1)]]
    low, high = known[after - 1], known[after]
    return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
