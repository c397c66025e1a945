"""What the optimizers of this package share: settings and gradients that are checked, and two ways to step.

An optimizer says what it keeps of a parameter (`_start`), and how one parameter moves (`_move`), which reads
like its equation. `_move_all` does the same to a list of parameters at once, in fewer and longer operations.

Book: optimization
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
"""What an optimizer keeps of one parameter: tensors of its shape, and its number of steps."""

Tensors = list[Tensor] | tuple[Tensor, ...]

_AT_LEAST_0 = ("lr", "weight_decay", "eps", "rho", "gamma")
_AT_ONCE = 2**18  # numbers that a processor's cache holds together with their gradients and states


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that names what is wrong, before it has moved anything.

    Args:
        params: parameters, pairs of name and parameter, or groups of either with settings of their own.
        defaults: the settings of a group that has none of its own.
        foreach: move parameters in lists; where False one by one, as the equation is written.
        check_finite: look through all gradients before a step.

    Raises:
        TypeError: `params` is a lone tensor, or a parameter is complex.
        ValueError: there are no parameters, or a setting is out of its range.

    Book: optimization
    """

    foreach = True
    check_finite = True

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, foreach: bool, check_finite: bool
    ) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params: expected parameters in a list, got a lone tensor")
        given = list(params)
        if not given:
            raise ValueError("params: expected at least one parameter, got none")
        self.foreach, self.check_finite = foreach, check_finite
        super().__init__(given, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take on a group of parameters, with the default settings where it has none of its own.

        Raises:
            TypeError: a parameter is complex.
            ValueError: a setting is out of its range, or a parameter is in a group already.

        Book: optimization
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            for i, p in enumerate(group["params"]):
                self._check_parameter(_name(group, len(self.param_groups) - 1, i), p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient, once.

        Args:
            closure: computes the loss and its gradients, for the caller who wants the loss back.

        Returns:
            What the closure returned.

        Raises:
            TypeError: a gradient is sparse.
            FloatingPointError: a gradient holds NaN or infinity. Nothing was moved.

        Book: optimization
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            for params in self._batches(group):
                grads: Tensors = [p.grad for p in params if p.grad is not None]
                states = [self.state[p] for p in params]
                if group.get("maximize"):
                    grads = torch._foreach_neg(grads)
                if self.foreach:
                    self._move_all(params, grads, states, group)
                else:
                    for p, g, state in zip(params, grads, states, strict=True):
                        self._move(p, g, state, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the name of the optimizer.

        Book: optimization
        """
        return super().state_dict() | {"optimizer": type(self).__name__}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` gave.

        Raises:
            ValueError: it is of another optimizer, or of other groups; nothing was changed.

        Book: optimization
        """
        name = state_dict.get("optimizer")
        if name != type(self).__name__:
            kept = sorted({key for state in state_dict.get("state", {}).values() for key in state})
            came = name or f"one without a name that keeps {', '.join(kept) or 'nothing'}"
            raise ValueError(f"state_dict: expected the state of {type(self).__name__}, got that of {came}")
        for number, (saved, group) in enumerate(
            zip(state_dict["param_groups"], self.param_groups, strict=False)
        ):
            for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=False)):
                for what, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.shape != p.shape:
                        raise ValueError(
                            f"state_dict: expected {what} of {_name(group, number, i)} "
                            f"to have shape {tuple(p.shape)}, got {tuple(value.shape)}"
                        )
        super().load_state_dict(dict(state_dict))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"foreach": self.foreach, "check_finite": self.check_finite}

    def _start(self, p: Tensor) -> State:
        """What is kept of a parameter before its first step."""
        raise NotImplementedError

    def _move(self, p: Tensor, g: Tensor, state: State, group: dict[str, Any]) -> None:
        """One step of one parameter with gradient g."""
        raise NotImplementedError

    def _move_all(
        self, params: list[Tensor], grads: Tensors, states: list[State], group: dict[str, Any]
    ) -> None:
        """One step of parameters of one device, one dtype and one number of steps."""
        raise NotImplementedError

    def _check_parameter(self, name: str, p: Tensor) -> None:
        if p.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {p.dtype}")

    def _kept(self, p: Tensor) -> State:
        """The state of a parameter, begun where there is none."""
        state = self.state[p]
        if not state:
            state.update(self._start(p))
        return state

    def _batches(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """The parameters with a gradient, in lists that can be moved together.

        On a processor a list is no longer than its cache: what one operation has written, the next one finds
        there.
        """
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault((p.device, p.dtype, self._kept(p).get("step")), []).append(p)
        for (device, *_), params in alike.items():
            batch: list[Tensor] = []
            numbers = 0
            for p in params:
                if batch and device.type == "cpu" and numbers + p.numel() > _AT_ONCE:
                    yield batch
                    batch, numbers = [], 0
                batch.append(p)
                numbers += p.numel()
            yield batch

    def _check_gradients(self) -> None:
        """Raise before anything is moved, where a gradient cannot be used."""
        grads: list[tuple[str, Tensor]] = []
        for number, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"{_name(group, number, i)}: expected a dense gradient, got {p.grad.layout} "
                        "(an nn.Embedding makes them with sparse=True)"
                    )
                grads.append((_name(group, number, i), p.grad))
        # NaN and infinity survive a sum, so that one number for each gradient is enough; a sum may also
        # overflow by itself, hence the second look
        if not self.check_finite or not grads or _finite([g.sum(dtype=_wide(g)) for _, g in grads]):
            return
        bad = [(name, g.numel() - int(g.isfinite().sum()), g.numel()) for name, g in grads]
        wrong = [f"{name} ({count} of {size} numbers)" for name, count, size in bad if count]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise FloatingPointError(
                f"expected finite gradients, got NaN or infinity in {', '.join(wrong[:4])}{more}; "
                "nothing was moved"
            )


def _wide(g: Tensor) -> torch.dtype:
    return torch.promote_types(g.dtype, torch.float32)


def _finite(sums: list[Tensor]) -> bool:
    devices = {s.device for s in sums}
    return all(bool(torch.stack([s for s in sums if s.device == d]).isfinite().all()) for d in devices)


def _name(group: Mapping[str, Any], number: int, i: int) -> str:
    """How a message calls parameter i of a group: by its name, or by its place and shape."""
    names = group.get("param_names")
    return (
        names[i] if names else f"parameter {i} of group {number}, of shape {tuple(group['params'][i].shape)}"
    )


def _check_settings(group: Mapping[str, Any]) -> None:
    for name in _AT_LEAST_0:
        if name in group and not 0 <= group[name] < math.inf:
            raise ValueError(f"{name}: expected a number of at least 0, got {group[name]}")
    for name in ("betas", "momentum"):
        if name not in group:
            continue
        given = group[name] if name == "betas" else (group[name],)
        if len(given) != (2 if name == "betas" else 1) or not all(0 <= beta < 1 for beta in given):
            raise ValueError(
                f"{name}: expected {'two numbers' if name == 'betas' else 'a number'} from 0 to below 1, "
                f"got {group[name]}"
            )
    for name in ("update_every", "batch_tokens", "ns_steps"):
        if name in group and (not isinstance(group[name], int) or group[name] < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {group[name]!r}")
