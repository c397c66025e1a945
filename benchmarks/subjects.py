"""What is compared: the same layer or model twice or three times, with the same weights.

A subject is called with its input and gives its output. It has the weights of its peers, so that the outputs
must be equal; `__main__` checks this before it times anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import decoding, windows
from benchmarks.families import BATCH, FAMILIES, LENGTH, Published
from textbook_code.layers.attention import Attention
from textbook_code.models.text.bert import Bert, BertConfig

SIZES = ((8, 128), (1, 512))  # batch, length
OURS, TRANSFORMERS, TORCH, PUBLISHED = "textbook_code", "transformers", "torch.nn", "published"


@dataclass(frozen=True)
class Case:
    """One thing to compare at one size: evaluation (`forward`), training (`step`), writing (`decode`), or a
    window beside the square that it leaves out (`window`)."""

    model: str
    mode: str
    batch: int
    length: int

    @property
    def what(self) -> str:
        if self.mode == "decode":
            return f"SmolLM2, {decoding.NEW} tokens with cache, {self.model}"
        if self.mode == "window":
            return windows.WHAT
        known = {"attention": "Attention", "bert": "BERT"}
        name = known.get(self.model) or FAMILIES[self.model].called
        mode = {"forward": "forward", "step": "training step"}[self.mode]
        return f"{name}, {mode}, {self.batch} × {self.length}"

    @property
    def peers(self) -> tuple[str, ...]:
        if self.mode == "decode":
            return (TRANSFORMERS,)
        if self.mode == "window":
            return tuple(windows.PEERS)
        return (PUBLISHED,) if self.model in FAMILIES else (TRANSFORMERS, TORCH)

    @property
    def with_memory(self) -> bool:
        """Whether the memory is measured too, in processes of their own, which takes its time."""
        return self.mode != "decode" and self.model in ("attention", "bert")

    def peer(self, who: str) -> str:
        """The peer's name, as a row tells it."""
        if self.mode == "decode":
            return decoding.PEER
        if self.mode == "window":
            return windows.PEERS[who]
        return FAMILIES[self.model].peer if self.model in FAMILIES else PEERS[self.model, who]


CASES = [
    Case(model, mode, batch, length)
    for model in ("attention", "bert")
    for mode in ("forward", "step")
    for batch, length in SIZES
]
CASES += [Case(model, mode, BATCH, LENGTH) for model in FAMILIES for mode in ("forward", "step")]
CASES += [Case(dtype, "decode", 1, decoding.PROMPT) for dtype in ("float32", "bfloat16")]
CASES += [Case("attention", "window", 1, windows.LENGTH)]

PEERS = {
    ("attention", TRANSFORMERS): "transformers, BertSelfAttention (SDPA) and its output layer",
    ("attention", TORCH): "torch.nn.MultiheadAttention",
    ("bert", TRANSFORMERS): "transformers, BertModel (SDPA)",
    ("bert", TORCH): "torch.nn.TransformerEncoder with our embeddings",
}


class TransformersAttention(nn.Module):
    """The self-attention of transformers and the linear layer behind it, without residual and norm."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        layer = _transformers_bert(
            Bert(replace(BertConfig.minilm_l6(), num_layers=1), pooler=False)
        ).encoder.layer[0]
        self.attention, self.dense = layer.attention.self, layer.attention.output.dense
        for theirs, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            getattr(self.attention, theirs).load_state_dict(getattr(ours, name).state_dict())
        self.dense.load_state_dict(ours.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.attention(x)[0])


class TorchAttention(nn.Module):
    """torch's own multi-head attention, without the averaged weights it gives unless told not to."""

    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            ours.d_model, ours.num_heads, dropout=ours.dropout, batch_first=True
        )
        _fill(self.attention, ours)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TransformersBert(nn.Module):
    def __init__(self, ours: Bert) -> None:
        super().__init__()
        self.bert = _transformers_bert(ours)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state


class TorchBert(nn.Module):
    """torch's encoder behind our embeddings: it brings none of its own."""

    def __init__(self, ours: Bert) -> None:
        super().__init__()
        config = ours.config
        self.embed = ours
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.num_heads,
            config.d_ff,
            config.dropout,
            activation="gelu",
            layer_norm_eps=config.norm_eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_layers)
        for theirs, block in zip(self.encoder.layers, ours.blocks, strict=True):
            _fill(theirs.self_attn, block.attn)
            for name, module in (
                ("norm1", block.attn_norm),
                ("norm2", block.ffn_norm),
                ("linear1", block.ffn.fc1),
                ("linear2", block.ffn.fc2),
            ):
                getattr(theirs, name).load_state_dict(module.state_dict())
        self.embed.blocks = nn.ModuleList()  # so that the model holds each weight once

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(self.embed(tokens))


def build(case: Case, who: str, *, seed: int = 0) -> tuple[Callable[[], Tensor], Tensor]:
    """The work to time, and the output in evaluation mode that all subjects of a case must share."""
    torch.manual_seed(seed)
    if case.mode == "decode":
        return decoding.build(who, getattr(torch, case.model), OURS)
    if case.mode == "window":
        return windows.build(who, OURS)
    if case.model in FAMILIES:
        return _work(case, *_family(case, who))
    if case.model == "attention":
        config = BertConfig.minilm_l6()
        ours: nn.Module = Attention(config.d_model, config.num_heads, dropout=config.dropout)
        peers = {TRANSFORMERS: TransformersAttention, TORCH: TorchAttention}
        x = torch.randn(case.batch, case.length, config.d_model)
    else:
        ours = Bert(BertConfig.minilm_l6(), pooler=False)
        for parameter in ours.parameters():  # away from the start, where biases are 0 and norms 1
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
        peers = {TRANSFORMERS: TransformersBert, TORCH: TorchBert}
        x = torch.randint(ours.config.vocab_size, (case.batch, case.length))
    return _work(case, ours if who == OURS else peers[who](ours), x)


def _family(case: Case, who: str) -> tuple[nn.Module, ...]:
    """The model and its texts; the reference is loud, for biases of 0 and norms of 1 would hide mistakes."""
    family = FAMILIES[case.model]
    reference = family.reference()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    texts = torch.randint(5, 4000, (1 + family.two_texts, case.batch, case.length))
    if who != OURS:
        return Published(reference), *texts
    return family.ours.from_hf(reference), *texts


def _work(case: Case, model: nn.Module, *texts: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    with torch.no_grad():  # a peer that keeps something here must be able to train with it
        output = model.eval()(*texts)
    return (forward if case.mode == "forward" else training_step)(model, *texts), output


def forward(model: nn.Module, *texts: Tensor) -> Callable[[], Tensor]:
    model.eval()

    def work() -> Tensor:
        with torch.inference_mode():
            return model(*texts)

    return work


def training_step(model: nn.Module, *texts: Tensor) -> Callable[[], Tensor]:
    """Forward with dropout, backward, one step of plain SGD; a richer optimizer would be the same for all."""
    model.train()
    parameters = list(model.parameters())

    def work() -> Tensor:
        loss = model(*texts).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad, alpha=1e-9)
                parameter.grad = None
        return loss.detach()

    return work


def _transformers_bert(ours: Bert) -> nn.Module:
    from transformers import BertConfig as TheirConfig
    from transformers import BertModel

    theirs = BertModel(
        TheirConfig(**{k: v for k, v in ours.config_to_hf().items() if k != "architectures"}),
        add_pooling_layer=False,
    )
    theirs.set_attn_implementation("sdpa")
    theirs.load_state_dict(ours.to_hf_state_dict())
    return theirs


def _fill(theirs: nn.MultiheadAttention, ours: Attention) -> None:
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
