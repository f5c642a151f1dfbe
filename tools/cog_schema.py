"""Write `.cog/openapi_schema.json`, which Cog's server enforces, from the doors' sources alone.

`cog build` makes that file by static analysis; Cog's Python package does not. This tool reads the same declarations by
the same rules, and refuses what the static analysis would read differently from Python, naming file and line.

    python -m tools.cog_schema            write the file
    python -m tools.cog_schema --check    exit 1 when the file is stale
    python -m tools.cog_schema --config cog.preprocess.yaml --folder F
                                          write the preprocessor's, for a server that is started in F

Knows syntax trees and the layout of Cog's schema; imports neither cog nor the doors.
"""

import argparse
import ast
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(".cog/openapi_schema.json")
_TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
_LIMITS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
}


class SchemaError(ValueError):
    """A declaration that Cog's static analysis would refuse or misread."""


@dataclass
class Door:
    """The declarations of one entry point."""

    properties: dict[str, dict[str, Any]] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)


def read_door(path: Path, name: str) -> Door:
    """Read the function `name`, or the `run` method of the class `name`, in `path`.

    Raises:
        SchemaError: names the file, line and parameter.
    """
    module = ast.parse(path.read_text(), str(path))
    lists = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found = next((node for node in module.body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        found = next((node for node in found.body if getattr(node, "name", None) == "run"), None)
    if not isinstance(found, ast.FunctionDef):
        raise SchemaError(f"{path} has no function or class with run() named {name}.")
    arguments = [argument for argument in found.args.args if argument.arg != "self"]
    defaults = found.args.defaults
    if len(defaults) != len(arguments):
        raise SchemaError(f"{path}:{found.lineno}: every parameter of {name} needs an Input(...) default.")
    door = Door(output={"title": "Output", **_type(found.returns, path, "the return value")[0]})
    for order, (argument, default) in enumerate(zip(arguments, defaults, strict=True)):
        _read_input(door, order, argument, default, path, lists)
    return door


def _read_input(
    door: Door, order: int, argument: ast.arg, default: ast.expr, path: Path, lists: dict[str, ast.expr]
) -> None:
    name, where = argument.arg, f"{path}:{argument.lineno}: {argument.arg}"
    if not (
        isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "Input"
    ):
        raise SchemaError(f"{where} needs an Input(...) default.")
    kind, optional = _type(argument.annotation, path, name)
    given = {keyword.arg: keyword.value for keyword in default.keywords}
    choices = _choices(given.pop("choices"), lists, where) if "choices" in given else None
    values = {key: _literal(value, f"{where}: {key}") for key, value in given.items() if key}
    if not isinstance(values.get("description"), str):
        raise SchemaError(f"{where} needs a description.")
    if "default" in values and values["default"] is None and not optional:
        raise SchemaError(f"{where} has the default None: annotate it Optional[...], or it becomes required.")
    shape: dict[str, Any] = {"x-order": order, "description": values["description"]}
    if choices is None:
        shape |= {"title": _title(name), **kind}
    else:
        shape["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        door.choices[name] = {
            "title": name,
            "description": "An enumeration.",
            "enum": choices,
            "type": kind["type"],
        }
    if optional:
        shape["nullable"] = True
    if "default" not in values:
        if not optional:
            door.required.append(name)
    elif values["default"] is not None:
        shape["default"] = values["default"]
    shape |= {_LIMITS[key]: value for key, value in values.items() if key in _LIMITS}
    if values.get("deprecated"):
        shape["deprecated"] = True
    door.properties[name] = shape


def _type(annotation: ast.expr | None, path: Path, name: str) -> tuple[dict[str, Any], bool]:
    """JSON schema of an annotation, and whether it is Optional."""
    match annotation:
        case ast.Name(id=known) if known in _TYPES:
            return dict(_TYPES[known]), False
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _type(inner, path, name)[0], True
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return {"type": "array", "items": _type(inner, path, name)[0]}, False
    line = getattr(annotation, "lineno", 0)
    raise SchemaError(
        f"{path}:{line}: {name} needs a type of {', '.join(_TYPES)}, Optional[...] or list[...]."
    )


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a single literal; concatenations, f-strings, names and arithmetic are not read statically."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(constant, ast.Constant):
        raise SchemaError(f"{where} must be a single literal.")
    if isinstance(constant.value, str) and constant.end_lineno != constant.lineno:
        raise SchemaError(f"{where} must be a single literal on one line.")
    return -constant.value if negative else constant.value  # type: ignore[operator]


def _choices(node: ast.expr, lists: dict[str, ast.expr], where: str) -> list[Any]:
    """The values of a literal list, of a list of the same module, or of `list(D.keys())` of its dict."""
    match node:
        case ast.Name(id=name) if name in lists:
            return _choices(lists[name], {}, where)
        case ast.List(elts=items):
            return [_literal(item, where) for item in items]
        case ast.Call(
            func=ast.Name(id="list"),
            args=[ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="keys"))],
        ) if isinstance(lists.get(name), ast.Dict):
            keys = lists[name].keys  # type: ignore[attr-defined]
            return [_literal(key, where) for key in keys]
    raise SchemaError(f"{where}: choices must be a list, or list(D.keys()) of a dict, of the same module.")


def build(config_file: Path) -> dict[str, Any]:
    """The schema of the doors, one or both, that a cog.yaml names.

    Raises:
        SchemaError: a declaration that Cog would misread, or one `choices` name with two meanings.
    """
    config = yaml.safe_load(config_file.read_text())
    doors = {}
    for key in [key for key in _DOORS if key in config]:
        file, _, name = config[key].partition(":")
        doors[key] = read_door(config_file.parent / file, name)
    choices: dict[str, Any] = {}
    for door in doors.values():
        for name, values in door.choices.items():
            if choices.setdefault(name, values) != values:
                raise SchemaError(
                    f"{name} has other choices in predict than in train: Cog keeps one list for both."
                )
    schemas, paths = {}, {}
    for key, door in doors.items():
        inputs, output, job = _DOORS[key]
        schemas |= _schemas(door, inputs, output, job.capitalize())
        paths |= _paths(f"{job}s", job)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": schemas | _ERRORS},
    }


_DOORS = {
    "run": ("Input", "Output", "prediction"),
    "train": ("TrainingInput", "TrainingOutput", "training"),
}
"""Key of cog.yaml → names of the door's inputs and output, and of its jobs."""


def _schemas(door: Door, inputs: str, output: str, job: str) -> dict[str, Any]:
    shape: dict[str, Any] = {"title": inputs, "type": "object", "properties": door.properties}
    if door.required:
        shape["required"] = door.required
    text = {"type": "string"}
    ref = {"input": _ref(inputs), "output": _ref(output)}
    facts = {"id": text, "status": text, "error": text, "logs": text, "metrics": {"type": "object"}, **ref}
    request = {"id": text, "input": _ref(inputs)}
    return {
        inputs: shape,
        output: {**door.output, "title": output},
        **door.choices,
        f"{job}Request": {"title": f"{job}Request", "type": "object", "properties": request},
        f"{job}Response": {"title": f"{job}Response", "type": "object", "properties": facts},
    }


_ERRORS = {
    "ValidationError": {
        "title": "ValidationError",
        "type": "object",
        "required": ["loc", "msg", "type"],
        "properties": {
            "loc": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
            "msg": {"type": "string"},
            "type": {"type": "string"},
        },
    },
    "HTTPValidationError": {
        "title": "HTTPValidationError",
        "type": "object",
        "properties": {
            "detail": {"type": "array", "items": {"$ref": "#/components/schemas/ValidationError"}}
        },
    },
}


def _paths(jobs: str, job: str) -> dict[str, Any]:
    def answer(schema: dict[str, Any]) -> dict[str, Any]:
        wrong = {"description": "Validation Error", "content": _json(_ref("HTTPValidationError"))}
        return {"200": {"description": "Successful Response", "content": _json(schema)}, "422": wrong}

    title = job.capitalize()
    identity = {"name": f"{job}_id", "in": "path", "required": True, "schema": {"type": "string"}}
    body = {"content": _json(_ref(f"{title}Request"))}
    return {
        f"/{jobs}": {
            "post": {"summary": title, "requestBody": body, "responses": answer(_ref(f"{title}Response"))}
        },
        f"/{jobs}/{{{job}_id}}/cancel": {
            "post": {"summary": "Cancel", "parameters": [identity], "responses": answer({})}
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def main(argv: list[str] | None = None) -> int:
    """Write or check the schema; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when the file is stale")
    parser.add_argument("--config", type=Path, default=Path("cog.yaml"), help="which names the doors")
    parser.add_argument(
        "--folder", type=Path, help="where the server is started; default: where the config is"
    )
    args = parser.parse_args(argv)
    try:
        text = json.dumps(build(args.config), indent=1, ensure_ascii=False) + "\n"
    except SchemaError as error:
        print(error, file=sys.stderr)
        return 1
    target = (args.folder or args.config.parent) / TARGET
    if args.check and (not target.is_file() or target.read_text() != text):
        print(f"{TARGET} is stale: run `make schema` and commit it.", file=sys.stderr)
        return 1
    if not args.check:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
