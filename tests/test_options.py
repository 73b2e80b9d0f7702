"""Options: declared once as fields, given as flags, and spelled by messages as whoever reads them gave them."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import hlwq
from hlwq.calibration import Calibration
from hlwq.cli import app
from hlwq.cli.options import flags_of, one_of, parameter, spelled, with_flags
from hlwq.options import Option, option, options_of
from hlwq.recipes import PARTS, stage_options
from hlwq.request import Request, Selection

SOURCE = Path(hlwq.__file__).parent
SHELL_COMMANDS = (
    " --language-model-only",
    "mlx_lm.generate --model {path} --prompt Hello",
    "hlwq convert {path} {path}-dense --format dense",
    "`hlwq quantize … --dry-run`",
    " --repository ",
    " --overwrite",
    "--device",
    "--json",
)
"""What users are told to paste into a shell, or `compare` runs: these alone spell flags outside the command line."""
LABELS = (" --calibrate",)
"""The demonstration's names for recipes, in its table."""


@dataclass(frozen=True)
class Toy:
    """A field of each kind."""

    whole: int = option("An integer.")
    part: float = option("A number.", default=0.5)
    maybe: int | None = option("An integer or none.", default=None)
    several_words: bool = option("A switch.", default=False)
    on: bool = option("On unless it is turned off.", default=True)
    even: bool | None = option("A pair.", default=None, flag="--even/--odd")
    method: Literal["fast", "exact"] | None = option("A choice.", default=None, flag="--how")
    names: tuple[str, ...] = option("Names.", default=(), flag="--name")
    numbers: tuple[int, ...] = option("Numbers.", default=())
    either: str | Path = option("A string, or what only Python has.", default="x")
    hidden: int = 3


TOY_FLAGS = {**flags_of(Toy), "basis": parameter("basis", one_of(["plain", "turned"]), Option("A made choice."))}


def toy_app() -> typer.Typer:
    toy = typer.Typer()

    @toy.command()
    @with_flags(TOY_FLAGS)
    def command(place: str, *, loud: bool = False, **options: Any) -> None:
        print(json.dumps([place, loud, options]))

    return toy


def run(*arguments: str) -> Any:
    ended = CliRunner().invoke(toy_app(), ["here", *arguments])
    assert ended.exit_code == 0, ended.output
    place, loud, options = json.loads(ended.stdout)
    assert (place, loud) == ("here", "--loud" in arguments)
    return options


def test_what_is_not_given_is_not_passed() -> None:
    assert run("--whole", "1") == {"whole": 1}
    assert run("--whole", "1", "--loud") == {"whole": 1}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--part", "0.25"], {"part": 0.25}),
        (["--part", "0"], {"part": 0.0}),
        (["--maybe", "0"], {"maybe": 0}),
        (["--several-words"], {"several_words": True}),
        (["--no-on"], {"on": False}),
        (["--on"], {"on": True}),
        (["--even"], {"even": True}),
        (["--odd"], {"even": False}),
        (["--how", "exact"], {"method": "exact"}),
        (["--name", "a", "--name", "b"], {"names": ["a", "b"]}),
        (["--numbers", "1", "--numbers", "2"], {"numbers": [1, 2]}),
        (["--either", ""], {"either": ""}),
        (["--basis", "turned"], {"basis": "turned"}),
    ],
)
def test_each_type_and_each_form_of_a_flag(arguments: list[str], given: dict[str, Any]) -> None:
    assert run("--whole", "1", *arguments) == {"whole": 1, **given}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--whole", "1.5"],
        ["--whole", "1", "--how", "slowly"],
        ["--whole", "1", "--basis", "other"],
        ["--whole", "1", "--method", "fast"],  # its flag has another name
        ["--whole", "1", "--no-several-words"],
        ["--whole", "1", "--hidden", "1"],  # a field, but no option
    ],
)
def test_what_is_no_flag_or_no_value_is_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(toy_app(), ["here", *arguments]).exit_code == 2


def test_help_comes_from_the_field() -> None:
    text = CliRunner().invoke(toy_app(), ["--help"], env={"COLUMNS": "160"}).stdout
    for name, field in options_of(Toy).items():
        assert field.metadata["option"].help in text, name


def test_a_type_that_no_flag_can_give_is_an_error() -> None:
    for annotation in (dict[str, int], int | float, Path):
        with pytest.raises(TypeError, match="no single form"):
            parameter("name", annotation, Option("Help."))


def command_of(*names: str) -> Any:
    command: Any = get_command(app)
    for name in names:
        command = command.commands[name]
    return command


@pytest.mark.parametrize(
    ("message", "command", "expected"),
    [
        ("`group_size` is 0", "quantize", "--group-size is 0"),
        ("`scale_method` is x", "quantize", "--scale is x"),
        ("name better data with `calibration`.", "quantize", "name better data with --calibration."),
        ("add `symmetric=True` or `symmetric=False`", "quantize", "add --symmetric or --asymmetric"),
        ("add `calibrate=True`.", "quantize", "add --calibrate."),
        ("use `recipe='hlwq-int4'`", "quantize", "use --recipe hlwq-int4"),
        ("`exclude='down_proj$'` and `include=\"a b\"`", "quantize", "--exclude 'down_proj$' and --include 'a b'"),
        ("`samples=8`, `damping=0.5`", "quantize", "--samples 8, --damping 0.5"),
        ("embedding (`include_embeddings` quantizes it)", "quantize", "embedding (--include-embeddings quantizes it)"),
        ("`max_shard_size` is 0", "quantize", "--max-shard-size is 0"),
        ("`source` is `out`", "quantize", "SOURCE is OUT"),
        ("`source='x'`", "quantize", "`source='x'`"),
        ("`desc_act=False`", "quantize", "`desc_act=False`"),
        ("`bits=wide`", "quantize", "`bits=wide`"),
        ("`group_size`, but `desc_act`", "convert", "--group-size, but `desc_act`"),
        ("use `hlwq quantize`, see `config.json` and `nothing`", "quantize", None),
        ("pass@5 (`ks`) needs `samples=5`", "eval humaneval", "pass@5 (--k) needs --samples 5"),
        ("or without isolation: `run=run_unsafely`", "eval humaneval", "or without isolation: --unsafe"),
        ("`run=run_unsafely`", "eval speed", "`run=run_unsafely`"),
        ("name `model`, or a server", "eval speed", "name MODEL, or a server"),
        ("`overwrite=True` replaces it", "card", "--overwrite replaces it"),
    ],
)
def test_messages_are_spelled_in_the_flags_of_the_command(message: str, command: str, expected: str | None) -> None:
    assert spelled(message, command_of(*command.split())) == (expected or message)


PART_KINDS = [kind for table in PARTS.values() for kind in table.values()]


@pytest.mark.parametrize("kind", [*PART_KINDS, Calibration, Selection, Request], ids=lambda kind: kind.__name__)
def test_every_option_is_a_flag_of_quantize(kind: type[Any]) -> None:
    help_text = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "200"}).stdout
    parameters = {each.name: each for each in command_of("quantize").params}
    for name, field in options_of(kind).items():
        declared = field.metadata["option"]
        flags = (declared.flag or f"--{name.replace('_', '-')}").split("/")
        assert [*parameters[name].opts, *parameters[name].secondary_opts] == flags
        assert all(f" {each} " in help_text for each in flags)
        assert parameters[name].default is None
        assert declared.help in help_text


def test_options_of_one_name_are_one_option() -> None:
    """A flag stands for every option of its name, so those must not differ, nor belong to two steps of the work."""
    for name in stage_options():
        declared = {options_of(kind)[name].metadata["option"] for kind in PART_KINDS if name in options_of(kind)}
        assert len(declared) == 1, name
    names = [*stage_options(), *(name for kind in (Calibration, Selection, Request) for name in options_of(kind))]
    assert len(set(names)) == len(names)


def test_commands_reach_the_library_as_they_were_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Request] = []

    def remember(request: Request, *_: object) -> None:
        seen.append(request)
        raise hlwq.RequestError("enough")

    monkeypatch.setattr(sys.modules["hlwq.quantize"], "run_request", remember)  # hlwq.quantize is the function
    arguments = ["--recipe", "rtn", "--asymmetric", "--exclude", "a", "--exclude", "b", "--max-shard-size", "500MB"]
    arguments += ["--calibrate", "--samples", "8", "--basis", "hadamard", "--block-size", "32"]
    CliRunner().invoke(app, ["quantize", "m", str(tmp_path), *arguments])
    changes = {"symmetric": False, "basis": "hadamard", "block_size": 32, "calibrate": True}
    assert seen == [
        Request(
            "m",
            "rtn",
            selection=Selection(exclude=("a", "b")),
            changes=changes,
            calibration=Calibration(samples=8),
            max_shard_size="500MB",
        )
    ]


def spells_flags(module: Path) -> list[str]:
    """The string literals of a module in which an option is spelled `--so`, docstrings and `option(flag=…)` apart."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    exempt = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    exempt |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "flag"}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt
    ]
    for allowed in (*SHELL_COMMANDS, *LABELS):
        texts = [text.replace(allowed, "") for text in texts]
    return [text for text in texts if "--" in text and text.split("--", 1)[1][:1].isalpha()]


MODULES = [
    name
    for name in sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
    if not name.startswith("cli/")
]


def test_only_the_command_line_spells_flags() -> None:
    offending = {name: texts for name in MODULES if (texts := spells_flags(SOURCE / name))}
    assert not offending


def test_the_search_for_flags_sees_them(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Has --doc."""\nx = f"Lower --samples of {1}"\ny = option("Help", flag="--y")\nz = "a -- b"\n')
    assert spells_flags(module) == ["Lower --samples of "]
