"""Files: numbered names, whole files or none, lines of JSON, and errors that name the file."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def numbered(path: Path) -> Iterator[Path]:
    """path, then the same name with -2, -3, … before its suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def replace_file(file: Path, text: str) -> None:
    """Writes the file aside and renames it, so that readers find the whole old or new file."""
    aside = file.with_name(f".{file.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError:   # the disk may be full
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def append_lines(file: Path, objects: list[dict]) -> None:
    """Appends a line of JSON for each object, with null for numbers that are not finite."""
    text = _lines(objects).encode()
    with file.open("ab", buffering=0) as stream:   # the lines of several processes do not mix
        while text:
            text = text[stream.write(text):]


def replace_lines(file: Path, objects: list[dict]) -> None:
    """Replaces the file by such lines."""
    replace_file(file, _lines(objects))


def _lines(objects: list[dict]) -> str:
    def finite(value):
        if isinstance(value, list):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return "".join(json.dumps({name: finite(value) for name, value in each.items()}) + "\n"
                   for each in objects)


def read_lines(file: Path) -> list[dict]:
    """The objects that append_lines wrote, without a last line that a kill has cut short.

    A file that is not there has none. Raises ValueError, which names the file and the line.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [_object(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, which names the file."""
    return _object(file.read_bytes(), str(file))


def write_object(file: Path, value: dict) -> None:
    """Replaces the file by this JSON object."""
    replace_file(file, json.dumps(value, indent=1) + "\n")


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml. Raises ValueError, which names the file."""
    with naming(f"{file} is damaged"):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("lines of the form 'option: value' were expected")
    return found


def _object(text: bytes, where: str) -> dict:
    with naming(f"{where} is damaged"):
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object was expected, not {type(found).__name__}")
    return found


@contextlib.contextmanager
def naming(what):
    """Turns any error in the `with` block into a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:
        message = error if type(error) is ValueError else brief(error)
        raise ValueError(f"{what}: {message}") from error


def brief(error: BaseException, lines: int = 1) -> str:
    """The kind of an error and the first lines of its message that are not empty."""
    text = f"{type(error).__name__}: {str(error).strip()}".splitlines()
    return " ".join([line.strip() for line in text if line.strip()][:lines])
