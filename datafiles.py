"""Reads data sets: files, folders and data sets of the Hugging Face hub, also by a short name.

    read_rows("train.jsonl"), read_rows("gsm8k"), read_rows("openai/gsm8k:main:test")

It says what is wrong with a bad row, and where. rowforms.py turns a row into a problem.
"""

import codecs
import csv
import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from files import brief
from rowforms import to_fields


class Known(NamedTuple):
    """A data set of the hub that has a short name. samples: the k of avg@k in eval.py."""
    hub: str
    splits: tuple[str, ...]   # the one for training first
    samples: int = 1


KNOWN = {
    "openr1-46k": Known("Elliott/Openr1-Math-46k-8192", ("train",)),
    "math": Known("DigitalLearningGmbH/MATH-lighteval", ("train", "test")),
    "gsm8k": Known("openai/gsm8k:main", ("train", "test")),
    "math500": Known("HuggingFaceH4/MATH-500", ("test",)),
    "aime24": Known("HuggingFaceH4/aime_2024", ("train",), 32),
    "aime25": Known("math-ai/aime25", ("test",), 32),
    "amc23": Known("math-ai/amc23", ("test",), 32),
    "minerva": Known("math-ai/minervamath", ("test",)),
    "olympiad": Known("Hothan/OlympiadBench:OE_TO_maths_en_COMP", ("train",)),
    "arc-c": Known("allenai/ai2_arc:ARC-Challenge", ("test",)),
    "gpqa": Known("Idavidrein/gpqa:gpqa_diamond", ("train",)),
    "mmlu-pro": Known("TIGER-Lab/MMLU-Pro", ("test",)),
}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".arrow", ".txt", ".zip")
FIELDS = ("problem", "answer", "solution", "expert_response", "id")
SOURCES = (f"JSONL, JSON, CSV or Parquet file, a folder, org/name:config:split of the Hugging Face "
           f"hub, or one of {', '.join(KNOWN)}")


def read_rows(source: str, needs: Sequence[str] = (), *, answer_lists: str = "any",
              columns: Mapping[str, str] | None = None, split: str = "train",
              answer_format: str = "boxed", seed: int = 0) -> list[dict[str, Any]]:
    """The fields of the problems of a data set. needs: optional ones that every row must have.

    answer_lists: with a list of answers, "any" of them is right, or only "all" of them together.
    columns: one of FIELDS -> column, with dots into a row, for data sets without a short name. An
    optional field whose column is missing is left out. split: the one to take of several.
    answer_format, seed: see rowforms.to_fields.
    An answer or id may be a number, and stays as it is written; the default id is the name of the
    data set and the number of the row, and that number is added to an id that an earlier row has.
    Raises ValueError for a data set that is missing, empty or cannot be read, and one that names
    the row for a row that lacks a field or has an empty field or one of the wrong type.
    """
    rows, ids = [], set()
    if source.partition(":")[0] in KNOWN:
        columns = None
    for number, where, row in _raw_rows(source, split):
        given = {}
        for name, path in (columns or {}).items():
            try:
                given[name] = _column(row, path)
            except ValueError as error:
                if name in ("problem", "answer", *needs):
                    raise ValueError(f"{where}: {error}") from None
        try:
            fields = to_fields(row, answer_format, seed, given)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: a row with these columns has another form here "
                             f"({brief(error)})") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        present = [name for name, value in fields.items() if value not in (None, "", [])]
        found: dict[str, Any] = {"id": f"{name_of(source)}-{number}"}
        for name in dict.fromkeys(("problem", "answer", *needs, *present)):
            value = fields.get(name)
            several = name == "answer" and isinstance(value, list)
            values = (value if several else [value]) or [""]
            texts = [_text(each, name, where, row) for each in values]
            if answer_lists == "all":
                texts = ["; ".join(texts)]
            found[name] = texts[0]
            if len(texts) > 1:
                found["other_answers"] = tuple(texts[1:])
        while found["id"] in ids:   # eval.py finds the answers to a problem by its id
            found["id"] += f"-{number}"
        ids.add(found["id"])
        rows.append(found)
    if not rows:
        raise ValueError(f"{source} holds no problems")
    return rows


def name_of(source: str) -> str:
    """The name of a data set in tables and ids."""
    path, *parts = source.split(":")
    name = Path(path).stem if path.endswith(SUFFIXES) else Path(path).name
    return "-".join([name, *filter(None, parts)])


def content_hash(source: str, split: str) -> str:
    """A hash that changes if the rows of the data set do."""
    if Path(source).is_file():
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    text = json.dumps([row for *_, row in _raw_rows(source, split)], sort_keys=True,
                      default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Where rows come from

def _raw_rows(source: str, split: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yields (number from 1 on, what an error says of it, row). Errors: see read_rows."""
    path = Path(source)
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8) if path.is_file() else b""
    if not path.is_file() or data.startswith(b"PAR1"):
        rows = _of_datasets(source, split)
        yield from ((n, f"{source}, row {n}", row) for n, row in enumerate(rows, start=1))
    elif path.suffix.lower() in (".csv", ".tsv"):
        separator = "," if path.suffix.lower() == ".csv" else "\t"
        csv.field_size_limit(2 ** 31 - 1)   # its default is shorter than some responses
        with path.open(newline="", encoding="utf-8-sig") as text:
            try:
                for n, row in enumerate(csv.DictReader(text, delimiter=separator), start=1):
                    if any(row.pop(None, ())):   # the cells beyond the header's
                        raise ValueError(f"{path}, row {n} has more cells than the header: quote "
                                         f"those in which the separator stands")
                    yield n, f"{path}, row {n}", {name: row[name] or None for name in row}
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is no table of UTF-8 text ({error})") from None
    elif data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PK\3\4")):
        raise ValueError(f"{path} is compressed; decompress it first")
    elif data.lstrip().startswith(b"["):
        for n, row in enumerate(_parse(data, str(path)), start=1):
            where = f"{path}, item {n}"
            yield n, where, _object(row, where)
    else:
        for n, line in enumerate(data.splitlines(), start=1):
            if line.strip():
                where = f"{path}, line {n}"
                yield n, where, _object(_parse(line, where), where)


def _of_datasets(source: str, preferred: str) -> Any:
    """The rows of a Parquet file, a folder or a data set of the hub, by the library datasets."""
    name, _, rest = source.partition(":")
    known = KNOWN.get(name)
    path, _, of_hub = (known.hub if known else name).partition(":")
    config, _, split = (of_hub + ":" + rest if known else rest).partition(":")
    folder = not known and Path(path).is_dir()
    path = str(Path(path).absolute()) if folder else path
    hub = known or (path.count("/") == 1 and not path.startswith((".", "/", "~"))
                    and not path.endswith(SUFFIXES))
    if not (folder or hub or Path(path).is_file()):
        close = difflib.get_close_matches(name, KNOWN, 1)
        raise ValueError(f"no data file at {source}" + (
            f"; did you mean {close[0]}?" if close else f": a {SOURCES} was expected"))
    try:
        import datasets
    except ImportError:
        raise ValueError(f"the library datasets reads {source}: pip install datasets") from None
    datasets.disable_progress_bars()
    try:
        if Path(path).is_file():
            return datasets.load_dataset("parquet", data_files=path, split="train")
        if folder and any((Path(path) / each).is_file()
                          for each in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            if isinstance(saved, datasets.Dataset):
                if split or config:
                    raise ValueError("it has no splits: leave that out")
                return saved
            return saved[split or config or _choose(list(map(str, saved)), preferred)]
        if not split:
            found = known.splits if known else map(str, datasets.get_dataset_split_names(
                path, config or None))
            split = _choose(list(found), preferred)
        return datasets.load_dataset(path, config or None, split=split)
    except Exception as error:
        where = "" if folder or Path(path).is_file() else (
            f" is {path} of the Hugging Face hub and" if known else
            " is no file or folder here, and of the Hugging Face hub it")
        if isinstance(error, datasets.exceptions.DatasetGenerationError):   # its cause says more
            error = error.__cause__ or error
        raise ValueError(f"{source}{where} could not be read: {brief(error, lines=3)}") from None


def _choose(splits: list[str], preferred: str) -> str:
    if preferred in splits or len(splits) == 1:
        return preferred if preferred in splits else splits[0]
    raise ValueError(f"it has the splits {', '.join(splits)}: add one, as in org/name::{splits[0]}")


# --------------------------------------------------------------------------------------------------
# Values

class _Number(str):
    """A number of a JSON file as it is written there."""


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> _Number:
    if not math.isfinite(float(text)):
        _no_number(text)
    return _Number(text)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), parse_float=_finite, parse_int=_Number,
                          parse_constant=_no_number)
    except (ValueError, RecursionError) as error:   # no JSON, or bytes that are not UTF-8
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object was expected, not {type(row).__name__}")
    return row


def _column(row: Any, path: str) -> Any:
    """The value of a column; dots lead into what it holds, and a number into a list."""
    for name in path.split("."):
        if isinstance(row, list) and name.isdecimal() and int(name) < len(row):
            row = row[int(name)]
        elif isinstance(row, Mapping) and name in row:
            row = row[name]
        else:
            there = f"; it has {', '.join(row)}" if isinstance(row, Mapping) else ""
            raise ValueError(f"there is no column {path!r}, which --columns names{there}")
    return row


def _text(value: Any, name: str, where: str, row: Mapping[str, Any]) -> str:
    """The value of a field. Raises ValueError for what is no text, or empty."""
    if name in ("answer", "id"):
        if isinstance(value, _Number):
            return str(value)
        if type(value) is int or type(value) is float and value.is_integer():   # of Parquet
            return str(int(value))
        if type(value) is float and math.isfinite(value):
            return repr(value)
    if not isinstance(value, str) or isinstance(value, _Number) or (
            name != "id" and not value.strip()):
        missing = (f"and is missing; the row has {', '.join(map(str, row)) or 'nothing'}, and "
                   f"--columns {name}=NAME says which of them it is")
        raise ValueError(f"{where}: field {name!r} must be text that is not empty, "
                         + (missing if value is None else f"not {value!r}"))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {name!r} has a lone surrogate, "
                         f"{value[error.start]!r}, which is no character") from None
    return value
