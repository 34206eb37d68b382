"""Hides secrets in every text that leaves the process. Runs in: both.

Names are taken apart into words (``dbPass``, ``DB_PASS``, ``db-pass``), so that ``tokenizer`` is no
``token`` and ``patience`` no ``pat``. Looks are the published formats of keys and tokens: the
prefixes that GitHub, GitLab, Hugging Face, OpenAI, Slack, Stripe, AWS and Google document so that
scanners can find them, RFC 7519 (JWT), RFC 7468 (PEM), RFC 6750 and 7617 (headers), RFC 3986
(user:password@).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

REDACTED = "[redacted]"

# ---- by name

# Anywhere in a name: no ``secretary``, though.
_ANYWHERE = re.compile(
    "passw|pass_?(?:phrase|code|key)|pswd|secret(?!ar[iy]|et|iv|ion)|credential|authori[sz]ation"
    "|bearer|cookie(?!_?cutter)|webhook|conn(?:ection)?_?str|shared_?access|sess(?:ion)?_?id"
    "|mnemonic|seed_?phrase|kubeconfig|netrc"
)
_WHOLE = re.compile(
    "[a-z]*pwd|psw|psk|creds?|o?auth|dsn|jwt|jws|pats?|sas|t?otp|mfa|csrf|xsrf|pem|pfx"
)
# Last in a name: what comes behind is what it is about, and these mean something else beside it.
_LAST = re.compile("[a-z]*pw|pin|signature")
_MEASURES = re.compile(
    "count|dim|format|height|kind|len|length|limit|max|min|num|policy|required|size|type|types|width"
)
_OF = (
    "access|account|admin|anthropic|api|app|auth|aws|azure|client|cohere|comet|cosmos|databricks"
    "|datadog|db|decryption|deploy|deepseek|email|encryption|fernet|ftp|gcp|gcs|gemini|git|github"
    "|gitlab|google|gpg|groq|hf|hmac|hook|huggingface|imap|jwt|kaggle|kms|ldap|license|mail|maps"
    "|master|mistral|mongo|mysql|neptune|openai|openrouter|pg|pgp|pinecone|postgres|private|proxy"
    "|pypi|rabbitmq|redis|replicate|root|rsa|sas|sendgrid|sentry|service|session|shared|sign|signing"
    "|slack|smtp|sql|ssh|ssl|storage|stripe|subscription|sudo|symmetric|telegram|tls|twilio|vault"
    "|wandb|wifi"
)
# One word, or two beside each other: ``sshkey`` and ``ssh_key``.
_COMPOUND = re.compile(
    f"(?:{_OF})(?:keys?|pass)|(?:auth|otp|mfa|pin|recovery|security|verification)codes?"
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# What goes over data is a pass too.
_PASSES = re.compile(
    "all|backward|band|by|eval|final|first|forward|high|last|low|multi|n|one|per|second|single|test"
    "|third|train|two"
)
# What tokenizers call tokens, and names of such.
SPECIAL_TOKEN = re.compile(r"<[^<>\s'\"]{1,40}>|\[[A-Z_]{2,20}\d*\]|(?:[a-z]+_)+tokens?")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=-]{20,}")


def secrecy(name: str) -> str:
    """Say how much under a name is a secret: ``"all"``, ``"texts"``, or ``""`` (nothing).

    Tokens and passes are two things: a text of that name may open a door, numbers are what language
    models read, and what a test run counts.

    >>> [secrecy(name) for name in ("dbPass", "hftoken", "tokenizer", "forward_pass", "ssh-key")]
    ['all', 'texts', '', '', 'all']
    """
    words = [] if "=" in name else [word.lower() for word in _WORDS.findall(name)]
    if not words or _MEASURES.fullmatch(words[-1]):
        return ""
    beside = map("".join, pairwise(words))
    if (
        _ANYWHERE.search("_".join(words))
        or any(map(_WHOLE.fullmatch, words))
        or _LAST.fullmatch(words[-1])
        or any(map(_COMPOUND.fullmatch, [*words, *beside]))
    ):
        return "all"
    passes = words[-1] == "pass" and not any(map(_PASSES.fullmatch, words[-2:-1]))
    of_texts = any(word.endswith(("token", "tokens")) for word in words) or words[-1] == "sid"
    return "texts" if passes or of_texts else ""


def looks_random(name: str, text: str) -> bool:
    """Say whether a text under the name of some key (``cdn_key``) is one that opens a door."""
    words = _WORDS.findall(name.lower())
    if name in ("-u", "--user"):  # as curl takes them; numbers are those of a user and a group
        return re.fullmatch(r"[^\s:]+:(?!\d+$)\S+", text) is not None
    named = words[-1:] == ["sig"] or (words[-1:] == ["key"] and len(words) > 1)
    return named and _RANDOM.fullmatch(text) is not None


# ---- by looks

_LOOKS = re.compile(
    r"""
    -----BEGIN[ ][A-Z0-9 ]*PRIVATE[ ]KEY[A-Z ]*-----[\s\S]*?(?:-----END[A-Z0-9 ]*-----|\Z)
    |(?<![A-Za-z0-9])(?:
        eyJ[\w-]{6,}\.[\w-]+(?:\.[\w-]*){0,3}
        |A[A-Z]{3}(?=[A-Z]*\d)[A-Z2-7]{16}(?![A-Za-z0-9])
        |(?:gh[pousr]|hf|npm|gsk|r8|xai|dckr_pat|dop_v1|glsa|shp(?:at|ss|ca|pa)|lin_api|whsec
            |[rsp]k_(?:live|test))_[A-Za-z0-9]{16,}
        |github_pat_\w{16,}
        |(?:sk|xox[a-z]|xapp|gl[a-z]{2,5}|pypi|nvapi|pplx|tvly|GOCSPX)-(?=[\w-]*\d)[\w-]{16,}
        |AIza[\w-]{30,}|ya29\.[\w-]{10,}|SG\.[\w-]{16,}\.[\w-]{16,}|hvs\.[\w-]{20,}
        |dapi[0-9a-f]{32}|SK[0-9a-f]{32}|\d{8,10}:AA[\w-]{30,}
    )
    |(?<=Bearer[ ])(?!token|auth)[^\s'"\[]{4,}|(?<=bearer[ ])(?=\S*\d)[^\s'"\[]{8,}
    |(?<=Basic[ ])(?=[^\s'"]*[\d=+/])[A-Za-z0-9+/]{6,}={0,2}
    # https://user:password@host, https://token@host, user:password@host
    |(?<=://)[^\s'"/@:]{16,}(?=@)
    |(?<=:)(?!//)(?!\d{1,5}[/?\#])[^\s'"@/,\[\]]{1,100}(?:/[^\s'"@]{0,100}|(?:@[^\s'"@/,:\[\]]{1,99}){1,3})?
        (?=@[\w.\[-])
    |(?<=://)(?P<user>[^\s'"/@:]*:)(?!\d{1,5}(?:[/?\#,]|$))[^\s'"@\[]+\Z
    # the hooks of Slack, Discord, Teams: who has the address may write
    |(?<=://)(?P<hook>[\w.-]{0,99}hooks?[\w.-]{0,99}/|[^\s'"]{0,300}?/(?:web)?hooks?/)[^\s'"\[]+
    # signed addresses
    |(?<=[?&;])(?P<signed>(?i:sig|sign|signature|x-[a-z]+-signature|key|code|policy|hmac|hdnea)=)
        [^\s&'"\[]+
    """,
    re.VERBOSE | re.MULTILINE,
)

# ---- by name, in a running text: ``password=x``, ``'password': 'x'``, ``--password x``

_QUOTED = (
    r"""[bruf]{0,2}(?:"{3}[\s\S]*?(?:"{3}|\Z)|'{3}[\s\S]*?(?:'{3}|\Z)"""
    r"""|"(?:[^"\\]|\\.)*(?:"|\Z)|'(?:[^'\\]|\\.)*(?:'|\Z))"""
)
_NAME = re.compile(
    r"""(?:b?(?P<q>\\{0,4}['"])(?P<quoted>[^'"\\\s=:]{1,80}|\w+(?:[ ]\w+){1,2})(?P=q)[\])]?
        |(?P<line>(?i:authorization|cookie))(?=:[ ])
        |(?P<flag>(?<![\w-])--?[A-Za-z][\w-]*)(?=[ ][^\s-])
        |(?<![\w-])(?<![\w-]\.)(?P<bare>-{0,2}[A-Za-z_][\w.-]*)(?:\[\w*\])?
    )(?P<sep>\s*(?::\s*[A-Za-z_][\w.\[\], |]{0,40}\s=\s|:=|=>|[=!]=|[=:])\s*
        |(?(quoted),\s*(?:['"](?:[:=]{1,2}|=>)['"],\s*)?(?:
            ['"]?(?i:val|values?|data|content|text)['"]?\s*[=:]\s*|(?=b?\\{0,4}['"]|[(\[{])
        )|(?(flag)[ ]|(?!)))
    )(?=\S)""",
    re.VERBOSE,
)
_VALUE = re.compile(
    rf"""(?P<esc>\\{{1,4}}['"])[\s\S]*?(?:(?P=esc)|\Z)|{_QUOTED}
        |(?:(?i:bearer|basic|token|digest)[ ])?[^\s;&'"(\[{{]*""",
    re.VERBOSE,
)
_LITERAL = re.compile(_QUOTED)
_INNER = re.compile(r"([\w-]+)['\"]?\s*[:=]")
_BRACKETS = re.compile(rf"{_QUOTED}|[(\[{{]|[)\]}}]")
_NUMERIC = re.compile(
    r"(?:[^A-Za-z'\"]|\d*e[+-]?\d|None|True|False|nan|inf|tensor|array|range|d?type|device"
    r"|torch|np|u?int\d+|b?float\d+"
    rf"|['\"]?(?:{SPECIAL_TOKEN.pattern})['\"]?)*"
)
_LINE = re.compile(r"[^\n'\"]*")
_BY_VALUE = ("key", "keys", "sig", "-u", "--user")  # the value says whether it is a secret
_NO_NAMES = ("Error", "Exception", "Warning", "Fault")
_FRAME = re.compile(r'(^ *File ".*", line \d+.*\n(?:^    .*(?:\n|\Z))*)', re.MULTILINE)


def scrub(text: str) -> str:
    """Hide in a text what looks like a secret, and what stands beside the name of one.

    Of the source lines in a traceback only literals, or what is in them, are hidden: a variable's
    name is no secret.

    >>> scrub("cannot reach postgresql://bob:hunter2@host/db (password=hunter2, rate=3)")
    'cannot reach postgresql://bob:[redacted]@host/db (password=[redacted], rate=3)'
    """
    text = _LOOKS.sub(lambda m: (m[m.lastgroup] if m.lastgroup else "") + REDACTED, text)
    if "Traceback" not in text and 'File "' not in text:
        return _scrub_pairs(text)
    pieces = _FRAME.split(text)  # every second one is a frame with its source
    pieces[::2] = map(_scrub_pairs, pieces[::2])
    for k, code in enumerate(pieces[1::2]):
        inside = _LITERAL.sub(lambda literal: _scrub_pairs(literal[0]), code)
        pieces[2 * k + 1] = _scrub_pairs(inside, code=True)
    return "".join(pieces)


def scrub_command(words: Iterable[str]) -> list[str]:
    """The words of a command line, without what looks like a secret or stands behind its name.

    >>> scrub_command(["train.py", "--api-key", "abc", "--tokens", "512", "hf.token=abc", "-v"])
    ['train.py', '--api-key', '[redacted]', '--tokens', '512', 'hf.token=[redacted]', '-v']
    """
    told: list[str] = []
    how = ""  # much of the next word is a secret, by the name before it
    for word in words:
        hides = how and not word.startswith("-")
        shown = how == "texts" and _NUMERIC.fullmatch(word) is not None
        name, given, _ = word.partition("=")
        if hides and not shown:
            told.append(REDACTED)
        elif given and scrub(word).startswith(f"{name}={REDACTED}"):
            told.append(f"{name}={REDACTED}")  # all of the word, blanks in it or not
        else:
            told.append(scrub(word))
        is_name = word.startswith("-") and "=" not in word
        how = secrecy(word.lstrip("-").rpartition(".")[2]) if is_name else ""
    return told


def _scrub_pairs(text: str, *, code: bool = False) -> str:
    told: list[str] = []
    done = at = 0
    while found := _NAME.search(text, at):
        name = found["quoted"] or found["line"] or found["flag"] or found["bare"]
        last = name.rpartition(".")[2]
        at = found.start() + 1 if found["quoted"] else found.start("sep")
        start = found.end()
        how = "" if last.endswith(_NO_NAMES) else secrecy(last)
        how = how or _by_value(last, text[start : start + 1000])
        if not how:
            continue
        end = _end_of_value(text, start)
        if found["line"]:
            end = _LINE.match(text, start).end()  # type: ignore[union-attr]  # of any length
        value = text[start:end]
        shown = (how == "texts" and _NUMERIC.fullmatch(value) is not None) or (
            code and not ("'" in value or '"' in value or value.isdigit())
        )
        if value and not shown:
            told += text[done:start], REDACTED
            done = at = end
    return "".join([*told, text[done:]])


def _by_value(name: str, behind: str) -> str:
    """Say like :func:`secrecy` what the text behind a name makes of it: of what opens a door."""
    if not name.lower().endswith(_BY_VALUE):
        return ""
    if behind.startswith("{"):  # keys, each under the name of what it opens
        secret = any(secrecy(f"{inner} {name}") for inner in _INNER.findall(behind[:200])[:5])
    else:
        found = _VALUE.match(behind)
        secret = found is not None and looks_random(name, found[0].strip("'\""))
    return "all" if secret else ""


def _end_of_value(text: str, start: int) -> int:
    found = _VALUE.match(text, start)
    end = start if found is None else found.end()
    if text[end : end + 1] not in ("(", "[", "{"):
        return start + len(text[start:end].rstrip(",)]}")) if text[start] not in "'\"" else end
    depth = 0
    for part in _BRACKETS.finditer(text, end):
        depth += (part[0] in "([{") - (part[0] in ")]}")
        if depth <= 0:
            return part.end()
    return len(text)
