"""Write `.cog/openapi_schema.json`, which Cog's server enforces, from the sources of the entry points.

`cog build` creates this file by static analysis; Cog's Python package cannot create it. This tool reads the same
declarations by the same rules. It raises an error with file and line for any declaration that the static analysis would
read differently than Python does.

    python -m tools.cog_schema                                            for a server that starts here
    python -m tools.cog_schema --config cog.preprocess.yaml --folder F    the preprocessor's, for one that starts in F

The file is made anew for each start of a server, and never kept in git: `cog build` overwrites it.

Knows syntax trees and the layout of Cog's schema; imports neither cog nor the entry points.
"""

import argparse
import ast
import json
import os
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
    """A declaration that Cog's static analysis would reject or misread."""


@dataclass
class EntryPoint:
    """The declarations of one entry point."""

    properties: dict[str, dict[str, Any]] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)


def read_entry_point(path: Path, name: str) -> EntryPoint:
    """Read the function `name`, or the `run` method of the class `name`, in `path`.

    Raises:
        SchemaError: a wrong declaration; the message names the file, the line and the parameter.
    """
    module = ast.parse(path.read_text(), str(path))
    constants = {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    function = next((node for node in module.body if getattr(node, "name", None) == name), None)
    if isinstance(function, ast.ClassDef):
        function = next((node for node in function.body if getattr(node, "name", None) == "run"), None)
    if not isinstance(function, ast.FunctionDef):
        raise SchemaError(f"{path} has no function {name}, and no class {name} with a method run.")
    arguments = [argument for argument in function.args.args if argument.arg != "self"]
    defaults = function.args.defaults
    if len(defaults) != len(arguments):
        raise SchemaError(f"{path}:{function.lineno}: every parameter of {name} needs an Input(...) default.")
    output = {"title": "Output", **_type(function.returns, path, "the return value")[0]}
    entry_point = EntryPoint(output=output)
    for order, (argument, default) in enumerate(zip(arguments, defaults, strict=True)):
        _read_input(entry_point, order, argument, default, path, constants)
    return entry_point


def _read_input(
    entry_point: EntryPoint,
    order: int,
    argument: ast.arg,
    default: ast.expr,
    path: Path,
    constants: dict[str, ast.expr],
) -> None:
    """Read one parameter, the `order`-th, into `entry_point`."""
    name, where = argument.arg, f"{path}:{argument.lineno}: {argument.arg}"
    if not (
        isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "Input"
    ):
        raise SchemaError(f"{where} needs an Input(...) default.")
    kind, optional = _type(argument.annotation, path, name)

    keywords = {keyword.arg: keyword.value for keyword in default.keywords}
    choices = _choices(keywords.pop("choices"), constants, where) if "choices" in keywords else None
    values = {key: _literal(value, f"{where}: {key}") for key, value in keywords.items() if key}
    if not isinstance(values.get("description"), str):
        raise SchemaError(f"{where} needs a description.")
    if "default" in values and values["default"] is None and not optional:
        raise SchemaError(f"{where} has the default None: annotate it Optional[...], or it becomes required.")

    # Cog's layout: a list of choices is a separate schema, and an input without a default is required.
    shape: dict[str, Any] = {"x-order": order, "description": values["description"]}
    if choices is None:
        shape |= {"title": _title(name), **kind}
    else:
        shape["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        entry_point.choices[name] = {
            "title": name,
            "description": "An enumeration.",
            "enum": choices,
            "type": kind["type"],
        }
    if optional:
        shape["nullable"] = True
    if "default" not in values:
        if not optional:
            entry_point.required.append(name)
    elif values["default"] is not None:
        shape["default"] = values["default"]
    shape |= {_LIMITS[key]: value for key, value in values.items() if key in _LIMITS}
    if values.get("deprecated"):
        shape["deprecated"] = True
    entry_point.properties[name] = shape


def _type(annotation: ast.expr | None, path: Path, name: str) -> tuple[dict[str, Any], bool]:
    """The JSON schema of an annotation, and whether it is Optional."""
    match annotation:
        case ast.Name(id=type_name) if type_name in _TYPES:
            return dict(_TYPES[type_name]), False
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _type(inner, path, name)[0], True
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return {"type": "array", "items": _type(inner, path, name)[0]}, False
    line = getattr(annotation, "lineno", 0)
    raise SchemaError(
        f"{path}:{line}: {name} needs a type: one of {', '.join(_TYPES)}, Optional[...] or list[...]."
    )


def _literal(node: ast.expr, where: str) -> Any:
    """The value of a single literal. Static analysis does not read concatenations, f-strings, names or arithmetic."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(constant, ast.Constant):
        raise SchemaError(f"{where} must be a single literal.")
    if isinstance(constant.value, str) and constant.end_lineno != constant.lineno:
        raise SchemaError(f"{where} must be a single literal on one line.")
    return -constant.value if negative else constant.value  # type: ignore[operator]


def _choices(node: ast.expr, constants: dict[str, ast.expr], where: str) -> list[Any]:
    """The values of a literal list, of a list in the same module, or of `list(D.keys())` for a dict in the same module."""
    match node:
        case ast.Name(id=name) if name in constants:
            return _choices(constants[name], {}, where)
        case ast.List(elts=items):
            return [_literal(item, where) for item in items]
        case ast.Call(
            func=ast.Name(id="list"),
            args=[ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="keys"))],
        ) if isinstance(constants.get(name), ast.Dict):
            keys = constants[name].keys  # type: ignore[attr-defined]
            return [_literal(key, where) for key in keys]
    raise SchemaError(f"{where}: choices must be a list, or list(D.keys()) of a dict, in the same module.")


def build(config_file: Path) -> dict[str, Any]:
    """The schema of the one or two entry points in a cog.yaml.

    Raises:
        SchemaError: a declaration that Cog would misread, or two inputs of one name with different choices.
    """
    config = yaml.safe_load(config_file.read_text())
    entry_points = {}
    for key in [key for key in _JOBS if key in config]:
        file, _, name = config[key].partition(":")
        entry_points[key] = read_entry_point(config_file.parent / file, name)

    # A schema of choices has the name of its input, and so both entry points share it.
    choices: dict[str, Any] = {}
    for entry_point in entry_points.values():
        for name, values in entry_point.choices.items():
            if choices.setdefault(name, values) != values:
                raise SchemaError(
                    f"{name} has other choices in predict than in train, but Cog keeps one list for both."
                )

    schemas, paths = {}, {}
    for key, entry_point in entry_points.items():
        inputs, output, job = _JOBS[key]
        schemas |= _schemas(entry_point, inputs, output, job.capitalize())
        paths |= _paths(f"{job}s", job)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": schemas | _ERRORS},
    }


_JOBS = {
    "run": ("Input", "Output", "prediction"),
    "train": ("TrainingInput", "TrainingOutput", "training"),
}
"""Key in cog.yaml → the schemas of the entry point's inputs and output, and the name of its job."""


def _schemas(entry_point: EntryPoint, inputs: str, output: str, job: str) -> dict[str, Any]:
    """The schemas of an entry point's inputs, output, choices, request and response."""
    shape: dict[str, Any] = {"title": inputs, "type": "object", "properties": entry_point.properties}
    if entry_point.required:
        shape["required"] = entry_point.required
    text = {"type": "string"}
    ref = {"input": _ref(inputs), "output": _ref(output)}
    request = {"id": text, "input": _ref(inputs)}
    response = {"id": text, "status": text, "error": text, "logs": text, "metrics": {"type": "object"}, **ref}
    return {
        inputs: shape,
        output: {**entry_point.output, "title": output},
        **entry_point.choices,
        f"{job}Request": {"title": f"{job}Request", "type": "object", "properties": request},
        f"{job}Response": {"title": f"{job}Response", "type": "object", "properties": response},
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
    """The HTTP paths that start and cancel a job."""

    def responses(schema: dict[str, Any]) -> dict[str, Any]:
        invalid = {"description": "Validation Error", "content": _json(_ref("HTTPValidationError"))}
        return {"200": {"description": "Successful Response", "content": _json(schema)}, "422": invalid}

    title = job.capitalize()
    identity = {"name": f"{job}_id", "in": "path", "required": True, "schema": {"type": "string"}}
    body = {"content": _json(_ref(f"{title}Request"))}
    return {
        f"/{jobs}": {
            "post": {"summary": title, "requestBody": body, "responses": responses(_ref(f"{title}Response"))}
        },
        f"/{jobs}/{{{job}_id}}/cancel": {
            "post": {"summary": "Cancel", "parameters": [identity], "responses": responses({})}
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def main(argv: list[str] | None = None) -> int:
    """Write the schema; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path("cog.yaml"), help="the file that names the entry points"
    )
    parser.add_argument(
        "--folder", type=Path, help="the folder that the server starts in; default: the config's folder"
    )
    args = parser.parse_args(argv)
    try:
        text = json.dumps(build(args.config), indent=1, ensure_ascii=False) + "\n"
    except SchemaError as error:
        print(error, file=sys.stderr)
        return 1
    target = (args.folder or args.config.parent) / TARGET
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another server may read it at this moment; one that reads half a schema checks nothing.
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
