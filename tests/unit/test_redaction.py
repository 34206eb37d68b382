"""No secret leaves in a text: neither by its name, nor by its looks, nor beside its name."""

from __future__ import annotations

import enum
import gzip
import json
import logging
import os
import re
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloader import SafeDataLoader, SampleError
from safeloader.failures.failure import failure_of
from safeloader.introspect.dataset_state import describe
from safeloader.introspect.redaction import scrub, secrecy
from safeloader.introspect.texts import bounded_text

SECRET = "hunter2"
HIDDEN = re.split(
    r"\s+",
    """db_pass PASS pw passcode hftoken authtoken sessiontoken jwt pat openai_key storage_key
    ssh_key aws_key sas connection_string session_id webhook dbPassword DB_PASSWD userPass x-api-key
    AWS_SECRET_ACCESS_KEY hf_token sshkey smtp_pwd signingKey client-secret pgpass cookie
    Authorization AccountKey otp recovery_code wandb_key slackWebhookUrl conn_str
    dbpw rootpw adminpw DB_PW userpwd pin gpg_pin oauth oauth2 signature sid mysecret secretkey
    session_cookie cookies password_hash""",
)
SHOWN = re.split(
    r"\s+",
    """tokenizer key passes patience keyframes passage author compass keys key_points monkey path
    pattern pin_memory forward_pass bypass image_key primary_key author_id patch digit_key session
    user_id accessible turkey sassy signal
    cookiecutter secretary token_type password_length pw_conv pem_width sig user_key""",
)


@pytest.mark.parametrize("name", HIDDEN)
def test_names_of_secrets_are_known(name: str) -> None:
    assert secrecy(name)


@pytest.mark.parametrize("name", SHOWN)
def test_harmless_names_are_not_taken_for_them(name: str) -> None:
    assert not secrecy(name)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://bob:hunter2@host/db",
        "redis://:hunter2@host:6379/0",
        "postgresql://bob:hun/hunter2@host",
        "bob:hunter2@db.example.com",
        "[('Authorization', 'Bearer hunter2')]",
        "[(b'authorization', b'Bearer hunter2')]",
        "Authorization: Bearer hunter2",
        "Authorization: Digest user=bob, response=hunter2",
        "Cookie: a=1; b=hunter2",
        "['--password', 'hunter2']",
        "train.py --password hunter2 --epochs 3",
        "--password=hunter2",
        "password: hunter2",
        "{'db_pass': 'hunter2', 'rate': 1}",
        json.dumps(json.dumps({"password": "hunter2"})),
        "AccountName=x;AccountKey=hunter2==;EndpointSuffix=core.windows.net",
        "https://x.com/a?X-Amz-Signature=hunter2&y=1",
        "https://x.com/a?sv=1&sig=hunter2",
        "https://x.com/?access_token=hunter2",
        "Config(api_key=SecretStr('hunter2'), rate=1)",
        "passwords: {'a': ['x', 'hunter2']}",
        "https://hooks.slack.com/services/T0/B0/hunter2",
        "https://discord.com/api/webhooks/1/hunter2",
        "environ({'AWS_SECRET_ACCESS_KEY': 'hunter2'})",
        'def f(password: str = "hunter2")',
        'config["password"] = "hunter2"',
        "password = 'hunter2",  # cut off
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
        "export PGPASSWORD=hunter2",
        "['password: hunter2', 'x']",
        "{'a': 'db_pass=hunter2', 'b': 1}",
        "[{'Name': 'DB_PASSWORD', 'Value': 'hunter2'}]",
        '{"type":"password","value":"hunter2"}',
        "{'keys': {'openai': 'hunter2'}}",
        "curl -u bob:hunter2 https://host",
        "['curl', '--user', 'bob:hunter2']",
        "password=r'''it's hunter2'''",
        'password="""a "hunter2" b"""',
        "postgresql://bob:a@hunter2@host",
        "<Login.PASSWORD: 'hunter2'>",
        '[["--password"],["hunter2"]]',
        '("DB_PASSWORD","=","hunter2")',
        "sig=" + "hunter2" * 4,
    ],
)
def test_secrets_in_a_running_text_are_hidden(text: str) -> None:
    clean = scrub(text)
    assert SECRET not in clean
    assert "[redacted]" in clean
    assert scrub(clean) == clean


@pytest.mark.parametrize(
    "key",
    [
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "AKIA" + "IOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1_" * 10,
        "hf_" + "aB1" * 10,
        "sk-proj-" + "aB1" * 10,
        "xoxb-" + "123456789012-abcdefghij",
        "AIza" + "aB1" * 12,
        "glpat-" + "a1" * 10,
    ],
)
def test_keys_of_known_looks_are_hidden(key: str) -> None:
    assert key not in scrub(f"the key {key} was refused")
    assert key not in bounded_text({"x": [key]})


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'password'",
        "max_tokens=512, tokens: [1, 2, 3]",
        "http://localhost:8080/a",
        "write to bob@example.com",
        "NoCredentialsError: Unable to find any",
        "git@github.com:org/repo",
        "s3://bucket/key=1/x",
        "tokenizer: 'bert', key='image', patience=3",
        "Caught KeyError in DataLoader worker process 3.",
        '  File "/x/secrets/a.py", line 3, in get_token\n    token = tokens[i]\n',
        "pad_token='<pad>', eos_token=</s>, mask_token='[MASK]', token_type='bert'",
        "special_tokens={'pad_token': '<pad>', 'unk_token': '<unk>'}",
        "cookiecutter='a', secretary='b', password_length=8, pw_conv='c', pem_width=3",
        "sig='sigmoid', user_key='u', keys={'image': 'img'}",
        "docker run -u 1000:1000 image",
        "git+https://host/a/b@v1",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert scrub(text) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["a:", "a.", "'", "\\", "password=(", "--a ", "://", "eyJ", "a/", "key=(", "://a/"]
)
def test_looking_takes_no_longer_than_in_proportion(piece: str) -> None:
    """Forty times the text of the longest message; what takes its square would take minutes."""
    scrub(piece * (400_000 // len(piece)))


Pair = namedtuple("Pair", "name value")  # as users write them
Account = namedtuple("Account", "user password")


class Login(enum.Enum):
    PASSWORD = SECRET
    RATE = 3


class TextLogin(enum.StrEnum):
    PASSWORD = SECRET


class Telling:
    def __init__(self, told: Any) -> None:
        self.told = told

    def __safeloader_state__(self) -> Any:
        return {"told": self.told}


@pytest.mark.parametrize(
    "value",
    [
        *(Login.PASSWORD, TextLogin.PASSWORD, [Login.PASSWORD], {"a": TextLogin.PASSWORD}),
        *({"type": "password", "value": SECRET}, {"keys": {"openai": SECRET}}),
        *([["--password"], [SECRET]], ("DB_PASSWORD", "=", SECRET), ["-u", f"bob:{SECRET}"]),
        Account("bob", SECRET),
    ],
    ids=lambda value: type(value).__name__,
)
def test_secrets_within_a_value_are_hidden(value: Any) -> None:
    for text in (
        bounded_text(value),
        str(describe(Holding(x=value))),
        str(describe(Telling(value))),
    ):
        assert SECRET not in text


def test_what_is_no_secret_within_a_value_is_shown() -> None:
    assert "3" in bounded_text(Login.RATE)
    for name, value in (
        ("pad_token", "<pad>"),
        ("eos_token", "<|endoftext|>"),
        ("mask_token", "[MASK]"),
        ("special_tokens", ["<s>", "</s>"]),
        ("special_tokens", {"pad_token": "<pad>"}),
        ("keys", {"image": "img"}),
        ("sig", "sigmoid"),
    ):
        state = describe(Holding(**{name: value}))
        assert state["attributes"][name]["repr"] == bounded_text(value)
        assert "[redacted]" not in str(describe(Telling({name: value})))


shapes = st.sampled_from(
    [
        lambda name, value: {name: value},
        lambda name, value: {name.encode(): value},
        lambda name, value: {("env", name): value},
        lambda name, value: OrderedDict({name: [value]}),
        lambda name, value: [name, value],
        lambda name, value: (name.encode(), value.encode()),
        lambda name, value: {"name": name, "value": value},
        Pair,
        lambda name, value: f"{name}={value}",
        lambda name, value: f"--{name}={value}",
        lambda name, value: f"{{'{name}': '{value}'}}",
        lambda name, value: SimpleNamespace(**{name: value}),
    ]
)
wrapped = st.lists(
    st.sampled_from([lambda x: [x], lambda x: (0, x), lambda x: {"a": x}, lambda x: {"a": [x]}]),
    max_size=2,
)


class Holding:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise ValueError(f"cannot log in: {self.__dict__}")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(shapes, wrapped, st.sampled_from(HIDDEN), st.sampled_from(SHOWN))
def test_a_secret_is_not_shown_in_any_shape_and_what_is_none_always_is(
    shape: Any, around: list[Any], hidden: str, shown: str
) -> None:
    secret, harmless = shape(hidden, SECRET), {shown: "visible"}
    for wrap in around:
        secret = wrap(secret)
    dataset = Holding(held=secret, other=harmless, **{hidden: SECRET, shown: "visible"})
    with pytest.raises(SampleError) as caught:
        list(SafeDataLoader(dataset))  # type: ignore[arg-type]
    failure = caught.value.failure
    assert failure is not None
    for text in (str(caught.value), json.dumps(failure.to_dict()), repr(failure)):
        assert SECRET not in text
    assert describe(dataset)["attributes"][shown]["repr"] == "'visible'"
    assert "visible" in describe(dataset)["attributes"]["other"]["repr"]
    assert SECRET in caught.value.args[0]  # the user's own exception is not touched


class LogsIn:
    """Fails at one index with all that a client may put into its message."""

    def __init__(self) -> None:
        self.environment = {"AWS_SECRET_ACCESS_KEY": SECRET, "HOME": "/home/bob"}
        self.command = ["fetch", "--password", SECRET]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise ConnectionError(f"postgresql://bob:{SECRET}@host refused (db_pass={SECRET})")
        return index


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_no_text_that_leaves_holds_a_secret(
    workers: int, on_error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "safeloader"):
        for trace in (True, tmp_path):
            loader = SafeDataLoader(
                LogsIn(),  # type: ignore[arg-type]
                batch_size=2,
                num_workers=workers,
                on_error=on_error,
                trace=trace,
                on_failure_dump=tmp_path,
            )
            if on_error == "skip":
                list(loader)
            else:
                with pytest.raises(ConnectionError) as caught:
                    list(loader)
                assert SECRET not in str(caught.value)
                assert "postgresql://bob:[redacted]@host" in str(caught.value)
                assert "/home/bob" in str(caught.value)
            audit = loader.audit
            assert audit is not None
            assert SECRET not in f"{audit}{audit.to_dict()}{audit.reasons}"
            del loader
    raw = {path.suffix: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(raw) == {".gz", ".json"}  # a trace, a failure
    raw[".gz"] = gzip.decompress(raw[".gz"])
    texts = [caplog.text, *map(bytes.decode, raw.values())]
    assert all(SECRET not in text for text in texts)
    assert "ConnectionError" in caplog.text


@pytest.mark.parametrize(
    "literal",
    [
        "host=db user=bob password=hunter2",
        "--token hunter2 --rate 3",
        "--api-key=hunter2",
        "PGPASSWORD=hunter2 psql",
        "hftoken: hunter2",
    ],
)
def test_source_lines_lose_the_secrets_within_their_literals(literal: str) -> None:
    text = f'Traceback\n  File "a.py", line 3, in connect\n    connect("{literal}", port=5432)\n'
    assert "hunter2" not in scrub(text)
    assert "port=5432" in scrub(text)


def test_source_lines_lose_their_literals_and_no_names() -> None:
    def connect(**options: Any) -> None:
        raise ValueError("no")

    token = ["a"]
    try:
        connect(password="hunter2", token=token[0])
    except ValueError as exc:
        failure = failure_of(exc, phase="sample", where="")
    assert "connect(password=[redacted], token=token[0])" in failure.traceback


def test_the_environment_itself_is_told_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert SECRET not in json.dumps(describe(Holding(environ=os.environ, copy=dict(os.environ))))
