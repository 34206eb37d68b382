"""``python -m tests.gallery``: run the programs and write docs/gallery.rst.

``python -m tests.gallery WORD...`` runs those whose section, name or title has one of the words,
and prints what they say. ``--check`` compares with the page and writes nothing.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # workers that are spawned import this too
    from tests.gallery.page import main

    sys.exit(main(sys.argv[1:]))
