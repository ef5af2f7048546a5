"""Typed loading: merge order, every error at once, frozen values, dumps that reload equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.loading import Config, chosen_by, difference, dump, find, load, validate
from pretrain.clock import Duration
from pretrain.config import RunConfig


class Inner(Config):
    width: int = pydantic.Field(8, gt=0)
    depth: int = 2


class Red(Config):
    name: str = "red"
    glow: float = 1.0


class Blue(Config):
    name: str = "blue"
    inner: Inner = Inner()


def colour_type(name: str) -> type[Config]:
    if name not in ("red", "blue"):
        raise ValueError("known: blue, red")
    return Red if name == "red" else Blue


class Whole(Config):
    inner: Inner = Inner()
    length: Duration = Duration(1, "steps")
    path: Path = Path("here")
    colour: pydantic.SerializeAsAny[Annotated[Config, chosen_by("name", colour_type)]] = Red()
    several: tuple[int, ...] = ()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_bases_then_file_then_overrides(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "inner: {width: 1, depth: 1}\nseveral: [1, 2]\n")
    write(tmp_path, "b.yaml", "base: a.yaml\ninner: {depth: 2}\n")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\nlength: 3 epochs\n")
    whole = load(path, Whole, ["inner.width=9"])
    assert whole == Whole(inner=Inner(width=9, depth=2), several=(1, 2), length=Duration(3, "epochs"))


def test_interpolation_is_resolved(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "inner: {width: 5, depth: '${inner.width}'}\n")
    assert load(path, Whole).inner.depth == 5


def test_all_bad_settings_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "bad.yaml",
        "inner: {widht: 3, depth: many}\nlength: 5 fortnights\n"
        "colour: {name: blue, inner: {width: -1}}\ntop: 1\n",
    )
    with pytest.raises(ConfigError) as caught:
        load(path, Whole)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"{path}: ") for line in lines)
    text = str(caught.value)
    assert "inner.widht: no such setting; did you mean width?" in text
    assert "inner.depth: found 'many'" in text
    assert "length: found '5 fortnights'" in text and '"12 steps"' in text
    assert "colour.inner.width: found -1" in text and "greater than 0" in text
    assert "top: no such setting; known here: inner, length, path, colour, several" in text


def test_unknown_choice_names_what_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.yaml", "colour: {name: green}\n")
    with pytest.raises(ConfigError, match=r"colour\.name: found 'green'; known: blue, red"):
        load(path, Whole)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: [1, 2", "not readable as YAML"),
        ("- 1\n- 2\n", "a mapping of settings"),
        ("inner: {width: '${nowhere.at.all}'}", "nowhere"),
        ("base: missing.yaml", "no such file"),
        ("base: bad.yaml", "comes back to itself"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, Whole)
    assert "\n" not in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_a_bad_override_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "{}")
    with pytest.raises(ConfigError, match=r"inner\.width"):
        load(path, Whole, ["inner.width"])
    with pytest.raises(ConfigError, match=r"innr: no such setting; did you mean inner"):
        load(path, Whole, ["innr.width=3"])


def test_a_missing_file_names_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean configs/smoke/mae\.yaml"):
        find("configs/smoke/mea.yaml")


def test_values_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Whole().inner.width = 3  # type: ignore[misc]


@given(
    width=st.integers(1, 10**6),
    amount=st.integers(0, 10**9),
    blue=st.booleans(),
    several=st.lists(st.integers(-5, 5), max_size=4),
    name=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8),
)
def test_a_dump_reloads_equal(width: int, amount: int, blue: bool, several: list[int], name: str) -> None:
    whole = Whole(
        inner=Inner(width=width),
        length=Duration(amount, "samples"),
        path=Path(name),
        colour=Blue(inner=Inner(width=width)) if blue else Red(glow=1 / 3),
        several=tuple(several),
    )
    again = validate(yaml.safe_load(dump(whole)), Whole, "dump")
    assert again == whole and dump(again) == dump(whole)


def test_difference_names_the_paths() -> None:
    changed = Whole(inner=Inner(depth=7), colour=Blue())
    paths = difference(Whole(), changed)
    assert paths["inner.depth"] == (2, 7)
    assert paths["colour.name"] == ("red", "blue")
    assert "inner.width" not in paths


def test_names_that_arent_text_are_refused_in_one_line(tmp_path: Path) -> None:
    odd = os.fsdecode(b"gr\xf6\xdfe")
    with pytest.raises(ConfigError, match=r"^run\.dir: found .*, whose name isn't UTF-8"):
        load("smoke/mae", RunConfig, [f"run.dir={odd}"])
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run: {dir: gr\xf6\xdfe}")
    with pytest.raises(ConfigError, match=r"latin\.yaml: .*utf-8"):
        load(latin, RunConfig)
    for nothing in ("", ".", "/"):
        with pytest.raises(ConfigError, match="names no config file"):
            load(nothing, RunConfig)
