from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gostore.config import KIB, MIB, NodeConfig
from gostore.core.errors import ConfigError

GOOD: dict[str, Any] = {"name": "n1", "secret": "0123456789abcdef", "data_dir": "/tmp/x"}


def test_defaults_are_valid_and_survive_a_round_trip() -> None:
    config = NodeConfig.from_dict(GOOD)
    assert NodeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"name": "n 1"}, ["name", "'n 1'", "matches"]),
        ({"name": ""}, ["name", "''"]),
        ({"secret": "short"}, ["secret", "16", "secrets.token_hex"]),
        ({"tcp_port": 70_000}, ["tcp_port", "70000", "65535"]),
        ({"tcp_port": "80"}, ["tcp_port", "'80'", "int"]),
        ({"tcp_port": True}, ["tcp_port", "True", "int"]),
        ({"join": ["nowhere"]}, ["join", "nowhere", "HOST:PORT"]),
        ({"db": {"shards": 0}}, ["db.shards", "0", "1", "1024"]),
        ({"db": {"sharks": 4}}, ["db.sharks", "no such setting", "shards"]),
        ({"db": 7}, ["db", "7", "table"]),
        ({"cls": {"profile": "slow"}}, ["cls.profile", "'slow'", "fast, lan"]),
        ({"policies": {"placement": {"name": "X"}}}, ["policies.placement", "source"]),
        ({"colour": "red"}, ["colour", "no such setting"]),
    ],
)
def test_a_mistake_names_field_value_and_what_is_allowed(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        NodeConfig.from_dict({**GOOD, **change})
    for part in parts:
        assert part in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("section", "name", "size_max", "room"),
    [
        ("comm", "message_size_bytes_max", 8 * MIB, 16 * KIB + 34 * KIB),
        ("storage", "record_size_bytes_max", 4 * MIB, 16 * KIB + KIB),
    ],
)
def test_a_value_must_fit_a_message_and_a_record(section: str, name: str, size_max: int, room: int) -> None:
    for settings in (
        {section: {name: size_max}, "db": {"value_size_bytes_max": size_max - room + 1}},
        {section: {name: size_max}, "db": {"value_size_bytes_max": size_max - room, "key_size_bytes_max": 2 * KIB}},
    ):
        with pytest.raises(ConfigError) as caught:
            NodeConfig.from_dict({**GOOD, **settings})
        for part in (f"db.value_size_bytes_max = {settings['db']['value_size_bytes_max']}", f"{section}.{name} = "):
            assert part in caught.value.message
        least = re.search(r"to at least (\d+), or db.value_size_bytes_max to at most (\d+)", caught.value.message)
        assert least is not None
        # Either of what it says to change is enough.
        NodeConfig.from_dict({**GOOD, **settings, section: {name: int(least[1])}})
        settings["db"]["value_size_bytes_max"] = int(least[2])
        NodeConfig.from_dict({**GOOD, **settings})
    NodeConfig.from_dict({**GOOD, section: {name: size_max}, "db": {"value_size_bytes_max": size_max - room}})


def test_a_missing_secret_is_named() -> None:
    with pytest.raises(ConfigError, match="secret"):
        NodeConfig.from_dict({"name": "n1", "data_dir": "x"})


def test_file_then_environment_then_keywords(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(
        'name = "n1"\nsecret = "0123456789abcdef"\ndata_dir = "d"\ntcp_port = 1\n'
        "[db]\nshards = 2\n[ring]\nreplicas = 2\n"
    )
    environ = {"GOSTORE_DB__SHARDS": "4", "GOSTORE_JOIN": "a:1, b:2", "HOME": "/"}
    config = NodeConfig.load(file, environ, db={"in_sync_min": 1}, tcp_port=9)
    assert (config.db.shards, config.db.in_sync_min, config.ring.replicas, config.tcp_port) == (4, 1, 2, 9)
    assert config.join == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [("GOSTORE_DB__SHARDS", "many", "int"), ("GOSTORE_DB__SHARKS", "1", "no such"), ("GOSTORE_X__Y", "1", "no such")],
)
def test_a_wrong_variable_is_named(variable: str, value: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        NodeConfig.load(None, {variable: value}, **GOOD)
    assert variable in caught.value.message


def test_an_unreadable_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        NodeConfig.load(tmp_path / "absent.toml", {})
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not a TOML file"):
        NodeConfig.load(tmp_path / "bad.toml", {})
