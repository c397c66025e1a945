"""What can go wrong when data or weights are fetched, one exception for each thing a reader can mend."""


class SourceError(RuntimeError):
    """Something kept a source from being fetched; the message says what, and what to do about it.

    Book: data-and-licences
    """


class UnknownSourceError(SourceError):
    """No source has the name asked for.

    Book: data-and-licences
    """


class OfflineError(SourceError):
    """The source is not in the cache and ``TEXTBOOK_CODE_OFFLINE`` forbids the network.

    Book: data-and-licences
    """


class NetworkError(SourceError):
    """The registry could not be reached.

    Book: data-and-licences
    """


class NotInRegistryError(SourceError):
    """The registry was reached and does not have the pinned version.

    Book: data-and-licences
    """


class ToolMissingError(SourceError):
    """The program that speaks to the registry (pip, npm, apt-get) is not installed.

    Book: setup
    """


class WrongHashError(SourceError):
    """What arrived is not, byte for byte, what the registry of sources pins.

    Book: data-and-licences
    """


class BadArchiveError(SourceError):
    """The archive lacks a member, or holds one that may not be unpacked (a link, a path leading outside).

    Book: data-and-licences
    """


class NoSpaceError(SourceError):
    """The disk that holds the cache is full, or too small for the source.

    Book: setup
    """


class CacheError(SourceError):
    """The cache folder cannot be created or written.

    Book: setup
    """
