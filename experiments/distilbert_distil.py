"""What does a student gain from its teacher: its layers, its soft answers, its hidden states?

The teacher is the four-layer BERT of the experiment `bert_pretrain`, as the package carries it. Each student
is a DistilBERT of two layers that fills in masked pieces of the same plays for the same few steps, with the
same batches in the same order. The arms differ in how it begins and in what it minimises:

    scratch        random weights, the masked pieces alone
    from_teacher   every second layer of the teacher, the masked pieces alone
    soft_1, _2, _4 the same start; 5 times the soft loss at this temperature and twice the masked pieces
    triple         as soft_2, and the cosine of the hidden states: DistilBERT's loss

The learning rate, the same for all arms, was set beforehand and not searched for. Two seeds draw the batches
and the random weights; the teacher is one and the same.

`results` has: teacher_loss, teacher_parameters, student_parameters, share_of_parameters, start_loss (of the
student made from the teacher, before any step), student_steps, and by_arm[arm] with loss, gap (to the
teacher, in nats), of_each_seed, curve (the mean over the seeds, every `eval_every` steps); and
gain_of_start, gain_of_soft, gain_of_cosine: the losses of scratch − from_teacher, from_teacher − soft_2 and
soft_2 − triple, of each seed.

Book: distilbert-loss
"""

import torch
from torch import Tensor

from textbook_code.models.text.bert import BertForMaskedLM
from textbook_code.models.text.distilbert import DistilBertForMaskedLM
from textbook_code.optim.schedules import warmup_linear
from textbook_code.recorded import experiment
from textbook_code.training.distillation import distillation_loss
from textbook_code.training.loop import train
from textbook_code.training.objectives import IGNORE, token_loss

ABOUT = (
    "Students of two layers learn masked language modelling on Shakespeare from a teacher of four: from "
    "nothing, from the teacher's layers, from its soft answers at three temperatures, and by DistilBERT's "
    "triple loss; what is left of the teacher's lead on plays held out is measured."
)
CONFIG = {
    "seeds": [0, 1],
    "teacher": "bert-shakespeare",
    "kinds": ["scratch", "from_teacher", "soft_1", "soft_2", "soft_4", "triple"],
    "temperature": {"soft_1": 1.0, "soft_2": 2.0, "soft_4": 4.0, "triple": 2.0},
    "batch_size": 16,
    "steps": 300,
    "warmup": 30,
    "lr": 1e-3,
    "eval_every": 50,
    "eval_windows": 512,
}
DATA = ["shakespeare"]
TOLERANCE = {"loss": 1e-3, "results": 0.05}
REPLAY = ["triple/seed-0"]


def arms(config: dict) -> list[str]:
    return [f"{kind}/seed-{seed}" for seed in config["seeds"] for kind in config["kinds"]]


def run(config: dict, arm: str, *, steps: int | None = None, log) -> dict:
    kind, seed = arm.split("/seed-")
    text = experiment("bert_pretrain")  # the same plays, windows and masks as the teacher's
    _, read, held_out = text.corpus(text.CONFIG)
    teacher = BertForMaskedLM.from_pretrained(config["teacher"]).float()
    torch.manual_seed(int(seed))
    student = DistilBertForMaskedLM.from_teacher(teacher)
    if kind == "scratch":
        student = DistilBertForMaskedLM(student.config)
        for p in student.parameters():
            if p.dim() > 1:
                p.data.mul_(text.CONFIG["init_std"] / 0.02)  # as the teacher began

    def loss_fn(student: DistilBertForMaskedLM, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        hidden = student.distilbert(tokens)
        logits = student.mlm_head(hidden, student.distilbert.token_embed)
        if kind in ("scratch", "from_teacher"):
            loss = token_loss(logits, targets)
        else:
            with torch.no_grad():
                theirs = teacher.bert(tokens)
                answers = teacher.mlm_head(theirs, teacher.bert.token_embed)
            loss = distillation_loss(
                logits,
                answers,
                targets,
                student_hidden=hidden,
                teacher_hidden=theirs,
                temperature=config["temperature"][kind],
                cosine_weight=1.0 if kind == "triple" else 0.0,
            ).total
        log(loss.item(), of=config["steps"])
        return loss

    draws = torch.Generator().manual_seed(99)
    examination = text.masked(text.CONFIG, held_out, config["eval_windows"], draws)
    before = held_out_loss(student.eval(), *examination)
    done = train(
        student,
        loss_fn,
        lambda _, draws: text.masked(text.CONFIG, read, config["batch_size"], draws),
        steps=min(config["steps"], steps or config["steps"]),
        optimizer=torch.optim.AdamW(student.parameters(), lr=config["lr"], betas=(0.9, 0.98), fused=True),
        schedule=warmup_linear(config["warmup"], config["steps"]),
        max_grad_norm=None,  # the losses of the arms are of different sizes, which Adam does not see
        evaluate=lambda model, _: {"loss": held_out_loss(model, *examination)},
        eval_every=config["eval_every"],
        seed=100 + int(seed),
        progress=False,
    )
    if steps is not None:
        return {}
    curve = [round(value, 4) for _, value in done.evaluated("loss")]
    return {
        "held_out_loss": curve[-1],
        "held_out_curve": curve,
        "start_loss": round(before, 4),
        "teacher_loss": round(held_out_loss(teacher, *examination), 4),
        "parameters": sum(p.numel() for p in student.parameters()),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
    }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """In nats a masked piece."""
    chosen = targets != IGNORE
    return torch.nn.functional.cross_entropy(model(tokens)[chosen], targets[chosen]).item()


def summarise(config: dict, runs: dict) -> dict:
    seeds, first = config["seeds"], runs["from_teacher/seed-0"]

    def losses(kind: str) -> list[float]:
        return [runs[f"{kind}/seed-{seed}"]["held_out_loss"] for seed in seeds]

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    def gain(one: str, other: str) -> list[float]:
        return [round(a - b, 4) for a, b in zip(losses(one), losses(other), strict=True)]

    curves = {kind: [runs[f"{kind}/seed-{s}"]["held_out_curve"] for s in seeds] for kind in config["kinds"]}
    return {
        "teacher_loss": first["teacher_loss"],
        "teacher_parameters": first["teacher_parameters"],
        "student_parameters": first["parameters"],
        "share_of_parameters": round(first["parameters"] / first["teacher_parameters"], 4),
        "start_loss": first["start_loss"],
        "student_steps": config["steps"],
        "by_arm": {
            kind: {
                "loss": mean(losses(kind)),
                "gap": round(mean(losses(kind)) - first["teacher_loss"], 4),
                "of_each_seed": losses(kind),
                "curve": [mean(list(values)) for values in zip(*curves[kind], strict=True)],
            }
            for kind in config["kinds"]
        },
        "gain_of_start": gain("scratch", "from_teacher"),
        "gain_of_soft": gain("from_teacher", "soft_2"),
        "gain_of_cosine": gain("soft_2", "triple"),
    }
