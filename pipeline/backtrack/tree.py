"""The token tree: an undo moves a cursor back to an ancestor, so walks with undos that share their beginnings are one tree.

The visible context of a node is its ancestors and itself, its position is its depth. Pure functions on token ids: rollouts,
search and traces grow trees, layout.py turns them into one forward pass. No tokenizer, no model, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.backtrack.undo import UndoRule, apply_undo

Rewinding = Literal["immediate", "deferred"]
ROOT = -1  # the parent of the root


@dataclass(frozen=True)
class Walk:
    """One completion as it was emitted, undo tokens and deleted tokens included."""

    prompt: tuple[int, ...]
    """Never undone and never a target; at least one id, since the first emitted token is predicted from its last one."""
    ids: tuple[int, ...]
    """[n] What was emitted."""
    logprobs: tuple[float, ...] | None = None
    """[n] Log-probabilities under the policy that emitted the ids."""
    banned: tuple[frozenset[int], ...] | None = None
    """[n] What that policy was forbidden at each place. With deferred rewinding U belongs in here right behind a run of U's,
    or the run and a new one could not be told apart."""
    targets: tuple[int, ...] | None = None
    """[n] What should have been emitted at each place, for training; the ids themselves when None."""
    weights: tuple[float, ...] | None = None
    """[n] What each target counts in a loss, 0 for masked ones; all count 1 when None."""
    roles: tuple[int, ...] | None = None
    """[n] What each id is in a trace, see trace.py."""
    closed: frozenset[int] = frozenset()
    """Indices of U's behind which a deferred run had to end, so that its end is no action."""
    prompt_weight: float = 0.0
    """What the prompt's tokens count from the second on; where it is 0 they are no actions."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a walk without a prompt: nothing predicts its first token; begin it with one token at least")
        for name in ("logprobs", "banned", "targets", "weights", "roles"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"a walk of {len(self.ids)} ids with {len(values)} {name}")


@dataclass(frozen=True, slots=True)
class Action:
    """A token that is emitted, or is to be emitted, in a state. U is an action like any other."""

    node: int
    """The state: the node on top of the stack. In a linear layout: the index of the token before."""
    token: int
    walk: int = 0
    """Which walk it belongs to."""
    step: int = 0
    """Its index among the ids of that walk, negative within the prompt; for `ends_run` that of the id behind the run."""
    weight: float = 1.0
    """What it counts in a loss; 0 when it is masked."""
    role: int = -1
    """What the emitted id is in a trace; -1 when not known."""
    ends_run: bool = False
    """The action is *not* to emit `token` (U): with deferred rewinding that is what ends a run of undos."""
    logprob: float | None = None
    """Under the policy that emitted it; None when not known."""
    banned: frozenset[int] = frozenset()
    """Ids that were forbidden there; probabilities are renormalised without them."""


@dataclass(frozen=True)
class TokenTree:
    """Nodes in an order in which parents come first. There is one root, node 0: the first token of the prompt.

    Raises:
        ValueError: no node, a second root, a parent that does not come before its child (so also: a cycle), an action without
            its node, or lengths that differ.
    """

    parent: tuple[int, ...]
    """[nodes] ROOT (-1) for node 0."""
    token: tuple[int, ...]
    """[nodes]"""
    actions: tuple[Action, ...] = ()
    """In the order of the walks. A node may have several: the error first, the correction after the undo."""
    depth: tuple[int, ...] = field(init=False)
    """[nodes] Number of ancestors; also the position of the token."""

    def __post_init__(self) -> None:
        if not self.parent or len(self.parent) != len(self.token):
            raise ValueError(f"a tree of {len(self.token)} tokens with {len(self.parent)} parents")
        depth: list[int] = []
        for node, parent in enumerate(self.parent):
            if parent == ROOT and node:
                raise ValueError(f"two roots, nodes 0 and {node}: walks of one tree begin with the same token")
            if parent < ROOT or parent >= node:
                raise ValueError(f"node {node} has parent {parent}, which does not come before it")
            depth.append(depth[parent] + 1 if node else 0)
        for action in self.actions:
            if not 0 <= action.node < len(depth):
                raise ValueError(f"an action at node {action.node} of a tree of {len(depth)} nodes")
        object.__setattr__(self, "depth", tuple(depth))

    def path(self, node: int) -> tuple[int, ...]:
        """Token ids from the root to the node: what a model in that state sees."""
        ids = []
        while node != ROOT:
            ids.append(self.token[node])
            node = self.parent[node]
        return tuple(reversed(ids))


def grow(walks: Sequence[Walk], rule: UndoRule, rewinding: Rewinding = "deferred") -> TokenTree:
    """The tree of several walks; a node's child with the same token is reused, so what they share is there once.

    With `immediate` rewinding each U moves back at once and has no node. With `deferred` (unit `token` alone; `step` and `all`
    delete by one U and are always immediate) the U's of a run see the error and each other, hence have nodes, and the token
    behind the run is predicted where the run has moved back to. That the run ends is an action of its own (`ends_run`).

    Linear time. Which tokens a U deletes is apply_undo's word.

    Raises:
        ValueError: a prompt that holds U, or walks that do not begin with the same token.

    Example:
        >>> tree = grow([Walk(prompt=(5,), ids=(1, 2, 9, 3))], UndoRule(undo_id=9), "immediate")
        >>> [(tree.path(action.node), action.token) for action in tree.actions]
        [((5,), 1), ((5, 1), 2), ((5, 1, 2), 9), ((5, 1), 3)]
    """
    deferred = rewinding == "deferred" and rule.unit == "token"
    parents: list[int] = []
    tokens: list[int] = []
    children: dict[tuple[int, int], int] = {}
    actions: list[Action] = []

    def descend(node: int, token: int) -> int:
        child = children.setdefault((node, token), len(parents))
        if child == len(parents):
            parents.append(node)
            tokens.append(token)
        return child

    undo_id, free = rule.undo_id, frozenset[int]()
    for number, walk in enumerate(walks):
        if undo_id in walk.prompt:
            raise ValueError(f"the prompt of walk {number} holds the undo token, which acts on completions alone")
        state = descend(ROOT, walk.prompt[0])
        for at, token in enumerate(walk.prompt[1:], start=1):
            if walk.prompt_weight:
                actions.append(Action(state, token, number, at - len(walk.prompt), walk.prompt_weight))
            state = descend(state, token)
        stack, emitted = [state], [-1]  # nodes, and for each the step that pushed it; the prompt's end stays
        deleted_by = apply_undo(walk.ids, rule).deleted_by
        logprobs, banned, weights, roles = walk.logprobs, walk.banned, walk.weights, walk.roles
        targets = walk.targets or walk.ids
        for step, token in enumerate(walk.ids):
            weight = weights[step] if weights else 1.0
            if state != stack[-1] and token != undo_id:
                if step - 1 not in walk.closed:
                    ended = weights[step - 1] if weights else 1.0  # ending the run is as right as the run
                    actions.append(Action(state, undo_id, number, step, ended, roles[step - 1] if roles else -1, True))
                state = stack[-1]
            logprob = logprobs[step] if logprobs else None
            role = roles[step] if roles else -1
            actions.append(
                Action(state, targets[step], number, step, weight, role, False, logprob, banned[step] if banned else free)
            )
            if token != undo_id:
                state = descend(state, token)
                stack.append(state)
                emitted.append(step)
                continue
            while emitted[-1] >= 0 and deleted_by[emitted[-1]] == step:
                stack.pop()
                emitted.pop()
            state = descend(state, token) if deferred else stack[-1]
    return TokenTree(tuple(parents), tuple(tokens), tuple(actions))
