"""``python -m textbook_code.data.people pedestrians VIDEO FOLDER``: make the pedestrians again.

Book: person-data
"""

import argparse
import sys
from collections import Counter

from textbook_code.data.people.pedestrians import make


def main(arguments: list[str] | None = None) -> int:
    """Make the sheet and its list, and print what was found, kept and lost.

    Book: person-data
    """
    parser = argparse.ArgumentParser(prog="python -m textbook_code.data.people", description=__doc__)
    parser.add_argument("what", choices=["pedestrians"])
    parser.add_argument("video", help="vtest.avi, as OpenCV's samples have it")
    parser.add_argument("folder", help="where pedestrians.png and pedestrians.json are written")
    options = parser.parse_args(arguments)
    try:
        about = make(options.video, options.folder)
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{about['found']} people found; lost: {about['lost']}")
    for (split, person), n in sorted(Counter((r["split"], r["person"]) for r in about["crops"]).items()):
        print(f"{split}: {n} {'people' if person else 'places without'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
