"""The examples run, and what they claim holds; the README's lines run too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import language_model
import torch

ROOT = Path(__file__).parents[1]


def test_language_model_quick():
    """Both models, both kinds of layers, one curve: without a terminal, in plain lines."""
    picture = ROOT / "examples" / "output" / "language_model.png"
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "language_model.py", "--quick"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RNN: step 20/20, loss stock" in done.stdout
    assert "self-attention: step 20/20, loss stock" in done.stdout
    apart = re.findall(r"Largest difference of the two curves: (\S+),", done.stdout)
    assert len(apart) == 2
    assert all(float(difference) < 1e-4 for difference in apart)
    written = re.findall(r"^(?:stock|ours) writes: The ", done.stdout, re.MULTILINE)
    assert len(written) == 4
    assert "torch / ours" in done.stdout, "the benchmark's table"
    assert "\x1b" not in done.stdout
    assert picture.stat().st_size > 10_000


def test_language_model_ends_on_interrupt(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "train", interrupted)
    assert language_model.main(["--quick"]) == 130
    assert capsys.readouterr().out.endswith("Interrupted.\n")


def test_models_see_no_future():
    """The score of a next character does not change with the characters after it."""
    torch.manual_seed(0)
    tokens = torch.randint(9, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 9
    for task in language_model.tasks(quick=True):
        for layers in language_model.LAYERS.values():
            model = task.model(layers, 9, task.width, task.length)
            with torch.no_grad():
                torch.testing.assert_close(model(tokens)[:, :7], model(other)[:, :7])


def test_readme_lines_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
