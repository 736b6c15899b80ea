"""Keys of S3 that run out in the middle of a night: a profile renews them unseen, keys of the environment end it."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bucket import Bucket, change, reading
from faults import Faults, faulty

from conjoin.jobs.nightly import run
from conjoin.pipeline.errors import StorageError

# What `credential_process` runs: the newest token, which is about to run out, so that nobody keeps it for long.
# A shell, since it is asked before every request.
PRINTS = """
at=$(date -u -d '+3 seconds' +%Y-%m-%dT%H:%M:%SZ 2>/dev/null || date -u -v+3S +%Y-%m-%dT%H:%M:%SZ)
printf '{"Version": 1, "AccessKeyId": "testing", "SecretAccessKey": "testing", '
printf '"SessionToken": "%s", "Expiration": "%s"}' "$(cat "$1")" "$at"
"""


_LEAST_S = 3.0  # a token says that it lasts so long, and whoever asked for it keeps it


@dataclass
class Tokens:
    """Session tokens of which the newest three are good, as an old one overlaps with its successors."""

    file: Path
    good: set[str] = field(default_factory=set)
    number: int = 0
    at: float = -math.inf

    def renew(self) -> None:
        if time.monotonic() - self.at < _LEAST_S:
            return
        self.number, self.at = self.number + 1, time.monotonic()
        self.good.add(f"token-{self.number}")
        self.good.discard(f"token-{self.number - 3}")
        fresh = self.file.with_suffix(".fresh")
        fresh.write_text(f"token-{self.number}")
        fresh.replace(self.file)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    made = Tokens(tmp_path / "token")
    made.renew()
    return made


def every(count: int, action: Callable[[], None]) -> Callable[[int], None]:
    return lambda number: action() if number % count == 0 else None


def test_a_profile_renews_its_keys_in_the_middle_of_a_night(
    bucket: Bucket, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "keys.sh"
    script.write_text(PRINTS)
    profile = tmp_path / "profile"
    profile.write_text(f"[default]\ncredential_process = sh {script} {tokens.file}\nregion = us-east-1\n")
    faults = Faults(good_tokens=tokens.good, each=every(100, tokens.renew))
    with faulty(bucket.good, faults) as endpoint:
        before = bucket.wanted()
        change(bucket, 1)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
        with reading(bucket, (before, bucket.wanted())):
            bucket.night(endpoint)
    assert tokens.number > 3, "nothing ran out"
    assert not bucket.errors
    assert not faults.met["stale"]


@pytest.mark.parametrize("requests", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_keys_that_are_not_renewed_end_the_night_and_new_ones_go_on(
    bucket: Bucket, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    def expire(number: int) -> None:
        if number == requests:
            tokens.good.clear()
            tokens.good.add("token-other")

    with faulty(bucket.good, Faults(good_tokens=tokens.good, each=expire)) as endpoint:
        before = bucket.wanted()
        change(bucket, 1)
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with reading(bucket, (before, bucket.wanted())):
            with pytest.raises(StorageError, match=r"keys of S3 have expired.*Renew them"):
                run(bucket.config(), dt.date(2026, 1, 1))
            monkeypatch.setenv("AWS_SESSION_TOKEN", "token-other")
            bucket.night(endpoint)
    assert not bucket.errors
