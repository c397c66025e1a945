"""The package of the textbook *Transformers, from pixel to logit*.

Nothing heavy is imported here: `import textbook_code` costs milliseconds.
Import what you need from its room, for example
`from textbook_code.models.text.bert import Bert`.

Book: how-to-read
"""

__version__ = "0.1.0"
