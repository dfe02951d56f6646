"""Maximum-weight closed set of a forest under a bound on its size: which nodes to expand when all cost the same.

Given weights w [N] and a limit m, choose a set X of at most m nodes, with every node its parent, that maximises the sum
of w. Weights may be +inf (the node must be in X; its ancestors must then be +inf too) or -inf (it must not be in X).

1. *Hull.* For a price lam per node the best set follows bottom-up from val(n) = w(n) - lam + sum over children of
   max(0, val), as in optimal tree pruning (Breiman, Friedman, Olshen and Stone 1984; Chou, Lookabaugh and Gray, IEEE
   Trans. Inf. Theory 35, 1989). Sets for falling prices are nested and lie on the concave hull of best weight over
   size. The price at which the size crosses m is found by chords: each chord between a set that fits and one that does
   not gives the next price.
2. *Core.* The hull has no set of exactly m nodes when a bundle (an ancestor and the descendants that pay for it)
   straddles the limit. The dual value at the price bounds the optimum from above, a greedy filling from below. A node
   whose change of side would cost more than the gap keeps its side in every optimal set (reduced-cost fixing, as in
   knapsack solvers); the others, usually a few dozen, are settled exactly by dynamic programming over sizes (tree
   knapsack).

The result is optimal when the core has at most `CORE_NODES` nodes. Otherwise only the nodes nearest to the price are
settled exactly, and the loss is at most the gap: the price times the units that the hull's set left free, less than one
bundle.
"""

from __future__ import annotations

import numpy as np

from mc_runtime.focus.forest import Bools, Floats, Forest, Positions

CORE_NODES = 256
"""Nodes that dynamic programming may settle: bounds its time (at most CORE_NODES**2 cells, usually far fewer)."""

MAX_CHORDS = 64
"""Any price gives a valid bound, so that stopping early costs optimality at worst."""


def values(forest: Forest, w: Floats, price: float) -> Floats:
    """[N]: what each node's best subtree is worth at a price per node, given that its parent is chosen."""
    val = w - price
    for a, b, starts, up in forest.links:
        val[up] += np.add.reduceat(np.maximum(val[a:b], 0.0), starts)
    return val


def closed_where(forest: Forest, good: Bools) -> Bools:
    """[N]: the nodes that are `good` along with all their ancestors."""
    chosen = good.copy()
    for a, b, _, _ in reversed(forest.links):
        chosen[a:b] &= chosen[forest.parent[a:b]]
    return chosen


def weight_of(w: Floats, chosen: Bools) -> float:
    """The sum of `w` over the chosen nodes. Not a dot product: BLAS would start threads that cost more than the sum."""
    return float((w * chosen).sum())


def best_closed_set(forest: Forest, w: Floats, limit: int) -> Bools:
    """[N]: a closed set of at most `limit` nodes of (nearly, see above) the greatest sum of `w`.

    Never leaves a unit free that a node of positive weight could take. The nodes of weight +inf must fit.
    """
    high = closed_where(forest, values(forest, w, 0.0) > 0)
    if np.count_nonzero(high) <= limit:
        return high
    low = w == np.inf
    finite = np.where(np.isfinite(w), w, 0.0)
    n_low, n_high = int(np.count_nonzero(low)), int(np.count_nonzero(high))
    sum_low, sum_high = 0.0, weight_of(finite, high)
    assert n_low <= limit
    for _ in range(MAX_CHORDS):
        price = (sum_high - sum_low) / (n_high - n_low)
        val = values(forest, w, price)
        chosen = closed_where(forest, val > 0)
        size = int(np.count_nonzero(chosen))
        if size == limit:
            return chosen
        if not n_low < size < n_high:  # no set lies above the chord: the price is the hull's slope at the limit
            break
        if size < limit:
            low, n_low, sum_low = chosen, size, weight_of(finite, chosen)
        else:
            high, n_high, sum_high = chosen, size, weight_of(finite, chosen)
    best = fill(forest, w, low, limit)
    return settle_core(forest, w, finite, limit, price, val, best)


def fill(forest: Forest, w: Floats, chosen: Bools, limit: int) -> Bools:
    """[N]: `chosen` with the heaviest nodes of positive weight that may join it, as many as the limit allows."""
    chosen = chosen.copy()
    addable = (w > 0) & ~chosen
    while (free := limit - int(np.count_nonzero(chosen))) > 0:
        fringe = np.flatnonzero(addable & (chosen[forest.parent] | (forest.parent < 0)))
        if fringe.size == 0:
            break
        if fringe.size > free:
            fringe = fringe[np.argpartition(w[fringe], -free)[-free:]]
        chosen[fringe] = True
        addable[fringe] = False
    return chosen


def settle_core(forest: Forest, w: Floats, finite: Floats, limit: int, price: float, val: Floats, best: Bools) -> Bools:
    """[N]: the better of `best` and the optimum over the sets that differ from the priced one in the core only."""
    chosen = closed_where(forest, val > 0)
    bound = weight_of(finite - price, chosen) + price * limit  # nodes of weight +inf: 0 in both sums, in the limit too
    slack = 1e-12 * abs(bound)
    loss: Floats | None = None
    for most in (CORE_NODES // 8, CORE_NODES):  # a first, small core raises the lower bound and so shrinks the second
        found = weight_of(finite, best)
        if bound - found <= slack:
            break
        loss = side_losses(forest, val, chosen) if loss is None else loss
        near = bound - found + slack
        whole = np.count_nonzero(loss < near) <= most
        core = loss < (near if whole else np.partition(loss, most)[most])
        kept = chosen & ~core
        nodes = np.flatnonzero(core)
        units = limit - int(np.count_nonzero(kept))
        if units > 0 and nodes.size:
            local = np.full(forest.index.size + 1, -1, np.intp)  # the last place answers for parent -1
            local[nodes] = np.arange(nodes.size)
            kept[nodes[tree_knapsack(local[forest.parent[nodes]], w[nodes], units)]] = True
            settled = fill(forest, w, kept, limit)
            best = settled if weight_of(finite, settled) > found else best
        if whole:
            break
    return best


def side_losses(forest: Forest, val: Floats, chosen: Bools) -> Floats:
    """[N]: what the priced optimum loses at least when the node is made to change sides, in or out of the set.

    In: what the node and its ancestors lack. Out: the worth of the node's subtree, or of an ancestor's if that is less.
    Along a path downward the loss of leaving falls and that of joining rises, so that any threshold leaves closed sets.
    """
    loss = np.abs(val)
    loss[~chosen & (val > 0)] = 0.0  # comes with its parent
    for a, b, _, _ in reversed(forest.links):
        up, inside = loss[forest.parent[a:b]], chosen[a:b]
        parent_in = chosen[forest.parent[a:b]]
        loss[a:b] = np.where(inside, np.minimum(loss[a:b], up), loss[a:b] + np.where(parent_in, 0.0, up))
    return loss


def tree_knapsack(parent: Positions, w: Floats, units: int) -> Positions:
    """The best closed set of at most `units` of n nodes, exactly: their positions.

    parent [n]: position of the parent, which is larger than the node's own, or -1; w [n] finite. O(n * units) cells.
    best[j] of a node is the greatest weight of j nodes of its subtree with the node itself among them.
    """
    n = w.size
    root = np.where(parent < 0, n, parent)  # one virtual root above all
    heads = np.unique(root)
    has_children = np.zeros(n, np.bool_)
    has_children[heads[:-1]] = True
    leaves = np.flatnonzero(~has_children)
    leaves = leaves[np.lexsort((-w[leaves], root[leaves]))]
    cuts = root[leaves].searchsorted(np.arange(n + 2))
    branches: dict[int, list[int]] = {}
    for node in heads[:-1].tolist():
        branches.setdefault(int(root[node]), []).append(node)

    best: dict[int, Floats] = {}
    splits: dict[int, list[tuple[int, Positions]]] = {}
    for node in heads.tolist():
        own = w[leaves[cuts[node] : min(cuts[node + 1], cuts[node] + units)]]
        table = np.concatenate([[0.0], np.cumsum(own)])  # leaves are taken heaviest first
        steps = []
        for child in branches.get(node, []):
            table, taken = merge(table, best[child], units)
            steps.append((child, taken))
        splits[node] = steps
        if node < n:
            table = np.concatenate([[0.0], w[node] + table])[: units + 1]
        best[node] = table

    picked: list[Positions] = []
    stack = [(n, int(np.argmax(best[n])))]
    while stack:
        node, size = stack.pop()
        if node < n:
            if size == 0:
                continue
            picked.append(np.array([node]))
            size -= 1
        for child, taken in reversed(splits[node]):
            part = int(taken[size])
            stack.append((child, part))
            size -= part
        picked.append(leaves[cuts[node] : cuts[node] + size])
    return np.concatenate(picked)


def merge(a: Floats, b: Floats, units: int) -> tuple[Floats, Positions]:
    """(max, +) convolution up to `units`: `(table, taken)`, where `taken[j]` of the j nodes come from b."""
    size = min(a.size + b.size - 1, units + 1)
    padded = np.full(size + b.size, -np.inf)  # j - i below 0 wraps round to the padding
    padded[: a.size] = a[:size]
    j = np.arange(size)
    sums = padded[j[:, None] - np.arange(b.size)] + b
    taken = sums.argmax(axis=1)
    return sums[j, taken], taken
