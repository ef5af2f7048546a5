"""YAML files and overrides to one frozen, validated value.

OmegaConf reads, merges (`base:` chain, then `a.b=c` overrides) and interpolates; pydantic validates.
All bad settings are reported at once, each as a line: path, value found, what is allowed, nearest known name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pydantic
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic_core import PydanticCustomError

from configs.errors import ConfigError

PACKAGED = Path(__file__).parent
"""Where the configs that ship with keel lie, so that `demo/mae` works from any folder."""


class Config(pydantic.BaseModel):
    """Base of every setting group: unknown names are refused, values never change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


ConfigType = TypeVar("ConfigType", bound=Config)


class Problem(pydantic.BaseModel):
    """One bad setting, as it will be printed."""

    path: str
    message: str

    def under(self, prefix: str) -> Problem:
        return Problem(path=f"{prefix}.{self.path}" if self.path else prefix, message=self.message)

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def load(path: str | Path, schema: type[ConfigType], overrides: Sequence[str] = ()) -> ConfigType:
    """Read `path`, its bases and the `a.b=c` overrides into a frozen `schema`.

    Raises `ConfigError` naming every bad setting.
    """
    found = find(path)
    return validate(resolved(found, overrides), schema, source=str(found))


def find(path: str | Path) -> Path:
    """The config file meant by `path`: itself, with `.yaml` added, or one that ships with keel."""
    given = Path(path)
    if not given.name:
        raise ConfigError(f"{str(path)!r}: names no config file")
    packaged = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    for candidate in (given, PACKAGED / packaged):
        for name in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if name.is_file():
                return name
    known = sorted(str(p.relative_to(PACKAGED)) for p in PACKAGED.rglob("*.yaml"))
    near = difflib.get_close_matches(str(packaged), known, n=1)
    hint = f"; did you mean configs/{near[0]}?" if near else ""
    raise ConfigError(f"{path}: no such config file{hint}")


def resolved(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged and interpolated settings of `path` as plain containers, not yet validated."""
    return _overridden(lambda: _with_bases(path, ()), overrides, str(path))


def from_values(
    values: dict[str, Any], schema: type[ConfigType], overrides: Sequence[str], source: str
) -> ConfigType:
    """As `load`, from settings at hand in place of a file; `source` is what errors name."""
    return validate(_overridden(lambda: OmegaConf.create(values), overrides, source), schema, source)


def _overridden(values: Callable[[], DictConfig], overrides: Sequence[str], source: str) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override}: an override reads path.to.setting=value")
        if not is_text(override):  # bytes that the shell passed on from a file's name
            raise ConfigError(
                f"{override.partition('=')[0]}: found {override.partition('=')[2]}, whose name isn't UTF-8, "
                "as what a config holds must be; rename it, or give a link to it another name"
            )
    try:
        merged = OmegaConf.merge(values(), OmegaConf.from_dotlist(list(overrides)))
        container = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def is_text(value: str) -> bool:
    """Whether a config file can hold it: a path may also be made of other bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_bases(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    here = path.resolve()
    if here in seen:
        chain = " -> ".join(str(p) for p in (*seen, here))
        raise ConfigError(f"{path}: base: the chain comes back to itself: {chain}")
    if not path.is_file():
        raise ConfigError(f"{path}: base: no such file, named in {seen[-1] if seen else path}")
    try:
        own = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of settings, found {type(own).__name__}")
    bases = own.pop("base", None) or []
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = OmegaConf.merge(merged, _with_bases(path.parent / base, (*seen, here)))  # type: ignore[assignment]
    whole = OmegaConf.merge(merged, own)
    assert isinstance(whole, DictConfig)
    return whole


def validate(values: dict[str, Any], schema: type[ConfigType], source: str) -> ConfigType:
    """`values` as a frozen `schema`; raises `ConfigError` with a line for every bad setting."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [f"{source}: {problem}" for problem in problems(error, schema)]
        raise ConfigError("\n".join(lines)) from None


def dump(config: Config) -> str:
    """The whole config as YAML that loads to an equal value."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two configs differ, with both values."""
    before, after = dict(leaves(old.model_dump(mode="json"))), dict(leaves(new.model_dump(mode="json")))
    paths = [*before, *(path for path in after if path not in before)]
    return {p: (before.get(p), after.get(p)) for p in paths if before.get(p) != after.get(p)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of nested mappings with what lies at their ends; an empty mapping is an end."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def chosen_by(key: str, resolve: Callable[[str], type[Config]]) -> pydantic.BeforeValidator:
    """A validator for a setting group whose type follows from its setting `key` (`name`, `kind`).

    `resolve` gives the config type for a name and raises ValueError with what is allowed.
    """

    def validator(value: Any) -> Any:
        if isinstance(value, Config):
            return value
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            raise PydanticCustomError("missing_choice", "needs a `{key}`", {"key": key})
        try:
            kind = resolve(value[key])
        except ValueError as error:
            unknown = Problem(path=key, message=f"found {value[key]!r}; {error}")
            raise PydanticCustomError("nested", "wrong", {"problems": [unknown.model_dump()]}) from None
        try:
            return kind.model_validate(value)
        except pydantic.ValidationError as error:
            raise PydanticCustomError(
                "nested", "wrong", {"problems": [p.model_dump() for p in problems(error, kind)]}
            ) from None

    return pydantic.BeforeValidator(validator)


def only_class(module: ModuleType, base: type[ConfigType]) -> type[ConfigType]:
    """The one subclass of `base` that `module` itself defines; raises ValueError where it isn't one."""
    own = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, base) and kind.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ValueError(f"{module.__name__} must define exactly one {base.__name__}, found {len(own)}")
    return own[0]


def problems(error: pydantic.ValidationError, schema: type[pydantic.BaseModel]) -> list[Problem]:
    """Every bad setting of a pydantic error, as a user should read it."""
    found: list[Problem] = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "nested":
            found += [Problem(**inner).under(path) for inner in item["ctx"]["problems"]]
        elif item["type"] == "extra_forbidden":
            found.append(Problem(path=path, message=_unknown(item["loc"], schema)))
        elif item["type"] == "missing":
            found.append(Problem(path=path, message="is missing; set it"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:] if message[:6] == "Input " else message
            message = message.replace("valid tuple", "valid list").replace("Tuple should", "a list should")
            shown = "" if isinstance(item["input"], dict | Config) else f"found {item['input']!r}; "
            found.append(Problem(path=path, message=shown + message))
    return found


def _unknown(location: tuple[int | str, ...], schema: type[pydantic.BaseModel]) -> str:
    known = _names_at(location[:-1], schema)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    if near:
        return f"no such setting; did you mean {near[0]}?"
    return "no such setting; known here: " + ", ".join(known) if known else "no such setting"


def _names_at(location: tuple[int | str, ...], schema: type[pydantic.BaseModel]) -> list[str]:
    """The field names of the model that `location` leads to, empty where it can't be followed."""
    model: Any = schema
    for part in location:
        field = model.model_fields.get(part)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
            return []
    return list(model.model_fields)
