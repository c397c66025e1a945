"""Exercises of the page on linear attention.

Book: linear-attention
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import slips_of, tensor_problem
from textbook_code.layers.linear_attention import dense_linear_attention, positive_features


class _Largest(TorchDispatchMode):
    """The size of the largest tensor made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def _features(T: int, m: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(T, m) + 0.1, torch.rand(T, m) + 0.1, torch.randn(T, dv)


def _dense(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    return dense_linear_attention(phi_q[None, None], phi_k[None, None], v[None, None], causal=True)[0][0, 0]


def _slip(got: Any, slips: dict[str, Tensor], tol: float = 1e-4) -> str | None:
    """What is wrong, where the answer equals one of the wrong ones."""
    for said, wrong in slips.items():
        if isinstance(got, Tensor) and got.shape == wrong.shape and torch.allclose(got, wrong, tol, tol):
            return said
    return None


def _causal_slips(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> dict[str, Tensor]:
    weights = phi_q @ phi_k.T
    seen, before = weights.tril(), weights.tril(-1)
    return {
        "that looks ahead: every query has seen all keys": weights / weights.sum(1, keepdim=True) @ v,
        "the weights do not sum to one: the normaliser is missing": seen @ v,
        "the weights do not sum to one: φ(q)·z over all keys was divided by": seen
        / weights.sum(1, keepdim=True)
        @ v,
        "a query does not see its own key: write the state before you read it": (
            before / before.sum(1, keepdim=True).clamp(min=1e-9) @ v
        ),
    }


def _check_running_sums(answer: Callable[..., Any]) -> str | None:
    for T, m, dv in ((3, 2, 5), (17, 5, 3), (1, 4, 4)):
        given = _features(T, m, dv)
        got, expected = answer(*(x.clone() for x in given)), _dense(*given)
        what = f"{T} positions, {m} features, values of width {dv}"
        if problem := tensor_problem(got, expected, what):
            said = _slip(got, _causal_slips(*given)) if T > 1 else None
            return f"{what}: {said}." if said else problem
    T = 512
    with _Largest() as largest:
        answer(*_features(T, 4, 4))
    if largest.numbers >= T * T:
        return f"right, but a tensor of {largest.numbers:,} numbers was made: T × T, which this is to avoid."
    return None


def _check_chunk_carry(answer: Callable[..., Any]) -> str | None:
    for T, m, dv, C in ((12, 5, 3, 4), (13, 2, 7, 5), (4, 3, 3, 9), (6, 3, 2, 1)):
        phi_q, phi_k, v = given = _features(T, m, dv)
        got, expected = answer(*(x.clone() for x in given), C), _dense(*given)
        what = f"{T} positions in chunks of {C}"
        if problem := tensor_problem(got, expected, what):
            place = torch.arange(T) // C
            weights = phi_q @ phi_k.T
            same = place[:, None] == place[None]
            last = same.tril() | (place[:, None] == place[None] + 1)
            slips = {
                "each chunk begins anew: the state is not carried on": weights * same.tril(),
                "inside a chunk a query sees later keys": weights * (same | torch.ones(T, T).tril().bool()),
                "a query sees the chunk before its own, and none earlier": weights * last,
                "a chunk's own keys are read twice, from the state and inside": weights * same.tril()
                + weights * (place[:, None] >= place[None]),
            }
            normalised = {said: w / w.sum(1, keepdim=True) @ v for said, w in slips.items()}
            said = _slip(got, normalised) or _slip(got, _causal_slips(*given))
            return f"{what}: {said}." if said else problem
    T, C = 512, 16
    with _Largest() as largest:
        answer(*_features(T, 4, 4), C)
    if largest.numbers >= T * T:
        return f"right, but a tensor of {largest.numbers:,} numbers was made: T × T, which this is to avoid."
    return None


def _check_positive_feature(answer: Callable[..., Any]) -> str | None:
    for T, d, m in ((3, 4, 7), (5, 16, 9), (2, 9, 1)):
        x, W = torch.randn(T, d), torch.randn(m, d)
        expected = positive_features(x[None, None], W, is_query=True, stabilise=False, eps=0.0)[0, 0]
        got = answer(x.clone(), W.clone())
        what = f"{T} vectors of width {d}, {m} rows"
        if problem := tensor_problem(got, expected, what, tol=1e-4):
            z = x * d**-0.25
            size = z.square().sum(-1, keepdim=True)
            root = m**-0.5
            slips = {
                "the square is not halved": (z @ W.T - size).exp() * root,
                "without the square the mean of the products is too large": (z @ W.T).exp() * root,
                "x is not scaled, so the mean is exp(q·k) and not exp(q·k / √d)": (
                    (x @ W.T - x.square().sum(-1, keepdim=True) / 2).exp() * root
                ),
                "x is scaled by 1/√d; a product of two scaled vectors has it twice": (
                    (x / d**0.5 @ W.T - (x / d**0.5).square().sum(-1, keepdim=True) / 2).exp() * root
                ),
                "a product of features is their sum and not their mean": (z @ W.T - size / 2).exp(),
                "divided by m twice: each of the two features has its root": ((z @ W.T - size / 2).exp() / m),
            }
            said = _slip(got, slips) if m > 1 else None
            return f"{what}: {said}." if said else problem
    return None


def _check_step(answer: Callable[..., Any]) -> str | None:
    T, m, dv = 7, 5, 3
    phi_q, phi_k, v = _features(T, m, dv)
    real = torch.tensor([True, True, False, True, False, True, True])
    S, z = torch.zeros(m, dv), torch.zeros(m)
    for t in range(T):
        result = answer(S, z, phi_q[t].clone(), phi_k[t].clone(), v[t].clone(), bool(real[t]))
        if not isinstance(result, tuple) or len(result) != 3:
            return "expected the triple (out, S, z)."
        out, S, z = result
        keys = phi_k[: t + 1] * real[: t + 1, None]
        want = phi_q[t] @ keys.T @ v[: t + 1] / (phi_q[t] @ keys.sum(0))
        if problem := tensor_problem(out, want, f"out at step {t}"):
            if t == 0:
                return f"{problem[:-1]}; the first position sees itself."
            return f"{problem[:-1]}; step 2 is padding." if t == 2 else problem
        if problem := tensor_problem(z, keys.sum(0), f"z after step {t}"):
            return problem
        if problem := tensor_problem(S, keys.T @ v[: t + 1], f"S after step {t}"):
            return problem
    return None


def _gated(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(len(q)):
        S = gates[t][:, None] * S + k[t][:, None] * v[t][None]
        outs.append(q[t] @ S)
    return torch.stack(outs), S


def _check_gated(answer: Callable[..., Any]) -> str | None:
    for T, d, dv in ((1, 3, 2), (9, 5, 7), (23, 4, 3)):
        q, k, v = torch.randn(T, d), torch.randn(T, d), torch.randn(T, dv)
        gates, S = 0.5 + 0.5 * torch.rand(T, d), torch.randn(d, dv)
        result = answer(*(x.clone() for x in (q, k, v, gates, S)))
        if not isinstance(result, tuple) or len(result) != 2:
            return "expected the pair (outputs, last state)."
        want, end = _gated(q, k, v, gates, S)
        what = f"{T} positions, keys of width {d}, values of width {dv}"
        if problem := tensor_problem(result[0], want, f"{what}: outputs", tol=1e-4):
            shifted = torch.cat([gates[1:], torch.ones(1, d)])
            before, state = [], S
            for t in range(T):
                before.append(q[t] @ state)
                state = gates[t][:, None] * state + k[t][:, None] * v[t][None]
            late, state = [], S
            for t in range(T):
                state = gates[t][:, None] * (state + k[t][:, None] * v[t][None])
                late.append(q[t] @ state)
            slips = {
                "the given state is not read": _gated(q, k, v, gates, torch.zeros_like(S))[0],
                "nothing is forgotten: the gates are not applied": _gated(q, k, v, torch.ones_like(gates), S)[
                    0
                ],
                "each gate is used one step early": _gated(q, k, v, shifted, S)[0],
                "the state is read before it is written": torch.stack(before),
                "the gate also weakens what is written now": torch.stack(late),
            }
            said = _slip(result[0], slips)
            return f"{what}: {said}." if said else problem
        if problem := tensor_problem(result[1], end, f"{what}: last state", tol=1e-4):
            return problem
    return None


_RUNNING = """
    import torch

    def causal_attention(phi_q, phi_k, v):
        S, z = torch.zeros(phi_k.size(1), v.size(1)), torch.zeros(phi_k.size(1))
        outs = []
        for query, key, value in zip(phi_q, phi_k, v):
            S = S + key[:, None] * value
            z = z + key
            outs.append(query @ S / (query @ z))
        return torch.stack(outs)
"""

_CHUNKS = """
    import torch

    def chunked_attention(phi_q, phi_k, v, chunk_size):
        v = torch.cat([v, torch.ones(len(v), 1)], 1)  # the last column makes the normaliser
        S = torch.zeros(phi_k.size(1), v.size(1))
        outs = []
        for q, k, values in zip(*(x.split(chunk_size) for x in (phi_q, phi_k, v))):
            inside = (q @ k.T).tril() @ values
            outs.append(q @ S + inside)
            S = S + k.T @ values
        out = torch.cat(outs)
        return out[:, :-1] / out[:, -1:]
"""

_FEATURE = """
    import torch

    def features(x, W):
        x = x * x.size(-1) ** -0.25
        exponent = x @ W.T - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() * len(W) ** -0.5
"""

_STEP = """
    def step(S, z, phi_q, phi_k, v, real):
        if real:
            S = S + phi_k[:, None] * v
            z = z + phi_k
        return phi_q @ S / (phi_q @ z), S, z
"""

_BUGGY_STEP = """
    def step(S, z, phi_q, phi_k, v, real):
        out = phi_q @ S / (phi_q @ z + 1e-6)
        S = S + phi_k[:, None] * v * real
        z = z + phi_k
        return out, S, z
"""

_GATED = """
    import torch

    def gated_attention(q, k, v, gates, S):
        outs = []
        for t in range(len(q)):
            S = gates[t][:, None] * S + k[t][:, None] * v[t]
            outs.append(q[t] @ S)
        return torch.stack(outs), S
"""


EXERCISES = (
    Exercise(
        name="linear-attention/running-sums",
        title="Attention that carries two sums",
        stars=1,
        statement=r"""
            Write causal linear attention for one head by the recurrence: `phi_q` and `phi_k` are features
            of shape `(T, m)`, `v` is `(T, dv)`. Carry $S_t = \sum_{s \le t} \phi(k_s)\, v_s^\top$ and $z_t =
            \sum_{s \le t} \phi(k_s)$ and return the outputs, `(T, dv)`. The check watches that no tensor has
            $T \times T$ numbers.
        """,
        answer="causal_attention",
        starter="""
            import torch

            def causal_attention(phi_q, phi_k, v):
                raise NotImplementedError
        """,
        solution=_RUNNING,
        wrong=(
            *slips_of(_RUNNING, (" / (query @ z)", "")),
            """
            import torch

            def causal_attention(phi_q, phi_k, v):
                S, z = phi_k.T @ v, phi_k.sum(0)
                return phi_q @ S / (phi_q @ z)[:, None]
            """,
            """
            import torch

            def causal_attention(phi_q, phi_k, v):
                S, z = torch.zeros(phi_k.size(1), v.size(1)), torch.zeros(phi_k.size(1))
                outs = []
                for query, key, value in zip(phi_q, phi_k, v):
                    outs.append(query @ S / (query @ z).clamp(min=1e-9))
                    S, z = S + key[:, None] * value, z + key
                return torch.stack(outs)
            """,
            """
            import torch

            def causal_attention(phi_q, phi_k, v):
                weights = (phi_q @ phi_k.T).tril()
                return weights / weights.sum(1, keepdim=True) @ v
            """,
        ),
        check=_check_running_sums,
        hint="At each position: write first, then read. What do you divide by?",
    ),
    Exercise(
        name="linear-attention/positive-feature",
        title="A feature whose products have the right mean",
        stars=2,
        statement=r"""
            Write the positive random features of a Performer without shift and without $\varepsilon$: from
            `x`, `(T, d)`, and Gaussian rows `W`, `(m, d)`, make `(T, m)` such that the mean of
            $\phi(q)^\top \phi(k)$ over $W$ is $\exp(q^\top k / \sqrt d)$.
        """,
        answer="features",
        starter="""
            import torch

            def features(x, W):
                raise NotImplementedError
        """,
        solution=_FEATURE,
        wrong=slips_of(
            _FEATURE,
            (".sum(-1, keepdim=True) / 2", ".sum(-1, keepdim=True)"),
            (" - x.square().sum(-1, keepdim=True) / 2", ""),
            ("** -0.25", "** 0"),
            ("** -0.25", "** -0.5"),
            (" * len(W) ** -0.5", ""),
            (" * len(W) ** -0.5", " / len(W)"),
        ),
        check=_check_positive_feature,
        hint="Complete the square in the exponent of the Gaussian mean of exp(w·(q + k)).",
    ),
    Exercise(
        name="linear-attention/find-the-bug",
        title="Find the bugs",
        stars=2,
        statement=r"""
            This step of a decoder runs, and a model that uses it writes nonsense. It takes the state, the
            features of one query and one key, `(m,)`, the value, `(dv,)`, and whether the position holds a
            real token; padding is to leave no trace in the state. Mend it.
        """,
        answer="step",
        starter=_BUGGY_STEP,
        solution=_STEP,
        wrong=(
            """
            def step(S, z, phi_q, phi_k, v, real):
                S = S + phi_k[:, None] * v * real
                z = z + phi_k
                return phi_q @ S / (phi_q @ z), S, z
            """,
            """
            def step(S, z, phi_q, phi_k, v, real):
                out = phi_q @ S / (phi_q @ z + 1e-6)
                if real:
                    S = S + phi_k[:, None] * v
                    z = z + phi_k
                return out, S, z
            """,
        ),
        check=_check_step,
        hint="Two of its four lines are wrong: one by its place, one by what it adds for padding.",
    ),
    Exercise(
        name="linear-attention/chunk-carry",
        title="In chunks",
        stars=3,
        statement=r"""
            Write causal linear attention for one head in chunks of `chunk_size` positions: inside a chunk
            with its weights written down, across chunks by the state. Arguments as for the running sums; the
            last chunk may be shorter. No tensor may have $T \times T$ numbers.
        """,
        answer="chunked_attention",
        starter="""
            import torch

            def chunked_attention(phi_q, phi_k, v, chunk_size):
                raise NotImplementedError
        """,
        solution=_CHUNKS,
        wrong=slips_of(
            _CHUNKS,
            ("S = S + k.T @ values", "pass"),
            (".tril()", ""),
            ("S = S + k.T @ values", "S = k.T @ values"),
            (
                "            outs.append(q @ S + inside)\n            S = S + k.T @ values",
                "            S = S + k.T @ values\n            outs.append(q @ S + inside)",
            ),
            ("out[:, :-1] / out[:, -1:]", "out[:, :-1]"),
        ),
        check=_check_chunk_carry,
        hint="Two contributions to each output: one through S, one through the masked products of the chunk.",
    ),
    Exercise(
        name="linear-attention/gated",
        title="The next layer, from its formula",
        stars=3,
        statement=r"""
            A sum that only grows cannot forget. Gated linear attention multiplies the state, before it
            writes, by a gate for each feature: $S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + k_t v_t^\top$ and
            $o_t = S_t^\top q_t$, without a normaliser. Write it for one head: `q`, `k` and `gates` are
            `(T, d)`, `v` is `(T, dv)`, and `S`, `(d, dv)`, is the state to begin with. Return the outputs,
            `(T, dv)`, and the last state. With all gates equal to one number, this is the recurrence of a
            retention head.
        """,
        answer="gated_attention",
        starter="""
            import torch

            def gated_attention(q, k, v, gates, S):
                raise NotImplementedError
        """,
        solution=_GATED,
        wrong=slips_of(
            _GATED,
            ("gates[t][:, None] * S", "S"),
            (
                "gates[t][:, None] * S + k[t][:, None] * v[t]",
                "gates[t][:, None] * (S + k[t][:, None] * v[t])",
            ),
            ("        outs = []\n", "        outs, S = [], torch.zeros_like(S)\n"),
            ("gates[t][:, None] * S", "(gates[t + 1] if t + 1 < len(q) else 1 + 0 * q[t])[:, None] * S"),
        ),
        check=_check_gated,
        hint="The gate acts on rows of S, one for each feature of the key. Which of the two terms has it?",
    ),
)
