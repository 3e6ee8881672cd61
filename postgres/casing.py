"""Lower case that is the same on every server.

What `lower` makes of a letter depends on the database's locale and its provider: `I` is `ı` in
Turkish, and in `C` only ASCII has cases at all. ICU's own collations are not in every build, and
change with its version, under an index that then has the old order. So the letters are listed here.
"""

from __future__ import annotations

import re

# Letters of Latin, Greek, Cyrillic, Armenian and Georgian beyond ASCII that have a lower case of
# one letter (Unicode's simple case folding): FIRST-LAST/STEP:DISTANCE in hexadecimal. All scripts
# together would be more than a row of PostgreSQL's catalogue of indexes holds (before version 18).
# Migration 002 has the same list.
LETTERS = """
    b5:307 c0-d6:20 d8-de:20 100-12e/2:1 132-136/2:1 139-147/2:1 14a-176/2:1 178:-79 179-17d/2:1
    17f:-10c 181:d2 182-184/2:1 186:ce 187:1 189-18a:cd 18b:1 18e:4f 18f:ca 190:cb 191:1 193:cd
    194:cf 196:d3 197:d1 198:1 19c:d3 19d:d5 19f:d6 1a0-1a4/2:1 1a6:da 1a7:1 1a9:da 1ac:1 1ae:da
    1af:1 1b1-1b2:d9 1b3-1b5/2:1 1b7:db 1b8:1 1bc:1 1c4:2 1c5:1 1c7:2 1c8:1 1ca:2 1cb-1db/2:1
    1de-1ee/2:1 1f1:2 1f2-1f4/2:1 1f6:-61 1f7:-38 1f8-21e/2:1 220:-82 222-232/2:1 23a:2a2b 23b:1
    23d:-a3 23e:2a28 241:1 243:-c3 244:45 245:47 246-24e/2:1 345:74 370-372/2:1 376:1 37f:74
    386:26 388-38a:25 38c:40 38e-38f:3f 391-3a1:20 3a3-3ab:20 3c2:1 3cf:8 3d0:-1e 3d1:-19 3d5:-f
    3d6:-16 3d8-3ee/2:1 3f0:-36 3f1:-30 3f4:-3c 3f5:-40 3f7:1 3f9:-7 3fa:1 3fd-3ff:-82 400-40f:50
    410-42f:20 460-480/2:1 48a-4be/2:1 4c0:f 4c1-4cd/2:1 4d0-52e/2:1 531-556:30 10a0-10c5:1c60
    10c7:1c60 10cd:1c60 1c90-1cba:-bc0 1cbd-1cbf:-bc0 1e00-1e94/2:1 1e9b:-3a 1e9e:-1dbf
    1ea0-1efe/2:1 1f08-1f0f:-8 1f18-1f1d:-8 1f28-1f2f:-8 1f38-1f3f:-8 1f48-1f4d:-8 1f59-1f5f/2:-8
    1f68-1f6f:-8 1f88-1f8f:-8 1f98-1f9f:-8 1fa8-1faf:-8 1fb8-1fb9:-8 1fba:-4a 1fbc:-9
    1fc8-1fca/2:-56 1fcc:-9 1fd8-1fd9:-8 1fda:-64 1fe8-1fe9:-8 1fea:-70 1fec:-7 1ff8:-80 1ffa:-7e
    1ffc:-9 ff21-ff3a:20
"""


def _expanded(text: str) -> tuple[str, str]:
    upper, lower = [], []
    for item in re.findall(r"([0-9a-f]+)(?:-([0-9a-f]+))?(?:/([0-9]))?:(-?[0-9a-f]+)", text):
        first, last, step, distance = item
        for code in range(int(first, 16), int(last or first, 16) + 1, int(step or 1)):
            upper.append(chr(code))
            lower.append(chr(code + int(distance, 16)))
    return "".join(upper), "".join(lower)


UPPER, LOWER = _expanded(LETTERS)


def lowered(text: str) -> str:
    """SQL for an SQL expression `text` in lower case. A text in ASCII needs no long list."""
    ascii_only = f'lower({text} COLLATE "C")'
    return (
        f"CASE WHEN octet_length({text}) = char_length({text}) THEN {ascii_only}"
        f" ELSE translate({ascii_only}, '{UPPER}', '{LOWER}') END"
    )
