"""Which parameters decay: matrices do; norms, biases and tables do not.

Book: optim-groups
"""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

_SPARED = re.compile(r"Norm|Embedding|Positions|RelativeBias")  # in the name of a module's class


def decay_groups(
    model: nn.Module, weight_decay: float, *, spared: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The model's parameters in two groups, with decay and without, each parameter once and with its name.

    Without decay are vectors and numbers (biases, gains), what a norm or a table of embeddings or positions
    owns, and what is named in `spared`. A matrix that is a table and an output layer at once is a table,
    whichever the model registered first. Frozen parameters are left out, and so is an empty group.

    Args:
        model: any module; norms and tables are known by the name of their class.
        weight_decay: λ of the first group.
        spared: patterns of further names, each to match a whole name, such as `r".*cls_token"`.

    Returns:
        Groups for an optimizer: `params` are pairs of name and parameter.

    Raises:
        ValueError: the decay is negative, the model has nothing to train, or a pattern matches no parameter.

    Book: optim-groups
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}")
    owners: dict[int, list[str]] = {}  # every module that holds a parameter; a tied one has several
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(type(module).__name__)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("model: expected parameters to train, got none")
    for pattern in spared:
        if not any(re.fullmatch(pattern, name) for name, _ in named):
            raise ValueError(f"spared: {pattern!r} is the name of no parameter")

    def decays(name: str, p: nn.Parameter) -> bool:
        kept = any(_SPARED.search(owner) for owner in owners[id(p)])
        return p.dim() >= 2 and not kept and not any(re.fullmatch(pattern, name) for pattern in spared)

    groups = [
        {"params": [(name, p) for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
