"""Reads data files, and says of a bad one what is wrong and where."""

import codecs
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


class _Number(str):
    """A number of a data file as it is written there."""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> _Number:
    if not math.isfinite(float(text)):
        _no_number(text)
    return _Number(text)


def read_rows(path: Path, needs: Sequence[str], answer_lists: str) -> list[dict[str, Any]]:
    """The fields of the problems in a JSONL file. `needs`: optional ones that every line must have.

    answer_lists: with a list of answers, "any" of them is right, or only "all" of them together.
    An answer or id may be a number, and stays as it is written; the default id is the file's name
    and the line, and the line is added to an id that an earlier one has. Raises ValueError for a
    missing or empty file, and one that names file and line for a line that is no JSON object in
    UTF-8, lacks a field or has an empty field or one of the wrong type.
    """
    rows, ids = [], set()
    for number, line in enumerate(_read_jsonl(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"), parse_float=_finite, parse_int=_Number,
                             parse_constant=_no_number)
        except ValueError as error:   # JSON that does not parse, or bytes that are not UTF-8
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object was expected, not {type(row).__name__}")
        fields: dict[str, Any] = {}
        for name in ("problem", "answer", "solution", "expert_response", "id"):
            value = row.get(name)
            if value is None and name not in ("problem", "answer", *needs):
                continue
            several = name == "answer" and isinstance(value, list)
            texts = [_text(each, name, where) for each in (value if several else [value]) or [""]]
            if answer_lists == "all":
                texts = ["; ".join(texts)]
            fields[name] = texts[0]
            if len(texts) > 1:
                fields["other_answers"] = tuple(texts[1:])
        fields.setdefault("id", f"{path.stem}-{number}")
        while fields["id"] in ids:   # eval.py finds the answers to a problem by its id
            fields["id"] += f"-{number}"
        ids.add(fields["id"])
        rows.append(fields)
    if not rows:
        raise ValueError(f"{path} holds no problems")
    return rows


def _read_jsonl(path: Path) -> list[bytes]:
    """The lines of a file. Raises ValueError for what is no JSONL, and says how to make it."""
    kind, data = f"no data file at {path}", b""
    if path.is_file():
        kind, data = "", path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\3\4")):
            kind = f"{path} is compressed"
        elif data.startswith(b"PAR1"):
            kind = f"{path} is a Parquet file"
        elif data.lstrip().startswith(b"["):
            kind = f"{path} is a JSON array"
        elif path.suffix.lower() in (".csv", ".tsv"):
            kind = f"{path} is a table"
    elif path.is_dir():
        kind = f"{path} is a folder"
    if kind:
        raise ValueError(f"{kind}; a JSONL file was expected, with one JSON object a line. The "
                         f"library datasets reads other files and the hub, and writes JSONL: "
                         f"load_dataset(...)['train'].to_json('data.jsonl')")
    return data.splitlines()


def _text(value: Any, name: str, where: str) -> str:
    """The value of a field. Raises ValueError for what is no text, or empty."""
    if isinstance(value, _Number) and name in ("answer", "id"):
        return str(value)
    if not isinstance(value, str) or isinstance(value, _Number) or (
            name != "id" and not value.strip()):
        raise ValueError(f"{where}: field {name!r} must be text that is not empty, "
                         + ("and is missing" if value is None else f"not {value!r}"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {name!r} has a lone surrogate, "
                         f"{value[error.start]!r}, which is no character") from None
    return value
