"""Passwords in addresses: found, taken out, and never in a sentence."""

from __future__ import annotations

import pytest

from train.config.credentials import has_credentials, redact, without_credentials


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("https://token@host", "https://host"),
        ("https://me:se@cret@host", "https://host"),
        ("https://me:se/cret@host", "https://host"),
        ("postgresql://mlflow:secret@db/mlflow", "postgresql://mlflow@db/mlflow"),
        ("postgresql+psycopg2://mlflow:s/e:cret@db:5/x", "postgresql+psycopg2://mlflow@db:5/x"),
        ("postgresql://db/x?user=u&password=secret&sslmode=on", "postgresql://db/x?user=u&sslmode=on"),
        ("postgresql://db/x?sslpassword=secret", "postgresql://db/x"),
    ],
)
def test_passwords_are_taken_out(uri: str, clean: str) -> None:
    assert without_credentials(uri) == clean
    assert has_credentials(uri) and not has_credentials(clean)
    assert "cret" not in redact(f"no way to {uri}: refused") and "token" not in redact(f"at {uri}.")


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "sqlite:////home/me@work/runs/mlflow.db",
        "sqlite:///mlflow.db",
        "postgresql://mlflow@db/mlflow",
        "https://host/path?page=1&x=2",
        "databricks",
    ],
)
def test_other_addresses_stay_as_they_are(uri: str) -> None:
    assert without_credentials(uri) == uri and not has_credentials(uri)
    if "mlflow@" not in uri:
        assert redact(f"no way to {uri}: refused") == f"no way to {uri}: refused"


def test_known_secrets_are_replaced_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "from-environment")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:of%20the-uri@host")
    said = redact("tried from-environment, of%20the-uri, 'of the-uri' and mine", "http://me:mine@host")
    assert said == "tried ***, ***, '***' and ***"
