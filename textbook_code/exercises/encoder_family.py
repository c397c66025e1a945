"""Exercises of the page on RoBERTa, DistilBERT and e5.

Book: encoder-family
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from textbook_code.exercises.framework import Exercise
from textbook_code.exercises.judge import number_problem, tensor_problem
from textbook_code.models.text.bert import BertConfig, BertForMaskedLM
from textbook_code.models.text.distilbert import DistilBertForMaskedLM, teacher_layers
from textbook_code.models.text.roberta import RobertaConfig, RobertaForMaskedLM
from textbook_code.training.distillation import soft_loss


def _check_positions(answer: Callable[..., Any]) -> str | None:
    for rows, pad_id, what in (
        ([[1, 1, 1, 1]], 1, "a text without padding"),
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 1, "padding on the right"),
        ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], 1, "padding on the left"),
        ([[1, 0, 1, 0, 1]], 1, "padding between tokens"),
        ([[0, 1, 1], [1, 1, 0]], 4, "pad_id = 4"),
    ):
        mask = torch.tensor(rows, dtype=torch.bool)
        expected = torch.where(mask, mask.cumsum(1) + pad_id, pad_id)
        if problem := tensor_problem(answer(mask.clone(), pad_id), expected, what):
            return problem
    return None


def _check_never_asked(answer: Callable[..., Any]) -> str | None:
    for epochs, copies, what in (
        (40, 10, "40 epochs over 10 copies"),
        (40, 40, "40 epochs, each masked anew"),
        (40, 1, "one copy"),
        (3, 10, "fewer epochs than copies"),
    ):
        expected = (1 - 0.15) ** min(epochs, copies)
        if problem := number_problem(answer(0.15, epochs, copies), expected, what, rel=1e-6):
            return problem
    return number_problem(answer(0.4, 5, 2), 0.36, "a share of 0.4", rel=1e-6)


def _check_soft_loss(answer: Callable[..., Any]) -> str | None:
    student = torch.randn(7, 11, dtype=torch.float64).requires_grad_()
    teacher = 2 * torch.randn(7, 11, dtype=torch.float64)
    for temperature in (1.0, 2.0, 5.0):
        what = f"temperature {temperature:g}"
        got = answer(student, teacher, temperature)
        if not isinstance(got, Tensor) or got.shape != ():
            return f"{what}: expected one number, as a tensor."
        expected = soft_loss(student, teacher, temperature=temperature)
        (right,) = torch.autograd.grad(expected, student)
        if not got.requires_grad:
            return f"{what}: no gradient reaches the student."
        (gradient,) = torch.autograd.grad(got, student)
        if problem := tensor_problem(gradient, right, f"{what}, gradient of the student", tol=1e-9):
            ratio = (gradient * right).sum() / right.square().sum()
            if tensor_problem(gradient, ratio * right, "", tol=1e-9) is None:
                return f"{what}: the gradient points the right way, and is {ratio:.3g} times the right one."
            return problem
        if problem := number_problem(got.item(), expected.item(), f"{what}, loss", rel=1e-6):
            return problem
    return None


def _loud(model: nn.Module) -> nn.Module:
    """Norms and biases away from where they start, so that a part left out is noticed."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() == 2:
            parameter.data = noise / parameter.size(1) ** 0.5 if "embed" not in name else noise
        else:
            parameter.data = 0.3 * noise + (1 if name.endswith("norm.weight") else 0)
    return model.double().eval()


def _check_student(answer: Callable[..., Any]) -> str | None:
    sizes = {"vocab_size": 13, "d_model": 6, "num_heads": 2, "d_ff": 10, "max_seq_len": 9}
    for num_layers in (12, 4):
        teacher = _loud(BertForMaskedLM(BertConfig(num_layers=num_layers, **sizes)))
        assert isinstance(teacher, BertForMaskedLM)
        layers = teacher_layers(num_layers, num_layers // 2)
        expected = DistilBertForMaskedLM.from_teacher(teacher).distilbert.state_dict()
        given = {name: x.clone() for name, x in teacher.bert.state_dict().items()}
        got = answer(dict(given), layers)
        what = f"a teacher of {num_layers} layers and the choice {list(layers)}"
        if not isinstance(got, dict):
            return f"{what}: expected a dict of tensors."
        if missing := sorted(expected.keys() - got.keys()):
            return f"{what}: {missing[0]} is missing, and {len(missing) - 1} more."
        if surplus := sorted(got.keys() - expected.keys()):
            return f"{what}: the student has no {surplus[0]}."
        for name, tensor in expected.items():
            if problem := tensor_problem(got[name], tensor, f"{what}, {name}", tol=0):
                return problem
    return None


def _check_roberta(answer: Callable[..., Any]) -> str | None:
    config = RobertaConfig(
        vocab_size=23, d_model=12, num_layers=2, num_heads=3, d_ff=20, max_seq_len=9, norm_eps=1e-2, pad_id=1,
        dropout=0.0,
    )  # fmt: skip
    model = _loud(RobertaForMaskedLM(config))
    assert isinstance(model, RobertaForMaskedLM)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(2, 23, (3, 9))
    right = torch.arange(9) < torch.tensor([[9], [6], [2]])
    masks = {"without padding": torch.ones(3, 9, dtype=torch.bool), "with padding on the right": right}
    for what, mask in (masks | {"with padding on the left": right.flip(1)}).items():
        given = tokens.masked_fill(~mask, config.pad_id)
        with torch.no_grad():
            expected = model(given, token_mask=mask)
            got = answer(dict(params), given.clone(), mask.clone(), config.num_heads, config.norm_eps, 1)
        if isinstance(got, Tensor) and got.shape == expected.shape:  # what stands at padding is of no account
            got, expected = (x.masked_fill(~mask[..., None], 0) for x in (got, expected))
        if problem := tensor_problem(got, expected, f"logits {what}", tol=1e-9):
            return _known_slip(model, given, mask, got) or problem
    return None


def _known_slip(model: RobertaForMaskedLM, tokens: Tensor, mask: Tensor, got: Any) -> str | None:
    """Name the model that `got` does belong to, if it is one of the usual ones."""
    body, head = model.roberta, model.mlm_head
    T = tokens.size(1)

    def logits(positions: Tensor) -> Tensor:
        x = body.token_embed(tokens) + positions + body.segment_embed.weight[0]
        x = body.embed_norm(x)
        for block in body.blocks:
            x, _ = block(x, attn_mask=mask[:, None, None])
        return x

    with torch.no_grad():
        hidden = logits(body.positions(T, mask))
        bare = body.token_embed.attend(nn.functional.gelu(head.dense(hidden))) + head.bias
        slips = {
            "RoBERTa whose positions start at 0, as BERT's": head(
                logits(body.pos_embed.weight[:T]), body.token_embed
            ),
            "RoBERTa whose positions count places, and not tokens": head(
                logits(body.pos_embed.weight[2 : T + 2]), body.token_embed
            ),
            "RoBERTa without the norm of its head": bare,
            "RoBERTa without the bias of the vocabulary": head(hidden, body.token_embed) - head.bias,
        }
    for said, output in slips.items():
        if tensor_problem(got, output.masked_fill(~mask[..., None], 0), "", tol=1e-9) is None:
            return f"this is what {said} computes."
    return None


_ROBERTA = """
import torch
import torch.nn.functional as F

def roberta(params, tokens, token_mask, num_heads, norm_eps, pad_id):
    def linear(name, x):
        return F.linear(x, params[name + ".weight"], params[name + ".bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], norm_eps)

    def attend(block, x):
        q, k, v = (
            linear(f"{block}.attn.{p}_proj", x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for p in "qkv"
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask[:, None, None])
        return linear(f"{block}.attn.out_proj", out.transpose(1, 2).flatten(2))

    words = params["roberta.token_embed.weight"]
    positions = torch.where(token_mask, token_mask.cumsum(1) + pad_id, pad_id)
    x = words[tokens] + params["roberta.pos_embed.weight"][positions]
    x = norm("roberta.embed_norm", x + params["roberta.segment_embed.weight"][0])
    num_layers = 1 + max(int(name.split(".")[2]) for name in params if ".blocks." in name)
    for i in range(num_layers):
        block = f"roberta.blocks.{i}"
        x = norm(f"{block}.attn_norm", x + attend(block, x))
        x = norm(f"{block}.ffn_norm", x + linear(f"{block}.ffn.fc2", F.gelu(linear(f"{block}.ffn.fc1", x))))
    x = norm("mlm_head.norm", F.gelu(linear("mlm_head.dense", x)))
    return x @ words.T + params["mlm_head.bias"]
"""

EXERCISES = (
    Exercise(
        name="encoder-family/positions",
        title="Positions that padding cannot shift",
        stars=1,
        statement=r"""
            Write RoBERTa's positions for a boolean `token_mask` of shape `(B, T)`, True = real token: the
            first real token of a row stands at `pad_id + 1`, the next at `pad_id + 2`, and so on, wherever
            the padding is; padding itself stands at `pad_id`.
        """,
        answer="positions",
        starter="""
            import torch

            def positions(token_mask, pad_id):
                return torch.arange(token_mask.size(1)).expand(token_mask.shape)
        """,
        solution="""
            import torch

            def positions(token_mask, pad_id):
                return torch.where(token_mask, token_mask.cumsum(1) + pad_id, pad_id)
        """,
        wrong=(
            """
            import torch

            def positions(token_mask, pad_id):
                places = torch.arange(token_mask.size(1)).expand(token_mask.shape)
                return torch.where(token_mask, places + pad_id + 1, pad_id)
            """,
            """
            import torch

            def positions(token_mask, pad_id):
                return token_mask.cumsum(1) + pad_id
            """,
        ),
        check=_check_positions,
        hint="How many real tokens are there up to and including each place? A cumulative sum knows.",
    ),
    Exercise(
        name="encoder-family/never-asked",
        title="The token that is never asked for",
        stars=1,
        statement=r"""
            A corpus is read `epochs` times. Each time, each token is chosen with probability `share`, and the
            maskings are drawn once for each of `copies` copies of the corpus, which are used in turn: with
            one copy the masking is static, with as many copies as epochs it is dynamic. With what
            probability is a given token not chosen in any epoch?
        """,
        answer="never_asked",
        starter="""
            def never_asked(share, epochs, copies):
                raise NotImplementedError
        """,
        solution="""
            def never_asked(share, epochs, copies):
                return (1 - share) ** min(epochs, copies)  # a masking seen again asks for nothing new
        """,
        wrong=(
            """
            def never_asked(share, epochs, copies):
                return (1 - share) ** epochs
            """,
            """
            def never_asked(share, epochs, copies):
                return (1 - share) ** copies
            """,
            """
            def never_asked(share, epochs, copies):
                return max(0, 1 - share * min(epochs, copies))
            """,
        ),
        check=_check_never_asked,
        hint="Only maskings that differ count, and each of them leaves a token alone with 1 − share.",
    ),
    Exercise(
        name="encoder-family/soft-loss",
        title="Learning from soft answers",
        stars=2,
        statement=r"""
            Write the loss by which a student learns from a teacher's logits, both `(n, V)`: the
            Kullback-Leibler divergence of the student's distribution from the teacher's, both softened by
            `temperature`, averaged over the n positions, and multiplied by whatever keeps the size of its
            gradient when the temperature grows.
        """,
        answer="soft",
        starter="""
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                return F.cross_entropy(student, teacher.argmax(-1))
        """,
        solution="""
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                log_p = F.log_softmax(teacher / temperature, dim=-1)
                log_q = F.log_softmax(student / temperature, dim=-1)
                return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        """,
        wrong=(
            """
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                log_p = F.log_softmax(teacher / temperature, dim=-1)
                log_q = F.log_softmax(student / temperature, dim=-1)
                return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            """,
            """
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                log_p = F.log_softmax(teacher / temperature, dim=-1)
                log_q = F.log_softmax(student / temperature, dim=-1)
                return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
            """,
            """
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                log_p = F.log_softmax(teacher / temperature, dim=-1)
                log_q = F.log_softmax(student, dim=-1)
                return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            """,
            """
            import torch.nn.functional as F

            def soft(student, teacher, temperature):
                log_p = F.log_softmax(teacher / temperature, dim=-1)
                log_q = F.log_softmax(student / temperature, dim=-1)
                return temperature**2 * (log_p.exp() * (log_p - log_q)).mean()
            """,
        ),
        check=_check_soft_loss,
        hint="Each division of the logits by τ divides the gradient by τ, and there are two of them.",
    ),
    Exercise(
        name="encoder-family/student",
        title="Half of a teacher",
        stars=2,
        statement=r"""
            Make a student's encoder out of its teacher's. You are given the teacher's tensors under the
            names of the package's `Bert` (`token_embed.weight`, `blocks.7.attn.q_proj.bias`,
            `embed_norm.weight`, `pooler.weight` and so on) and the layers to keep, in order. Return the
            tensors of the student, a `DistilBert`: the same names, its blocks counted from 0, without
            segments and without a pooler.
        """,
        answer="halve",
        starter="""
            def halve(teacher, layers):
                return dict(teacher)
        """,
        solution="""
            def halve(teacher, layers):
                student = {}
                for name, tensor in teacher.items():
                    if name.startswith("blocks."):
                        _, layer, rest = name.split(".", 2)
                        if int(layer) in layers:
                            student[f"blocks.{layers.index(int(layer))}.{rest}"] = tensor
                    elif not name.startswith(("segment_embed.", "pooler.")):
                        student[name] = tensor
                return student
        """,
        wrong=(
            """
            def halve(teacher, layers):
                return {
                    name: tensor
                    for name, tensor in teacher.items()
                    if not name.startswith(("segment_embed.", "pooler."))
                    and (not name.startswith("blocks.") or int(name.split(".")[1]) in layers)
                }
            """,
            """
            def halve(teacher, layers):
                student = {}
                for name, tensor in teacher.items():
                    if name.startswith("blocks."):
                        _, layer, rest = name.split(".", 2)
                        if int(layer) < len(layers):
                            student[name] = tensor
                    elif not name.startswith(("segment_embed.", "pooler.")):
                        student[name] = tensor
                return student
            """,
            """
            def halve(teacher, layers):
                student = {}
                for name, tensor in teacher.items():
                    if name.startswith("blocks."):
                        _, layer, rest = name.split(".", 2)
                        if int(layer) in layers:
                            student[f"blocks.{layers.index(int(layer))}.{rest}"] = tensor
                    else:
                        student[name] = tensor
                return student
            """,
        ),
        check=_check_student,
        hint="The layer's number stands between the first two dots; where does it stand in the list?",
    ),
    Exercise(
        name="encoder-family/roberta",
        title="RoBERTa from its paper",
        stars=3,
        statement=r"""
            Write the whole of RoBERTa's masked language model so that it gives the package's own numbers:
            from token ids `(B, T)` and a token mask `(B, T)`, True = real token, to logits `(B, T, V)`. It is
            BERT with the differences of this page: positions that count real tokens from `pad_id + 1`, one
            segment, which is added all the same, and the head dense, GELU, norm, tied table, bias.
            The weights come in a dict under the names of `RobertaForMaskedLM`,
            `roberta.token_embed.weight`, `roberta.blocks.0.attn.q_proj.weight`, `mlm_head.dense.bias` and
            so on. The package's models stay shut; everything in `torch` is open. What you return at
            padding is not looked at.
        """,
        answer="roberta",
        starter="""
            import torch
            import torch.nn.functional as F

            def roberta(params, tokens, token_mask, num_heads, norm_eps, pad_id):
                raise NotImplementedError
        """,
        solution=_ROBERTA,
        wrong=tuple(
            _ROBERTA.replace(right, slip)
            for right, slip in (
                (
                    "torch.where(token_mask, token_mask.cumsum(1) + pad_id, pad_id)",
                    "torch.arange(tokens.size(1))",
                ),
                (
                    "torch.where(token_mask, token_mask.cumsum(1) + pad_id, pad_id)",
                    "torch.arange(tokens.size(1)) + pad_id + 1",
                ),
                (', x + params["roberta.segment_embed.weight"][0])', ", x)"),
                (
                    'norm("mlm_head.norm", F.gelu(linear("mlm_head.dense", x)))',
                    'F.gelu(linear("mlm_head.dense", x))',
                ),
                (' + params["mlm_head.bias"]', ""),
            )
        ),
        check=_check_roberta,
        hint="Compare stage by stage on one layer: the embeddings first, then a block, then the head.",
    ),
)
